"""Intervals against closed forms, known distributions, scipy's tests and numpy."""

import math

import numpy as np
import pytest

from raft_jax.evaluation import intervals


def test_bootstrap_covers_the_mean_in_95_percent_of_samples():
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(300):
    low, high = intervals.interval(intervals.ItemScores(rng.exponential(2.0, 60)))
    hits += low <= 2.0 <= high
  # Binomial(300, 0.95) +- 3 sd is 0.91..0.99; percentile intervals of 60 skewed values
  # are known to be a little short (about 0.93).
  assert 0.89 <= hits / 300 <= 0.98


def test_bootstrap_width_is_that_of_the_normal_interval():
  values = np.random.default_rng(1).normal(3.0, 2.0, 30_000)  # many blocks of memory
  low, high = intervals.interval(intervals.ItemScores(values))
  half = 1.96 * values.std() / np.sqrt(len(values))
  assert (high - low) / 2 == pytest.approx(half, rel=0.05)
  assert (high + low) / 2 == pytest.approx(values.mean(), abs=half / 10)


def test_bootstrap_of_degenerate_samples():
  assert intervals.interval(intervals.ItemScores(np.array([1.5]))) == (1.5, 1.5)
  assert intervals.interval(intervals.ItemScores(np.full(9, -2.0))) == (-2.0, -2.0)
  assert intervals.interval(intervals.ItemScores(np.arange(5.0))) == intervals.interval(
    intervals.ItemScores(np.arange(5.0))
  )
  with pytest.raises(ValueError, match="at least one"):
    intervals.interval(intervals.ItemScores(np.array([])))


def test_a_share_has_wilsons_interval():
  # Centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (...).
  z, n, p = 1.959963984540054, 12, 9 / 12
  scale = 1 + z**2 / n
  centre = (p + z**2 / (2 * n)) / scale
  half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
  low, high = intervals.interval(
    intervals.ItemScores(np.array([1.0] * 9 + [0.0] * 3), share=True)
  )
  assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_a_share_of_nothing_has_room_above():
  described = intervals.describe(intervals.ItemScores(np.zeros(10), share=True))
  # With p = 0 the upper end is z^2 / (n + z^2).
  assert described["low"] == pytest.approx(0.0, abs=1e-12)
  assert described["high"] == pytest.approx(3.841459 / 13.841459, rel=1e-5)
  assert described["n"] == 10


def test_weights_count_answers_within_an_item():
  # 1 of 1 and 1 of 3 instructions: 2 of 4, not the mean of 1 and 1/3.
  scores = intervals.ItemScores(np.array([1.0, 1 / 3]), np.array([1.0, 3.0]))
  assert intervals.mean(scores) == pytest.approx(0.5)
  low, high = intervals.interval(scores)
  # Items are resampled whole: both first, or both second.
  assert (low, high) == pytest.approx((1 / 3, 1.0))


def test_items_without_an_answer_move_no_interval():
  values, weights = np.array([1.0, 0.0, 0.5]), np.array([2.0, 1.0, 2.0])
  padded = intervals.ItemScores(np.append(values, [0, 0]), np.append(weights, [0, 0]))
  actual = intervals.interval(padded)
  assert actual == intervals.interval(intervals.ItemScores(values, weights))
  assert np.isfinite(actual).all()


def test_mcnemar_counts_only_the_items_that_changed():
  base = np.array([1.0] * 6 + [0.0] * 2 + [1.0] * 20)
  trained = np.array([0.0] * 6 + [1.0] * 2 + [1.0] * 20)
  # 2 of 8 changes are gains: 2 * P(X <= 2), X ~ Binomial(8, 1/2) = 2 * 37 / 256.
  assert intervals.mcnemar(base, trained) == pytest.approx(74 / 256)
  assert intervals.mcnemar(base, base) == 1.0
  compared = intervals.compare(
    intervals.ItemScores(base, share=True), intervals.ItemScores(trained, share=True)
  )
  assert compared["difference"] == pytest.approx(-4 / 28)
  assert compared["p"] == pytest.approx(74 / 256)
  assert compared["low"] < compared["difference"] < compared["high"]


def test_only_shares_are_given_a_p_and_wilsons_interval():
  drift = intervals.ItemScores(np.zeros(3))  # happens to look like one
  assert "p" not in intervals.compare(drift, drift)
  assert intervals.interval(drift) == (0.0, 0.0)


def test_retention_is_a_ratio_of_means_on_the_same_items():
  base = intervals.ItemScores(np.random.default_rng(0).uniform(0.5, 1.0, 50))
  half = intervals.ItemScores(base.values_N / 2)
  # Every item kept exactly half: so does every resample.
  assert intervals.retention(base, half) == pytest.approx(
    {"value": 50.0, "low": 50.0, "high": 50.0}
  )


