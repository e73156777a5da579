"""Checkpoints: whole round trips, and every way in which one may not be what it was."""

import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax import balance, errors
from raft_jax.distillation import step
from raft_jax.models import transformer
from raft_jax.training import checkpoint, optim, tree_fingerprints
from tests.helpers import tiny_decoder

CONFIG = tiny_decoder.CONFIG
SHAPES = transformer.shapes(CONFIG)
IDENTITY = {"model": "some/model", "data": "d1", "tokenizer": "t1"}


def make_state(seed=0):
  params = transformer.init(jax.random.key(seed), CONFIG)
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


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  folder = tmp_path_factory.mktemp("original")
  state = make_state()
  with checkpoint.manager(folder, keep=2) as orbax:
    for number in (5, 6, 7):
      checkpoint.save(orbax, number, state, IDENTITY)
  return folder, state


@pytest.fixture
def saved(original, tmp_path):
  """A run's folder of its own with checkpoints of steps 6 and 7, and their state."""
  folder, state = original
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  return tmp_path, state


def restore(folder, state, identity=IDENTITY, **options):
  with checkpoint.manager(folder, keep=2) as orbax:
    checkpoint.check_latest(orbax, identity, **options)
    return checkpoint.restore(orbax, abstract(state), identity, **options)


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


def damage(file, how):
  content = bytearray(file.read_bytes())
  if how == "flip":
    content[len(content) // 2] ^= 1
  file.write_bytes({"truncate": content[:-1], "empty": b""}.get(how, content))
  if how == "delete":
    file.unlink()


# Of the step itself: Orbax writes these last, and no array hangs on them.
MARKS = {checkpoint.UNSEALED, "commit_success.txt"}


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "empty"])
def test_damage_to_any_file_is_named_with_the_step_before(saved, how):
  folder, state = saved
  whole, kept = folder / "checkpoints/7", folder / "kept"
  shutil.copytree(whole, kept)
  files = [path.relative_to(kept) for path in kept.rglob("*") if path.is_file()]
  assert len(files) > 10
  for name in files:
    damage(whole / name, how)
    if str(name) in MARKS:
      jax.tree.map(np.testing.assert_array_equal, restore(folder, state)[0], state)
    else:
      with pytest.raises(errors.UserError) as caught:
        restore(folder, state)
      assert str(caught.value).startswith(f"{whole / name}: "), name
      assert "go on from the step before (6)" in str(caught.value), name
      with pytest.raises(errors.UserError, match="checkpoints/7"):
        checkpoint.restore_params(folder, SHAPES, {"model": "some/model"})
    shutil.rmtree(whole)
    shutil.copytree(kept, whole)
  # The remedy that the message names works.
  shutil.rmtree(whole)
  assert restore(folder, state)[1] == 6


def flip_an_array(folder):
  """A bit of the largest file of step 7, which holds array data."""
  files = (folder / "checkpoints/7/state").rglob("*/d/*")
  damage(max(files, key=lambda path: path.stat().st_size), "flip")


def test_a_flipped_bit_in_a_file_too_large_for_a_digest_is_seen(saved, monkeypatch):
  folder, state = saved
  monkeypatch.setattr(checkpoint, "LARGE", 0)
  checkpoint.seal(folder / "checkpoints/7")
  flip_an_array(folder)
  with pytest.raises(errors.UserError, match=r"checkpoints/7: the bytes of .*\(6\)"):
    restore(folder, state)
  with pytest.raises(errors.UserError, match="checkpoints/7: "):
    checkpoint.restore_params(folder, SHAPES, {"model": "some/model"})
  # Found only when it is restored, and gone back from all the same.
  assert restore(folder, state, on_corrupt="previous")[1] == 6


def test_going_back_is_loud_and_keeps_the_damaged_step(saved, capsys):
  folder, state = saved
  flip_an_array(folder)
  restored, number = restore(folder, state, on_corrupt="previous")
  assert number == 6
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  said = capsys.readouterr().out
  assert said.count("WARNING: ") == 2
  assert "going back to step 6" in said
  assert {path.name for path in (folder / "checkpoints").iterdir()} == {
    *("6", "damaged-7")
  }
  # The step comes again, and nothing is in its way.
  with checkpoint.manager(folder, keep=2) as orbax:
    checkpoint.save(orbax, 7, state, IDENTITY)
  assert restore(folder, state)[1] == 7


def test_an_empty_step_is_damage_and_another_run_is_not(saved):
  folder, state = saved
  (folder / "checkpoints/8").mkdir()
  with pytest.raises(errors.UserError, match=r"checkpoints/8: .*\(7\)"):
    restore(folder, state)
  with pytest.raises(errors.UserError, match="whose data was"):
    restore(folder, state, IDENTITY | {"data": "other"}, on_corrupt="previous")
  assert not (folder / "checkpoints/damaged-7").exists()


