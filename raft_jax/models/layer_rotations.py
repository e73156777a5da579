"""Rotary rotations of all kinds of layers, computed once a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax.models import hybrid, rotary

if TYPE_CHECKING:
  from raft_jax.models import transformer


class Turns(NamedTuple):
  """The rotations, and how far each query is from each key.

  Attributes:
    rotation: of the first of the config's rotary embeddings.
    tables: all of these, stacked.
    of_global: of the global layers; None: there are none.
    distance_BTS: int32, position of the query minus that of the key.
  """

  rotation: rotary.Rotation
  tables: rotary.Rotation
  of_global: rotary.Rotation | None
  distance_BTS: Array


def of_pass(
  config: transformer.DecoderConfig,
  positions_BT: Array,
  key_positions_BS: Array,
  mask_BTS: Array,
  reach_B: Array | None,
) -> Turns:
  """The rotations of a pass; arguments as for `transformer.forward`.

  Args:
    key_positions_BS: positions of all keys.
  """
  read = positions_BT, key_positions_BS, mask_BTS, reach_B
  rotations = _rotations(config, *read)
  of_global = None
  if config.global_attention is not None:
    (of_global,) = _rotations(hybrid.global_config(config), *read)
  return Turns(
    rotations[0],
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *rotations),
    of_global,
    positions_BT[:, :, None] - key_positions_BS[:, None, :],
  )


def _rotations(
  config: transformer.DecoderConfig,
  positions_BT: Array,
  key_positions_BS: Array,
  mask_BTS: Array,
  reach_B: Array | None,
) -> list[rotary.Rotation]:
  """The rotation of each of the config's rotary embeddings."""
  ropes = config.ropes or (rotary.Rope(config.rope_theta),)
  reach_B = (
    _reach(key_positions_BS, mask_BTS, reach_B) if config.reads_key_positions else None
  )
  return [
    rotary.rotation(rope, positions_BT, config.head_dim, reach_B) for rope in ropes
  ]


def _reach(key_positions_BS: Array, mask_BTS: Array, reach_B: Array | None) -> Array:
  """Length of each row in positions, without padding, to which nothing attends."""
  attended_BS = jnp.any(mask_BTS, axis=1)
  length_B = jnp.max(jnp.where(attended_BS, key_positions_BS, 0), axis=1) + 1
  return length_B if reach_B is None else jnp.maximum(length_B, reach_B)
