"""Rows of one text file, whatever their fields mean: JSONL, JSON, CSV and TSV.

A row is parsed when `values` is called with it, so a bad row does not affect others.
The file may be compressed, as `.gz` or `.zst`.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.storage import delimited

TEXT_KINDS = (".jsonl", ".json", ".csv", ".tsv")
KINDS = (*TEXT_KINDS, ".parquet")
COMPRESSED = (".gz", ".zst")
USABLE = "rows are read from .jsonl, .json, .csv, .tsv and .parquet; .gz and .zst too"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_FORMATS = {
  b"\x1f\x8b": "compressed (gzip); name it .gz, as in q.jsonl.gz",
  b"BZh": "compressed (bzip2); uncompress it",
  b"\xfd7zXZ": "compressed (xz); uncompress it",
  b"\x28\xb5\x2f\xfd": "compressed (zstd); name it .zst, as in q.jsonl.zst",
  b"PK\x03\x04": "a zip archive or a workbook; take the file out, or save it as CSV",
  b"PAR1": "a Parquet file; name it .parquet",
  b"ARROW1": "an Arrow file; write it as Parquet",
}

Row = bytes | Callable[[], dict[str, Any]]
"""A raw line of JSONL, or a function that reads a row of another kind of file."""


class Fault(Exception):
  """Why one row cannot be used."""


class Kind(NamedTuple):
  """What a file's name says: the suffix of its rows, and of its compression or ""."""

  suffix: str
  compression: str


def kind(path: pathlib.Path) -> Kind | None:
  """The kind of a file of rows, by its name; None: it has another one."""
  compression = path.suffix.lower()
  name = path
  if compression in COMPRESSED:
    name = path.with_suffix("")
  else:
    compression = ""
  suffix = name.suffix.lower()
  return Kind(suffix, compression) if suffix in KINDS else None


def suffix_of(path: str | os.PathLike[str]) -> str:
  """The suffix of a file's rows, without that of a compression; "" for other names."""
  found = kind(pathlib.Path(path))
  return found.suffix if found else ""


def rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
  """Each row of a text file with its line, or its number from 1 in a JSON file.

  Raises:
    errors.UserError: the file cannot be read or has another format.
  """
  suffix, compression = kind(path) or (path.suffix.lower(), "")
  try:
    if suffix not in TEXT_KINDS:
      raise errors.UserError(f"{path}: unknown file type {suffix!r}; {USABLE}")
    with _opened(path, compression) as stream:
      lines = _lines(path, stream)
      if suffix == ".jsonl":
        yield from _jsonl_rows(path, lines)
      elif suffix == ".json":
        yield from _json_rows(path, b"".join(raw for _, raw in lines))
      else:
        yield from _delimited_rows(path, lines, DELIMITERS[suffix])
  except (OSError, EOFError, zlib.error) as e:
    if compression and getattr(e, "errno", None) is None:
      raise errors.UserError(
        f"{path}: the {compression} archive is torn or damaged ({e}); download or "
        "compress it again"
      ) from e
    reason = getattr(e, "strerror", None) or e
    raise errors.UserError(f"{path}: cannot read: {reason}") from e


def _opened(
  path: pathlib.Path, compression: str
) -> contextlib.AbstractContextManager[Iterable[bytes]]:
  if compression == ".gz":
    return gzip.open(path, "rb")
  if compression == ".zst":
    import pyarrow  # a third of a second that other users need not pay

    stream = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(stream, 1 << 18)
  return path.open("rb")