def test_what_else_lies_beside_the_steps_is_no_step(saved):
  folder, state = saved
  for name in ("notes", "7.copy", "9.orbax-checkpoint-tmp"):
    (folder / "checkpoints" / name).mkdir()
  (folder / "checkpoints/list.txt").write_text("8 9")
  assert restore(folder, state)[1] == 7
  assert (folder / "checkpoints/notes").is_dir()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_old_step_that_is_half_deleted_harms_nothing(saved, share):
  """What a kill leaves that comes while Orbax deletes a step."""
  folder, state = saved
  old = folder / "checkpoints/6"
  files = sorted(path for path in old.rglob("*") if path.is_file())
  for path in files[: round(len(files) * share)]:
    path.unlink()
  restored, number = restore(folder, state)
  assert number == 7
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  with checkpoint.manager(folder, keep=1) as orbax:
    checkpoint.save(orbax, 8, state, IDENTITY)
  assert {path.name for path in (folder / "checkpoints").iterdir()} == {"8"}
  assert restore(folder, state)[1] == 8


def test_values_are_not_cast_to_another_type(saved):
  folder, state = saved
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
  with pytest.raises(errors.UserError, match="are not those that were saved"):
    restore(folder, state._replace(params=params))


def test_a_relative_path_with_spaces_and_a_link_is_a_folder(tmp_path, monkeypatch):
  state = make_state()
  (tmp_path / "another disk").mkdir()
  (tmp_path / "my runs").symlink_to(tmp_path / "another disk")
  monkeypatch.chdir(tmp_path)
  with checkpoint.manager("my runs/a b/../c", keep=1) as orbax:
    for number in (1, 2):
      checkpoint.save(orbax, number, state, IDENTITY)
  steps = tmp_path / "another disk/c/checkpoints"
  assert {path.name for path in steps.iterdir()} == {"2"}
  params, _ = checkpoint.restore_params("my runs/c", SHAPES, IDENTITY)
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_an_old_step_that_is_a_link_is_refused_before_it_must_be_deleted(
  saved, tmp_path_factory
):
  folder, state = saved
  elsewhere = tmp_path_factory.mktemp("elsewhere") / "6"
  shutil.move(folder / "checkpoints/6", elsewhere)
  (folder / "checkpoints/6").symlink_to(elsewhere)
  before = sorted(elsewhere.rglob("*"))
  with pytest.raises(errors.UserError, match=r"6: is a symbolic link; move"):
    restore(folder, state)
  assert sorted(elsewhere.rglob("*")) == before != []


def test_without_a_step_to_go_back_to_damage_stops_the_run(saved):
  folder, state = saved
  shutil.rmtree(folder / "checkpoints/6")
  flip_an_array(folder)
  with pytest.raises(errors.UserError, match="no earlier step is left"):
    restore(folder, state, on_corrupt="previous")


def test_fingerprints_see_a_flipped_bit_and_a_swapped_row():
  leaf = jax.random.normal(jax.random.key(0), (6, 4))
  plain = tree_fingerprints.by_path({"a": leaf})
  bits = np.array(leaf).view(np.uint32)
  bits[3, 2] ^= 1
  flipped = {"a": jnp.array(bits.view(np.float32))}
  swapped = {"a": leaf[jnp.array([1, 0, 2, 3, 4, 5])]}
  assert tree_fingerprints.by_path(flipped) != plain
  assert tree_fingerprints.by_path(swapped) != plain
  assert tree_fingerprints.by_path({"a": leaf + 0}) == plain
  # By hand: the sum, and the sum weighted by 1, 3, 5, ... in row-major order.
  flat = np.array(leaf).view(np.uint32).ravel().astype(object)
  weighted = sum(int(x) * (2 * i + 1) for i, x in enumerate(flat))
  assert plain == {"a": [int(flat.sum()) % 2**32, weighted % 2**32]}


def test_damage_is_not_logged_beside_the_error_that_is_raised(saved, caplog):
  folder, _ = saved
  (folder / "checkpoints/7/_CHECKPOINT_METADATA").write_text("junk")
  shutil.rmtree(folder / "checkpoints/7/state")
  checkpoint.seal(folder / "checkpoints/7")  # or the seal would speak, not Orbax
  with pytest.raises(errors.UserError, match="cannot be restored"):
    checkpoint.restore_params(folder, SHAPES, IDENTITY)
  assert caplog.records == []
