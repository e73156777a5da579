"""Each tracker's library, read back with its own reader from its own offline store."""

import glob
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from raft_jax.training import metrics_log, tracker_libraries, trackers
from tests.helpers import short_run, tiny_run

pytestmark = pytest.mark.slow  # the libraries are not among those of the fast tests

LIBRARIES = tuple(tracker_libraries.LIBRARIES)


# --- Readers: name of a curve -> its (step, value) ------------------------------------


def read_tensorboard(output, state):
  from tensorboard.backend.event_processing import event_accumulator

  found = event_accumulator.EventAccumulator(str(output / "tensorboard"))
  found.Reload()
  return {
    tag: [(event.step, event.value) for event in found.Scalars(tag)]
    for tag in found.Tags()["scalars"]
  }


def wandb_records(path):
  """Records of a `.wandb` file: a LevelDB log after a header of 7 bytes.

  Blocks of 32 KiB; each record has a CRC, a length and a type (whole, first, middle or
  last part).
  """
  from wandb.proto import wandb_internal_pb2

  raw, place, parts = path.read_bytes(), 7, b""
  while place + 7 <= len(raw):
    if 32768 - place % 32768 < 7:
      place += 32768 - place % 32768
      continue
    length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
    parts += raw[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
      yield wandb_internal_pb2.Record.FromString(parts)
      parts = b""


def read_wandb(output, state):
  folders = sorted(output.glob(f"wandb/offline-run-*-{state['run']}*"))
  assert folders
  curves = {}
  for folder in folders:
    (path,) = folder.glob("*.wandb")
    for record in wandb_records(path):
      row = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for item in record.history.item
      }
      for name, value in row.items():
        if not name.startswith("_"):
          curves.setdefault(name, []).append((row["_step"], value))
  return curves


def read_mlflow(output, state):
  import mlflow

  client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
  return {
    name: [(m.step, m.value) for m in client.get_metric_history(state["run"], name)]
    for name in client.get_run(state["run"]).data.metrics
  }


def read_trackio(output, state):
  from trackio.sqlite_storage import SQLiteStorage

  curves = {}
  for row in SQLiteStorage.get_logs("raft_jax", state["run"]):
    for name, value in row.items():
      if "/" in name:
        curves.setdefault(name, []).append((row["step"], value))
  return curves


READERS = {name: globals()[f"read_{name}"] for name in LIBRARIES}


@pytest.fixture(scope="module")
def installed():
  """Fails where a library is missing; without it a run would only warn."""
  trackers.require(LIBRARIES)


@pytest.fixture
def stores(tmp_path, monkeypatch, installed):
  """Folders of the libraries' own, for this process and those that it starts."""
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / "trackio"
  monkeypatch.setenv("TRACKIO_DIR", str(folder))
  if "trackio" in sys.modules:  # it reads the variable when it is imported
    for name in [n for n in sys.modules if n.split(".")[0] == "trackio"]:
      del sys.modules[name]
  return tmp_path


def read(name, output):
  state = json.loads((output / trackers.FILE).read_text())[name]
  return READERS[name](output, state)


def values(step):
  return {"loss": 1.0 / step, "kd_at_0": float("nan"), "step_seconds": 0.5}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_run_that_goes_on_is_one_curve(stores, name):
  output = stores / "run"
  output.mkdir()
  run = tracker_libraries.Run(output, group="mine", settings={"method": "raft"})
  for first, last in ((0, 6), (4, 5), (4, 9)):  # twice from an older checkpoint
    log = metrics_log.Log(output, resume_step=first, tracked=[name], run=run)
    for step in range(first + 1, last + 1):
      log.write(step, values(step))
    log.close()
  curve = read(name, output)["train/loss"]
  assert [step for step, _ in curve] == [*range(1, 10)]
  np.testing.assert_allclose(
    [value for _, value in curve], [1.0 / step for step in range(1, 10)], rtol=1e-6
  )


@pytest.mark.parametrize("name", LIBRARIES)
def test_scores_pictures_and_group_reach_the_run(stores, name):
  from PIL import Image

  output = stores / "run"
  output.mkdir()
  run = tracker_libraries.Run(output, group="sweep7", settings={"method": "raft"})
  log = metrics_log.Log(output, resume_step=0, tracked=[name], run=run)
  log.write(1, values(1))
  log.write(2, values(2))
  log.close()
  picture = io.BytesIO()
  Image.new("RGBA", (30, 20), "red").save(picture, "png")
  for _ in range(2):
    with metrics_log.tracked([name], run) as opened:
      opened.summarise(2, {"evaluation/trained/rouge_l": 0.25})
      opened.attach({"losses-1": picture.getvalue()})
  state = json.loads((output / trackers.FILE).read_text())[name]
  assert [step for step, _ in read(name, output)["train/loss"]] == [1, 2]
  check = {
    "tensorboard": scores_of_tensorboard,
    "wandb": scores_of_wandb,
    "mlflow": scores_of_mlflow,
    "trackio": scores_of_trackio,
  }[name]
  check(output, state)


