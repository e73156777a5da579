"""An output folder keeps the config that its results were made with."""

import pathlib

import pytest

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import run_lock
from tests.helpers import least_config


@pytest.fixture(autouse=True)
def _root(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])  # paths of data start there


def lock(folder: pathlib.Path, *overrides: str, stage: str = "train") -> None:
  output = f"output={folder / 'run'}"
  keys = ["model.source", "train", "data.questions"]
  run_lock.lock_config(least_config.least(folder, output, *overrides), stage, keys)


def test_lock_records_and_compares(tmp_path):
  lock(tmp_path)
  recorded = tmp_path / "run/config/train.yaml"
  assert config_load.load(recorded) == least_config.least(
    tmp_path, f"output={tmp_path / 'run'}"
  )
  lock(tmp_path, "evaluate.limit=3")  # not a locked key: allowed, and recorded
  assert config_load.load(recorded).evaluate.limit == 3
  lock(tmp_path, "train.batch_size=4")  # nothing was made under the first lock
  lock(tmp_path)
  (tmp_path / "run/metrics.jsonl").touch()
  lock(tmp_path, "train.batch_size=4")  # no step is kept: it would begin anew
  lock(tmp_path)
  (tmp_path / "run/checkpoints/2").mkdir(parents=True)
  lock(tmp_path, "train.seed=5", stage="refine")  # each stage has its own record
  with pytest.raises(errors.UserError) as caught:
    lock(tmp_path, "train.batch_size=8", "model.source=other", "mesh.fsdp=1")
  assert str(caught.value) == (
    f"output: {tmp_path / 'run'} holds a train run of another config (model.source: "
    "some/model -> other; train.batch_size: 16 -> 8); choose another output, put the "
    "old values back, or delete checkpoints and best in it"
  )
  assert config_load.load(recorded).train.batch_size == 16


def test_a_key_younger_than_the_folder_had_its_default_there(tmp_path):
  lock(tmp_path)
  recorded = tmp_path / "run/config/train.yaml"
  lines = recorded.read_text().splitlines(keepends=True)
  recorded.write_text("".join(x for x in lines if "warmup_ratio" not in x))
  (tmp_path / "run/checkpoints/2").mkdir(parents=True)
  with pytest.raises(errors.UserError, match=r"warmup_ratio: \(absent\) -> 0\.5"):
    lock(tmp_path, "train.warmup_ratio=0.5")
  lock(tmp_path)
  assert config_load.load(recorded).train.warmup_ratio == 0.03


def test_a_folder_of_an_earlier_version_had_keys_of_other_names(tmp_path):
  lock(tmp_path)
  recorded = tmp_path / "run/config/train.yaml"
  recorded.write_text(
    recorded.read_text().replace("gradient_stats_every", "measure_every")
  )
  (tmp_path / "run/checkpoints/2").mkdir(parents=True)
  with pytest.raises(errors.UserError, match="gradient_stats_every: 20 -> 7"):
    lock(tmp_path, "train.gradient_stats_every=7")
  lock(tmp_path)
  assert "  gradient_stats_every: 20" in recorded.read_text()
  text = recorded.read_text().replace("validation: null\nmesh", "watch: null\nmesh")
  recorded.write_text(text)
  lock(tmp_path)
  recorded.write_text(text.replace("watch: null", "watch: {every: 5}"))
  with pytest.raises(errors.UserError, match="by an earlier version of raft_jax"):
    lock(tmp_path)


def test_lock_of_a_key_of_every_item(tmp_path):
  def lock(*judges: str) -> None:
    changed = least_config.least(
      tmp_path, f"output={tmp_path / 'run'}", f"refine.judges=[{', '.join(judges)}]"
    )
    run_lock.lock_config(changed, "refine", ["refine.judges.*.engine"])

  lock("{engine: jax}")
  (tmp_path / "run/refined").mkdir()
  (tmp_path / "run/refined/journal.jsonl").touch()
  lock("{engine: jax, batch_size: 3}")
  with pytest.raises(errors.UserError, match=r"judges\.0\.engine: jax -> encoder"):
    lock("{engine: encoder}")
  with pytest.raises(errors.UserError, match=r"judges\.1\.engine: \(absent\) -> enc"):
    lock("{engine: jax}", "{engine: encoder}")


def test_lock_refuses_a_foreign_or_damaged_folder(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  (run / ".lock").touch()  # hidden files do not count
  lock(tmp_path)
  (run / "config/train.yaml").write_text("model: {")
  (run / "checkpoints/2").mkdir(parents=True)
  with pytest.raises(errors.UserError, match="damaged"):
    lock(tmp_path)
  foreign = tmp_path / "f"
  (foreign / "run").mkdir(parents=True)
  (foreign / "run/thesis.tex").touch()
  with pytest.raises(errors.UserError, match=r"not empty \(e.g. thesis.tex\).*choose"):
    lock(foreign)
  (tmp_path / "g").mkdir()
  (tmp_path / "g/run").write_text("a file")
  with pytest.raises(errors.UserError, match="is not a folder"):
    lock(tmp_path / "g")


def test_lock_of_an_unknown_key_is_a_programming_error(tmp_path):
  for key in ("train.bach_size", "train.batch"):
    with pytest.raises(ValueError, match=f"no config key '{key}'"):
      run_lock.lock_config(least_config.least(tmp_path), "train", [key])
