"""What the config says about the rows of files, and the format of a file.

A file has one format: that of its first rows, or the one that the config names. Two
that fit are an error; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.storage import row_files, row_formats


class Layout(NamedTuple):
  """What the config says about rows.

  Attributes:
    format: name of the format; None: detected.
    columns: field -> the column that holds it.
    turns: "last": a conversation is one example; "each": every assistant turn is.
  """

  format: str | None = None
  columns: Mapping[str, str] = {}
  turns: str = "last"


DETECTED = Layout()
"""What is found where the config says nothing."""


def columns_to_read(layout: Layout) -> tuple[str, ...]:
  return tuple(dict.fromkeys((*row_formats.FIELDS, *layout.columns.values())))


def fields(values: row_formats.Values, columns: Mapping[str, str]) -> dict[str, Any]:
  """The fields of a row under the names of the formats, without its nulls.

  Args:
    columns: field -> its column. A column with the field's own name gives way.
  """
  given = {key: value for key, value in values.items() if value is not None}
  if not columns:
    return given
  mapped = {field: given[name] for field, name in columns.items() if name in given}
  moved = {*columns, *columns.values()}
  return {**{k: v for k, v in given.items() if k not in moved}, **mapped}


def detect(file: str, head: Iterable[row_formats.Values], layout: Layout) -> str:
  """The format of a file, from its first readable rows.

  Args:
    file: its name, for messages.
    head: the columns of each.

  Raises:
    errors.UserError: a mapped column is missing, or two formats fit the first row that
      any fits.
  """
  rows = []
  names: dict[str, None] = {}
  chosen = layout.format
  missing = set(layout.columns.values())
  for values in head:
    names |= dict.fromkeys(values)
    missing -= names.keys()
    row = fields(values, layout.columns)
    rows.append(row)
    fitting = row_formats.fitting_formats(row) if chosen is None else []
    if len(fitting) > 1:
      raise errors.UserError(
        f"{file}: its rows fit {' and '.join(map(_described, fitting))}; name one by "
        f"data.format, e.g. data.format={fitting[0]}"
      )
    chosen = chosen or next(iter(fitting), None)
    if chosen is not None and not missing:
      break
  if missing and rows:
    key, column = next((k, c) for k, c in layout.columns.items() if c in missing)
    raise errors.UserError(
      f"{file}: data.columns maps {key} to {column!r}, and there is no such "
      f"column; there are {', '.join(map(repr, names))}"
    )
  if chosen is None and rows and row_files.suffix_of(file) in row_files.DELIMITERS:
    header = dict.fromkeys(names, "")
    if not row_formats.fitting_formats(fields(header, layout.columns)):
      raise errors.UserError(
        f"{file}:1: the first line must name the columns, and its names "
        f"({', '.join(map(repr, names))}) fit no format; write e.g. question,answer, "
        "or map the columns by data.columns"
      )
  return chosen or "question"


def _described(name: str) -> str:
  return f"{name} ({row_formats.FORMATS[name].needs})"
