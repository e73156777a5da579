"""The table of axes, and training steps that do not depend on the mesh."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from raft_jax import errors
from raft_jax.models import param_sharding, sharding, transformer
from tests.benchmarks import step_collectives
from tests.helpers import mesh_steps, simulated_devices

# Compiled by the fast tests; the slow one takes all of `mesh_steps.MESHES`.
FAST_MESHES = (
  *("tensor", "all", "fsdp, rollouts over 4", "packed, batch in two parts"),
)


def sized(data, fsdp, tensor):
  """A mesh of any size on any machine; it can place arrays, but holds none."""
  return jax.sharding.AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES)


def test_the_mesh_has_three_named_axes_and_every_device():
  devices = jax.device_count()
  for sizes in [(1, -1, 1), (devices, 1, 1), (1, 1, -1), (-1, 1, 1)]:
    mesh = sharding.make_mesh(*sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.size == devices
  assert dict(sharding.make_mesh(1, -1, 1).shape) == {
    "data": 1,
    "fsdp": devices,
    "tensor": 1,
  }


@pytest.mark.parametrize(
  "sizes", [(3, 7, 1), (1, 11, -1), (0, -1, 1), (0, 1, 1), (-2, -1, 1), (-1, -2, 1)]
)
def test_a_mesh_that_does_not_fit_is_the_users_to_change(sizes):
  data, fsdp, tensor = sizes
  with pytest.raises(errors.UserError) as caught:
    sharding.make_mesh(*sizes)
  assert str(caught.value) == (
    f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not fit "
    f"{jax.device_count()} devices; the sizes must multiply to that number "
    "(one may be -1)"
  )


def test_negative_sizes_do_not_make_up_for_each_other(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  with pytest.raises(errors.UserError, match="data=-2 x fsdp=-4 x tensor=1 does not"):
    sharding.make_mesh(-2, -4, 1)


def test_spec_looks_every_name_up():
  assert sharding.spec(("layers", "heads", "embed")) == PartitionSpec(
    None, "tensor", "fsdp"
  )
  assert sharding.spec(("batch",)) == PartitionSpec(("data", "fsdp"))
  with pytest.raises(KeyError, match="hidden"):
    sharding.spec(("embed", "hidden"))
  with pytest.raises(KeyError, match="hidden"):
    sharding.place(sized(1, 1, 1), ("hidden",), (4,))


def test_place_splits_what_divides_and_leaves_the_rest_whole():
  mesh = sized(2, 4, 3)
  cases = [
    (("vocab", "embed"), (96, 32), PartitionSpec("tensor", "fsdp"), (32, 8)),
    (("vocab", "embed"), (97, 32), PartitionSpec(None, "fsdp"), (97, 8)),
    (("vocab", "embed"), (96, 30), PartitionSpec("tensor", None), (32, 30)),
    (("layers", "mlp"), (6, 7), PartitionSpec(None, None), (6, 7)),
    # A batch divides by data x fsdp = 8, or not at all.
    (("batch",), (16,), PartitionSpec(("data", "fsdp")), (2,)),
    (("batch",), (12,), PartitionSpec(None), (12,)),
  ]
  for axes, shape, spec, shard in cases:
    placed = sharding.place(mesh, axes, shape)
    assert placed.spec == spec, (axes, shape)
    assert placed.shard_shape(shape) == shard
  with pytest.raises(ValueError, match="zip"):
    sharding.place(mesh, ("embed",), (32, 32))


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_place(tied):
  decoder = dataclasses.replace(mesh_steps.DECODER, tie_embeddings=tied)
  shapes = transformer.shapes(decoder)
  placed = sharding.tree(sized(2, 2, 2), param_sharding.axes(decoder), shapes)
  assert jax.tree.structure(placed) == jax.tree.structure(shapes)
  # Kernels over fsdp and tensor, norm scales over fsdp: an eighth to a half each.
  parts = jax.tree.map(
    lambda where, leaf: leaf.size // np.prod(where.shard_shape(leaf.shape)),
    placed,
    shapes,
  )
  norms = {"attn_norm", "mlp_norm"}
  assert parts["final_norm"] == 2
  assert parts["embed"] == parts.get("head", 4) == 4
  assert {n: p for n, p in parts["layers"].items() if n in norms} == {
    "attn_norm": 2,
    "mlp_norm": 2,
  }
  assert {p for n, p in parts["layers"].items() if n not in norms} == {4}


def test_batches_are_split_by_rows_and_scalars_are_whole():
  mesh = sized(2, 2, 2)
  assert sharding.batch(mesh).shard_shape((8, 5)) == (2, 5)
  assert sharding.replicated(mesh).shard_shape((8, 5)) == (8, 5)
  one = sharding.make_mesh(1, -1, 1)
  rows = jax.device_put(jnp.zeros((jax.device_count(), 3)), sharding.batch(one))
  assert len(rows.addressable_shards) == jax.device_count()


@pytest.fixture(scope="module")
def arrived(tmp_path_factory):
  """What two steps on each mesh arrive at, from a process with 8 devices."""
  names = (mesh_steps.ONE, *FAST_MESHES, mesh_steps.ONE_ADAPTERS, mesh_steps.ADAPTERS)
  return run_steps(tmp_path_factory.mktemp("mesh") / "arrived.npz", *names)


def run_steps(path, *meshes):
  subprocess.run(
    [sys.executable, "-m", "tests.helpers.mesh_steps", str(path), *meshes],
    check=True,
    timeout=600,
    cwd=pathlib.Path(__file__).parents[2],
    env={
      **os.environ,
      "XLA_FLAGS": simulated_devices.flags(8),
      "JAX_PLATFORMS": "cpu",
      # Compiling is most of the time; what is partitioned does not change.
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
  )
  with np.load(path) as file:
    return dict(file)


def named(arrived, prefix):
  found = {
    key.removeprefix(prefix): value
    for key, value in arrived.items()
    if key.startswith(prefix)
  }
  assert found
  return found


def test_the_reference_is_worth_comparing_with(arrived):
  """Rollouts of several lengths, a weight and losses that are not 0, and motion."""
  one = f"{mesh_steps.ONE}: "
  for index in range(mesh_steps.STEPS):
    assert len(set(arrived[f"{one}rollout {index} ['length_B']"])) > 1
    for name in ("loss_sft", "loss_kd", "kd_weight", "grad_norm"):
      assert arrived[f"{one}values {index} ['{name}']"] > 0.1
  for name, start in named(arrived, "start ").items():
    moved = np.linalg.norm(arrived[f"{one}params {name}"] - start)
    assert moved > 1e-3 * np.linalg.norm(start), name


def check_rollouts(arrived, mesh):
  """The same tokens."""
  ours, theirs = (
    named(arrived, f"{name}: rollout ") for name in (mesh, mesh_steps.ONE)
  )
  assert len(theirs) == 2 * mesh_steps.STEPS
  for name, tokens in theirs.items():
    np.testing.assert_array_equal(ours[name], tokens, err_msg=name)


def check_losses_and_their_balance(arrived, mesh):
  ours, theirs = (named(arrived, f"{name}: values ") for name in (mesh, mesh_steps.ONE))
  for index in range(mesh_steps.STEPS):
    assert f"{index} ['kd_weight']" in theirs
  for name, value in theirs.items():
    np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)


def check_gradients(arrived, mesh):
  """Of each tensor, in norm."""
  theirs = named(arrived, f"{mesh_steps.ONE}: first ")
  assert len(theirs) == 11
  for name, value in theirs.items():
    error = np.linalg.norm(arrived[f"{mesh}: first {name}"] - value)
    assert np.linalg.norm(value) > 0, name
    assert error <= 1e-5 * np.linalg.norm(value), name


def check_how_parameters_move(arrived, mesh):
  """Each tensor within a hundredth of its own motion (largest measured: 0.001)."""
  for name, start in named(arrived, "start ").items():
    ours, theirs = (
      arrived[f"{which}: params {name}"] for which in (mesh, mesh_steps.ONE)
    )
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start)
    assert error < 1e-2, (name, error)


Q, DOWN, EMBED = "['layers']['q']", "['layers']['down']", "['embed']"
SHARDS = {
  "data": {Q: (2, 32, 32), DOWN: (2, 32, 44), EMBED: (96, 32)},
  "fsdp": {Q: (2, 32, 4), DOWN: (2, 4, 44), EMBED: (96, 4)},
  # 44 does not divide by 8.
  "tensor": {Q: (2, 4, 32), DOWN: (2, 32, 44), EMBED: (12, 32)},
  "all": {Q: (2, 16, 16), DOWN: (2, 16, 22), EMBED: (48, 16)},
}


def check_shares(arrived, mesh):
  """After a step each device still holds its share only."""
  for kind in ("params", "adam"):
    for name, shape in SHARDS.get(mesh, {}).items():
      assert tuple(arrived[f"{mesh}: shards ['{kind}']{name}"]) == shape, (mesh, name)


CHECKS = (
  check_rollouts,
  check_losses_and_their_balance,
  check_gradients,
  check_how_parameters_move,
  check_shares,
)


@pytest.mark.parametrize("mesh", FAST_MESHES)
@pytest.mark.parametrize("check", CHECKS)
def test_two_steps_are_the_same_on_one_device_and_on_a_mesh(arrived, mesh, check):
  check(arrived, mesh)


@pytest.mark.slow
def test_two_steps_are_the_same_on_every_mesh(tmp_path):
  arrived = run_steps(tmp_path / "arrived.npz")
  for mesh in mesh_steps.MESHES:
    if mesh != mesh_steps.ONE:
      for check in CHECKS:
        check(arrived, mesh)
  for how in ("", ", layers apart"):
    check_adapters(arrived, how)


@pytest.mark.slow
def test_a_mixture_of_experts_trains_the_same_on_any_mesh(tmp_path):
  """Rollouts token for token, losses, the router's load, gradients and placement."""
  arrived = run_steps(tmp_path / "arrived.npz", *mesh_steps.EXPERT_MESHES)
  one = mesh_steps.ONE_EXPERTS
  for mesh in mesh_steps.EXPERT_MESHES:
    for name, tokens in named(arrived, f"{one}: rollout ").items():
      np.testing.assert_array_equal(arrived[f"{mesh}: rollout {name}"], tokens, name)
    for name, value in named(arrived, f"{one}: values ").items():
      ours = arrived[f"{mesh}: values {name}"]
      np.testing.assert_allclose(ours, value, rtol=1e-4, err_msg=f"{mesh}: {name}")
    for name, value in named(arrived, f"{one}: first ").items():
      error = np.linalg.norm(arrived[f"{mesh}: first {name}"] - value)
      assert np.linalg.norm(value) > 0, name
      assert error <= 1e-5 * np.linalg.norm(value), (mesh, name)
  assert f"{one}: values 1 ['router_max_share']" in arrived
  gate = "shards ['params']['layers']['gate']"  # [layers, experts, width, embed]
  assert tuple(arrived[f"tensor, experts: {gate}"]) == (2, 1, 16, 32)
  assert tuple(arrived[f"all, experts: {gate}"]) == (2, 4, 16, 16)


