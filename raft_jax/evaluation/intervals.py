"""Intervals of scores over items, and comparisons of two models item by item.

Test sets are small (the paper's hold 60 to 185 questions), so no score is shown
without its interval and no two models are compared but on the same items.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000


class Scores(NamedTuple):
  """One score, item by item.

  Attributes:
    values_N: float, one an item.
    weights_N: how many answers a value stands for (an IFEval prompt holds several
      instructions); None where every item counts once.
    share: every item just passed (1) or failed (0), and counts once.
  """

  values_N: np.ndarray
  weights_N: np.ndarray | None = None
  share: bool = False


Figure = Scores | float
"""A score item by item, or one of a whole set that is no mean of items (a perplexity):
its intervals are not known."""


class Interval(NamedTuple):
  low: float
  high: float


def mean(scores: Figure) -> float:
  """The weighted mean."""
  if isinstance(scores, float):
    return scores
  return float(np.average(scores.values_N, weights=scores.weights_N))


def interval(scores: Scores) -> Interval:
  """95 % interval of the mean: Wilson's for a share, else a percentile bootstrap.

  Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927;
  Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979. One seed draws the
  same items for every score of a set.

  Raises:
    ValueError: no item.
  """
  count = len(scores.values_N)
  if count == 0:
    raise ValueError("an interval needs at least one item")
  if scores.share:
    test = stats.binomtest(int(scores.values_N.sum()), count)
    found = test.proportion_ci(method="wilson")
    return Interval(float(found.low), float(found.high))
  return _mean_bootstrap(scores)


def ratio_interval(base: Scores, trained: Scores) -> Interval | None:
  """95 % paired bootstrap interval of 100 · mean(trained) / mean(base).

  None where a resample can hold no point of the base model's.
  """

  def ratio(base, trained, weights, axis):
    return 100.0 * (trained * weights).sum(axis) / (base * weights).sum(axis)

  with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
    warnings.simplefilter("ignore", stats.DegenerateDataWarning)
    found = _bootstrap(ratio, base.values_N, trained.values_N, _weights(base))
  return found if np.isfinite(found).all() else None


def mcnemar(base_N: np.ndarray, trained_N: np.ndarray) -> float:
  """Two-sided exact p that two models pass equally many of the same items.

  McNemar, "Note on the sampling error of the difference between correlated proportions
  or percentages", 1947, with the binomial distribution in place of its approximation.

  Args:
    base_N, trained_N: 0 or 1 an item.
  """
  gained = int(((base_N == 0) & (trained_N == 1)).sum())
  lost = int(((base_N == 1) & (trained_N == 0)).sum())
  return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _mean_bootstrap(scores: Scores) -> Interval:
  def weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int) -> Any:
    return (values * weights).sum(axis) / weights.sum(axis)

  weights_N = _weights(scores)
  # A resample of items without an answer has no mean, and the mean none of theirs.
  held_N = weights_N > 0
  return _bootstrap(weighted_mean, scores.values_N[held_N], weights_N[held_N])


def _weights(scores: Scores) -> np.ndarray:
  if scores.weights_N is None:
    return np.ones(len(scores.values_N))
  return scores.weights_N


def _bootstrap(statistic: Any, *samples: np.ndarray) -> Interval:
  count = len(samples[0])
  if count == 1:
    only = float(statistic(*samples, axis=-1))
    return Interval(only, only)
  found = stats.bootstrap(
    samples,
    statistic,
    paired=True,
    vectorized=True,
    n_resamples=RESAMPLES,
    batch=max(1, 2_000_000 // count),  # bounds the memory for large test sets
    method="percentile",
    rng=np.random.default_rng(0),
  ).confidence_interval
  return Interval(float(found.low), float(found.high))


def describe(scores: Figure) -> dict[str, Any]:
  """Mean, interval and number of items, ready for JSON."""
  if isinstance(scores, float):
    return {"value": scores}
  return {
    "value": mean(scores),
    **interval(scores)._asdict(),
    "n": len(scores.values_N),
  }


def alike(
  base: Mapping[str, Figure], trained: Mapping[str, Figure]
) -> tuple[dict[str, Figure], dict[str, Figure]]:
  """Two models' scores under the names that both have, of one kind each.

  What a model said may decide whether a score is known item by item, and whether every
  item just passed or failed. What one lacks the other loses.
  """
  left, right = {}, {}
  for name in base.keys() & trained.keys():
    one, other = base[name], trained[name]
    if isinstance(one, float) or isinstance(other, float):
      one, other = mean(one), mean(other)
    elif one.share != other.share:
      one, other = one._replace(share=False), other._replace(share=False)
    left[name], right[name] = one, other
  order = [name for name in base if name in left]
  return {name: left[name] for name in order}, {name: right[name] for name in order}


def compare(base: Figure, trained: Figure) -> dict[str, Any]:
  """Trained minus base on the same items, ready for JSON; `p` only for shares."""
  if isinstance(base, float) or isinstance(trained, float):
    return {"difference": mean(trained) - mean(base)}
  difference = Scores(trained.values_N - base.values_N, base.weights_N)
  found = {"difference": mean(difference), **interval(difference)._asdict()}
  if base.share:
    found["p"] = mcnemar(base.values_N, trained.values_N)
  return found


def retention(base: Figure, trained: Figure) -> dict[str, Any]:
  """100 · trained / base with its paired interval; empty where base scores 0."""
  if mean(base) == 0:
    return {}
  found: dict[str, Any] = {"value": 100.0 * mean(trained) / mean(base)}
  if isinstance(base, float) or isinstance(trained, float):
    return found
  between = ratio_interval(base, trained)
  return found | (between._asdict() if between else {})
