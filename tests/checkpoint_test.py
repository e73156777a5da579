"""Checkpoints: whole round trips, and every way in which one may not be what it was."""

import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax import balance, checkpoint, errors, model, optim, step
from tests import model_test

CONFIG = model_test.CONFIG
SHAPES = model.shapes(CONFIG)
IDENTITY = {"model": "some/model", "data": "d1", "tokenizer": "t1"}


def make_state(seed=0):
  params = model.init(jax.random.key(seed), CONFIG)
  optimizer = optim.chain(
    balance.balance_by_ema(),
    optax.constant_schedule(1e-3),
    weight_decay=0.01,
    clip=1.0,
  )
  grads = jax.tree.map(jnp.ones_like, params)
  losses = {"sft": jnp.float32(2.0), "kd": jnp.float32(0.5)}
  _, opt_state = optimizer.update(
    grads, optimizer.init(params), params, losses=losses, valid=None
  )
  return step.TrainState(jnp.int32(7), params, opt_state)


def abstract(state):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
    state,
  )


@pytest.fixture
def saved(tmp_path):
  state = make_state()
  with checkpoint.manager(tmp_path, keep=2) as orbax:
    for number in (5, 6, 7):
      checkpoint.save(orbax, number, state, IDENTITY)
  return tmp_path, state


def restore(folder, state, identity=IDENTITY):
  with checkpoint.manager(folder, keep=2) as orbax:
    checkpoint.check_latest(orbax, identity)
    return checkpoint.restore(orbax, abstract(state))


def test_everything_comes_back_bit_for_bit_and_old_steps_go(saved):
  folder, state = saved
  restored, number = restore(folder, state)
  assert number == 7
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert restored.opt_state["balance"].weights["kd"] == pytest.approx(4.0)
  assert {path.name for path in (folder / "checkpoints").iterdir()} == {"6", "7"}


def test_parameters_alone_come_back(saved):
  folder, state = saved
  params, number = checkpoint.restore_params(folder, SHAPES, {"model": "some/model"})
  assert number == 7
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_no_checkpoint_says_what_to_run(tmp_path):
  with pytest.raises(errors.UserError, match=r"no checkpoint.*raft_jax\.train"):
    checkpoint.restore_params(tmp_path, SHAPES, {"model": "some/model"})


@pytest.mark.parametrize("key", list(IDENTITY))
def test_another_run_is_refused_by_name(saved, key):
  folder, state = saved
  with pytest.raises(errors.UserError, match=f"whose {key} was"):
    restore(folder, state, IDENTITY | {key: "other"})


def test_parameters_of_another_model_are_refused(saved):
  folder, _ = saved
  with pytest.raises(errors.UserError, match="whose model was 'some/model'"):
    checkpoint.restore_params(folder, SHAPES, {"model": "other/model"})


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(tmp_path):
  state = make_state()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # as on a full disk
  try:
    with (
      pytest.raises(errors.UserError, match=r"was not saved .* GiB free"),
      checkpoint.manager(tmp_path, keep=2) as orbax,
    ):
      checkpoint.save(orbax, 7, state, IDENTITY)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def data_files(folder):
  """Files that hold array data of step 7, largest first."""
  files = [f for f in (folder / "checkpoints/7/state").rglob("*") if f.is_file()]
  return sorted(files, key=lambda f: f.stat().st_size, reverse=True)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_array_data_never_passes(saved, damage):
  folder, state = saved
  file = data_files(folder)[0]
  content = bytearray(file.read_bytes())
  if damage == "flip":
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
  elif damage == "truncate":
    file.write_bytes(content[: len(content) // 2])
  else:
    file.unlink()
  with pytest.raises(errors.UserError, match="checkpoints/7"):
    restore(folder, state)
  with pytest.raises(errors.UserError, match="checkpoints/7"):
    checkpoint.restore_params(folder, SHAPES, {"model": "some/model"})
  # The remedy that the message names works.
  shutil.rmtree(folder / "checkpoints/7")
  assert restore(folder, state)[1] == 6


def test_fingerprints_see_a_flipped_bit_and_a_swapped_row():
  leaf = jax.random.normal(jax.random.key(0), (6, 4))
  plain = checkpoint.named_fingerprints({"a": leaf})
  bits = np.array(leaf).view(np.uint32)
  bits[3, 2] ^= 1
  flipped = {"a": jnp.array(bits.view(np.float32))}
  swapped = {"a": leaf[jnp.array([1, 0, 2, 3, 4, 5])]}
  assert checkpoint.named_fingerprints(flipped) != plain
  assert checkpoint.named_fingerprints(swapped) != plain
  assert checkpoint.named_fingerprints({"a": leaf + 0}) == plain


def test_damage_is_not_logged_beside_the_error_that_is_raised(saved, caplog):
  folder, _ = saved
  (folder / "checkpoints/7/_CHECKPOINT_METADATA").write_text("junk")
  shutil.rmtree(folder / "checkpoints/7/state")
  with pytest.raises(errors.UserError, match="cannot be restored"):
    checkpoint.restore_params(folder, SHAPES, IDENTITY)
  assert caplog.records == []
