"""Stage 0: question/answer pairs from documents.

Run it as `python -m raft_jax.extract --config FILE`.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from raft_jax import errors
from raft_jax.config import cli, schema
from raft_jax.curation import extraction_run
from raft_jax.runtime import progress


def extract(config: schema.Config, ray: int | None = None) -> None:
  """Extracts pairs from `extract.documents` into `output/extracted`.

  Args:
    ray: make the calls on so many GPUs of a Ray cluster.
  """
  summary = extraction_run.extract(config, ray)
  if summary is not None:
    folder = pathlib.Path(config.output) / extraction_run.FOLDER
    show(summary, folder)
    check_kept(summary, folder)


def show(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Prints the summary as a table, then what needs attention."""
  table = rich.table.Table(title="extraction", show_header=False)
  for name in ("documents", "chunks", "pairs", "kept"):
    table.add_row(name, f"{summary[name]:,}")
  dropped, votes = summary["dropped"], summary["judges"]
  parts = {
    "splits": summary["splits"],
    **{f"{kind} dropped": reasons for kind, reasons in dropped.items()},
    **{f"judge {i}": counts for i, counts in enumerate(votes, start=1)},
    "seconds": summary["seconds"],
    "tokens": summary["tokens"],
  }
  for name, amounts in parts.items():
    table.add_row(name, progress.amounts(amounts) or "none")
  rich.console.Console().print(table)
  empty = [name for name, count in summary["splits"].items() if not count]
  if empty and summary["kept"]:
    print(f"no pair in {', '.join(empty)}: these shares need more documents")
  print(f"written to {folder}; dropped.jsonl has the reason for everything dropped")


def check_kept(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Raises UserError, with the most frequent reasons, if no pair was kept."""
  if summary["kept"]:
    return
  counts = collections.Counter(
    {
      f"{kind} {reason}": count
      for kind, reasons in summary["dropped"].items()
      for reason, count in reasons.items()
    }
  )
  frequent = ", ".join(f"{count} {name}" for name, count in counts.most_common(3))
  raise errors.UserError(
    f"extract: no pair was kept ({frequent}); see {folder / 'dropped.jsonl'}, and "
    "change the documents, the writer or the judges"
  )


def main() -> None:
  cli.run(
    "extract",
    extract,
    "Write, judge and split question/answer pairs from documents.",
    options=cli.RAY,
    without_data=True,
  )


if __name__ == "__main__":
  main()
