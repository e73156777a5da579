"""Which parameters a run may change: masks by name, by layer or at random.

Layers are stacked on axis 0, so a leaf of a mask holds one number per layer, `[L, 1,
...]`, or one number for a parameter outside the layers. Where the layers are of
different kinds, `layers_of` (`hybrid.layers_of` of the config) gives the numbers of the
layers that have a parameter; without it, every layer has every parameter.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from raft_jax import errors

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")

LayersOf = Callable[[str], Sequence[int]]
"""Parameter of a layer -> numbers of the layers that have it."""


def by_name(
  shapes: Any, patterns: Sequence[str], layers_of: LayersOf | None = None
) -> Any:
  """Freezes every parameter whose name matches a pattern.

  Args:
    shapes: the parameter tree, or its shapes.
    patterns: shell patterns such as `layers.[0-9].*`, for names such as `embed` and
      `layers.3.q`.

  Returns:
    A tree of float32 masks: 0 frozen, 1 free.

  Raises:
    errors.UserError: a pattern matches nothing, or all parameters are frozen.
  """
  unmatched = set(patterns)

  def frozen(name: str) -> bool:
    matching = {p for p in patterns if fnmatch.fnmatchcase(name, p)}
    unmatched.difference_update(matching)
    return bool(matching)

  mask = _each(shapes, lambda name, layer: 0.0 if frozen(name) else 1.0, layers_of)
  if unmatched:
    raise errors.UserError(
      f"freeze.names: {sorted(unmatched)[0]!r} matches no parameter; names look like "
      f"{', '.join(_some_names(shapes))}"
    )
  if not any(leaf.any() for leaf in jax.tree.leaves(mask)):
    raise errors.UserError("freeze.names: every parameter is frozen; name fewer")
  return mask


def bottom(shapes: Any, layers: int, layers_of: LayersOf | None = None) -> Any:
  """Freezes the embeddings (with a tied head) and the lowest layers."""
  tables = ("embed", "per_layer_embed")
  return _each(
    shapes,
    lambda name, layer: float(name not in tables if layer is None else layer >= layers),
    layers_of,
  )


def half(shapes: Any, seed: int) -> Any:
  """Half fine-tuning: trains about half of every layer, drawn once per run.

  Trained are 2 of the 4 attention projections of each layer; 2 of its 3 feed-forward
  projections in a random half of the layers, and 1 in the others (1 of 2 in all layers
  without a gate); half of the norms; and always the embedding and the head. The bias of
  a projection goes with it, and the numbers of an activation with the projection before
  it. Of experts, a projection of all of them counts as one. Their router and the sinks
  of attention stay frozen. Hui et al., *HFT: Half Fine-Tuning for Large Language
  Models*, arXiv 2404.18466.

  Args:
    shapes: the parameter tree, or its shapes.
    seed: seed of the draw.
  """
  rng = np.random.default_rng(seed)
  names = sorted(shapes["layers"])
  count = next(iter(shapes["layers"].values())).shape[0]
  norms = [(layer, n) for layer in range(count) for n in names if n.endswith("norm")]
  drawn = rng.permutation(len(norms))[: len(norms) // 2]
  free = {norms[i] for i in drawn}
  feed_forward = [name for name in FEED_FORWARD if name in names]
  two_of_three = set(rng.permutation(count)[: count // 2].tolist())
  for layer in range(count):
    free |= {(layer, n) for n in rng.choice(ATTENTION, 2, replace=False)}
    width = 2 if layer in two_of_three and len(feed_forward) == 3 else 1
    free |= {(layer, n) for n in rng.choice(feed_forward, width, replace=False)}

  def value(name: str, layer: int | None) -> float:
    own = name.rsplit(".", 1)[-1].removesuffix("_bias")
    own = "up" if own.startswith("xielu") else own
    return float(layer is None or (layer, own) in free)

  return _each(shapes, value)


def scale(mask: Any) -> optax.GradientTransformationExtraArgs:
  """Multiplies the updates that pass by a mask.

  Adam undoes a constant factor on a gradient, so only a mask on the *updates*, after
  Adam and decay, slows a parameter down; a mask of 0 keeps it bit for bit. A mask on
  the gradients decides which of them count for the clipped norm.

  Args:
    mask: a tree like the parameters, of arrays that broadcast to them.
  """

  def init(params):
    del params
    return optax.EmptyState()

  def update(updates, state, params=None, **extra):
    del params, extra
    masked = jax.tree.map(lambda u, m: u * m.astype(u.dtype), updates, mask)
    return masked, state

  return optax.GradientTransformationExtraArgs(init, update)


def _each(shapes: Any, value: Any, layers_of: LayersOf | None = None) -> Any:
  """A mask by `value(name, layer)`; layer is None outside the layers."""

  def leaf(path, shape):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if path[0].key != "layers":
      return np.full((1,) * len(shape.shape), value(name, None), np.float32)
    own = name.removeprefix("layers.")
    layers = layers_of(own) if layers_of else range(shape.shape[0])
    values = [value(f"layers.{i}.{own}", i) for i in layers]
    return np.array(values, np.float32).reshape(-1, *(1,) * (len(shape.shape) - 1))

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def _some_names(shapes: Any) -> list[str]:
  own = sorted(shapes["layers"])[:2]
  return [*sorted(set(shapes) - {"layers"})[:2], *(f"layers.0.{name}" for name in own)]
