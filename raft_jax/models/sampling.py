"""Sampling in one compiled program: prefill, then decode until every row has ended.

Rows are right-padded prompts of any length. Token n of every row is written at the same
cache column; masks and positions account for the different lengths. The tokens of a row
depend only on (seed, step, row id) and the row's prompt: not on the other rows, on
padding, or on how the batch is sharded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax import vocab_head
from raft_jax.models import kv_cache, param_sharding, sharding, transformer

Forward = Callable[..., tuple[Array, kv_cache.Cache | None]]
"""`transformer.forward` with the parameters and settings of a rollout."""
Head = Callable[[Array], Array]
"""Hidden states [B, D] to logits [B, V]."""

NOT_FINITE = (
  "the model's logits are not finite while it writes: its weights are damaged, its "
  "training diverged, or they are too large for bfloat16; use other weights or float32"
)
"""What to tell the user of rows that are not `Rollout.finite_B`."""


class SamplerStats(NamedTuple):
  """The sampler's distribution at each token, before top-p and temperature.

  Attributes:
    ids_BRK: int32, the most probable tokens, in descending order.
    log_prob_BR: float32, log-probability of the sampled token among all tokens.
  """

  ids_BRK: Array
  log_prob_BR: Array


class Rollout(NamedTuple):
  """The sampled answers to a batch of prompts.

  Attributes:
    tokens_BR: int32; the pad id after a row's end.
    length_B: int32, number of tokens of each row, with the EOS that ends it.
    ended_B: whether the row sampled an EOS within the limit.
    finite_B: whether the row's tokens were drawn from finite logits only. Tokens that
      were drawn from others mean nothing.
    stats: statistics of every token, if `generate` was given `top_tokens`; zeros after
      the last token that was sampled.
  """

  tokens_BR: Array
  length_B: Array
  ended_B: Array
  finite_B: Array
  stats: SamplerStats | None = None


class TokenRule(NamedTuple):
  """How tokens are chosen, which of them end a row, and what fills a row then."""

  temperature: float
  top_p: float
  eos_ids: Sequence[int]
  pad_id: int


class DecodeState(NamedTuple):
  """Carry of the decode loop.

  Attributes:
    decided: int32 scalar, number of tokens sampled in each row.
    logits_BV: float32, for the next token.
    tokens_BR: int32, the tokens sampled so far.
    done_B: whether the row has sampled an EOS.
    finite_B: whether all logits were finite that the row's tokens were drawn from.
    cache: keys and values; never None here, but `forward` also runs without a cache.
    stats: statistics so far, as in `Rollout`.
  """

  decided: Array
  logits_BV: Array
  tokens_BR: Array
  done_B: Array
  finite_B: Array
  cache: kv_cache.Cache | None
  stats: SamplerStats | None


def row_keys(seed: Array | int, step: Array | int, row_id_B: Array) -> Array:
  """One key per row: the seed folded with the step and the row's id."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_id_B)


def keep_top_p(logits_BV: Array, top_p: float) -> Array:
  """Masks all but the smallest set of tokens whose probability reaches `top_p`.

  Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
  Always keeps the most probable token, and every token that is as probable as the least
  probable one of the set.

  Raises:
    ValueError: If `top_p` <= 0.
  """
  if top_p <= 0:
    raise ValueError(
      f"top_p={top_p} must be > 0; to take the most probable token set temperature=0"
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


def are_finite(logits_BV: Array) -> Array:
  """Whether a token can be drawn from each row: bool [B].

  The largest logit says it: it is NaN if any is. A row of -inf alone gives token 0.
  """
  return jnp.isfinite(jnp.max(logits_BV, axis=-1))


def record_stats(
  stats: SamplerStats | None, logits_BV: Array, token_B: Array, column: Array
) -> SamplerStats | None:
  """The statistics with those of one more token, written at `column`."""
  if stats is None:
    return None
  partition = sharding.spec(("batch", "vocab"))
  _, ids_BK = vocab_head.sharded_top_k(logits_BV, stats.ids_BRK.shape[2], partition)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  log_prob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=1)
  write = jax.lax.dynamic_update_index_in_dim
  return SamplerStats(
    write(stats.ids_BRK, ids_BK, column, axis=1),
    write(stats.log_prob_BR, log_prob_B, column, axis=1),
  )