def scores_of_tensorboard(output, state):
  from PIL import Image
  from tensorboard.backend.event_processing import event_accumulator

  assert read_tensorboard(output, state)["evaluation/trained/rouge_l"] == [(2, 0.25)]
  found = event_accumulator.EventAccumulator(str(output / "tensorboard"))
  found.Reload()
  (image,) = found.Images("losses-1")
  shown = Image.open(io.BytesIO(image.encoded_image_string))
  assert shown.size == (image.width, image.height) == (30, 20)


def scores_of_wandb(output, state):
  summary, group, config = {}, set(), {}
  for path in sorted(output.glob("wandb/offline-run-*/*.wandb")):
    for record in wandb_records(path):
      for item in record.summary.update:
        key = item.key or ".".join(item.nested_key)
        summary[key] = json.loads(item.value_json)
      if record.HasField("run"):
        group.add(record.run.run_group)
        for item in record.run.config.update:
          config[item.key] = json.loads(item.value_json)
  assert summary["evaluation/trained/rouge_l"] == 0.25
  assert summary["report/losses-1"]["_type"] == "image-file"
  assert glob.glob(str(output / "wandb/offline-run-*/files/media/images/**/*.png"))
  assert group == {"sweep7"}
  assert config["method"] == "raft"


def scores_of_mlflow(output, state):
  import mlflow

  client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
  found = client.get_run(state["run"])
  assert found.data.metrics["evaluation/trained/rouge_l"] == 0.25
  assert found.data.tags["group"] == "sweep7"
  assert found.data.params == {"method": "raft"}
  assert found.info.status == "FINISHED"
  (artifact,) = client.list_artifacts(state["run"], "report")
  assert artifact.path == "report/losses-1.png"


def scores_of_trackio(output, state):
  from trackio.sqlite_storage import SQLiteStorage

  curves = read_trackio(output, state)
  assert curves["evaluation/trained/rouge_l"] == [(2, 0.25)]
  ((step, picture),) = curves["report/losses-1"]
  assert (step, picture["_type"]) == (2, "trackio.image")
  config = SQLiteStorage.get_run_config("raft_jax", state["run"])
  assert (config["_Group"], config["method"]) == ("sweep7", "raft")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_store_that_cannot_be_written_is_one_warning(stores, name):
  """In a process, as libraries also write from threads and when Python ends."""
  output = stores / "run"
  output.mkdir()
  blocked = stores / "blocked"
  blocked.write_text("a file where a folder should be")
  if name == "wandb":
    (output / "wandb").write_text("a file where a folder should be")
  code = f"""
import pathlib
from raft_jax.training import metrics_log
log = metrics_log.Log(pathlib.Path({str(output)!r}), resume_step=0, tracked=[{name!r}])
for step in range(1, 40):
  log.write(step, {{"loss": 1.0}})
log.close()
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    timeout=300,
    env={
      **os.environ,
      "MLFLOW_TRACKING_URI": f"sqlite:///{blocked}/mlflow.db",
      "TRACKIO_DIR": str(blocked),
    },
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert len((output / "metrics.jsonl").read_text().splitlines()) == 39
  assert done.stdout == ""
  assert done.stderr.count("Warning: ") == 1, done.stderr
  # Trackio writes this warning itself: it never raises.
  assert tracker_libraries.LIBRARIES[name].title.lower() in done.stderr.lower()


def test_a_killed_run_of_training_is_one_curve_everywhere(
  stores, law, smollm, monkeypatch
):
  # wandb, used here before, would make this process's service that of both runs.
  monkeypatch.delenv("WANDB_SERVICE", raising=False)
  # In a folder of its own: the libraries' stores must not be files of the model.
  (stores / "model").mkdir()
  source = str(tiny_run.save_model(stores / "model", smollm))
  output = stores / "killed"
  short_run.write_refined(output, law)
  option = "train.trackers=[tensorboard, wandb, mlflow, trackio]"
  path, _ = short_run.make_config(output, source, law, option)
  process = short_run.run(path, option)
  short_run.wait_for_step(process, output, 3)
  process.send_signal(signal.SIGKILL)
  process.wait()
  again = short_run.run(path, option)
  said, _ = again.communicate(timeout=600)
  assert again.returncode == 0, said
  assert "Warning" not in said
  expected = {step: logged["loss_sft"] for step, logged in short_run.rows(output)}
  for name in LIBRARIES:
    curve = read(name, output)["train/loss_sft"]
    assert [step for step, _ in curve] == [*expected], name
    found = [value for _, value in curve]
    np.testing.assert_allclose(found, [*expected.values()], rtol=1e-6)
