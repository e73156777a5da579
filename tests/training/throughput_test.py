"""The speed of a step, by hand."""

import pytest

from raft_jax.training import throughput

TOKENS = {"rollout": 300.0, "teacher": 500.0, "update": 1000.0}


def test_flops_utilization_by_hand():
  """2 N (300 + 500) forward and 6 N 1000, or 4 N 1000, in 2 s of 10^6 FLOP/s."""
  full = throughput.Meter(active=100, trains_weights=True, peak=1e6)
  assert throughput.of_step(full, TOKENS, 2.0) == {
    "tokens_per_s": 500.0,
    "mfu": pytest.approx((160_000 + 600_000) / 2e6),
  }
  adapters = full._replace(trains_weights=False)
  assert throughput.of_step(adapters, TOKENS, 2.0)["mfu"] == pytest.approx(
    (160_000 + 400_000) / 2e6
  )
  alone = throughput.of_step(full, {"update": 1000.0}, 2.0)
  assert alone["mfu"] == pytest.approx(600_000 / 2e6)


def test_devices_are_known_by_name():
  names = ("NVIDIA A100-SXM4-80GB", "TPU v5 lite", "TPU v5", "cpu")
  assert [throughput.peak_flops(name) for name in names] == [
    312e12,
    197e12,
    459e12,
    None,
  ]
  unknown = throughput.Meter(active=100, trains_weights=True, peak=None)
  assert "mfu" not in throughput.of_step(unknown, TOKENS, 2.0)
