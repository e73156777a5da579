"""DG-Hard: after training, keeps of each matrix's change what stands out from noise.

DG-Hard, arXiv 2605.20296. The threshold is that of Gavish and Donoho, "The Optimal Hard
Threshold for Singular Values is 4/√3", arXiv 1305.5870, for noise of unknown size.
"""

from __future__ import annotations

import functools

import numpy as np

from raft_jax.baselines import tensor_edits
from raft_jax.models import transformer


def noise_factor(shape: tuple[int, int]) -> float:
  """The threshold of singular values, in multiples of their median.

  .. math::
    \\omega(\\beta) \\approx 0.56 \\beta^3 - 0.95 \\beta^2 + 1.82 \\beta + 1.43

  Args:
    shape: of the matrix; β is its shorter side by its longer one.
  """
  beta = min(shape) / max(shape)
  return 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43


def threshold_tensor(
  base: np.ndarray, tuned: np.ndarray, *, scale: float, keep_vectors: bool
) -> np.ndarray:
  """W₀ plus the part of the change whose singular values reach the threshold.

  .. math::
    W = W_0 + \\sum_{\\sigma_i \\ge \\tau} \\sigma_i u_i v_i^T, \\quad
    \\tau = s\\, \\omega(\\beta)\\, \\mathrm{median}(\\sigma), \\quad
    W_{tuned} - W_0 = U \\Sigma V^T

  If all singular values reach τ this is `tuned`, and if none does `base`, bit for bit.

  Args:
    base: W₀, float32.
    tuned: the weight after training, of the same shape.
    scale: s, a factor of the threshold; 0 keeps everything.
    keep_vectors: whether a tensor that is no matrix keeps its change.
  """
  if base.ndim != 2:
    return tuned if keep_vectors else base
  if scale == 0:
    return tuned
  left_MR, size_R, right_RN = np.linalg.svd(
    np.asarray(tuned, np.float32) - base, full_matrices=False
  )
  rank = int((size_R >= scale * noise_factor(base.shape) * np.median(size_R)).sum())
  if rank == len(size_R):
    return tuned
  if rank == 0:
    return base
  kept = (left_MR[:, :rank] * size_R[:rank]) @ right_RN[:rank]
  return (base + kept).astype(tuned.dtype)


def threshold(
  base: transformer.Params,
  tuned: transformer.Params,
  *,
  scale: float,
  keep_vectors: bool,
) -> transformer.Params:
  """A tuned model in which each matrix keeps the large part of its change.

  One matrix at a time is decomposed on the host.

  Args:
    base: the model before training, float32.
    tuned: the model after it.
    scale: factor of the threshold; with 0, `tuned` is returned bit for bit.
    keep_vectors: whether norms and biases keep their change.

  Returns:
    Parameters like `tuned`, on the host.

  Raises:
    ValueError: `scale` is below 0.
  """
  if scale < 0:
    raise ValueError(f"scale={scale} must be at least 0")
  one = functools.partial(threshold_tensor, scale=scale, keep_vectors=keep_vectors)
  return tensor_edits.of_each(one, base, tuned)
