"""Many runs of one config: `python -m raft_jax.sweep --config C`.

The `sweep` section of a run's file names the runs: what each sets, and over what it is
repeated (seeds, learning rates). They are done one after the other, or one per task of
an array job (`sweep.only=N`). Every stage of every run continues where it was stopped.
Refinement is done once for all runs that share its settings, no call of it twice for
any two of them, and the evaluation of the base model once: tasks of an array job train
at the same time, and take turns at what they share. At the end the scores stand side by
side in `sweep.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box, console, table

from raft_jax import errors, refine
from raft_jax.config import cli, schema
from raft_jax.config import load as config_load
from raft_jax.data import training_set
from raft_jax.evaluation import test_sets
from raft_jax.generation import sentence_encoder
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.reporting import run_folder, sweep_results
from raft_jax.storage import atomic, journal

MEASURED = {
  *("limit", "max_new_tokens", "judges", "open_ended", "ifeval", "mmlu", "drift"),
  "tasks",
}
"""Keys of `evaluate` that say what is measured, and how."""

STAGE_FILES = ".stages"
"""Folder of the files that stages are started with: those beside it are the user's."""

INTERRUPTED = (75, 130, 143)
"""Exit codes of a stage that was stopped and can be continued."""


class Planned(NamedTuple):
  """One run of a sweep.

  Attributes:
    group: the run's name in the file; its repetitions share it.
    config: what it runs, with a folder of its own as output.
  """

  name: str
  group: str
  overrides: dict[str, Any]
  config: schema.Config


def expand(base: schema.Config) -> list[Planned]:
  """All runs of a sweep, checked.

  Raises:
    errors.UserError: no runs, two of one name, a setting that no config has, or one
      that would have two runs scored on different things.
  """
  if not base.sweep.runs:
    raise errors.UserError(
      "sweep.runs: no run is named, so there is nothing to sweep; add e.g."
      " `sweep: {runs: [{name: sft, set: {method: sft}}]}`"
    )
  planned: list[Planned] = []
  for run in base.sweep.runs:
    for point in _grid(run.over):
      overrides = {**run.set, **point}
      words = [_word(key, value) for key, value in point.items()]
      name = "-".join([run.name, *words])
      for key, value in overrides.items():
        if value is not None and _measures(key):
          raise errors.UserError(
            f"sweep run {name!r}: {key}: runs are compared on the same items, scored"
            " alike; set it in its own section, for all of them (null here leaves a"
            " score out)"
          )
      settings = _override(base, name, overrides)
      planned.append(Planned(name, run.name, overrides, settings))
  names = [run.name for run in planned]
  twice = {name for name in names if names.count(name) > 1}
  if twice:
    raise errors.UserError(
      f"sweep.runs: two runs are named {sorted(twice)[0]!r}; give each its own name"
    )
  return planned


def check_exam(run: schema.Config) -> None:
  """Reads what all runs are scored on: not first after hours of training.

  Raises:
    errors.UserError: what `evaluate` would say of it, or of the encoder.
  """
  source = run.model.source
  test_sets.read(run, chat.load(source), hf_load.load_config(source))
  sentence_encoder.find(run.refine.encoder)


def _measures(key: str) -> bool:
  section, *rest = key.split(".")
  if section == "evaluate":
    return not rest or rest[0] in MEASURED
  return key == "data.test"


