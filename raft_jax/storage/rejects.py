"""Rows that a run cannot use: their places, the reasons, and the file of the list."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from raft_jax.storage import atomic


class Place(NamedTuple):
  """The place of a row: its file, and its line there (its number in a Parquet file).

  The id is None for an unreadable row without an id. The file is empty if a record's
  origin is not known.
  """

  id: str | None
  file: str = ""
  line: int = 0

  def __str__(self) -> str:
    at = f"{self.file}:{self.line}" if self.file else ""
    return ": ".join(filter(None, (at, self.id and f"row {self.id!r}")))


class Reject(NamedTuple):
  """A row that cannot be used, and why; `kind` is the reason in one word."""

  place: Place
  reason: str
  kind: str = "unusable"
  text: str = ""

  def __str__(self) -> str:
    return f"{self.place}: {self.reason}"


def write(path: str | os.PathLike[str], rejects: Sequence[Reject]) -> None:
  """Lists rows as JSONL {file, line, id, kind, reason, text}.

  An existing file is replaced, or removed if there are no rows to list.
  """
  path = pathlib.Path(path)
  if not rejects:
    path.unlink(missing_ok=True)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = [
    {**place._asdict(), "kind": kind, "reason": reason, "text": text}
    for place, reason, kind, text in rejects
  ]
  lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
  with atomic.replacing(path) as temporary:
    temporary.write_text("".join(lines), "utf-8", errors="backslashreplace")


def report(
  rejects: Sequence[Reject], listed: str | os.PathLike[str] | None = None
) -> None:
  """Prints how many rows were set aside, the first one, and where all are listed."""
  if not rejects:
    return
  counts = collections.Counter(reject.kind for reject in rejects)
  kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
  where = f"; all are in {listed}" if listed else ""
  rows = "1 row was" if len(rejects) == 1 else f"{len(rejects)} rows were"
  print(
    f"{rows} set aside ({kinds}); the first is {rejects[0]}{where}", file=sys.stderr
  )
