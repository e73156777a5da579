"""Edits of a trained model, one tensor of its checkpoint at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from raft_jax.models import experts, transformer

Edit = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A tensor before and after training -> the tensor to keep, of the same shape."""


def of_each(
  edit: Edit, base: transformer.Params, tuned: transformer.Params
) -> transformer.Params:
  """A tuned model whose tensors were edited one by one.

  The tensors are those of the checkpoint on the hub: one per layer, or per expert of a
  layer, and tied embeddings once. If a family fuses projections (Phi), each part is a
  tensor of its own.

  Args:
    base: the model before training, float32.
    tuned: the model after it.

  Returns:
    Parameters like `tuned`, on the host.
  """

  def of_leaf(path, base_leaf, tuned_leaf):
    stacked = experts.stacked_axes(path[-1].key, base) if path[0].key == "layers" else 0
    return of_stack(np.asarray(base_leaf), np.asarray(tuned_leaf), stacked)

  def of_stack(before: np.ndarray, after: np.ndarray, axes: int) -> np.ndarray:
    if not axes:
      return edit(before, after)
    edited = np.empty_like(after)
    for i in range(len(after)):
      edited[i] = of_stack(before[i], after[i], axes - 1)
    return edited

  return jax.tree_util.tree_map_with_path(of_leaf, base, tuned)
