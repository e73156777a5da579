"""Collects the finished runs of a sweep into the rows of `sweep.json`."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from raft_jax.config import load as config_load
from raft_jax.config import sweep_runs
from raft_jax.reporting import run_folder, sweep_results
from raft_jax.storage import atomic

FINISHED = "finished.json"
"""File of a run's folder: the config and the stages with which it finished."""

COST = "cost.json"
"""File of a run's folder: what its training took."""

ITEM_SCORES = (
  "validation_loss",
  "held_out_loss",
  "rouge_l",
  "similarity",
  "choice",
  "choice_letter",
  "d_acc",
  "open_ended",
  "ifeval_prompt_strict",
  "ifeval_instruction_strict_but_no_comma",
  "mmlu",
  "mmlu_kept",
  "drift",
  "domain_drift",
)
"""Scores that are compared item by item; those of tasks are, too."""


def collect(
  runs: Sequence[sweep_runs.PlannedRun], stages: Sequence[str]
) -> list[dict[str, Any]]:
  """The rows of `sweep.json`: runs that finished with their present settings."""
  rows = []
  for run in runs:
    folder = pathlib.Path(run.config.output)
    path = folder / "evaluation" / "scores.json"
    if path.exists() and is_finished(run, stages):
      chosen = {
        "name": run.name,
        "group": run.group,
        "method": run.config.method,
        "set": run.overrides,
        "config_digest": config_load.digest(run.config),
      }
      rows.append(chosen | measured(folder))
  return rows


def measured(folder: pathlib.Path) -> dict[str, Any]:
  """What the training and the evaluation of a run contribute to a comparison."""
  path = folder / "evaluation" / "scores.json"
  scores = json.loads(path.read_text(encoding="utf-8"))
  tensors = scores["weight_distance"].pop("tensors", {})
  return {
    **training_values(folder),
    "scores": scores,
    "items": item_scores(path.parent),
    "weight_distances": round_digits(list(tensors.values())),
  }


def mark_finished(run: sweep_runs.PlannedRun, stages: Sequence[str]) -> None:
  """Records that all stages of a run are done."""
  with atomic.replacing(pathlib.Path(run.config.output) / FINISHED) as path:
    mark = {"config": run.config.model_dump(mode="json"), "stages": list(stages)}
    path.write_text(json.dumps(mark))


def is_finished(run: sweep_runs.PlannedRun, stages: Sequence[str]) -> bool:
  """Whether a run finished with the same config and stages."""
  path = pathlib.Path(run.config.output) / FINISHED
  if not path.exists():
    return False
  mark = json.loads(path.read_text())
  return mark["stages"] == list(stages) and not config_load.changes(
    mark["config"], run.config
  )


def add_cost(folder: pathlib.Path, host_peak_bytes: int) -> None:
  """Records the peak memory of a run's training, over all its resumptions."""
  path = folder / COST
  if path.exists():
    earlier = json.loads(path.read_text())["host_peak_bytes"]
    host_peak_bytes = max(host_peak_bytes, earlier)
  with atomic.replacing(path) as temporary:
    temporary.write_text(json.dumps({"host_peak_bytes": host_peak_bytes}))


def training_values(folder: pathlib.Path) -> dict[str, Any]:
  """What the log of a run contributes to a comparison.

  Returns:
    "cost": peak memory, and the median seconds of a step without the first, which
    compiles; "support_mass": mean teacher probability of the compared tokens; "ratio":
    pairs of step and λ·L_KD/L_SFT; "looks": for each validation its step, loss and
    drift. What was not logged is left out.
  """
  run = run_folder.read(folder)
  steps = run_folder.series(run, "step_seconds")[1][1:]
  mass = run_folder.series(run, "teacher_mass_in_support")[1]
  ratio = list(zip(*run_folder.series(run, "kd_ratio")))
  drift = dict(zip(*run_folder.series(run, "validation_drift")))
  validations = [
    (step, loss, drift[step])
    for step, loss in zip(*run_folder.series(run, "validation_loss"))
    if step in drift
  ]
  path = folder / COST
  cost = json.loads(path.read_text()) if path.exists() else {}
  return {
    "cost": cost | ({"step_seconds": statistics.median(steps)} if steps else {}),
    **({"support_mass": statistics.fmean(mass)} if mass else {}),
    **({"ratio": ratio} if ratio else {}),
    **({"looks": validations} if validations else {}),
  }


def item_scores(evaluation: pathlib.Path) -> dict[str, Any]:
  """The scores in an evaluation's `items.json` that are compared item by item."""
  path = evaluation / "items.json"
  if not path.exists():  # evaluated by an earlier version
    return {}
  scores = json.loads(path.read_text(encoding="utf-8"))
  return {
    name: {
      "items": score["items"][:16],
      **{
        part: None if score[part] is None else round_digits(score[part])
        for part in ("base", "trained", "weights")
      },
    }
    for name, score in scores.items()
    if name in ITEM_SCORES or name.startswith(sweep_results.TASK)
  }


def round_digits(numbers: Sequence[float]) -> list[float]:
  """The numbers with five significant digits each."""
  return [float(f"{number:.5g}") for number in numbers]
