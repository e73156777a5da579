"""FAPM: after training, keep the tenth of the change that costs the base least.

Huang et al., *FAPM*, EMNLP 2025, arXiv 2509.08255.
"""

from __future__ import annotations

import fractions
import math

import jax
import numpy as np

from raft_jax.models import transformer


def scores(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
  """How much a weight's change matters, less what it does to the base model.

  .. math::
    S = |\\Delta| \\left(1 - \\frac{\\overline{|W_0|}}{|W_0|}\\right), \\quad
    \\Delta = W - W_0

  with the mean over the tensor. A weight that was 0 scores minus infinity.

  Args:
    base: W₀, float32.
    tuned: W, of the same shape.

  Returns:
    S, float32, of that shape.
  """
  base = np.asarray(base, np.float32)
  change = np.abs(np.asarray(tuned, np.float32) - base)
  size = np.abs(base)
  mean = np.float32(size.mean(dtype=np.float64))
  kept = np.divide(mean, size, out=np.zeros_like(size), where=size > 0)
  return np.where(size > 0, change * (1 - kept), -np.inf).astype(np.float32)


def prune_tensor(base: np.ndarray, tuned: np.ndarray, keep: float) -> np.ndarray:
  """Takes the ⌊keep · n⌋ best scored entries from `tuned` and the others from `base`.

  Equal scores go by their place, the first first.
  """
  base, tuned = np.asarray(base), np.asarray(tuned)
  # As printed: 0.29 of 100 entries are 29, though 0.29 * 100 is below it.
  count = math.floor(fractions.Fraction(str(keep)) * base.size)
  if count == base.size:
    return tuned
  chosen = np.zeros(base.size, bool)
  if count:
    score = scores(base, tuned).ravel()
    least = np.partition(score, base.size - count)[base.size - count]
    chosen = score > least
    equal = np.flatnonzero(score == least)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
  return np.where(chosen.reshape(base.shape), tuned, base)


def prune(
  base: transformer.Params, tuned: transformer.Params, keep: float
) -> transformer.Params:
  """A tuned model whose every tensor keeps ⌊keep · n⌋ of its changes.

  Tensors are those of the checkpoint on the hub, each layer's on its own, and tied
  embeddings once; but of projections that a family fuses (Phi) each part is a tensor.

  Args:
    base: the model before training, float32.
    tuned: the model after it.
    keep: share of each tensor that keeps its change, in 0..1: 1 is `tuned`, 0 `base`,
      both bit for bit. The paper's is 0.1.

  Returns:
    Parameters like `tuned`, on the host.

  Raises:
    ValueError: `keep` is outside 0..1.
  """
  if not 0 <= keep <= 1:
    raise ValueError(f"keep={keep} must be in 0..1")

  def of_leaf(path, base_leaf, tuned_leaf):
    before, after = np.asarray(base_leaf), np.asarray(tuned_leaf)
    if path[0].key != "layers":
      return prune_tensor(before, after, keep)
    return np.stack([prune_tensor(b, t, keep) for b, t in zip(before, after)])

  return jax.tree_util.tree_map_with_path(of_leaf, base, tuned)