def decide(
  state: DecodeState, keys_B: Array, rule: TokenRule
) -> tuple[Array, DecodeState]:
  """Samples a token in every row (the pad id in rows that are done) and records it.

  Returns:
    The tokens, int32 [B], and the state with them; `decided` and the logits are left.
  """
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.decided)
  token_B = choose(state.logits_BV, keys, rule.temperature, rule.top_p)
  token_B = jnp.where(state.done_B, rule.pad_id, token_B)
  ended_B = jnp.isin(token_B, jnp.array(rule.eos_ids)) & ~state.done_B
  return token_B, state._replace(
    tokens_BR=jax.lax.dynamic_update_index_in_dim(
      state.tokens_BR, token_B, state.decided, axis=1
    ),
    done_B=state.done_B | ended_B,
    finite_B=state.finite_B & (are_finite(state.logits_BV) | state.done_B),
    stats=record_stats(state.stats, state.logits_BV, token_B, state.decided),
  )


def finish(state: DecodeState, rule: TokenRule) -> Rollout:
  """The lengths, and the pad id where the loop ended before it wrote a token."""
  limit = state.tokens_BR.shape[1]
  written_BR = jnp.arange(limit) <= state.decided
  tokens_BR = jnp.where(written_BR, state.tokens_BR, rule.pad_id)
  is_eos_BR = jnp.isin(tokens_BR, jnp.array(rule.eos_ids)) & written_BR
  length_B = jnp.where(state.done_B, jnp.argmax(is_eos_BR, axis=1) + 1, limit)
  return Rollout(
    tokens_BR, length_B.astype(jnp.int32), state.done_B, state.finite_B, state.stats
  )


def unrolled(unroll: int | None, default: int, platform: str) -> int:
  """The value for `generate`'s `unroll`: None becomes 0 on GPUs, `default` elsewhere.

  XLA:GPU (jax 0.10.2) copies each layer's slice of the stacked weights before it
  multiplies with it: for SmolLM3-3B on 8 A100, `plan` counts 2.8 times the memory
  traffic per token. On TPUs XLA reads the slices in place. On a CPU, sampling with the
  scan took 1.1 times as long (SmolLM2-135M) and compiled in a quarter of the time.
  """
  if unroll is not None:
    return unroll
  return 0 if platform == "gpu" else default


def prefill(
  run: Forward,
  head: Head,
  prompt_BP: Array,
  prompt_length_B: Array,
  *,
  empty_cache: kv_cache.Cache,
  pad_id: int,
  top_tokens: int,
) -> DecodeState:
  """Fills the cache with the prompts and computes the logits of the first token.

  Args:
    empty_cache: result of `kv_cache.init`, as long as prompts and answers together.
  """
  batch, width = prompt_BP.shape
  column_S = jnp.arange(empty_cache["k"].shape[2])
  prompt_key_BS = column_S < prompt_length_B[:, None]
  new_tokens = column_S.size - width
  causal_TS = column_S[None, :] <= jnp.arange(width)[:, None]
  hidden_BTD, cache = run(
    prompt_BP,
    jnp.broadcast_to(jnp.arange(width), (batch, width)),
    causal_TS & prompt_key_BS[:, None, :],
    cache=empty_cache,
  )
  last_BD = jnp.take_along_axis(
    hidden_BTD, (prompt_length_B - 1)[:, None, None], axis=1
  )[:, 0]
  stats = SamplerStats(
    ids_BRK=jnp.zeros((batch, new_tokens, top_tokens), jnp.int32),
    log_prob_BR=jnp.zeros((batch, new_tokens), jnp.float32),
  )
  return DecodeState(
    decided=jnp.int32(0),
    logits_BV=head(last_BD),
    tokens_BR=jnp.full((batch, new_tokens), pad_id, jnp.int32),
    done_B=jnp.zeros(batch, bool),
    finite_B=jnp.ones(batch, bool),
    cache=cache,
    stats=stats if top_tokens else None,
  )


