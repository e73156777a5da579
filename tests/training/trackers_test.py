"""Trackers follow metrics.jsonl: one curve after a resume, and no harm when they fail.

A store of our own stands in for a library; tracker_libraries_test has the libraries.
"""

import contextlib
import json
import math
import shutil
import threading
import time
import warnings

import pytest

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.training import metrics_log, tracker_libraries, trackers


class Store:
  """Runs by id, each a list of (step, values), as a library would keep them."""

  def __init__(self):
    self.runs, self.scores, self.pictures, self.ends = {}, {}, [], []
    self.tells_steps, self.fails_at, self.gate = True, None, None

  def open(self, run, run_id):
    if run_id is None:
      run_id = f"id{len(self.runs)}"
      self.runs[run_id] = []
    elif run_id not in self.runs:
      raise LookupError("no such run")
    rows = self.runs[run_id]

    def log(new_rows):
      for step, values in new_rows:
        if self.gate is not None:
          self.gate.wait()
        if step == self.fails_at:
          raise ConnectionError("http://me:hunter22@host/api is away")
        rows.append((step, dict(values)))

    last = max((step for step, _ in rows), default=0)
    return tracker_libraries.Tracker(
      run_id=run_id,
      last_step=last if self.tells_steps else None,
      log=log,
      summarise=lambda step, scores: self.scores.update({step: dict(scores)}),
      attach=lambda step, name, png: self.pictures.append((step, name, png)),
      close=self.ends.append,
      batches=self.tells_steps,
    )

  def steps(self, run_id="id0"):
    return [step for step, _ in self.runs[run_id]]


def replace(monkeypatch, name, **changes):
  library = tracker_libraries.LIBRARIES[name]._replace(**changes)
  monkeypatch.setitem(tracker_libraries.LIBRARIES, name, library)


@pytest.fixture(params=[True, False], ids=["tells_steps", "mute"])
def store(request, monkeypatch):
  store = Store()
  store.tells_steps = request.param
  replace(monkeypatch, "wandb", open=store.open)
  monkeypatch.setattr(trackers, "CLOSE_SECONDS", 5.0)
  return store


def train(output, first, last, *, closes=True):
  """The log of a process that goes on after a checkpoint and logs some steps."""
  log = metrics_log.Log(output, resume_step=first, tracked=["wandb"])
  for step in range(first + 1, last + 1):
    log.write(step, {"loss": float(step), "kd_at_0": math.nan})
  if closes:
    log.close()
  else:  # killed: what was handed over arrives, but nothing is closed
    for feed in log.trackers.feeds:
      while not feed._calls.empty():
        time.sleep(0.01)
      time.sleep(0.05)
  return log


@contextlib.contextmanager
def warned(*texts):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    yield
  said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
  assert len(said) == len(texts), said
  for text, message in zip(texts, said):
    assert text in message