def test_retention_of_nothing_is_not_a_number():
  nothing = intervals.ItemScores(np.zeros(5))
  some = intervals.ItemScores(np.array([1.0, 0, 0, 0, 0]))
  assert intervals.retention(nothing, some) == {}
  # A resample without the one success has no ratio: the value stays, no interval.
  assert intervals.retention(some, some) == {"value": 100.0}


def test_the_interval_is_that_of_the_plain_bootstrap():
  values = np.random.default_rng(3).exponential(2.0, 80)
  actual = intervals.describe_samples(
    intervals.resampled_means(values, "test questions")
  )
  low, high = intervals.interval(intervals.ItemScores(values))
  assert actual["value"] == pytest.approx(values.mean())
  # Two sets of 10,000 resamples agree to a few percent of the width.
  assert actual["low"] == pytest.approx(low, abs=0.05 * (high - low))
  assert actual["high"] == pytest.approx(high, abs=0.05 * (high - low))


def test_weights_count_answers():
  values, weights = np.array([1.0, 0.0, 0.5]), np.array([1.0, 3.0, 2.0])
  samples = intervals.resampled_means(values, "x", weights)
  assert samples[0] == pytest.approx((1.0 + 0.0 + 1.0) / 6)
  assert samples.min() == 0.0  # a resample of the second item alone
  assert samples.max() == 1.0


def test_the_same_items_are_resampled_together_and_others_apart():
  rng = np.random.default_rng(4)
  values = rng.normal(0.0, 1.0, 50)
  one, shifted = (
    intervals.resampled_means(values, "a"),
    intervals.resampled_means(values - 0.25, "a"),
  )
  np.testing.assert_allclose(one - shifted, 0.25)
  other = intervals.resampled_means(values, "b")
  assert abs(np.corrcoef(one[1:], other[1:])[0, 1]) < 0.05
  # Of independent sets the variance of the difference is the sum of both.
  assert np.var(one - other) == pytest.approx(2 * np.var(one), rel=0.1)


def test_resamples_come_in_batches_that_bound_memory(monkeypatch):
  values = np.arange(7.0)
  whole = intervals.resampled_means(values, "batches")
  intervals._resample_counts.cache_clear()
  monkeypatch.setattr(intervals, "BATCH", 700)
  np.testing.assert_allclose(intervals.resampled_means(values, "batches"), whole)
  intervals._resample_counts.cache_clear()


def test_what_holds_no_answer_says_nothing():
  samples = intervals.resampled_means(np.zeros(3), "none", np.zeros(3))
  assert intervals.describe_samples(samples) == {}


def test_a_curve_is_read_off_in_every_sample():
  places = [np.array([4.0, 4.0]), np.array([3.0, 2.0]), np.array([2.0, 3.0])]
  heights = [np.array([0.0, 0.0]), np.array([0.1, 0.4]), np.array([0.4, 0.1])]
  curve = list(zip(places, heights))
  actual = intervals.interpolate_samples(curve, np.array([2.5, 3.5]))
  # Between 2 (0.4) and 3 (0.1); then between 3 (0.1) and 4 (0).
  np.testing.assert_allclose(actual, [0.25, 0.05])
  outside = intervals.interpolate_samples(curve, np.array([1.9, 1.9]))
  assert np.isnan(outside[0])
  assert outside[1] == pytest.approx(0.4)


def test_the_lowest_height_of_a_line_within_a_bound_is_interpolated():
  line = [
    (np.array([0.0, 0.0]), np.array([4.0, 4.0])),
    (np.array([2.0, 1.0]), np.array([2.0, 3.0])),
    (np.array([1.0, 5.0]), np.array([3.5, 1.0])),
  ]
  actual = intervals.lowest_on_line(line, np.array([1.5, 4.0]))
  # First sample: up to 1.5 on the way from 0 (4) to 2 (2) is 2.5, and from 2 back to 1
  # (3.5) it is 2.75. Second: three quarters of the way from 1 (3) to 5 (1).
  np.testing.assert_allclose(actual, [2.5, 1.5])
  nowhere = intervals.lowest_on_line(line[1:], np.array([0.5, 1.0]))
  assert np.isnan(nowhere[0])
  assert nowhere[1] == pytest.approx(3.0)


def test_seeds_are_resampled_with_their_items():
  means_RS = np.stack([np.full(4001, 1.0), np.full(4001, 3.0)])
  mean_S = intervals.resampled_runs(means_RS, [0, 1])
  assert mean_S[0] == pytest.approx(2.0)
  # Both draws are the same seed in half of the resamples.
  values, counts = np.unique(mean_S[1:], return_counts=True)
  np.testing.assert_allclose(values, [1.0, 2.0, 3.0])
  np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)
  # The same seeds of another setting are drawn together, one run does not vary.
  np.testing.assert_array_equal(
    intervals.resampled_runs(2 * means_RS, [0, 1]), 2 * mean_S
  )
  one_S = np.arange(4001.0)
  np.testing.assert_array_equal(intervals.resampled_runs(one_S[None], [0]), one_S)
