"""The cache of keys and values that a forward pass fills, and that later passes read.

Shapes: L layers, B rows, T tokens of this pass, S columns, N key/value heads, h head
width. Where some layers have a state instead (`gated_delta`), the keys and values have
a row for each layer with attention, and the states one for each of the others. Layers
whose heads have a shape of their own (`hybrid.GlobalAttention`) have stacks of their
own. Layers that share the keys and values of others have no rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax.models import gated_delta, hybrid

if TYPE_CHECKING:
  from raft_jax.models import transformer

Cache = dict[str, Array]
"""{"k", "v"} of all layers, each [L, B, S, N, h]; see `init` for the others."""
GLOBAL_KV = ("global_k", "global_v")
"""Keys and values of the global layers."""
STATES = ("conv", "matrix")
"""The fields of `gated_delta.State`, each stacked over the layers that have it."""


def init(
  config: transformer.DecoderConfig, batch: int, length: int, dtype: str = "float32"
) -> Cache:
  """An empty cache of `length` columns.

  Where the config reads key positions, it also has {"positions"}, int32 [B, S]; where
  layers have states, also those ({"conv", "matrix"}), and the keys and values of global
  layers ({"global_k", "global_v"}).
  """
  cache = _keys_values(config, batch, length, dtype)
  if config.reads_key_positions:
    cache["positions"] = jnp.zeros((batch, length), jnp.int32)
  if config.delta is not None:
    state = gated_delta.empty_state(config.delta, batch, dtype)
    count = len(config.delta.layers)
    for name, leaf in zip(STATES, state, strict=True):
      cache[name] = jnp.zeros((count, *leaf.shape), leaf.dtype)
  return cache


def _keys_values(
  config: transformer.DecoderConfig,
  batch: int,
  length: int,
  dtype: str,
  layers: int | None = None,
) -> Cache:
  """Empty keys and values of all layers that have them, or of `layers` of each kind."""
  rows = len(hybrid.layers_of(config, "k")) if layers is None else layers
  shape = (rows, batch, length, config.n_kv_heads, config.head_dim)
  cache = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
  if own := config.global_attention:
    rows = len(hybrid.layers_of(config, "global_k")) if layers is None else layers
    shape = (rows, batch, length, own.n_kv_heads, own.head_dim)
    cache |= {name: jnp.zeros(shape, dtype) for name in GLOBAL_KV}
  return cache


def of_layers(
  cache: Cache | None,
  config: transformer.DecoderConfig,
  shape: tuple[int, ...],
  dtype: str,
) -> Cache | None:
  """What the layers of one pass write and read: the cache without its positions.

  Without a cache it is None. But where layers share keys and values, it has a place for
  those of one layer of each kind: each layer replaces what the layer before it wrote,
  and those that share find the last ones.

  Args:
    shape: of the tokens, B and T.
  """
  if cache is not None:
    return {name: leaf for name, leaf in cache.items() if name != "positions"}
  if config.kv_sharing is None:
    return None
  batch, length = shape
  return _keys_values(config, batch, length, dtype, layers=1)


def lengthened(cache: Cache, more: int) -> Cache:
  """The cache with more empty columns behind its own."""
  axes = {**dict.fromkeys(("k", "v", *GLOBAL_KV), 2), "positions": 1}

  def pad(leaf: Array, axis: int) -> Array:
    widths = [(0, 0)] * leaf.ndim
    widths[axis] = (0, more)
    return jnp.pad(leaf, widths)

  return {
    name: pad(leaf, axes[name]) if name in axes else leaf
    for name, leaf in cache.items()
  }


def without_states(cache: Cache) -> Cache:
  """The cache with states as before the first token."""
  empty = {name: jnp.zeros_like(cache[name]) for name in STATES if name in cache}
  return {**cache, **empty}


def of_global(cache: Cache) -> Cache:
  """The cache as a global layer reads and writes it: its own kind's `k` and `v`."""
  return hybrid.plain({name: cache[name] for name in GLOBAL_KV})


def with_global(cache: Cache, written: Cache) -> Cache:
  """The cache with what a global layer made of `of_global` of it."""
  return {
    **cache,
    **{name: written[name.removeprefix(hybrid.GLOBAL)] for name in GLOBAL_KV},
  }


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
  moves the data of one token and not the whole cache. What fills the whole cache takes
  its place: a backward pass then needs nothing of the old one.
  """
  if cache["k"].shape == (1, *k_BTNh.shape):
    own = {"k": k_BTNh[None], "v": v_BTNh[None]}
    return {**cache, **{name: x.astype(cache[name].dtype) for name, x in own.items()}}
  start = (layer, 0, column, 0, 0)
  written = {
    name: jax.lax.dynamic_update_slice(
      cache[name], new_BTNh[None].astype(cache[name].dtype), start
    )
    for name, new_BTNh in (("k", k_BTNh), ("v", v_BTNh))
  }
  return {**cache, **written}


def read_state(cache: Cache, layer: Array | int) -> gated_delta.State:
  """The state of a layer after the tokens so far."""
  return gated_delta.State(*(cache[name][layer] for name in STATES))


def write_state(cache: Cache, state: gated_delta.State, layer: Array | int) -> Cache:
  """Writes the state of a layer in place."""
  written = {
    name: jax.lax.dynamic_update_index_in_dim(
      cache[name], leaf.astype(cache[name].dtype), layer, axis=0
    )
    for name, leaf in zip(STATES, state, strict=True)
  }
  return {**cache, **written}


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
