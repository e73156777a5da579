"""Means resampled together, against closed forms and numpy's own interpolation."""

import numpy as np
import pytest

from raft_jax.evaluation import bootstrap, intervals


def test_the_interval_is_that_of_the_plain_bootstrap():
  values = np.random.default_rng(3).exponential(2.0, 80)
  found = bootstrap.describe(bootstrap.means(values, "test questions"))
  low, high = intervals.interval(intervals.Scores(values))
  assert found["value"] == pytest.approx(values.mean())
  # Two sets of 10,000 resamples agree to a few percent of the width.
  assert found["low"] == pytest.approx(low, abs=0.05 * (high - low))
  assert found["high"] == pytest.approx(high, abs=0.05 * (high - low))


def test_weights_count_answers():
  values, weights = np.array([1.0, 0.0, 0.5]), np.array([1.0, 3.0, 2.0])
  samples = bootstrap.means(values, "x", weights)
  assert samples[0] == pytest.approx((1.0 + 0.0 + 1.0) / 6)
  assert samples.min() == 0.0  # a resample of the second item alone
  assert samples.max() == 1.0


def test_the_same_items_are_resampled_together_and_others_apart():
  rng = np.random.default_rng(4)
  values = rng.normal(0.0, 1.0, 50)
  one, shifted = bootstrap.means(values, "a"), bootstrap.means(values - 0.25, "a")
  np.testing.assert_allclose(one - shifted, 0.25)
  other = bootstrap.means(values, "b")
  assert abs(np.corrcoef(one[1:], other[1:])[0, 1]) < 0.05
  # Of independent sets the variance of the difference is the sum of both.
  assert np.var(one - other) == pytest.approx(2 * np.var(one), rel=0.1)


def test_resamples_come_in_batches_that_bound_memory(monkeypatch):
  values = np.arange(7.0)
  whole = bootstrap.means(values, "batches")
  bootstrap._counts.cache_clear()
  monkeypatch.setattr(bootstrap, "BATCH", 700)
  np.testing.assert_allclose(bootstrap.means(values, "batches"), whole)
  bootstrap._counts.cache_clear()


def test_what_holds_no_answer_says_nothing():
  samples = bootstrap.means(np.zeros(3), "none", np.zeros(3))
  assert bootstrap.describe(samples) == {}


def test_a_curve_is_read_off_in_every_sample():
  places = [np.array([4.0, 4.0]), np.array([3.0, 2.0]), np.array([2.0, 3.0])]
  heights = [np.array([0.0, 0.0]), np.array([0.1, 0.4]), np.array([0.4, 0.1])]
  curve = list(zip(places, heights))
  found = bootstrap.read_off(curve, np.array([2.5, 3.5]))
  # Between 2 (0.4) and 3 (0.1); then between 3 (0.1) and 4 (0).
  np.testing.assert_allclose(found, [0.25, 0.05])
  outside = bootstrap.read_off(curve, np.array([1.9, 1.9]))
  assert np.isnan(outside[0])
  assert outside[1] == pytest.approx(0.4)
