"""What a sweep collects from the files of its runs."""

import json

import pytest

from raft_jax.config import sweep_runs
from raft_jax.reporting import sweep_collection
from tests.helpers import least_config


def test_a_finished_run_is_not_repeated_after_an_upgrade_of_raft_jax(tmp_path):
  config = least_config.least(tmp_path, f"output={tmp_path}")
  run = sweep_runs.PlannedRun("a", "a", {}, config)
  stages = ["train", "evaluate"]
  assert not sweep_collection.is_finished(run, stages)
  sweep_collection.mark_finished(run, stages)
  assert sweep_collection.is_finished(run, stages)
  assert not sweep_collection.is_finished(run, stages[:1])

  def with_rate(rate):
    train = config.train.model_copy(update={"learning_rate": rate})
    return run._replace(config=config.model_copy(update={"train": train}))

  assert not sweep_collection.is_finished(with_rate(1e-3), stages)
  # The version that finished the run did not have these keys yet.
  path = tmp_path / sweep_collection.FINISHED
  mark = json.loads(path.read_text())
  del mark["config"]["mirror"], mark["config"]["train"]["learning_rate"]
  path.write_text(json.dumps(mark))
  assert sweep_collection.is_finished(run, stages)
  assert not sweep_collection.is_finished(with_rate(1e-3), stages)


def test_what_the_log_of_a_run_has_for_a_comparison(tmp_path):
  rows = [
    {"step_seconds": 60.0, "kd_ratio": 1.0, "teacher_mass_in_support": 0.8},
    {"step_seconds": 2.0, "kd_ratio": None, "teacher_mass_in_support": 0.9},
    {"step_seconds": 4.0, "kd_ratio": 0.5, "teacher_mass_in_support": 1.0},
  ]
  rows[1] |= {"validation_loss": 2.5}  # without the drift it is no point of a curve
  rows[2] |= {"validation_loss": 2.0, "validation_drift": 0.1}
  (tmp_path / "metrics.jsonl").write_text(
    "".join(
      json.dumps({"step": step, "split": "train", "values": values}) + "\n"
      for step, values in enumerate(rows, 1)
    )
  )
  (tmp_path / "cost.json").write_text('{"host_peak_bytes": 5}')
  assert sweep_collection.training_values(tmp_path) == {
    "cost": {"host_peak_bytes": 5, "step_seconds": 3.0},
    "support_mass": pytest.approx(0.9),
    "ratio": [(1, 1.0), (3, 0.5)],
    "looks": [(3, 2.0, 0.1)],
  }
  assert sweep_collection.training_values(tmp_path / "empty") == {"cost": {}}


def test_what_is_kept_of_an_evaluation_is_short(tmp_path):
  (tmp_path / "items.json").write_text(
    json.dumps(
      {
        "drift": {
          "items": "a" * 64, "share": False, "base": None,
          "trained": [0.123456789], "weights": None,
        },
        "choice": {
          "items": "c" * 64, "share": True, "base": [1.0], "trained": [0.0],
          "weights": None,
        },
        "ended": {
          "items": "b" * 64, "share": True, "base": [0.0], "trained": [1.0],
          "weights": None,
        },
      }
    )
  )  # fmt: skip
  assert sweep_collection.item_scores(tmp_path) == {
    "drift": {
      "items": "a" * 16,
      "base": None,
      "trained": [0.12346],
      "weights": None,
    },
    "choice": {"items": "c" * 16, "base": [1.0], "trained": [0.0], "weights": None},
  }
  assert sweep_collection.item_scores(tmp_path / "absent") == {}
