"""Configs that do not fit their mesh."""

import jax
import pytest

from raft_jax import errors
from raft_jax.models import sharding
from raft_jax.training import plan_checks


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
