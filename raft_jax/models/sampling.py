"""Sampling in one compiled program: prefill, then decode until every row has ended.

Rows are right-padded prompts of any length; token n of every row is written at the same
cache column, and masks and positions carry the raggedness. The tokens of a row depend
on (seed, step, row id) and the row's own prompt only: not on the batch around it, on
padding, or on how the batch is spread over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax import vocab_head
from raft_jax.models import sharding, transformer


class Seen(NamedTuple):
  """What the sampler saw before it chose each token.

  Attributes:
    ids_BRK: int32, the most probable tokens, in descending order.
    log_prob_BR: float32, of the chosen token at temperature 1 among all tokens.
  """

  ids_BRK: Array
  log_prob_BR: Array


class Rollout(NamedTuple):
  """What a batch of prompts was answered with.

  Attributes:
    tokens_BR: int32; the pad id after a row's end.
    length_B: int32, tokens of each row, the ending EOS included.
    ended_B: whether the row sampled an EOS within the limit.
    seen: of every token, if asked for; zeros after the last one decided.
  """

  tokens_BR: Array
  length_B: Array
  ended_B: Array
  seen: Seen | None = None


class DecodeState(NamedTuple):
  """Carry of the decode loop."""

  decided: Array  # [] int32, tokens decided so far
  logits_BV: Array  # float32, for the token to decide next
  tokens_BR: Array
  done_B: Array
  cache: dict[str, Array] | None  # never None here; `forward` also works without
  seen: Seen | None


def row_keys(seed: Array | int, step: Array | int, row_id_B: Array) -> Array:
  """One key per row: the seed folded with the step and the row's id."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_id_B)


def keep_top_p(logits_BV: Array, top_p: float) -> Array:
  """Masks all but the smallest set of tokens whose probability reaches `top_p`.

  Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
  The most probable token always stays, and so do all that are as probable as the last
  one of the set.

  Raises:
    ValueError: If `top_p` <= 0.
  """
  if top_p <= 0:
    raise ValueError(
      f"top_p={top_p} must be > 0; for the most probable token alone set temperature=0"
    )
  descending = -jnp.sort(-logits_BV, axis=-1)
  before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
  before = before - jax.nn.softmax(descending, axis=-1)
  lowest_kept = jnp.min(
    jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True
  )
  return jnp.where(logits_BV < lowest_kept, -jnp.inf, logits_BV)


def choose(logits_BV: Array, keys_B: Array, temperature: float, top_p: float) -> Array:
  """Draws one token a row; temperature 0 takes the most probable. Returns int32 [B].

  Raises:
    ValueError: If `temperature` < 0 or `top_p` <= 0.
  """
  if temperature < 0:
    raise ValueError(f"temperature={temperature} must be >= 0")
  if temperature == 0.0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / temperature
  if top_p < 1.0:
    logits_BV = keep_top_p(logits_BV, top_p)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def observe(
  seen: Seen | None, logits_BV: Array, token_B: Array, column: Array
) -> Seen | None:
  """`seen` with what stands in the logits of one more token."""
  if seen is None:
    return None
  partition = sharding.spec(("batch", "vocab"))
  _, ids_BK = vocab_head.sharded_top_k(logits_BV, seen.ids_BRK.shape[2], partition)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  log_prob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=1)
  write = jax.lax.dynamic_update_index_in_dim
  return Seen(
    write(seen.ids_BRK, ids_BK, column, axis=1),
    write(seen.log_prob_BR, log_prob_B, column, axis=1),
  )


def finish(
  state: DecodeState,
  tokens_BR: Array,
  ended_B: Array,
  eos_ids: Sequence[int],
  pad_id: int,
  seen: Seen | None = None,
) -> Rollout:
  """Lengths, and the pad id wherever the loop ended before it wrote."""
  limit = tokens_BR.shape[1]
  written_BR = jnp.arange(limit) <= state.decided
  tokens_BR = jnp.where(written_BR, tokens_BR, pad_id)
  is_eos_BR = jnp.isin(tokens_BR, jnp.array(eos_ids)) & written_BR
  length_B = jnp.where(ended_B, jnp.argmax(is_eos_BR, axis=1) + 1, limit)
  return Rollout(tokens_BR, length_B.astype(jnp.int32), ended_B, seen)


def unrolled(asked: int | None, otherwise: int, platform: str) -> int:
  """`generate`'s `unroll`: as asked; None means what suits the platform.

  XLA:GPU (jax 0.10.2) copies each layer's slice of the stacked weights before it
  multiplies with it: of SmolLM3-3B on 8 A100 2.8 times the traffic of a token, as
  `plan` counts it. For TPUs it reads slices where they are. On a CPU the scan took 1.1
  times as long (SmolLM2-135M), and compiles in a quarter of the time.
  """
  if asked is not None:
    return asked
  return 0 if platform == "gpu" else otherwise