def _lines(path: pathlib.Path, stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
  """Number and bytes of each line, without the byte-order mark."""
  for number, raw in enumerate(stream, start=1):
    if number == 1:
      if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise errors.UserError(f"{path}:1: is UTF-16; save the file as UTF-8")
      for start, what in _OTHER_FORMATS.items():
        if raw.startswith(start):
          raise errors.UserError(f"{path}: is {what}")
      raw = raw.removeprefix(codecs.BOM_UTF8)
    yield number, raw


# --- JSON -----------------------------------------------------------------------------


def _jsonl_rows(
  path: pathlib.Path, lines: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
  for number, raw in lines:
    if not raw.strip():
      continue
    if number == 1 and re.match(rb"\[\s*(\{|$)", raw):
      raise errors.UserError(
        f"{path}:1: begins a list of rows, which is JSON; name the file .json, or "
        "write one row a line"
      )
    yield number, raw


def _json_rows(path: pathlib.Path, data: bytes) -> Iterator[tuple[int, Row]]:
  """The objects of a JSON array, one by one; the first is row 1."""
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as e:
    raise errors.UserError(
      f"{path}: is not UTF-8 (byte {e.start + 1}); save it as UTF-8"
    ) from e
  at = _after_space(text, 0)
  if at == len(text):
    return
  if text[at] != "[":
    raise errors.UserError(f"{path}: {_not_array(text)}")
  number = 0
  at = _after_space(text, at + 1)
  closed = text.startswith("]", at)
  while not closed:
    number += 1
    try:
      row, at = _element(text, at)
      at = _after_space(text, at)
      closed = text.startswith("]", at)
      if not closed and not text.startswith(",", at):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    except (json.JSONDecodeError, RecursionError) as e:
      place, reason = str(path), "is nested too deeply"
      if isinstance(e, json.JSONDecodeError):
        place, reason = f"{path}:{e.lineno}", f"{e.msg} at column {e.colno}"
      raise errors.UserError(
        f"{place}: is not valid JSON: {reason}, in row {number} of the list; mend it "
        "or write the file again"
      ) from e
    yield number, row
    if not closed:
      at = _after_space(text, at + 1)
  rest = _after_space(text, at + 1)
  if rest < len(text):
    line = text.count("\n", 0, rest) + 1
    raise errors.UserError(
      f"{path}:{line}: more follows the list of rows; a .json file is one list"
    )


def _after_space(text: str, at: int) -> int:
  match = _SPACE.match(text, at)
  return match.end() if match else at


_SPACE = re.compile(r"[ \t\r\n]*")


def _element(text: str, at: int) -> tuple[Row, int]:
  """The row at a position and the position after it. A bad row still has an end."""
  try:
    value, end = _STRICT.raw_decode(text, at)
  except Fault as fault:
    _, end = _LENIENT.raw_decode(text, at)
    return _refusing(str(fault)), end
  return (lambda: value), end


def _refusing(reason: str) -> Row:
  def refuse() -> dict[str, Any]:
    raise Fault(reason)

  return refuse


_OF_A_ROW = (
  "messages",
  "conversations",
  "conversation",
  "prompt",
  "completion",
  "tools",
)
"""Lists of objects that belong to one row."""


def _dicts(items: list[Any]) -> Iterator[Any]:
  return (item for item in items if isinstance(item, dict))


def _not_array(text: str) -> str:
  """Why the text of a .json file is no list of rows."""
  try:
    value = json.loads(text)
  except json.JSONDecodeError as e:
    if e.msg == "Extra data":
      return "is one row a line, not a list of rows; name it .jsonl"
    return f"is not valid JSON: {e.msg} on line {e.lineno}, column {e.colno}; mend it"
  except (ValueError, RecursionError):
    return "is not valid JSON; write it again as a list of rows"
  if not isinstance(value, dict):
    return f"is a JSON {type(value).__name__}, not a list of rows"
  for key, rows in value.items():
    if key not in _OF_A_ROW and isinstance(rows, list) and any(_dicts(rows)):
      return (
        f"is one object, whose rows are the list under {key!r}; write that list alone "
        "into the file"
      )
  tables = [v for v in value.values() if isinstance(v, (dict, list))]
  if tables and len(tables) == len(value):
    return (
      "is one object of columns, not a list of rows; write a row an object (pandas: "
      'orient="records")'
    )
  return "is one object, not a list of rows; put [ ] around it"


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


_STRICT = json.JSONDecoder(
  object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
)
_LENIENT = json.JSONDecoder()


# --- CSV and TSV ----------------------------------------------------------------------


def _delimited_rows(
  path: pathlib.Path, lines: Iterator[tuple[int, bytes]], delimiter: str
) -> Iterator[tuple[int, Row]]:
  try:
    records = delimited.records(lines, delimiter)
    header = next(records, None)
    if header is None:
      return
    _check_header(path, header, delimiter)
    for line, fields, fault in records:
      yield line, _delimited_row(header.fields, fields, fault)
  except delimited.Broken as e:
    raise errors.UserError(f"{path}:{e.line}: {e.reason}") from e


def _delimited_row(names: list[str], fields: list[str], fault: str | None) -> Row:
  def read() -> dict[str, Any]:
    if fault is not None:
      raise Fault(fault)
    if len(fields) != len(names):
      raise Fault(
        f"has {len(fields)} fields, and the first line names {len(names)}; quote a "
        "text that holds the separator"
      )
    # An empty field is an absent one.
    return {name: text or None for name, text in zip(names, fields)}

  return read


def _check_header(path: pathlib.Path, header: delimited.Record, delimiter: str) -> None:
  place = f"{path}:{header.line}"
  names = header.fields
  if header.fault is not None:
    utf16 = " (is it UTF-16?)" if "NUL" in header.fault else ""
    raise errors.UserError(f"{place}: {header.fault}{utf16}")
  if any("\r" in name for name in names):
    raise errors.UserError(
      f"{place}: lines end with CR alone; save the file with LF or CRLF line ends"
    )
  if len(names) == 1:
    for other, called in delimited.NAMES.items():
      if other in names[0]:
        remedy = "name it .tsv" if other == "\t" else "save it with commas"
        if delimiter == "\t":
          remedy = "name it .csv" if other == "," else "save it with tabs"
        raise errors.UserError(
          f"{place}: its columns are separated by {called}, not by "
          f"{delimited.NAMES[delimiter]}; {remedy}"
        )
  twice = next((name for name in names if name and names.count(name) > 1), None)
  if twice is not None:
    raise errors.UserError(f"{place}: two columns are named {twice!r}; keep one")


# --- Rows -----------------------------------------------------------------------------


def values(row: Row) -> Mapping[str, Any]:
  """The fields of a row. Raises Fault if it cannot be read."""
  fields = _parse(row) if isinstance(row, bytes) else row()
  if not isinstance(fields, Mapping):
    raise Fault(f"is a JSON {type(fields).__name__}, not an object; one row a line")
  return fields


def unit(path: str) -> str:
  """The unit of a row's number in a file: rows or lines."""
  return "line" if suffix_of(path) in (".jsonl", *DELIMITERS) else "row"


def excerpt(row: Row) -> str:
  """The beginning of a line, for messages."""
  return row.decode("utf-8", "replace").strip()[:500] if isinstance(row, bytes) else ""