def logged(output):
  lines = (output / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("closes", [True, False])
def test_a_run_that_goes_on_from_an_older_checkpoint_is_one_curve(
  tmp_path, store, closes
):
  with warned():
    train(tmp_path, 0, 7, closes=closes)
    train(tmp_path, 4, 5, closes=closes)  # again from 4, and stopped before step 7
    train(tmp_path, 4, 9)
  assert store.steps() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
  assert store.runs["id0"][0][1]["train/loss"] == 1.0
  assert logged(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


# Of a store that does not tell its steps nobody knows what it lacks.
@pytest.mark.parametrize("store", [True], indirect=True)
def test_what_was_lost_is_sent_again(tmp_path, store):
  train(tmp_path, 0, 6)
  del store.runs["id0"][3:]  # the process was killed before these were sent
  train(tmp_path, 6, 8)
  assert store.steps() == [1, 2, 3, 4, 5, 6, 7, 8]
  assert store.runs["id0"][4][1] == {"train/loss": 5.0}  # null is left out


def test_a_tracker_that_is_named_later_gets_the_whole_curve(tmp_path, store):
  log = metrics_log.Log(tmp_path, resume_step=0)
  for step in (1, 2, 3):
    log.write(step, {"loss": 0.5})
  log.close()
  assert not (tmp_path / trackers.FILE).exists()
  train(tmp_path, 3, 5)
  assert store.steps() == [1, 2, 3, 4, 5]


def test_a_failure_is_one_warning_and_a_resume_fills_the_gap(tmp_path, store):
  store.fails_at = 3
  with warned("Weights & Biases is off from now on: http://***@host/api is away"):
    train(tmp_path, 0, 6)
  assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]
  assert store.steps() == [1, 2]
  store.fails_at = None
  with warned():
    train(tmp_path, 6, 7)
  assert store.steps() == [1, 2, 3, 4, 5, 6, 7]


def test_a_tracker_that_hangs_holds_up_no_step(tmp_path, store, monkeypatch):
  monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
  store.gate = threading.Event()
  began = time.monotonic()
  with warned("it took nothing for"):
    train(tmp_path, 0, 50)
  assert time.monotonic() - began < 5
  assert logged(tmp_path) == [*range(1, 51)]
  store.gate.set()


def test_a_tracker_that_cannot_start_is_one_warning(tmp_path, monkeypatch):
  def broken(run, run_id):
    raise PermissionError("store: read-only")

  replace(monkeypatch, "mlflow", open=broken)
  with warned("no MLflow (store: read-only)"):
    log = metrics_log.Log(tmp_path, resume_step=0, tracked=["mlflow"])
    log.write(1, {"a": 1.0})
    log.close()
  assert logged(tmp_path) == [1]


def test_an_opening_that_hangs_ends(tmp_path, monkeypatch):
  gate = threading.Event()
  monkeypatch.setattr(trackers, "OPEN_SECONDS", 0.1)
  replace(monkeypatch, "wandb", open=lambda *_: gate.wait())
  began = time.monotonic()
  with warned("no Weights & Biases (no answer within"):
    train(tmp_path, 0, 3)
  assert time.monotonic() - began < 5
  assert logged(tmp_path) == [1, 2, 3]
  gate.set()


def test_a_deleted_run_is_one_warning_and_a_new_run(tmp_path, store):
  train(tmp_path, 0, 3)
  store.runs = {"other": []}
  with warned("a new run, because the earlier one cannot go on (no such run)"):
    train(tmp_path, 3, 5)
  assert store.steps("id1") == [1, 2, 3, 4, 5]


def test_a_copy_of_the_folder_is_a_new_run_and_a_moved_folder_is_not(tmp_path, store):
  (tmp_path / "a").mkdir()
  train(tmp_path / "a", 0, 3)
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  with warned("the folder is a copy of"):
    train(tmp_path / "b", 3, 4)
  assert store.steps("id1") == [1, 2, 3, 4]
  (tmp_path / "a").rename(tmp_path / "c")
  with warned():
    train(tmp_path / "c", 3, 5)
  assert store.steps("id0") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", ["", "[]", '{"wandb": 3}', "{"])
def test_a_damaged_file_of_runs_means_a_new_run(tmp_path, store, text):
  train(tmp_path, 0, 2)
  (tmp_path / trackers.FILE).write_text(text)
  train(tmp_path, 2, 3)
  assert store.steps("id1") == [1, 2, 3]


def test_scores_and_pictures_reach_the_same_run_once(tmp_path, store):
  train(tmp_path, 0, 3)
  for _ in range(2):  # `evaluate` and `report` were run twice
    with metrics_log.tracked(["wandb"], tracker_libraries.Run(tmp_path)) as opened:
      opened.summarise(2, {"evaluation/trained/rouge_l": 0.5})
      opened.attach({"losses-1": b"png"})
  assert store.scores == {2: {"evaluation/trained/rouge_l": 0.5}}
  assert store.pictures == [(3, "losses-1", b"png")]
  assert store.steps() == [1, 2, 3]
  assert store.ends == ["finished"] * 3


@pytest.mark.parametrize(("error", "status"), [(None, "finished"), (OSError, "failed")])
def test_a_run_ends_with_its_status(tmp_path, store, error, status):
  run = tracker_libraries.Run(tmp_path)
  with (
    contextlib.suppress(OSError),
    metrics_log.run_log(0, 2, ["wandb"], run) as log,
  ):
    log.write(1, {"loss": 1.0})
    if error:
      raise error
  assert store.ends == [status]


def test_a_missing_library_is_an_error_with_its_pip_command(monkeypatch):
  replace(monkeypatch, "wandb", module="no_such_module")
  with pytest.raises(errors.UserError, match=r"wandb is not installed.*\[wandb\]"):
    trackers.require(["wandb"])
  trackers.require(["tensorboard"])


def test_a_tracker_that_is_listed_twice_is_one(tmp_path, store):
  log = metrics_log.Log(tmp_path, resume_step=0, tracked=["wandb", "wandb"])
  log.write(1, {"loss": 1.0})
  log.close()
  assert [*store.runs] == ["id0"]
  assert store.steps() == [1]
  assert store.ends == ["finished"]


def test_secrets_are_not_shown(monkeypatch):
  monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
  text = "401 for 0123456789abcdef at https://u:pw@host/x?write_token=abc&a=1"
  assert trackers.redact(text) == (
    "401 for *** at https://***@host/x?write_token=***&a=1"
  )


def test_every_setting_that_is_shown_is_a_key():
  fields = schema.Config.model_fields
  for key in trackers.SETTINGS:
    section, _, name = key.partition(".")
    assert section in fields
    if name:
      annotation = fields[section].annotation
      assert name in annotation.model_fields, key