STATIC = (
  "config",
  "max_new_tokens",
  "temperature",
  "top_p",
  "eos_ids",
  "pad_id",
  "dtype",
  "unroll",
  "watch",
)


@functools.partial(jax.jit, static_argnames=STATIC)
def generate(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  prompt_BP: Array,
  prompt_length_B: Array,
  row_id_B: Array,
  *,
  seed: Array | int,
  step: Array | int,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  eos_ids: Sequence[int],
  pad_id: int,
  dtype: str = "float32",
  unroll: int = 1,
  watch: int = 0,
) -> Rollout:
  """Samples up to `max_new_tokens` tokens a row, until each row's first EOS.

  Args:
    prompt_BP: int32, right-padded; every row has at least one token.
    prompt_length_B: int32 tokens of each prompt.
    row_id_B: int32 ids that make a row's randomness its own.
    seed: of the run, in 0..2³¹ - 1; `step`: of the optimizer.
    temperature: of sampling; 0 is greedy.
    top_p: nucleus; 1 keeps every token.
    eos_ids: any of them ends a row (a hashable tuple).
    unroll: layers per iteration of the scan over layers; 0 for no scan: see `unrolled`.
    watch: how many of each token's most probable ids to return; 0: nothing is `seen`.

  Returns:
    A `Rollout`; no gradient flows through it.
  """
  batch, width = prompt_BP.shape
  # Cast and gathered once: inside the loop it would be every token's work.
  params = transformer.gathered(params, config, dtype, apart=unroll == 0)
  embedding_VD = transformer.output_embedding(params)
  head = functools.partial(
    vocab_head.head_logits, embedding_VD=embedding_VD, softcap=config.logit_softcap
  )
  keys_B = row_keys(seed, step, row_id_B)
  run = functools.partial(
    transformer.forward,
    params,
    config,
    reach_B=prompt_length_B + max_new_tokens,
    dtype=dtype,
    unroll=unroll,
  )
  column = jnp.arange(width + max_new_tokens)
  prompt_key_BS = column < prompt_length_B[:, None]

  def prefill() -> DecodeState:
    causal_TS = column[None, :] <= jnp.arange(width)[:, None]
    positions_BT = jnp.broadcast_to(jnp.arange(width), (batch, width))
    hidden_BTD, cache = run(
      prompt_BP,
      positions_BT,
      causal_TS & prompt_key_BS[:, None, :],
      cache=transformer.init_cache(config, batch, width + max_new_tokens, dtype),
    )
    last_BD = jnp.take_along_axis(
      hidden_BTD, (prompt_length_B - 1)[:, None, None], axis=1
    )[:, 0]
    tokens_BR = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    seen = Seen(
      jnp.zeros((batch, max_new_tokens, watch), jnp.int32),
      jnp.zeros((batch, max_new_tokens), jnp.float32),
    )
    return DecodeState(
      jnp.int32(0),
      head(last_BD),
      tokens_BR,
      jnp.zeros(batch, bool),
      cache,
      seen if watch else None,
    )

  def decide(state: DecodeState) -> tuple[Array, Array, Array, Seen | None]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.decided)
    token_B = choose(state.logits_BV, keys, temperature, top_p)
    token_B = jnp.where(state.done_B, pad_id, token_B)
    ended_B = jnp.isin(token_B, jnp.array(eos_ids)) & ~state.done_B
    tokens_BR = jax.lax.dynamic_update_index_in_dim(
      state.tokens_BR, token_B, state.decided, axis=1
    )
    seen = observe(state.seen, state.logits_BV, token_B, state.decided)
    return token_B, tokens_BR, state.done_B | ended_B, seen

  def decode(state: DecodeState) -> DecodeState:
    token_B, tokens_BR, done_B, seen = decide(state)
    decoded_S = (column >= width) & (column <= width + state.decided)
    hidden_BTD, cache = run(
      token_B[:, None],
      (prompt_length_B + state.decided)[:, None],
      (prompt_key_BS | decoded_S)[:, None, :],
      cache=state.cache,
      cache_index=width + state.decided,
    )
    logits_BV = head(hidden_BTD[:, 0])
    return DecodeState(state.decided + 1, logits_BV, tokens_BR, done_B, cache, seen)

  def unfinished(state: DecodeState) -> Any:
    # The last token needs no forward pass: nothing is predicted from it.
    return (state.decided < max_new_tokens - 1) & ~jnp.all(state.done_B)

  state = jax.lax.while_loop(unfinished, decode, prefill())
  _, tokens_BR, ended_B, seen = decide(state)
  return finish(state, tokens_BR, ended_B, eos_ids, pad_id, seen)