def test_adapters_train_the_same_on_eight_devices(arrived):
  check_adapters(arrived, "")


def check_adapters(arrived, how):
  """Rollouts token for token, losses, and each half of an adapter."""
  mesh, one = f"{mesh_steps.ADAPTERS}{how}: ", f"{mesh_steps.ONE_ADAPTERS}: "
  for name, tokens in named(arrived, f"{one}rollout ").items():
    np.testing.assert_array_equal(arrived[f"{mesh}rollout {name}"], tokens, name)
  for name, value in named(arrived, f"{one}values ").items():
    ours = arrived[f"{mesh}values {name}"]
    np.testing.assert_allclose(ours, value, rtol=1e-5, err_msg=name)
  starts = named(arrived, "adapters at start ")
  assert len(starts) == 2 * 7
  for name, start in starts.items():
    ours, theirs = (arrived[f"{which}params {name}"] for which in (mesh, one))
    moved = np.linalg.norm(theirs - start)
    assert moved > 1e-3 * np.linalg.norm(start), name
    assert np.linalg.norm(ours - theirs) < 1e-2 * moved, name
  a, b = ("['lora']['q']['a']", "['lora']['q']['b']")
  for kind in ("params", "adam"):
    # The rank stays whole; the model's width lies over fsdp, the heads over tensor.
    assert tuple(arrived[f"{mesh}shards ['{kind}']{a}"]) == (2, 4, 16)
    assert tuple(arrived[f"{mesh}shards ['{kind}']{b}"]) == (2, 16, 4)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["int8", "nf4", "kinds"])
