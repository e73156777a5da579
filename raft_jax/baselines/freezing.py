"""Which parameters a run may move: masks from names, layers or chance, and their use.

Layers are stacked on axis 0, so a mask's leaf holds one number a layer, `[L, 1, ...]`,
or one number for a parameter that is no layer's.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from raft_jax import errors

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")


def by_name(shapes: Any, patterns: Sequence[str]) -> Any:
  """Freezes every parameter whose name matches a pattern.

  Args:
    shapes: the parameter tree, or its shapes.
    patterns: as in a shell, on names such as `embed`, `layers.3.q`: `layers.[0-9].*`.

  Returns:
    A tree of float32 masks: 0 frozen, 1 free.

  Raises:
    errors.UserError: a pattern matches nothing, or nothing is left to train.
  """
  unmatched = set(patterns)

  def frozen(name: str) -> bool:
    found = {p for p in patterns if fnmatch.fnmatchcase(name, p)}
    unmatched.difference_update(found)
    return bool(found)

  mask = _each(shapes, lambda name, layer: 0.0 if frozen(name) else 1.0)
  if unmatched:
    raise errors.UserError(
      f"freeze.names: {sorted(unmatched)[0]!r} matches no parameter; names look like "
      f"{', '.join(_some_names(shapes))}"
    )
  if not any(leaf.any() for leaf in jax.tree.leaves(mask)):
    raise errors.UserError("freeze.names: every parameter is frozen; name fewer")
  return mask


def bottom(shapes: Any, layers: int) -> Any:
  """Freezes the embedding and the lowest layers; a tied head is frozen with it."""
  return _each(
    shapes,
    lambda name, layer: float(name != "embed" if layer is None else layer >= layers),
  )


def half(shapes: Any, seed: int) -> Any:
  """Half fine-tuning: about half of every layer's parameters, drawn once a run.

  Free are 2 of the 4 attention projections of a layer; of the 3 feed-forward ones 2 in
  a random half of the layers and 1 in the others; half of the norms; embedding and head
  always. Hui et al., *HFT: Half Fine-Tuning for Large Language Models*,
  arXiv 2404.18466. A projection's bias goes with it.

  Args:
    shapes: the parameter tree, or its shapes.
    seed: of the draw.
  """
  rng = np.random.default_rng(seed)
  names = sorted(shapes["layers"])
  count = next(iter(shapes["layers"].values())).shape[0]
  norms = [(layer, n) for layer in range(count) for n in names if n.endswith("norm")]
  drawn = rng.permutation(len(norms))[: len(norms) // 2]
  free = {norms[i] for i in drawn}
  two_of_three = set(rng.permutation(count)[: count // 2].tolist())
  for layer in range(count):
    free |= {(layer, n) for n in rng.choice(ATTENTION, 2, replace=False)}
    width = 2 if layer in two_of_three else 1
    free |= {(layer, n) for n in rng.choice(FEED_FORWARD, width, replace=False)}

  def value(name: str, layer: int | None) -> float:
    own = name.rsplit(".", 1)[-1].removesuffix("_bias")
    return float(layer is None or (layer, own) in free)

  return _each(shapes, value)


def scale(mask: Any) -> optax.GradientTransformationExtraArgs:
  """Multiplies what passes by a mask.

  Adam undoes a constant factor on a gradient, so that only a mask on the *updates*,
  after Adam and decay, slows a parameter down; one of zeros keeps its bits. On the
  gradients a mask decides what counts for clipping.

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


def free_share(mask: Any, shapes: Any) -> float:
  """Share of the parameters that a mask leaves free."""
  free = jax.tree.map(
    lambda m, s: np.broadcast_to(m, s.shape[:1] + (1,) * (m.ndim - 1)).mean() * s.size,
    mask,
    shapes,
  )
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  return float(sum(jax.tree.leaves(free)) / total)


def _each(shapes: Any, value: Any) -> Any:
  """A mask by `value(name, layer)`; layer is None for what is no layer's."""

  def leaf(path, shape):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if path[0].key != "layers":
      return np.full((1,) * len(shape.shape), value(name, None), np.float32)
    own = name.removeprefix("layers.")
    values = [value(f"layers.{i}.{own}", i) for i in range(shape.shape[0])]
    return np.array(values, np.float32).reshape(-1, *(1,) * (len(shape.shape) - 1))

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def _some_names(shapes: Any) -> list[str]:
  own = sorted(shapes["layers"])[:2]
  return [*sorted(set(shapes) - {"layers"})[:2], *(f"layers.0.{name}" for name in own)]
