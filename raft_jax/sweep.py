"""Many runs of one config: `python -m raft_jax.sweep --config C`.

The `sweep` section of the config lists the runs: the keys that each sets, and the
values over which it is repeated (seeds, learning rates). The runs are done one after
the other, or one per task of an array job (`sweep.only=N`). Every stage of every run
continues where it was stopped. Runs with the same refinement settings share one
refinement, and all runs share one evaluation of the base model. The tasks of an array
job train at the same time, but take turns at what they share. `sweep.json` has the
scores of all runs.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box, console, table

from raft_jax import errors
from raft_jax.config import cli, run_lock, schema, sweep_runs
from raft_jax.config import load as config_load
from raft_jax.curation import refined_folder
from raft_jax.data import training_set
from raft_jax.evaluation import test_sets
from raft_jax.generation import sentence_encoder
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.reporting import (
  method_curves,
  sweep_collection,
  sweep_page,
  sweep_results,
)
from raft_jax.runtime import interrupts, stage_process
from raft_jax.storage import atomic, journal
from raft_jax.training import trackers

STAGE_FILES = ".stages"
"""Folder of the config files of stages; those beside it are the user's."""


def main(base: schema.Config) -> None:
  """Runs or resumes a sweep, and collects its scores."""
  runs, only, stages = sweep_runs.expand(base), base.sweep.only, base.sweep.stages
  if only is not None and only > len(runs):
    raise errors.UserError(f"sweep.only: {only}, but there are runs 1 to {len(runs)}")
  todo = runs if only is None else [runs[only - 1]]
  for run in todo:
    trackers.require(run.config.train.trackers)
  if "evaluate" in stages:
    first = todo[0].config
    check_tests(first.model, first.data, first.evaluate, first.refine.encoder)
  output = pathlib.Path(base.output)
  failed = run_all(output, todo, stages)
  rows = sweep_collection.collect(runs, stages)
  if rows:
    with atomic.replacing(output / sweep_results.FILE) as path:
      path.write_text(json.dumps(rows, indent=2) + "\n")
    show(rows)
    show_curves(output.name, rows)
  print(f"{len(rows)} of {len(runs)} runs have scores: {output / sweep_results.FILE}")
  missing = {run.name for run in runs} - {row["name"] for row in rows}
  if rows and missing:
    print(f"not finished with these settings: {', '.join(sorted(missing))}")
  if failed:
    raise errors.UserError(
      f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}; their errors are"
      " printed above. Run the same command again to retry them"
    )


def check_tests(
  model: schema.Model, data: schema.Data, evaluate: schema.Evaluate, encoder: str
) -> None:
  """Reads what all runs are tested on, before hours of training.

  Raises:
    errors.UserError: `evaluate` would reject a test set or the sentence encoder.
  """
  source = model.source
  thinking = data.thinking == "keep"
  tokenizer = chat.load(source, model.chat_template, thinking=thinking)
  decoder = hf_load.load_config(source)
  sets = test_sets.read(data, evaluate, tokenizer, decoder, source=source)
  sentence_encoder.find(encoder)
  if evaluate.choice is not None:
    embed = sentence_encoder.load(encoder)
    test_sets.with_choices(
      sets, evaluate.choice, tokenizer, decoder, embed, source=source
    )


def run_all(
  output: pathlib.Path, runs: Sequence[sweep_runs.PlannedRun], stages: Sequence[str]
) -> list[str]:
  """Runs what is not finished; returns the names of the runs that failed."""
  failed = []
  for number, run in enumerate(runs, start=1):
    title = f"run {number} of {len(runs)}, {run.name}"
    if sweep_collection.is_finished(run, stages):
      print(f"{title}: finished before", flush=True)
      continue
    try:
      for stage in stages:
        interrupts.check()
        print(f"{title}: {stage}", flush=True)
        run_stage(stage, output, run)
    except errors.UserError as error:
      print(f"error: {error}", file=sys.stderr, flush=True)
      failed.append(run.name)
    else:
      sweep_collection.mark_finished(run, stages)
  return failed


def run_stage(stage: str, output: pathlib.Path, run: sweep_runs.PlannedRun) -> None:
  """One stage of a run, in a process of its own."""
  if stage == "refine":
    refine_once(output, run)
    return
  file = write_config(output, run.name, config_load.dump(run.config))
  if stage == "evaluate":
    with journal.locked(output / ".evaluate", waits=True):
      stage_process.run(stage, file)
    return
  host_peak_bytes = stage_process.run(stage, file)
  if stage == "train":
    sweep_collection.add_cost(pathlib.Path(run.config.output), host_peak_bytes)


def refine_once(output: pathlib.Path, run: sweep_runs.PlannedRun) -> None:
  """Gives a run its refined records; the first run that needs them makes them."""
  if run.config.data.answers == "original":
    return
  folder = pathlib.Path(run.config.output)
  if (folder / "refined").exists():
    return
  values = {
    key: value
    for key, value in config_load.values(run.config, training_set.REFINED_KEYS).items()
    # At their defaults these keys are left out, as before they existed.
    if key not in refined_folder.LAYOUT_KEYS or value not in (None, "last")
  }
  name = f"refined-{config_load.digest(values)[:12]}"
  config = run.config.model_copy(update={"output": str(output / name)})
  with journal.locked(output / ".refine", waits=True):
    stage_process.run("refine", write_config(output, name, config_load.dump(config)))
  temporary = folder / ".tmp-refined"
  shutil.rmtree(temporary, ignore_errors=True)
  # The journal is not copied: only a refinement that continues needs it.
  shutil.copytree(
    output / name / "refined", temporary, ignore=shutil.ignore_patterns("journal*")
  )
  run_lock.lock_config(run.config, "refine", refined_folder.IDENTITY_KEYS)
  temporary.rename(folder / "refined")


def write_config(output: pathlib.Path, name: str, text: str) -> pathlib.Path:
  """Writes the config file of a stage; returns its path."""
  file = output / STAGE_FILES / f"{name}.yaml"
  file.parent.mkdir(parents=True, exist_ok=True)
  with atomic.replacing(file) as path:
    path.write_text(text, encoding="utf-8")
  return file


SHOWN = ("held_out_loss", "rouge_l", "d_acc", "ifeval_prompt_strict", "mmlu")
"""The scores that a terminal has room for, beside the drift; `report` shows all."""


def show(rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints the main scores: the base model first, then one line for each run."""
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
    # In a narrow terminal only the names of runs are folded.
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


def show_curves(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints the numbers of each method's curve; nothing if no drift was measured."""
  domains = {name: rows}
  headlines = method_curves.headlines(domains)
  if not headlines:
    return
  shown = table.Table(
    title="methods as curves over learning rates and steps",
    title_justify="left",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    collapse_padding=True,
  )
  shown.add_column("method", overflow="fold")
  columns = sweep_page.curve_columns(domains)[:4]
  for column in columns:
    shown.add_column(column.heading, justify="right")
  for row in headlines:
    cells = (sweep_page.cell_text(row.cells.get(c.name, {}), c.digits) for c in columns)
    shown.add_row(row.label, *cells)
  console.Console().print(shown)


if __name__ == "__main__":
  cli.run("sweep", main, "Run, resume and collect many runs of one config.")
