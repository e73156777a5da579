"""Intervals against closed forms, known distributions and scipy's own tests."""

import math

import numpy as np
import pytest

from raft_jax.evaluation import intervals


def test_bootstrap_covers_the_mean_in_95_percent_of_samples():
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(300):
    low, high = intervals.interval(intervals.Scores(rng.exponential(2.0, 60)))
    hits += low <= 2.0 <= high
  # Binomial(300, 0.95) +- 3 sd is 0.91..0.99; percentile intervals of 60 skewed values
  # are known to be a little short (about 0.93).
  assert 0.89 <= hits / 300 <= 0.98


def test_bootstrap_width_is_that_of_the_normal_interval():
  values = np.random.default_rng(1).normal(3.0, 2.0, 30_000)  # many blocks of memory
  low, high = intervals.interval(intervals.Scores(values))
  half = 1.96 * values.std() / np.sqrt(len(values))
  assert (high - low) / 2 == pytest.approx(half, rel=0.05)
  assert (high + low) / 2 == pytest.approx(values.mean(), abs=half / 10)


def test_bootstrap_of_degenerate_samples():
  assert intervals.interval(intervals.Scores(np.array([1.5]))) == (1.5, 1.5)
  assert intervals.interval(intervals.Scores(np.full(9, -2.0))) == (-2.0, -2.0)
  assert intervals.interval(intervals.Scores(np.arange(5.0))) == intervals.interval(
    intervals.Scores(np.arange(5.0))
  )
  with pytest.raises(ValueError, match="at least one"):
    intervals.interval(intervals.Scores(np.array([])))


def test_a_share_has_wilsons_interval():
  # Centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (...).
  z, n, p = 1.959963984540054, 12, 9 / 12
  scale = 1 + z**2 / n
  centre = (p + z**2 / (2 * n)) / scale
  half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
  low, high = intervals.interval(
    intervals.Scores(np.array([1.0] * 9 + [0.0] * 3), share=True)
  )
  assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_a_share_of_nothing_has_room_above():
  described = intervals.describe(intervals.Scores(np.zeros(10), share=True))
  # With p = 0 the upper end is z^2 / (n + z^2).
  assert described["low"] == pytest.approx(0.0, abs=1e-12)
  assert described["high"] == pytest.approx(3.841459 / 13.841459, rel=1e-5)
  assert described["n"] == 10


def test_weights_count_answers_within_an_item():
  # 1 of 1 and 1 of 3 instructions: 2 of 4, not the mean of 1 and 1/3.
  scores = intervals.Scores(np.array([1.0, 1 / 3]), np.array([1.0, 3.0]))
  assert intervals.mean(scores) == pytest.approx(0.5)
  low, high = intervals.interval(scores)
  # Items are resampled whole: both first, or both second.
  assert (low, high) == pytest.approx((1 / 3, 1.0))


def test_items_without_an_answer_move_no_interval():
  values, weights = np.array([1.0, 0.0, 0.5]), np.array([2.0, 1.0, 2.0])
  padded = intervals.Scores(np.append(values, [0, 0]), np.append(weights, [0, 0]))
  found = intervals.interval(padded)
  assert found == intervals.interval(intervals.Scores(values, weights))
  assert np.isfinite(found).all()


def test_mcnemar_counts_only_the_items_that_changed():
  base = np.array([1.0] * 6 + [0.0] * 2 + [1.0] * 20)
  trained = np.array([0.0] * 6 + [1.0] * 2 + [1.0] * 20)
  # 2 of 8 changes are gains: 2 * P(X <= 2), X ~ Binomial(8, 1/2) = 2 * 37 / 256.
  assert intervals.mcnemar(base, trained) == pytest.approx(74 / 256)
  assert intervals.mcnemar(base, base) == 1.0
  compared = intervals.compare(
    intervals.Scores(base, share=True), intervals.Scores(trained, share=True)
  )
  assert compared["difference"] == pytest.approx(-4 / 28)
  assert compared["p"] == pytest.approx(74 / 256)
  assert compared["low"] < compared["difference"] < compared["high"]


def test_only_shares_are_given_a_p_and_wilsons_interval():
  drift = intervals.Scores(np.zeros(3))  # happens to look like one
  assert "p" not in intervals.compare(drift, drift)
  assert intervals.interval(drift) == (0.0, 0.0)


def test_retention_is_a_ratio_of_means_on_the_same_items():
  base = intervals.Scores(np.random.default_rng(0).uniform(0.5, 1.0, 50))
  half = intervals.Scores(base.values_N / 2)
  # Every item kept exactly half: so does every resample.
  assert intervals.retention(base, half) == pytest.approx(
    {"value": 50.0, "low": 50.0, "high": 50.0}
  )


def test_retention_of_nothing_is_not_a_number():
  nothing = intervals.Scores(np.zeros(5))
  some = intervals.Scores(np.array([1.0, 0, 0, 0, 0]))
  assert intervals.retention(nothing, some) == {}
  # A resample without the one success has no ratio: the value stays, no interval.
  assert intervals.retention(some, some) == {"value": 100.0}
