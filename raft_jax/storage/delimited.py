"""CSV and TSV, read strictly (RFC 4180): records with the line where each begins.

A text is kept as it stands, spaces and line ends inside quotes included. In CSV, a
field that holds a quote must be quoted as a whole. In TSV, whose writers often do not
quote, a field that does not begin with a quote is text as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


class Record(NamedTuple):
  """The fields of a record, the line where it begins, and why it cannot be used.

  Bytes that are not UTF-8 are lone surrogates in the fields.
  """

  line: int
  fields: list[str]
  fault: str | None = None


class Broken(Exception):
  """Quotes that do not match: nothing after them can be trusted."""

  def __init__(self, line: int, reason: str):
    super().__init__(line, reason)
    self.line = line
    self.reason = reason


def records(lines: Iterator[tuple[int, bytes]], delimiter: str) -> Iterator[Record]:
  """The records of a file, without blank lines.

  Args:
    lines: number and bytes of each line, without a byte-order mark.

  Raises:
    Broken: a quote is not closed, or is followed by text.
  """
  for number, raw in lines:
    line = _decode(raw)
    if '"' not in line:
      if line.rstrip("\r\n"):
        fields = line.removesuffix("\n").removesuffix("\r").split(delimiter)
        yield Record(number, fields, _fault(fields))
      continue
    fields, fault = _quoted(number, line, lines, delimiter)
    yield Record(number, fields, fault or _fault(fields))


def _decode(raw: bytes) -> str:
  return raw.decode("utf-8", "surrogateescape")


def _fault(fields: list[str]) -> str | None:
  for field in fields:
    if not field.isascii() and any("\udc80" <= c <= "\udcff" for c in field):
      return "is not UTF-8; save the file as UTF-8"
    if "\0" in field:
      return "holds a NUL character; take it out"
  return None


def _quoted(
  first: int, line: str, lines: Iterator[tuple[int, bytes]], delimiter: str
) -> tuple[list[str], str | None]:
  """The fields of a record that begins on line `first`, and a fault of one of them."""
  fields: list[str] = []
  fault = None
  number, at = first, 0
  while True:
    if line.startswith('"', at):
      opened = number
      number, line, at, text = _quoted_field(opened, line, at + 1, lines)
      fields.append(text)
      rest = line[at:]
      if not rest.startswith(delimiter) and rest.rstrip("\r\n"):
        raise Broken(
          opened,
          f"field {len(fields)} begins with a quote, and {rest.rstrip()[:20]!r} "
          'follows the closing one; double the quotes inside a quoted field ("")',
        )
    else:
      end = line.find(delimiter, at)
      end = len(line) if end < 0 else end
      text = line[at:end]
      if end == len(line):
        text = text.removesuffix("\n").removesuffix("\r")
      if '"' in text and delimiter == ",":
        fault = fault or (
          f"has a stray quote in field {len(fields) + 1}; quote the whole field and "
          'double the quotes inside ("")'
        )
      fields.append(text)
      at = end
    if not line.startswith(delimiter, at):
      return fields, fault
    at += 1


def _quoted_field(
  opened: int, line: str, at: int, lines: Iterator[tuple[int, bytes]]
) -> tuple[int, str, int, str]:
  """Reads on to the closing quote.

  Returns:
    The number and text of the line where the field ends, the position after its closing
    quote there, and the field's text.
  """
  number = opened
  parts = []
  while True:
    end = line.find('"', at)
    if end < 0:
      parts.append(line[at:])
      following = next(lines, None)
      if following is None:
        raise Broken(opened, "a quote is opened here and never closed; close it")
      number, line, at = following[0], _decode(following[1]), 0
    elif line.startswith('"', end + 1):
      parts.append(line[at : end + 1])
      at = end + 2
    else:
      parts.append(line[at:end])
      return number, line, end + 1, "".join(parts)