def _grid(over: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
  for values in itertools.product(*over.values()):
    yield dict(zip(over, values))


def _word(key: str, value: Any) -> str:
  """`train.seed`, 3 -> `seed_3`; fit for a folder's name."""
  text = f"{key.rsplit('.', 1)[-1]}_{value}"
  return re.sub(r"[^\w.+-]", "_", text)


def _override(
  base: schema.Config, name: str, overrides: Mapping[str, Any]
) -> schema.Config:
  # Its own values only: those of its method must not outlive a change of the method.
  tree = config_load.own(base)
  del tree["sweep"]
  output = pathlib.Path(base.output)
  tree["output"] = str(output / name)
  for section, file in (("evaluate", "evaluation"), ("refine", "refinement")):
    shared = tree.setdefault(section, {})
    shared["journal"] = shared.get("journal") or str(output / f"{file}.jsonl")
  items = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
  try:
    return config_load.from_tree(tree, items)
  except errors.UserError as error:
    raise errors.UserError(f"sweep run {name!r}: {error}") from error


# Running


def run_all(base: schema.Config, runs: Sequence[Planned]) -> list[str]:
  """Runs what is not finished; returns the names of the runs that failed."""
  stages, failed = base.sweep.stages, []
  for number, run in enumerate(runs, start=1):
    title = f"run {number} of {len(runs)}, {run.name}"
    folder = pathlib.Path(run.config.output)
    if _finished(run, stages):
      print(f"{title}: finished before", flush=True)
      continue
    try:
      for stage in stages:
        print(f"{title}: {stage}", flush=True)
        file = folder.parent / STAGE_FILES / f"{run.name}.yaml"
        if stage == "refine":
          _refine_once(base, run)
        elif stage == "train":
          _note_cost(folder, _stage(stage, run.config, file))
        elif stage == "evaluate":
          with journal.locked(folder.parent / ".evaluate", waits=True):
            _stage(stage, run.config, file)
        else:
          _stage(stage, run.config, file)
    except errors.UserError as error:
      print(f"error: {error}", file=sys.stderr, flush=True)
      failed.append(run.name)
    else:
      with atomic.replacing(folder / "finished.json") as path:
        path.write_text(json.dumps(_mark(run, stages)))
  return failed


def _mark(run: Planned, stages: Sequence[str]) -> dict[str, Any]:
  return {"config": config_load.digest(run.config), "stages": list(stages)}


def _finished(run: Planned, stages: Sequence[str]) -> bool:
  path = pathlib.Path(run.config.output) / "finished.json"
  return path.exists() and json.loads(path.read_text()) == _mark(run, stages)


def _stage(stage: str, settings: schema.Config, file: pathlib.Path) -> int:
  """One stage in a process of its own, so that no run sees another's memory.

  Returns:
    The most bytes of host memory that it held.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  with atomic.replacing(file) as path:
    path.write_text(config_load.dump(settings), encoding="utf-8")
  command = [sys.executable, "-m", f"raft_jax.{stage}", "--config", str(file)]
  process = subprocess.Popen(command)
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = code = os.waitstatus_to_exitcode(status)
  if code in INTERRUPTED or -code in (signal.SIGINT, signal.SIGTERM):
    raise SystemExit(code if code > 0 else 128 - code)
  if code < 0:
    raise errors.UserError(
      f"{stage} of {file.stem} was killed by signal {-code}"
      + (", as where memory ran out" if -code == signal.SIGKILL else "")
    )
  if code:
    raise errors.UserError(f"{stage} of {file.stem} failed with exit code {code}")
  # Linux counts in KiB, macOS in bytes.
  return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _note_cost(folder: pathlib.Path, peak: int) -> None:
  """Adds what a run's training took to what it took before it was stopped."""
  path = folder / "cost.json"
  if path.exists():
    peak = max(peak, json.loads(path.read_text())["host_peak_bytes"])
  with atomic.replacing(path) as temporary:
    temporary.write_text(json.dumps({"host_peak_bytes": peak}))


def _training(folder: pathlib.Path) -> dict[str, Any]:
  """What the log of a run has for a comparison.

  Returns:
    "cost": median seconds of a step, the first (which compiles) left out, and peak
    memory; "support_mass": mean of the teacher's probability on the tokens compared;
    "ratio": pairs of a step and λ·L_KD/L_SFT; "looks": triples of a step, loss and
    drift of the panel that was watched. What was not logged is left out.
  """
  run = run_folder.read(folder)
  steps = run_folder.series(run, "step_seconds")[1][1:]
  mass = run_folder.series(run, "teacher_mass_in_support")[1]
  ratio = list(zip(*run_folder.series(run, "kd_ratio")))
  drift = dict(zip(*run_folder.series(run, "watch_drift")))
  looks = [
    (step, loss, drift[step])
    for step, loss in zip(*run_folder.series(run, "watch_loss"))
    if step in drift
  ]
  path = folder / "cost.json"
  cost = json.loads(path.read_text()) if path.exists() else {}
  return {
    "cost": cost | ({"step_seconds": statistics.median(steps)} if steps else {}),
    **({"support_mass": statistics.fmean(mass)} if mass else {}),
    **({"ratio": ratio} if ratio else {}),
    **({"looks": looks} if looks else {}),
  }


def _refine_once(base: schema.Config, run: Planned) -> None:
  """The refined records of a run, made for the first of those that can share them."""
  if run.config.data.answers == "original":
    return
  folder = pathlib.Path(run.config.output)
  if (folder / "refined").exists():
    return
  values = config_load.values(run.config, training_set.REFINED)
  name = f"refined-{config_load.digest(values)[:12]}"
  shared = pathlib.Path(base.output) / name
  settings = run.config.model_copy(update={"output": str(shared)})
  with journal.locked(shared.parent / ".refine", waits=True):
    _stage("refine", settings, shared.parent / STAGE_FILES / f"{shared.name}.yaml")
  temporary = folder / ".tmp-refined"
  shutil.rmtree(temporary, ignore_errors=True)
  # Not the journal: it is of use only where refinement goes on.
  shutil.copytree(
    shared / "refined", temporary, ignore=shutil.ignore_patterns("journal*")
  )
  config_load.claim_output(run.config, "refine", refine.CLAIMED)
  temporary.rename(folder / "refined")


# Collecting


def collect(runs: Sequence[Planned], stages: Sequence[str]) -> list[dict[str, Any]]:
  """What was measured of every run that is finished, and was with these settings."""
  rows = []
  for run in runs:
    path = pathlib.Path(run.config.output) / "evaluation" / "scores.json"
    if path.exists() and _finished(run, stages):
      scores = json.loads(path.read_text(encoding="utf-8"))
      tensors = scores["weight_distance"].pop("tensors", {})
      rows.append(
        {
          "name": run.name,
          "group": run.group,
          "method": run.config.method,
          "set": run.overrides,
          "config_digest": config_load.digest(run.config),
          **_training(pathlib.Path(run.config.output)),
          "scores": scores,
          "items": sweep_results.items_of(path.parent),
          "weight_distances": sweep_results.short(list(tensors.values())),
        }
      )
  return rows


SHOWN = ("held_out_loss", "rouge_l", "d_acc", "ifeval_prompt_strict", "mmlu")
"""Scores that a terminal has room for, beside the drift; `report` has all."""


def show(rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints one line a run: its main scores and, first, the base model's."""
  base = rows[0]["scores"]["scores"]["base"]
  trained = [row["scores"]["scores"]["trained"] for row in rows]
  names = [name for name in SHOWN if any(name in scores for scores in trained)]
  shown = table.Table(
    title="95 % intervals below each score",
    title_justify="left",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    collapse_padding=True,
  )
  shown.add_column("run", overflow="fold")
  for name in [*names, "drift"]:
    # Only a run's name is folded where the terminal is narrow.
    shown.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)

  def cell(score: Mapping[str, Any]) -> str:
    if not score:
      return "–"
    return f"{score['value']:.3f}\n{score['low']:.3f}–{score['high']:.3f}"

  shown.add_row("base model", *(cell(base.get(name, {})) for name in names), "0")
  for row, scores in zip(rows, trained):
    cells = [cell(scores.get(name, {})) for name in names]
    shown.add_row(row["name"], *cells, cell(row["scores"]["drift"]))
  console.Console().print(shown)


def main(base: schema.Config) -> None:
  """Runs, resumes and collects a sweep."""
  runs, only = expand(base), base.sweep.only
  if only is not None and only > len(runs):
    raise errors.UserError(f"sweep.only: {only}, but there are runs 1 to {len(runs)}")
  todo = runs if only is None else [runs[only - 1]]
  if "evaluate" in base.sweep.stages:
    check_exam(todo[0].config)
  failed = run_all(base, todo)
  rows = collect(runs, base.sweep.stages)
  output = pathlib.Path(base.output)
  if rows:
    with atomic.replacing(output / sweep_results.FILE) as path:
      path.write_text(json.dumps(rows, indent=2) + "\n")
    show(rows)
  print(f"{len(rows)} of {len(runs)} runs have scores: {output / sweep_results.FILE}")
  missing = {run.name for run in runs} - {row["name"] for row in rows}
  if rows and missing:
    print(f"not finished with these settings: {', '.join(sorted(missing))}")
  if failed:
    raise errors.UserError(
      f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}; what each said"
      " stands above. Rerun the same command to try them again"
    )


if __name__ == "__main__":
  cli.run("sweep", main, "Run, resume and collect many runs of one config.")
