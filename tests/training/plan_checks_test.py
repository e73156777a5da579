"""Configs that do not fit their model or their mesh."""

import dataclasses

import jax
import pytest

from raft_jax import errors
from raft_jax.models import rotary, sharding
from raft_jax.training import plan_checks
from tests.helpers import tiny_decoder


def test_only_devices_that_held_shards_can_share_the_weights_of_a_rollout():
  mesh = jax.sharding.AbstractMesh((2, 6, 2), sharding.MESH_AXES)
  for fits in (2, 4, 6, 12):
    plan_checks.check_rollout_tensor(fits, mesh)
  for tensor in (1, 3, 8, 24):
    with pytest.raises(errors.UserError) as caught:
      plan_checks.check_rollout_tensor(tensor, mesh)
    assert str(caught.value) == (
      f"rollout.tensor: {tensor} devices cannot share the weights on a mesh of "
      "fsdp=6 x tensor=2; set 2 or 4 or 6 or 12, or null"
    )


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"delta": object()}, "layers that carry a state"),
    ({"ropes": (rotary.Rope(1e4, long_divisors=(1.0,)),)}, "depend on the length"),
  ],
)
def test_networks_that_cannot_be_packed_are_refused(change, says):
  decoder = dataclasses.replace(tiny_decoder.CONFIG, **change)
  with pytest.raises(errors.UserError, match=f"train.packing: a/model .*{says}"):
    plan_checks.check_packing("a/model", decoder)
  plan_checks.check_packing("a/model", tiny_decoder.CONFIG)
