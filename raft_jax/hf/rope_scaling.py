"""Rotary embeddings scaled for long texts: divisors of frequencies, factors.

The formulas are those of transformers/modeling_rope_utils.py. They are computed once,
in float64, from the numbers of a model's config.
"""

from __future__ import annotations

import math

import numpy as np

LLAMA3_NUMBERS = (
  "factor",
  "low_freq_factor",
  "high_freq_factor",
  "original_max_position_embeddings",
)


def llama3_divisors(
  periods: np.ndarray,
  *,
  factor: float,
  low_freq_factor: float,
  high_freq_factor: float,
  original_max_position_embeddings: float,
) -> tuple[float, ...]:
  """Divisors of the rotary frequencies in the rope scaling `llama3`.

  Waves that turn fewer than `low_freq_factor` times within the original length are
  slowed by `factor`, those above `high_freq_factor` not, those between in part.

  Args:
    periods: positions in which each frequency turns by one radian.
  """
  turns = original_max_position_embeddings / (2 * math.pi * periods)
  share = np.clip(
    (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1
  )
  return tuple((1 / ((1 - share) / factor + share)).tolist())


def proportional_divisors(
  width: int, *, share: float, factor: float
) -> tuple[float, ...]:
  """Divisors of the rotary frequencies in the rope scaling `proportional`.

  The first frequencies, a share of all, are slowed by `factor`; the others do not turn.
  """
  turning = int(share * width // 2)
  return (factor,) * turning + (math.inf,) * (width // 2 - turning)


def yarn_divisors(
  theta: float,
  width: int,
  *,
  factor: float,
  original: int,
  beta_fast: float,
  beta_slow: float,
  truncate: bool,
) -> tuple[float, ...]:
  """Divisors of the rotary frequencies in the rope scaling `yarn`.

  Waves that turn more than `beta_fast` times within the original length stay, those
  below `beta_slow` are slowed by `factor`; between them the share grows linearly with
  the dimension. Peng et al., "YaRN", arXiv 2309.00071.

  Args:
    theta: base of the frequencies.
    width: dimensions of a head that are rotated.
    original: positions that the model was first trained on.
    truncate: whether the two ends are rounded to whole dimensions.
  """

  def dimension(turns: float) -> float:
    return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = dimension(beta_fast), dimension(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  high += 0.001 * (low == high)
  slowed = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
  return tuple((1 / (slowed / factor + 1 - slowed)).tolist())


def yarn_scale(
  factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
  """Factor of cosine and sine in the rope scaling `yarn`.

  It is that of the paper, or with both further numbers (DeepSeek) a ratio of two.
  """

  def of(weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

  if mscale and mscale_all_dim:
    return of(mscale) / of(mscale_all_dim)
  return of(1.0)


def longrope_scale(factor: float, original: int) -> float:
  """Factor of cosine and sine in the rope scaling `longrope`."""
  if factor <= 1:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(original))
