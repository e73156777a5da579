"""Rehearsal questions that the model to be trained writes and answers itself (SSR).

Run it as `python -m raft_jax.synthesise --config FILE`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from raft_jax import errors
from raft_jax.config import cli, schema
from raft_jax.curation import synthesis_run
from raft_jax.runtime import progress


def synthesise(config: schema.Config, ray: int | None = None) -> None:
  """Writes questions and answers for replay into `output/synthesised`.

  Args:
    ray: make the calls on so many GPUs of a Ray cluster.
  """
  summary = synthesis_run.synthesise(config, ray)
  if summary is not None:
    folder = pathlib.Path(config.output) / synthesis_run.FOLDER
    show(summary, folder)
    check_kept(summary, folder)


def show(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Prints the summary as a table."""
  table = rich.table.Table(title="synthesis", show_header=False)
  for name in ("seeds", "drafts", "kept"):
    table.add_row(name, f"{summary[name]:,}")
  for name in ("dropped", "seconds", "tokens"):
    table.add_row(name, progress.amounts(summary[name]) or "none")
  sizes = sorted(summary["clusters"], reverse=True)
  table.add_row("drafts by cluster", ", ".join(map(str, sizes)) or "none")
  rich.console.Console().print(table)
  print(f"written to {folder}; dropped.jsonl has the reason for everything dropped")


def check_kept(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Raises UserError, with the most frequent reasons, if no question was kept."""
  if summary["kept"]:
    return
  reasons = list(summary["dropped"].items())[:3]
  frequent = ", ".join(f"{count} {reason}" for reason, count in reasons)
  raise errors.UserError(
    f"synthesise: no question was kept ({frequent}); see {folder / 'dropped.jsonl'}, "
    "and change the seeds, synthesise.writer or the budgets data.max_prompt_tokens and "
    "data.max_answer_tokens"
  )


def main() -> None:
  cli.run(
    "synthesise",
    synthesise,
    "Have the model write and answer general questions, for replay.",
    options=cli.RAY,
    without_data=True,
  )


if __name__ == "__main__":
  main()
