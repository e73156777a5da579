"""The cache of keys and values that a forward pass fills, and that later passes read.

Shapes: L layers, B rows, T tokens of this pass, S columns, N key/value heads, h head
width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
  from raft_jax.models import transformer

Cache = dict[str, Array]
"""{"k", "v"} of all layers, each [L, B, S, N, h]; see `init` for {"positions"}."""


def init(
  config: transformer.DecoderConfig, batch: int, length: int, dtype: str = "float32"
) -> Cache:
  """An empty cache of `length` columns.

  Where the config reads key positions, it also has {"positions"}, int32 [B, S].
  """
  shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
  cache = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
  if config.reads_key_positions:
    cache["positions"] = jnp.zeros((batch, length), jnp.int32)
  return cache


def write_layer(
  cache: Cache,
  k_BTNh: Array,
  v_BTNh: Array,
  *,
  layer: Array | int,
  column: Array | int,
) -> Cache:
  """Writes keys and values in place at [layer, :, column:].

  The cache of all layers is the carry of the scan over layers, so that a decode step
  moves the data of one token and not the whole cache.
  """
  start = (layer, 0, column, 0, 0)
  return {
    name: jax.lax.dynamic_update_slice(
      cache[name], new_BTNh[None].astype(cache[name].dtype), start
    )
    for name, new_BTNh in (("k", k_BTNh), ("v", v_BTNh))
  }


def write_positions(
  cache: Cache | None, positions_BT: Array, column: Array | int
) -> tuple[Array, Cache | None]:
  """Positions of all keys [B, S], and the cache with those of this pass."""
  if cache is None or "positions" not in cache:
    return positions_BT, cache
  key_positions_BS = jax.lax.dynamic_update_slice(
    cache["positions"], positions_BT.astype(jnp.int32), (0, column)
  )
  return key_positions_BS, {**cache, "positions": key_positions_BS}
