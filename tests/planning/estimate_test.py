"""The arithmetic of memory and time, by hand."""

import pytest

from raft_jax.planning import estimate, machines, tables


def made_up(**own) -> dict:
  """1 GiB of each class beside an update with round costs."""
  phase = {
    "flops": 312e12,
    "temporaries": 10 * estimate.GIB,
    "output": 0,
    "code": 0,
    "traffic": 2 * 2039e9,
    "collectives": {"all-gather": [1, 300e9], "all-reduce": [9, 150e9]},
    "latency": 0.25,
    "largest": [],
  } | own
  memory = dict.fromkeys(
    ("parameters", "optimizer", "base model", "batch"), estimate.GIB
  )
  return {
    "parameters": 1000,
    "mesh": {"data": 1, "fsdp": 8, "tensor": 1},
    "rollouts": {"data": 1, "fsdp": 8, "tensor": 1},
    "other rollouts": {},
    "memory": {**memory, "cache": 0},
    "phases": {"update": phase, "measured update": {**phase, "flops": 4 * 312e12}},
  }


def test_the_roofline_by_hand():
  """1 s of FLOPs (the measured step: 4 s), 2 s of memory, 1.5 s of sending, and a
  quarter of a second of latency."""
  machine = machines.parse("a100_80:8")
  update = estimate.phase(made_up(), "update", machine)
  assert (update.compute, update.memory, update.wire) == (1.0, 2.0, 1.5)
  assert (update.seconds, update.serial_seconds, update.bound) == (2.25, 3.75, "memory")
  assert update.peak == 14 * estimate.GIB
  verdict = estimate.judge(
    made_up(), machine, share=0.75, total_steps=100, gradient_stats_every=20
  )
  assert verdict.fits
  assert verdict.limit == 0.75 * 85100068864
  assert verdict.step == (2.25, 3.75)
  # Five of the 100 steps are measured: 4.25 s, or 5.75 s, each instead.
  assert verdict.run == (2.25 * 100 + 5 * 2.0, 3.75 * 100 + 5 * 2.0)


def test_the_fastest_rollout_that_fits_is_named():
  """2.25 s on the run's own mesh; over 2 devices 1.25 s; over 4 it needs too much."""
  machine = machines.parse("a100_80:8")
  costs = made_up()
  own = costs["phases"]["update"]
  costs["phases"]["rollout"] = own
  halved = own | {"traffic": 2039e9, "flops": 0, "collectives": {}}
  costs["other rollouts"] = {
    "2": halved,
    "4": halved | {"traffic": 0, "temporaries": 90 * estimate.GIB},
    "8": {"flops": 1.0, "refused": "RESOURCE_EXHAUSTED: 90.00G"},
  }
  assert tables.rollouts_line(costs, machine, limit=60 * estimate.GIB) == (
    "rollout.tensor 1: 2,250 ms, 14.00 GiB; 2: 1,250 ms, 14.00 GiB; "
    "4: 250 ms, 94.00 GiB; 8: refused; the fastest that fits: 2"
  )
  assert tables.rollouts_line(costs, machine, limit=1).endswith("; none fits")


def test_a_refused_or_too_large_program_does_not_fit():
  machine = machines.parse("v5e:2x4")
  refused = made_up()
  refused["phases"]["update"] = {"flops": 1.0, "refused": "RESOURCE_EXHAUSTED: 16.00G"}
  options = {"share": 0.75, "total_steps": None, "gradient_stats_every": 20}
  assert not estimate.judge(refused, machine, **options).fits
  assert not estimate.judge(
    made_up(temporaries=12 * estimate.GIB), machine, **options
  ).fits
  assert estimate.judge(made_up(temporaries=11 * estimate.GIB), machine, **options).fits


@pytest.mark.parametrize(
  ("temporaries", "topology", "need"),
  [
    (10, "a100_80:2", 4 * 4 + 10 * 4),  # 56 of 59.4 GiB; one GPU would need 112
    (1, "a100_80:1", 4 * 8 + 1 * 8),
    (57, "a100_80:2x8", 4 / 2 + 57),  # does not fit on 8
  ],
)
def test_the_smallest_machine_by_its_bound(temporaries, topology, need):
  machine = machines.parse("a100_80:8")
  answer = made_up(temporaries=temporaries * estimate.GIB)
  fit = estimate.smallest_fit(answer, machine, 0.75, 16)
  assert fit.startswith(f"{topology} (at most {need:.1f} GiB a device")
  huge = made_up(temporaries=80 * estimate.GIB)
  assert estimate.smallest_fit(huge, machine, 0.75, 16).startswith(
    "none of a100_80:1, "
  )