def decode_rows(
  first: DecodeState,
  run: Forward,
  head: Head,
  prompt_length_B: Array,
  keys_B: Array,
  rule: TokenRule,
) -> Rollout:
  """Samples tokens, one in every row at a time, until all rows have ended.

  Token n of every row is written at the n-th cache column behind the widest prompt.
  """
  assert first.cache is not None
  max_new_tokens = first.tokens_BR.shape[1]
  column_S = jnp.arange(first.cache["k"].shape[2])
  width = column_S.size - max_new_tokens
  prompt_key_BS = column_S < prompt_length_B[:, None]

  def decode(state: DecodeState) -> DecodeState:
    token_B, state = decide(state, keys_B, rule)
    decoded_S = (column_S >= width) & (column_S <= width + state.decided)
    hidden_BTD, cache = run(
      token_B[:, None],
      (prompt_length_B + state.decided)[:, None],
      (prompt_key_BS | decoded_S)[:, None, :],
      cache=state.cache,
      column=width + state.decided,
    )
    logits_BV = head(hidden_BTD[:, 0])
    return state._replace(decided=state.decided + 1, logits_BV=logits_BV, cache=cache)

  def unfinished(state: DecodeState) -> Array:
    # The last token needs no forward pass, because nothing is predicted from it.
    return (state.decided < max_new_tokens - 1) & ~jnp.all(state.done_B)

  _, last = decide(jax.lax.while_loop(unfinished, decode, first), keys_B, rule)
  return finish(last, rule)


@functools.partial(
  jax.jit,
  static_argnames=(
    "config",
    "max_new_tokens",
    "temperature",
    "top_p",
    "eos_ids",
    "pad_id",
    "dtype",
    "unroll",
    "top_tokens",
  ),
)
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
  top_tokens: int = 0,
) -> Rollout:
  """Samples up to `max_new_tokens` tokens in each row, until the row's first EOS.

  On a `sharding.decode_mesh` it reads parameters and prompts from the mesh that it was
  made of, and its result lies there, too.

  Args:
    prompt_BP: int32, right-padded; every row has at least one token.
    prompt_length_B: int32, number of tokens of each prompt.
    row_id_B: int32 ids; they give each row its own randomness.
    seed: seed of the run, in 0..2³¹ - 1.
    step: step of the optimizer.
    temperature: sampling temperature; 0 is greedy.
    top_p: nucleus; 1 keeps every token.
    eos_ids: any of them ends a row (a hashable tuple).
    unroll: layers per iteration of the scan over layers; 0: no scan, see `unrolled`.
    top_tokens: number of most probable ids to return for each token; 0: no statistics.

  Returns:
    A `Rollout`; no gradient flows through it.
  """
  (batch, width), mesh = prompt_BP.shape, sharding.mesh_of(prompt_BP)
  # Cast and gathered once: inside the loop this would be repeated for every token.
  params = param_sharding.gathered(params, config, dtype, apart=unroll == 0)
  prompt_BP, prompt_length_B, row_id_B = sharding.constrain_rows(
    (prompt_BP, prompt_length_B, row_id_B)
  )
  embedding_VD = transformer.output_embedding(params)
  head = functools.partial(
    vocab_head.head_logits, embedding_VD=embedding_VD, softcap=config.logit_softcap
  )
  reach_B = prompt_length_B + max_new_tokens
  compute = transformer.Compute(dtype=dtype, unroll=unroll)
  run = functools.partial(
    transformer.forward, params, config, reach_B=reach_B, compute=compute
  )
  cache = kv_cache.init(config, batch, width + max_new_tokens, dtype)
  first = prefill(
    run,
    head,
    prompt_BP,
    prompt_length_B,
    empty_cache=cache,
    pad_id=pad_id,
    top_tokens=top_tokens,
  )
  keys_B = row_keys(seed, step, row_id_B)
  rule = TokenRule(temperature, top_p, eos_ids, pad_id)
  rollout = decode_rows(first, run, head, prompt_length_B, keys_B, rule)
  with jax.sharding.use_abstract_mesh(mesh):
    return sharding.constrain_rows(rollout)
