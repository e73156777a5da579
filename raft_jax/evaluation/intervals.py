"""95 % intervals of scores over items, and comparisons of two models on the same items.

Test sets are small (the paper's hold 60 to 185 questions), so every score has an
interval, and two models are compared item by item.

For numbers that are computed from several means (differences, ratios, points on a
curve), `resampled_means` gives a mean in each of S samples: first over all items, then
over each bootstrap resample. Means over the same M items use the same resamples, so
they are paired; means over different items are independent.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000

BATCH = 2_000_000
"""The most entries of an array of resamples; bounds the memory for large test sets."""


class ItemScores(NamedTuple):
  """One score, item by item.

  Attributes:
    values_N: float, one value an item.
    weights_N: how many answers each value counts for (an IFEval prompt holds several
      instructions); None: one each.
    share: whether each item just passed (1) or failed (0), and counts once.
  """

  values_N: np.ndarray
  weights_N: np.ndarray | None = None
  share: bool = False


Score = ItemScores | float
"""A score item by item, or a number for a whole set that is not a mean over its items,
such as a perplexity; for the latter no interval is known."""


class Interval(NamedTuple):
  low: float
  high: float


def mean(scores: Score) -> float:
  """The weighted mean."""
  if isinstance(scores, float):
    return scores
  return float(np.average(scores.values_N, weights=scores.weights_N))


def interval(scores: ItemScores) -> Interval:
  """95 % interval of the mean: Wilson's for a share, else a percentile bootstrap.

  Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927;
  Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979. The seed is fixed, so
  all scores of a test set use the same resamples.

  Raises:
    ValueError: there is no item.
  """
  count = len(scores.values_N)
  if count == 0:
    raise ValueError("an interval needs at least one item")
  if scores.share:
    from scipy import stats  # takes a second to import

    test = stats.binomtest(int(scores.values_N.sum()), count)
    wilson = test.proportion_ci(method="wilson")
    return Interval(float(wilson.low), float(wilson.high))
  return _mean_bootstrap(scores)


def ratio_interval(base: ItemScores, trained: ItemScores) -> Interval | None:
  """95 % paired bootstrap interval of 100 · mean(trained) / mean(base).

  None if the base model's mean is 0 in some resample.
  """

  from scipy import stats

  def ratio(base, trained, weights, axis):
    return 100.0 * (trained * weights).sum(axis) / (base * weights).sum(axis)

  with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
    warnings.simplefilter("ignore", stats.DegenerateDataWarning)
    ends = _bootstrap(ratio, base.values_N, trained.values_N, _weights(base))
  return ends if np.isfinite(ends).all() else None


def mcnemar(base_N: np.ndarray, trained_N: np.ndarray) -> float:
  """Two-sided exact p-value of the hypothesis that both models pass equally often.

  McNemar, "Note on the sampling error of the difference between correlated proportions
  or percentages", 1947, with the binomial distribution in place of its approximation.

  Args:
    base_N, trained_N: 0 or 1 for each item.
  """
  from scipy import stats

  gained = int(((base_N == 0) & (trained_N == 1)).sum())
  lost = int(((base_N == 1) & (trained_N == 0)).sum())
  return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _mean_bootstrap(scores: ItemScores) -> Interval:
  def weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int) -> Any:
    return (values * weights).sum(axis) / weights.sum(axis)

  weights_N = _weights(scores)
  # A resample of items that all count for nothing has no mean, so these are left out.
  counts_N = weights_N > 0
  return _bootstrap(weighted_mean, scores.values_N[counts_N], weights_N[counts_N])


def _weights(scores: ItemScores) -> np.ndarray:
  if scores.weights_N is None:
    return np.ones(len(scores.values_N))
  return scores.weights_N


def _bootstrap(statistic: Any, *samples: np.ndarray) -> Interval:
  from scipy import stats

  count = len(samples[0])
  if count == 1:
    only = float(statistic(*samples, axis=-1))
    return Interval(only, only)
  ends = stats.bootstrap(
    samples,
    statistic,
    paired=True,
    vectorized=True,
    n_resamples=RESAMPLES,
    batch=max(1, BATCH // count),
    method="percentile",
    rng=np.random.default_rng(0),
  ).confidence_interval
  return Interval(float(ends.low), float(ends.high))


def describe(scores: Score) -> dict[str, Any]:
  """Mean, interval and number of items, for JSON."""
  if isinstance(scores, float):
    return {"value": scores}
  return {
    "value": mean(scores),
    **interval(scores)._asdict(),
    "n": len(scores.values_N),
  }


# --- Two models on the same items -----------------------------------------------------


def comparable(
  base: Mapping[str, Score], trained: Mapping[str, Score]
) -> tuple[dict[str, Score], dict[str, Score]]:
  """The scores that both models have, each in the same form for both.

  A model's replies may decide whether a score is known item by item, and whether each
  item just passed or failed. If only one model's score is, both are given without.
  """
  base_scores, trained_scores = {}, {}
  for name, ours in base.items():
    if name not in trained:
      continue
    theirs = trained[name]
    if isinstance(ours, float) or isinstance(theirs, float):
      ours, theirs = mean(ours), mean(theirs)
    elif ours.share != theirs.share:
      ours, theirs = ours._replace(share=False), theirs._replace(share=False)
    base_scores[name], trained_scores[name] = ours, theirs
  return base_scores, trained_scores


def compare(base: Score, trained: Score) -> dict[str, Any]:
  """Trained minus base on the same items, for JSON; shares have a p-value `p`, too."""
  if isinstance(base, float) or isinstance(trained, float):
    return {"difference": mean(trained) - mean(base)}
  difference = ItemScores(trained.values_N - base.values_N, base.weights_N)
  paired = {"difference": mean(difference), **interval(difference)._asdict()}
  if base.share:
    paired["p"] = mcnemar(base.values_N, trained.values_N)
  return paired


def retention(base: Score, trained: Score) -> dict[str, Any]:
  """100 · trained / base with its paired interval; {} if base scores 0."""
  if mean(base) == 0:
    return {}
  retained: dict[str, Any] = {"value": 100.0 * mean(trained) / mean(base)}
  if isinstance(base, float) or isinstance(trained, float):
    return retained
  ends = ratio_interval(base, trained)
  return retained | (ends._asdict() if ends else {})


# --- Numbers computed from several means ----------------------------------------------


def resampled_means(
  values_M: np.ndarray, items: str, weights_M: np.ndarray | None = None
) -> np.ndarray:
  """The weighted mean over all items, then over each resample of them, float64 [S].

  Args:
    values_M: one score an item.
    items: identifies the set of items; equal strings share their resamples.
    weights_M: how many answers each value counts for; None: one each.
  """
  if weights_M is None:
    weights_M = np.ones(len(values_M))
  pair_M2 = np.stack([values_M * weights_M, weights_M], axis=-1)
  totals = [pair_M2.sum(axis=0, keepdims=True)]
  totals += [
    counts_BM.astype(np.float64) @ pair_M2
    for counts_BM in _resample_counts(items, len(values_M))
  ]
  total_S2 = np.concatenate(totals)
  # The mean of a resample without any answer is NaN, and is left out of intervals.
  with np.errstate(invalid="ignore", divide="ignore"):
    return total_S2[:, 0] / total_S2[:, 1]


@functools.lru_cache(maxsize=8)
def _resample_counts(items: str, count: int) -> tuple[np.ndarray, ...]:
  """How often each resample holds each item, in batches uint8 [B, M].

  No count comes near 256.
  """
  rng = np.random.default_rng(list(items.encode()))
  rows = max(1, BATCH // count)
  sizes = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
  share_M = np.full(count, 1 / count)
  return tuple(rng.multinomial(count, share_M, size=n).astype(np.uint8) for n in sizes)


def resampled_runs(means_RS: np.ndarray, seeds: Sequence[int | None]) -> np.ndarray:
  """The mean over runs that differ in their seed, then over resamples of them, [S].

  Few seeds vary less in a bootstrap than they would if they were drawn anew: the
  variance is (R - 1) / R of that. One run does not vary.

  Args:
    means_RS: each run's `resampled_means`.
    seeds: the runs' seeds, [R]; equal seeds share their resamples.
  """
  count = len(seeds)
  rng = np.random.default_rng(list(f"seeds {list(seeds)}".encode()))
  share_R = np.full(count, 1 / count)
  weight_SR = rng.multinomial(count, share_R, size=means_RS.shape[1]) / count
  weight_SR[0] = share_R
  return np.einsum("rs,sr->s", means_RS, weight_SR)


def describe_samples(samples_S: np.ndarray) -> dict[str, float]:
  """The value over all items and its 95 % interval, for JSON; {} if the value is NaN.

  Resamples that are NaN are left out. If all are, there is no interval.
  """
  value = float(samples_S[0])
  if not np.isfinite(value):
    return {}
  finite_S = samples_S[1:][np.isfinite(samples_S[1:])]
  if not finite_S.size:
    return {"value": value}
  low, high = np.percentile(finite_S, [2.5, 97.5])
  return {"value": value, "low": float(low), "high": float(high)}


def interpolate_samples(
  curve: Sequence[tuple[np.ndarray, np.ndarray]], x_S: np.ndarray
) -> np.ndarray:
  """The height of a curve at x, sample by sample, float64 [S].

  The curve is linear between its points, each (x [S], height [S]). Outside of them the
  value over all items is NaN, and a resample has the height of the nearest point.
  """
  x_PS, height_PS = (np.stack(part) for part in zip(*curve))
  order_PS = np.argsort(x_PS, axis=0)
  x_PS = np.take_along_axis(x_PS, order_PS, axis=0)
  height_PS = np.take_along_axis(height_PS, order_PS, axis=0)
  result_S = np.array(
    [np.interp(x, x_P, height_P) for x, x_P, height_P in zip(x_S, x_PS.T, height_PS.T)]
  )
  if not x_PS[0, 0] <= x_S[0] <= x_PS[-1, 0]:
    result_S[0] = np.nan
  return result_S


def lowest_on_line(
  line: Sequence[tuple[np.ndarray, np.ndarray]], most_S: np.ndarray
) -> np.ndarray:
  """The lowest height of a line where x is at most a bound, float64 [S].

  The line is straight between each (x [S], height [S]) and the next, and may turn back.
  NaN where x is above the bound everywhere.

  Args:
    most_S: the bound on x, sample by sample.
  """
  x_PS, height_PS = (np.stack(part) for part in zip(*line))
  within_PS = x_PS <= most_S
  crosses_QS = within_PS[1:] != within_PS[:-1]  # Q = P - 1 pieces
  rise_QS = np.divide(
    np.diff(height_PS, axis=0),
    np.diff(x_PS, axis=0),
    out=np.zeros_like(x_PS[1:]),
    where=crosses_QS,
  )
  crossing_QS = height_PS[:-1] + (most_S - x_PS[:-1]) * rise_QS
  heights_S = np.concatenate(
    [np.where(within_PS, height_PS, np.inf), np.where(crosses_QS, crossing_QS, np.inf)]
  ).min(axis=0)
  return np.where(np.isinf(heights_S), np.nan, heights_S)
