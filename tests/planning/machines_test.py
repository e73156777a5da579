"""Topologies: which words name a machine, and what the others say."""

import pytest

from raft_jax import errors
from raft_jax.planning import machines


def test_machines():
  assert machines.parse("a100_80:8").devices == 8
  assert machines.parse("v5p:2x2x2").devices == 8
  nodes = machines.parse("a100_80:2x8")
  # All eight cards of a node send what a ring over both nodes hands on.
  assert (nodes.devices, nodes.link) == (16, 8 * 25e9)
  assert machines.parse("h100:8").link == 450e9
  for kind in machines.CHIPS:
    sizes = [machine.devices for machine in machines.ladder(kind)]
    assert sizes == sorted(set(sizes)), kind


def test_the_latency_of_a_ring():
  """NCCL's model by hand: 6.6 µs, and 0.6 µs for each of 2 x 7, 7 or 1 steps."""
  gpus, chips = machines.parse("a100_80:8"), machines.parse("v5p:2x2x2")
  assert gpus.latency("all-reduce", 8) == pytest.approx(15.0e-6)
  assert gpus.latency("all-gather", 8) == pytest.approx(10.8e-6)
  assert gpus.latency("collective-permute", 8) == pytest.approx(7.2e-6)
  assert chips.latency("all-reduce", 4) == pytest.approx(6e-6)


@pytest.mark.parametrize(
  ("topology", "says"),
  [
    ("a100:8", "write KIND:SIZE with a kind of a100_40, a100_80, h100, v5e"),
    ("v5e", "write KIND:SIZE"),
    ("v5e:3x3", "there is no v5e of this size; e.g. v5e:1x1, v5e:2x2"),
    ("a100_80:16", "there is no a100_80 of this size; e.g. a100_80:1"),
    ("a100_80:0", "there is no a100_80 of this size"),
  ],
)
def test_an_unknown_topology_is_the_users_to_change(topology, says):
  with pytest.raises(errors.UserError, match=f"^--topology {topology}: {says}"):
    machines.parse(topology)
