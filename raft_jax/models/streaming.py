"""Sampling one token at a time, with a cache that stays between the turns of a chat.

One compiled function reads tokens and draws the next one. It is compiled for pieces of
a prompt and for single tokens, once for each length of the cache, which doubles.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax import errors, vocab_head
from raft_jax.models import kv_cache, param_sharding, sampling, transformer

PIECE = 64
"""Tokens of a prompt that are read at a time."""
SHORTEST = 512
"""Tokens of the shortest cache."""


class Network(NamedTuple):
  """A model that is ready to be read token by token; see `network`."""

  weights: transformer.Params
  config: transformer.DecoderConfig
  compute: transformer.Compute


class Drawing(NamedTuple):
  """How tokens are drawn: the settings of `sampling.generate`.

  Attributes:
    step: number of the answer, so that a repeated question is answered anew.
  """

  max_new_tokens: int
  temperature: float
  top_p: float
  eos_ids: Sequence[int]
  seed: int
  step: int


@dataclasses.dataclass
class Memory:
  """What a network has read of one conversation; changes with every token.

  Attributes:
    ids: tokens whose keys and values are in the cache, in its first columns.
    cache: None before the first token.
    long: of each rotary embedding, whether it has the frequencies of long rows.
  """

  ids: list[int] = dataclasses.field(default_factory=list)
  cache: kv_cache.Cache | None = None
  long: tuple[bool, ...] = ()


def network(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  compute: transformer.Compute,
) -> Network:
  """Casts the weights once, since they are read for every token.

  They are bound to the default device: arrays that are not bound would need programs of
  their own.

  Args:
    compute: its `unroll` may be 0, as for `sampling.generate`.
  """
  prepare = jax.jit(
    functools.partial(
      param_sharding.gathered,
      config=config,
      dtype=compute.dtype,
      apart=compute.unroll == 0,
    )
  )
  return Network(_bound(prepare(params)), config, compute)


def _bound(tree: Any) -> Any:
  return jax.device_put(tree, jax.local_devices()[0])


def stream(
  network: Network, memory: Memory, prompt: Sequence[int], drawing: Drawing
) -> Iterator[int | None]:
  """Yields None after each piece of the prompt but the last, then each drawn token.

  The tokens are those of `sampling.generate` for one row with id 0. The last one is an
  end token, unless the limit came first. The caller may stop after any of them: memory
  then holds what was read.

  Raises:
    errors.UserError: the logits are not finite, so that no token can be drawn.

  Args:
    memory: of the conversation so far; what the prompt shares with it is not read.
  """
  key_1 = sampling.row_keys(drawing.seed, drawing.step, jnp.zeros(1, jnp.int32))
  reach = len(prompt) + drawing.max_new_tokens
  _prepare(network, memory, prompt, reach)
  unread = list(prompt[len(memory.ids) :])
  for decided in range(drawing.max_new_tokens):
    while len(unread) > PIECE:
      _read(network, memory, unread[:PIECE], reach, key_1, decided, drawing)
      unread = unread[PIECE:]
      yield None
    token = _read(network, memory, unread, reach, key_1, decided, drawing)
    yield token
    if token in drawing.eos_ids:
      return
    unread = [token]


def _prepare(
  network: Network, memory: Memory, prompt: Sequence[int], reach: int
) -> None:
  """Forgets what the prompt does not begin with, and makes room for `reach` tokens."""
  config = network.config
  long = tuple(
    bool(rope.long_divisors) and reach > rope.long_after for rope in config.ropes
  )
  read = len(memory.ids)
  if memory.long != long:
    memory.ids, memory.long = [], long
  # The last token is always read, because the answer begins with its logits.
  same = itertools.takewhile(
    lambda pair: pair[0] == pair[1], zip(memory.ids, prompt[:-1])
  )
  shared = [token for token, _ in same]
  if config.delta is not None and len(shared) < read:
    # Keys and values are forgotten by columns, but a state only as a whole.
    shared = []
    if memory.cache is not None:
      memory.cache = kv_cache.without_states(memory.cache)
  memory.ids = shared
  length = SHORTEST
  while length < reach + PIECE:  # a piece is written whole, with its padding
    length *= 2
  if memory.cache is None:
    memory.cache = _bound(kv_cache.init(config, 1, length, network.compute.dtype))
  elif (more := length - memory.cache["k"].shape[2]) > 0:
    memory.cache = kv_cache.lengthened(memory.cache, more)


def _read(
  network: Network,
  memory: Memory,
  tokens: Sequence[int],
  reach: int,
  key_1: Array,
  decided: int,
  drawing: Drawing,
) -> int:
  """Reads tokens into memory; the token drawn after the last of them."""
  tokens_1T = np.zeros((1, 1 if len(tokens) == 1 else PIECE), np.int32)
  tokens_1T[0, : len(tokens)] = tokens
  token_1, finite_1, cache = read_and_draw(
    network.weights,
    network.config,
    memory.cache,
    tokens_1T,
    np.int32(len(tokens)),
    np.int32(len(memory.ids)),
    np.full(1, reach, np.int32),
    key_1,
    np.int32(decided),
    temperature=drawing.temperature,
    top_p=drawing.top_p,
    compute=network.compute,
  )
  memory.cache = cache
  memory.ids.extend(tokens)
  if not finite_1[0]:
    raise errors.UserError(sampling.NOT_FINITE)
  return int(token_1[0])


@functools.partial(
  jax.jit,
  static_argnames=("config", "temperature", "top_p", "compute"),
  donate_argnames=("cache",),
)
def read_and_draw(
  weights: transformer.Params,
  config: transformer.DecoderConfig,
  cache: kv_cache.Cache,
  tokens_1T: Array,
  count: Array,
  start: Array,
  reach_1: Array,
  key_1: Array,
  decided: Array,
  *,
  temperature: float,
  top_p: float,
  compute: transformer.Compute,
) -> tuple[Array, Array, kv_cache.Cache]:
  """The token after the first `count` of `tokens_1T`, int32 [1], and the cache.

  Between them: whether the logits were finite that the token was drawn from.

  Args:
    weights: from `network`.
    cache: holds `start` tokens. The columns behind them hold anything.
    tokens_1T: padded with anything behind `count`.
    reach_1: length that the row may reach, as in `transformer.forward`.
    key_1: of the row, from `sampling.row_keys`.
    decided: number of tokens of the answer so far.
  """
  column_S = jnp.arange(cache["k"].shape[2])
  position_T = start + jnp.arange(tokens_1T.shape[1])
  mask_TS = (column_S <= position_T[:, None]) & (column_S < start + count)
  hidden_1TD, new_cache = transformer.forward(
    weights,
    config,
    tokens_1T,
    position_T[None],
    mask_TS[None],
    cache=cache,
    column=start,
    reach_B=reach_1,
    compute=compute,
  )
  last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD, count - 1, axis=1, keepdims=False)
  logits_1V = vocab_head.head_logits(
    last_1D,
    transformer.output_embedding(weights),
    softcap=config.logit_softcap,
  )
  keys_1 = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_1, decided)
  assert new_cache is not None
  token_1 = sampling.choose(logits_1V, keys_1, temperature, top_p)
  return token_1, sampling.are_finite(logits_1V), new_cache
