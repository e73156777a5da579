"""Fingerprints of a tree's arrays, which a flipped bit or swapped rows change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from raft_jax.runtime import distributed


@jax.jit
def compute(tree: Any) -> Any:
  """Two wrap-around sums of the bits of each leaf, the second weighted by position.

  They do not depend on the sharding; a flipped bit or swapped rows change them. uint32
  [2] per leaf.
  """

  def of_leaf(leaf):
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    # Flattening would gather arrays that are sharded over devices.
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
      along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      place += along * jnp.uint32(stride % 2**32)
      stride *= leaf.shape[axis]
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * (2 * place + 1))])

  return jax.tree.map(of_leaf, tree)


def by_path(tree: Any) -> dict[str, list[int]]:
  """Fingerprints by the path of the leaf, ready for JSON."""
  leaves = jax.tree_util.tree_leaves_with_path(distributed.to_host(compute(tree)))
  return {
    # Simple names are the same for a NamedTuple and for the dict that Orbax restores.
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      int(part) for part in value
    ]
    for path, value in leaves
  }
