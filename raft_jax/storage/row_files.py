"""Rows of JSONL and Parquet files, whatever their fields mean.

A row is parsed when `values` is called with it, so a bad row does not affect others.
"""

from __future__ import annotations

import codecs
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raft_jax import errors

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_OTHER_FORMATS = {
  b"\x1f\x8b": "compressed (gzip); uncompress it",
  b"BZh": "compressed (bzip2); uncompress it",
  b"\x28\xb5\x2f\xfd": "compressed (zstd); uncompress it",
  b"PK\x03\x04": "a zip archive; take the file out of it",
  b"PAR1": "a Parquet file; name it .parquet",
}


Row = bytes | Callable[[], dict[str, Any]]
"""A raw line of JSONL, or a function that reads a row of Parquet."""


class Fault(Exception):
  """Why one row cannot be used."""


def rows(path: pathlib.Path, fields: Sequence[str]) -> Iterator[tuple[int, Row]]:
  """Each row with its line, or its number from 1.

  Args:
    fields: columns to read from Parquet; of other columns only the names are kept.

  Raises:
    errors.UserError: the file cannot be read or has another format.
  """
  if not path.is_file():
    what = "is a folder, not a file" if path.is_dir() else "no such file"
    raise errors.UserError(
      f"{path}: {what}; give a .jsonl or .parquet file (relative paths start at the "
      f"folder the command runs in)"
    )
  kind = path.suffix.lower()
  try:
    if kind == ".jsonl":
      yield from _jsonl_rows(path)
    elif kind == ".parquet":
      yield from _parquet_rows(path, fields)
    else:
      raise errors.UserError(
        f"{path}: unknown file type {path.suffix!r}; questions are .jsonl or .parquet"
        f"{', uncompressed' if kind in COMPRESSED else ''}"
      )
  except OSError as e:
    raise errors.UserError(f"{path}: cannot read: {e.strerror or e}") from e


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  with path.open("rb") as lines:
    for number, raw in enumerate(lines, start=1):
      if number == 1:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
          raise errors.UserError(f"{path}:1: is UTF-16; save the file as UTF-8")
        for start, what in _OTHER_FORMATS.items():
          if raw.startswith(start):
            raise errors.UserError(f"{path}: is {what}")
        raw = raw.removeprefix(codecs.BOM_UTF8)
      if raw.strip():
        yield number, raw


def _parquet_rows(
  path: pathlib.Path, fields: Sequence[str]
) -> Iterator[tuple[int, Any]]:
  import pyarrow  # a third of a second that JSONL users need not pay
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    columns = [name for name in names if name in fields]
    # Not read; their names serve as suggestions where a field is missing.
    others = dict.fromkeys((name for name in names if name not in fields), True)
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
      raise errors.UserError(f"{path}: two columns are named {twice!r}; keep one")
    start = 1
    for batch in file.iter_batches(columns=columns):
      for i in range(batch.num_rows):
        yield start + i, lambda batch=batch, i=i: {**others, **_cells(batch, i)}
      start += batch.num_rows
  except pyarrow.ArrowException as e:
    reason = str(e).splitlines()[0]
    raise errors.UserError(
      f"{path}: not a readable Parquet file ({reason}); write it again"
    ) from e


def _cells(batch: Any, i: int) -> dict[str, Any]:
  try:
    return {
      name: _without_nulls(batch.column(name)[i].as_py()) for name in batch.schema.names
    }
  except UnicodeDecodeError as e:
    raise Fault("is not UTF-8") from e
  except (ValueError, OverflowError) as e:
    raise Fault(f"cannot be read: {str(e).splitlines()[0]}") from e


def _without_nulls(value: Any) -> Any:
  """The value without the null fields of its objects.

  All rows of a Parquet column have the same fields: those that a row did not have are
  null.
  """
  if isinstance(value, dict):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value


def _parse(raw: bytes) -> Any:
  try:
    text = raw.decode("utf-8")
  except UnicodeDecodeError as e:
    raise Fault(f"is not UTF-8 (byte {e.start + 1} of the line)") from e
  return parse_json(text)


def parse_json(text: str) -> Any:
  """The value of a JSON text, read strictly. Raises Fault if it has none."""
  try:
    return json.loads(
      text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
    )
  except json.JSONDecodeError as e:
    raise Fault(f"is not valid JSON: {e.msg} at column {e.colno}") from e
  except (ValueError, RecursionError) as e:
    reason = str(e).partition(";")[0]  # the rest is for programmers
    raise Fault(f"is not valid JSON: {reason}") from e


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  row: dict[str, Any] = {}
  for key, value in pairs:
    if key in row:
      raise Fault(f"has the key {key!r} twice")
    row[key] = value
  return row


def _refuse_constant(name: str) -> None:
  raise Fault(f"is not valid JSON: {name} is not a JSON number")


def values(row: Row) -> Mapping[str, Any]:
  """The fields of a row. Raises Fault if it cannot be read."""
  fields = _parse(row) if isinstance(row, bytes) else row()
  if not isinstance(fields, Mapping):
    raise Fault(f"is a JSON {type(fields).__name__}, not an object; one row a line")
  return fields


def unit(path: pathlib.Path) -> str:
  """The unit of a row's number: rows or lines."""
  return "row" if path.suffix.lower() == ".parquet" else "line"


def excerpt(row: Row) -> str:
  """The beginning of a line, for messages."""
  return row.decode("utf-8", "replace").strip()[:500] if isinstance(row, bytes) else ""