def test_other_models_train_the_same_on_eight_devices(tmp_path, which):
  """Adapters of a quantised one, and layers of several kinds.

  Rollouts token for token, losses and gradients.
  """
  others = {**mesh_steps.QUANTISED_MESHES, "kinds": mesh_steps.KIND_MESHES}
  one, *meshes = others[which]
  arrived = run_steps(tmp_path / "arrived.npz", one, *meshes)
  for mesh in meshes:
    for name, tokens in named(arrived, f"{one}: rollout ").items():
      np.testing.assert_array_equal(arrived[f"{mesh}: rollout {name}"], tokens, name)
    for name, value in named(arrived, f"{one}: values ").items():
      ours = arrived[f"{mesh}: values {name}"]
      # The second step follows Adam's first, which makes the most of round-off.
      rtol = 1e-3 if which == "kinds" and name.startswith("1") else 1e-5
      np.testing.assert_allclose(ours, value, rtol=rtol, err_msg=f"{mesh}: {name}")
    for name, value in named(arrived, f"{one}: first ").items():
      error = np.linalg.norm(arrived[f"{mesh}: first {name}"] - value)
      assert np.linalg.norm(value) > 0, name
      assert error <= 1e-5 * np.linalg.norm(value), (mesh, name)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_tensor_parallel_step_sends_neither_logits_nor_the_vocabulary(tmp_path, head):
  """Sums of partial products, and of the top K each device's own candidates."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.benchmarks.step_collectives", str(tmp_path), head],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert {name: program["kinds"] for name, program in found.items()} == {
    "rollout": ["all-gather", "all-reduce"],
    "teacher": ["all-gather", "all-reduce"],
    "update": ["all-reduce"],
  }
  vocabulary = step_collectives.VOCABULARY
  for name, program in found.items():
    assert program["shapes"], name
    for shape in program["shapes"]:
      assert not {vocabulary, vocabulary // 8} & set(shape), (name, shape)
  assert [16 * 12, 8 * 32] in found["teacher"]["shapes"]  # K of each of 8 devices
