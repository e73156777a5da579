"""Stage 1: rewrite, filter, fuse, judge and select the answers to learn from.

Run it as `python -m raft_jax.refine --config FILE`.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from raft_jax import errors
from raft_jax.config import cli, schema
from raft_jax.curation import refined_folder, refinement_run, reselection
from raft_jax.reporting import refine_page
from raft_jax.runtime import progress


def refine(
  config: schema.Config,
  num_workers: int | None = None,
  worker: int | None = None,
  select_only: str | None = None,
  ray: int | None = None,
) -> None:
  """Refines `data.questions` into `output/refined`: shards, manifest, summary, report.

  Args:
    num_workers, worker: refine only this worker's share of the rows.
    select_only: output folder of a finished run; select again among its answers.
    ray: make the calls on so many GPUs of a Ray cluster.
  """
  share = worker_share(num_workers, worker, select_only)
  if ray is not None and (select_only is not None or share != refinement_run.ALL_ROWS):
    raise errors.UserError(
      "command line: --ray shares out the calls itself; leave out --num-workers, "
      "--worker and --select-only"
    )
  page = pathlib.Path(config.output) / refined_folder.FOLDER / "refine_report.html"
  write_report = functools.partial(
    refine_page.write,
    page,
    judges=[judge.model or judge.engine for judge in config.refine.judges],
    accept_at=config.refine.fusion.accept_at,
    title=pathlib.Path(config.output).name,
  )
  if select_only is None:
    summary = refinement_run.refine(config, share, write_report, ray)
  else:
    summary = reselection.reselect(config, pathlib.Path(select_only), write_report)
  if summary is not None:
    show(summary)
    print(f"report: {page}")


def worker_share(
  num_workers: int | None, worker: int | None, select_only: str | None
) -> refinement_run.WorkerShare:
  """The rows that the command line asks for."""
  if num_workers is None and worker is None:
    return refinement_run.ALL_ROWS
  if num_workers is None or worker is None:
    raise errors.UserError(
      "command line: --num-workers and --worker go together: the number of workers, "
      "and which of them this is, counted from 0"
    )
  if select_only is not None:
    raise errors.UserError(
      "command line: --select-only calls no model, so it takes no workers; leave out "
      "--num-workers and --worker"
    )
  if num_workers < 1:
    raise errors.UserError(
      f"command line: --num-workers {num_workers}: must be 1 or more"
    )
  if not 0 <= worker < num_workers:
    raise errors.UserError(
      f"command line: --worker {worker}: the workers are 0 to {num_workers - 1} "
      f"(--num-workers {num_workers})"
    )
  return refinement_run.WorkerShare(worker, num_workers)


def show(summary: Mapping[str, Any]) -> None:
  """Prints the summary as a table, then what needs attention."""
  table = rich.table.Table(title="refinement", show_header=False)
  table.add_row("questions", str(summary["questions"]))
  table.add_row(
    f"rewrites with cosine >= {summary['threshold']:g}",
    f"{summary['accepted']} ({summary['accept_rate']:.0%})",
  )
  titles = {"rounds": "rounds taken", "thinking_tokens": "thinking tokens"}
  for name in ("chosen", "reasons", "rounds", "seconds", "tokens", "thinking_tokens"):
    values = summary.get(name, {})
    if any(value or value is None for value in values.values()):
      table.add_row(titles.get(name, name), progress.amounts(values))
  table.add_row("judge abstentions", str(summary["judge_failures"]))
  rich.console.Console().print(table)
  if summary.get("encoder_truncated"):
    print(
      f"{summary['encoder_truncated']} texts were longer than the encoder's limit: "
      "their cosines compare only the beginnings"
    )
  if summary.get("unused_calls"):
    print(
      f"{summary['unused_calls']} journalled calls belong to rows or settings that are "
      "gone, or to other runs"
    )


def main() -> None:
  cli.run(
    "refine",
    refine,
    "Rewrite, filter, fuse and judge the training answers.",
    options={
      **cli.RAY,
      "--num-workers": {
        "type": int,
        "metavar": "N",
        "help": "share the rows among N processes or machines; then run the same"
        " command without this option to merge their results",
      },
      "--worker": {
        "type": int,
        "metavar": "I",
        "help": "which of the N workers this is, counted from 0",
      },
      "--select-only": {
        "metavar": "FOLDER",
        "help": "select again among the answers in a finished run's output folder, with"
        " another threshold, another accept_at or fewer judges; calls no model",
      },
    },
  )


if __name__ == "__main__":
  main()
