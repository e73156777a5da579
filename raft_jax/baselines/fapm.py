"""FAPM: after training, keeps the tenth of the change that hurts the base model least.

Huang et al., *FAPM*, EMNLP 2025, arXiv 2509.08255.
"""

from __future__ import annotations

import fractions
import functools
import math

import numpy as np

from raft_jax.baselines import tensor_edits
from raft_jax.models import transformer


def scores(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
  """How much a weight's change matters, minus how much it harms the base model.

  .. math::
    S = |\\Delta| \\left(1 - \\frac{\\overline{|W_0|}}{|W_0|}\\right), \\quad
    \\Delta = W - W_0

  with the mean over the tensor. The score of a weight that was 0 is minus infinity.

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
  """Takes the ⌊keep · n⌋ best scored entries from `tuned`, the rest from `base`.

  Of equal scores the first entries are taken.
  """
  base, tuned = np.asarray(base), np.asarray(tuned)
  # Exact in decimal: 0.29 of 100 entries is 29, though 0.29 * 100 is less in floats.
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
  """A tuned model in which every tensor keeps ⌊keep · n⌋ of its changes.

  Args:
    base: the model before training, float32.
    tuned: the model after it.
    keep: share of each tensor that keeps its change, in 0..1. 1 gives `tuned` and 0
      gives `base`, bit for bit. The paper uses 0.1.

  Returns:
    Parameters like `tuned`, on the host.

  Raises:
    ValueError: `keep` is outside 0..1.
  """
  if not 0 <= keep <= 1:
    raise ValueError(f"keep={keep} must be in 0..1")
  one = functools.partial(prune_tensor, keep=keep)
  return tensor_edits.of_each(one, base, tuned)
