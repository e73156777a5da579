"""What the stages hand to each other: frozen records, and their strict reading.

Input is JSONL or Parquet with rows `{id?, domain?, question | messages, answer}`; other
fields are ignored. A row we cannot use is set aside with its line and reason, never
guessed at. Text is kept byte for byte: no stripping, no Unicode normalisation.
Refined records travel as canonical JSON.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.storage import atomic

ROLES = ("system", "user", "assistant")
FIELDS = ("id", "domain", "question", "messages", "answer")


class Message(NamedTuple):
  role: str
  content: str


def user_turn(content: str) -> tuple[Message, ...]:
  """A conversation of one turn; no system turn, which some chat templates refuse."""
  return (Message("user", content),)


@dataclasses.dataclass(frozen=True)
class Question:
  """One training or test example; `messages` ends with a user turn."""

  id: str
  domain: str
  messages: tuple[Message, ...]
  answer: str


@dataclasses.dataclass(frozen=True)
class Round:
  """One fused answer; a judge that abstained scores None, as does `mean` if all did."""

  text: str
  scores: tuple[float | None, ...]
  mean: float | None


@dataclasses.dataclass(frozen=True)
class Refined:
  """A question with every intermediate of the refinement.

  `similarity` is the cosine in -1..1 of answer and rewrite (None: not computable),
  `answer` the final one, `chosen` where it came from ("original", "rewrite", "fused")
  and `reason` why. Any ablation of the filter is a re-selection of these fields.
  """

  question: Question
  rewrite: str
  similarity: float | None
  rounds: tuple[Round, ...]
  answer: str
  chosen: str
  reason: str


class _Reject(Exception):
  """Why one row is unusable; never leaves this module."""


# Questions in


def read_questions(
  path: str | os.PathLike[str],
  *,
  limit: int | None = None,
  reject_threshold: float = 0.01,
  rejects_path: str | os.PathLike[str] | None = None,
) -> list[Question]:
  """Reads and checks the rows of a `.jsonl` or `.parquet` file, in order.

  Args:
    path: the file. A byte-order mark, CRLF line ends and blank lines are fine.
    limit: stop after this many usable rows.
    reject_threshold: share of unusable rows (0..1) above which the file is refused.
    rejects_path: where to write the unusable rows as JSONL {line, reason, text}; an
      old file there is replaced, or removed when nothing is rejected.

  Returns:
    The usable rows. A row without an id gets one derived from its content.

  Raises:
    errors.UserError: no such file, not one of the two formats, no usable row, more
      rejects than the threshold, or an id that appears twice.
  """
  kept: list[Question] = []
  check_questions(
    path,
    limit=limit,
    reject_threshold=reject_threshold,
    rejects_path=rejects_path,
    keep=kept.append,
  )
  return kept


def check_questions(
  path: str | os.PathLike[str],
  *,
  limit: int | None = None,
  reject_threshold: float = 0.01,
  rejects_path: str | os.PathLike[str] | None = None,
  keep: Callable[[Question], None] = lambda question: None,
) -> int:
  """The number of usable rows, each given to `keep`; all else as `read_questions`."""
  path = pathlib.Path(path)
  count = 0
  lines: dict[str, int] = {}  # of each id
  repeats: list[tuple[int, str]] = []
  rejects: list[dict[str, Any]] = []
  for line, row in _checked(path, limit):
    if isinstance(row, Question):
      count += 1
      seen = lines.setdefault(row.id, line)
      if seen != line:
        repeats.append((line, f"{row.id!r} on lines {seen} and {line}"))
      keep(row)
    else:
      rejects.append({"line": line, **row})
  if rejects_path is not None:
    _write_rejects(pathlib.Path(rejects_path), rejects)
  _check_rejects(path, count, rejects, reject_threshold, rejects_path)
  _check_ids(path, repeats)
  if rejects:
    first = rejects[0]
    print(
      f"{path}: {len(rejects)} unusable rows were left out; the first is line "
      f"{first['line']}: {first['reason']}",
      file=sys.stderr,
    )
  return count


def rows(
  path: str | os.PathLike[str], *, limit: int | None = None
) -> Iterator[Question]:
  """The usable rows of a file that `check_questions` took, in order, one at a time."""
  found = (row for _, row in _checked(pathlib.Path(path), limit))
  return (row for row in found if isinstance(row, Question))


def _checked(
  path: pathlib.Path, limit: int | None
) -> Iterator[tuple[int, Question | dict[str, str]]]:
  """Line and question of each row, up to `limit` questions; else reason and text."""
  count = 0
  try:
    for line, row in _rows(path):
      try:
        question = _question(row() if callable(row) else row)
      except _Reject as reason:
        yield line, {"reason": str(reason), "text": _excerpt(row)}
        continue
      yield line, question
      count += 1
      if count == limit:
        return
  except OSError as e:
    raise errors.UserError(f"{path}: cannot read: {e.strerror or e}") from e


def read_texts(
  path: str | os.PathLike[str], fields: Sequence[str]
) -> Iterator[tuple[int, dict[str, str] | str]]:
  """Rows of any `.jsonl` or `.parquet` file: (line, texts by field), or (line, reason).

  Fields that a row lacks are left out; a whole number is fine as `id`.

  Raises:
    OSError: the file cannot be read.
    errors.UserError: it is no file of the two formats.
  """
  for line, row in _rows(pathlib.Path(path), fields):
    try:
      values = _parse(row) if isinstance(row, bytes) else row()
      if not isinstance(values, Mapping):
        raise _Reject(f"is a JSON {type(values).__name__}, not an object")
      given = {name: values[name] for name in fields if values.get(name) is not None}
      yield line, {name: _plain_text(name, value) for name, value in given.items()}
    except _Reject as reason:
      yield line, str(reason)


def _rows(
  path: pathlib.Path, fields: Sequence[str] = FIELDS
) -> Iterator[tuple[int, Any]]:
  """Yields (line or row number from 1, raw line or a function that reads the row)."""
  if not path.is_file():
    what = "is a folder, not a file" if path.is_dir() else "no such file"
    raise errors.UserError(
      f"{path}: {what}; give a .jsonl or .parquet file (relative paths start at the "
      f"folder the command runs in)"
    )
  if path.suffix == ".jsonl":
    yield from _jsonl_rows(path)
  elif path.suffix == ".parquet":
    yield from _parquet_rows(path, fields)
  else:
    raise errors.UserError(
      f"{path}: unknown file type {path.suffix!r}; questions are .jsonl or .parquet"
    )


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  with path.open("rb") as lines:
    for number, raw in enumerate(lines, start=1):
      if number == 1:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
          raise errors.UserError(f"{path}:1: is UTF-16; save the file as UTF-8")
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
    columns = [name for name in file.schema_arrow.names if name in fields]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
      raise errors.UserError(f"{path}: two columns are named {twice!r}; keep one")
    start = 1
    for batch in file.iter_batches(columns=columns):
      for i in range(batch.num_rows):
        yield start + i, lambda batch=batch, i=i: _cells(batch, i)
      start += batch.num_rows
  except pyarrow.ArrowException as e:
    reason = str(e).splitlines()[0]
    raise errors.UserError(
      f"{path}: not a readable Parquet file ({reason}); write it again"
    ) from e


def _cells(batch: Any, i: int) -> dict[str, Any]:
  try:
    return {name: batch.column(name)[i].as_py() for name in batch.schema.names}
  except UnicodeDecodeError as e:
    raise _Reject("is not UTF-8") from e


def _parse(raw: bytes) -> Any:
  try:
    text = raw.decode("utf-8")
  except UnicodeDecodeError as e:
    raise _Reject(f"is not UTF-8 (byte {e.start + 1} of the line)") from e
  try:
    return json.loads(
      text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
    )
  except json.JSONDecodeError as e:
    raise _Reject(f"is not valid JSON: {e.msg} at column {e.colno}") from e
  except (ValueError, RecursionError) as e:
    raise _Reject(f"is not valid JSON: {e}") from e


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  row: dict[str, Any] = {}
  for key, value in pairs:
    if key in row:
      raise _Reject(f"has the key {key!r} twice")
    row[key] = value
  return row


def _refuse_constant(name: str) -> None:
  raise _Reject(f"is not valid JSON: {name} is not a JSON number")


def _question(row: bytes | Mapping[str, Any]) -> Question:
  """A checked question from a raw JSONL line or a mapping, else _Reject."""
  values = _parse(row) if isinstance(row, bytes) else row
  if not isinstance(values, Mapping):
    raise _Reject(f"is a JSON {type(values).__name__}, not an object; one row a line")
  values = {key: value for key, value in values.items() if value is not None}
  has_question, has_messages = "question" in values, "messages" in values
  if has_question and has_messages:
    raise _Reject("has both `question` and `messages`; keep one")
  messages: tuple[Message, ...]
  if has_question:
    messages = user_turn(_text("question", values["question"]))
  elif has_messages:
    messages = _messages(values["messages"])
  else:
    raise _Reject(_missing("question", values))
  if "answer" not in values:
    raise _Reject(_missing("answer", values))
  answer = _text("answer", values["answer"])
  domain = _text("domain", values["domain"]) if "domain" in values else ""
  return Question(_id(values, domain, messages, answer), domain, messages, answer)


def _missing(field: str, values: Mapping[str, Any]) -> str:
  others = [key for key in values if key not in FIELDS]
  near = difflib.get_close_matches(field, others, n=1)
  wanted = "`question` (or `messages`)" if field == "question" else f"`{field}`"
  return f"has no {wanted}" + (f"; rename {near[0]!r}" if near else "")


def _text(field: str, value: Any) -> str:
  if not isinstance(value, str):
    raise _Reject(f"`{field}` is {type(value).__name__}, not text")
  # Spaces, control and zero-width characters alone are as empty as nothing.
  if all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in value):
    raise _Reject(f"`{field}` is empty")
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise _Reject(f"`{field}` holds half of a surrogate pair, which no text has") from e
  return value


def text_fault(field: str, value: Any) -> str | None:
  """Why `read_questions` would refuse a value as the text of a field, or None."""
  try:
    _text(field, value)
  except _Reject as reason:
    return str(reason)
  return None


def _messages(value: Any) -> tuple[Message, ...]:
  if not isinstance(value, list) or not value:
    raise _Reject("`messages` is not a non-empty list of {role, content}")
  messages = []
  for i, item in enumerate(value):
    at = f"messages[{i}]"
    if not isinstance(item, Mapping):
      raise _Reject(f"`{at}` is not an object {{role, content}}")
    extra = [k for k, v in item.items() if k not in Message._fields and v]
    if extra:  # e.g. tool calls: dropping them would change what was said
      raise _Reject(f"`{at}` has {extra[0]!r}; only role and content are supported")
    role = item.get("role")
    if role not in ROLES:
      raise _Reject(f"`{at}.role` is {role!r}, not one of {', '.join(ROLES)}")
    if role == "system" and i > 0:
      raise _Reject(f"`{at}` is a system turn; only the first turn may be")
    messages.append(Message(role, _text(f"{at}.content", item.get("content"))))
  if messages[-1].role != "user":
    raise _Reject("`messages` does not end with a user turn; the reply is `answer`")
  return tuple(messages)


def _id(values: Mapping[str, Any], domain: str, messages: Any, answer: str) -> str:
  given = values.get("id")
  if given is None:
    return hashlib.sha256(_canonical([domain, messages, answer])).hexdigest()[:16]
  return _plain_text("id", given)


def _plain_text(field: str, value: Any) -> str:
  whole = isinstance(value, int) and not isinstance(value, bool)
  return _text(field, str(value) if field == "id" and whole else value)


def _excerpt(row: Any) -> str:
  return row.decode("utf-8", "replace").strip()[:500] if isinstance(row, bytes) else ""


def _write_rejects(path: pathlib.Path, rejects: list[dict[str, Any]]) -> None:
  if not rejects:
    path.unlink(missing_ok=True)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic.replacing(path) as temporary:
    temporary.write_bytes(b"".join(_canonical(reject) + b"\n" for reject in rejects))


def _check_rejects(
  path: pathlib.Path,
  kept: int,
  rejects: list[dict[str, Any]],
  threshold: float,
  rejects_path: str | os.PathLike[str] | None,
) -> None:
  rows = kept + len(rejects)
  if rows == 0:
    raise errors.UserError(f"{path}: holds no rows; it needs at least one question")
  if not rejects or (kept and len(rejects) <= threshold * rows):
    return
  first = rejects[0]
  where = f" (all in {rejects_path})" if rejects_path else ""
  raise errors.UserError(
    f"{path}:{first['line']}: {first['reason']}; {len(rejects)} of {rows} rows are "
    f"unusable{where}: mend or delete them, or raise data.reject_threshold"
  )


def _check_ids(path: pathlib.Path, repeats: list[tuple[int, str]]) -> None:
  if repeats:
    named = ", ".join(what for _, what in repeats[:5])
    more = f" and {len(repeats) - 5} more" if len(repeats) > 5 else ""
    raise errors.UserError(
      f"{path}:{repeats[0][0]}: duplicate id: {named}{more}; give every row its own "
      f"id or delete the repeats (a row without an id is known by its content)"
    )


# Records out and back


def to_json(refined: Refined) -> bytes:
  """Canonical JSON: sorted keys, UTF-8, no NaN, so equal records have equal bytes.

  Raises:
    ValueError: a number is not finite, or a text holds a lone surrogate.
  """
  # Not `dataclasses.asdict`, which copies every text and takes as long as a call.
  question = vars(refined.question)
  messages = [m._asdict() for m in refined.question.messages]
  return _canonical(
    {
      **vars(refined),
      "question": {**question, "messages": messages},
      "rounds": [vars(past) for past in refined.rounds],
    }
  )


def from_json(data: bytes) -> Refined:
  """Inverse of `to_json`. Raises errors.UserError for anything else."""
  try:
    tree = json.loads(data)
    question = tree.pop("question")
    messages = tuple(Message(**message) for message in question["messages"])
    rounds = tuple(
      Round(**{**r, "scores": tuple(r["scores"])}) for r in tree.pop("rounds")
    )
    return Refined(
      question=Question(**{**question, "messages": messages}), rounds=rounds, **tree
    )
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
    raise errors.UserError(
      f"not a refined record ({e!r}): {data[:80]!r}; run the refine stage again"
    ) from e


def _canonical(value: Any) -> bytes:
  text = json.dumps(
    value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
  )
  return text.encode("utf-8")
