"""Files of questions: what a row may be, and strict reading of JSONL and Parquet.

Rows are `{id?, domain?, question | messages, answer, tools?, reasoning_content?}`;
other fields are ignored. A row that cannot be used is set aside with its line and the
reason; nothing is guessed. Text is kept byte for byte: no stripping, no Unicode
normalisation.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.runtime import interrupts
from raft_jax.storage import messages as messages_lib
from raft_jax.storage import records, row_files
from raft_jax.storage import rejects as rejects_lib

FIELDS = (
  *("id", "domain", "question", "messages", "answer"),
  *("tools", "reasoning_content"),
)
USUAL = {
  "question": ("prompt", "instruction", "input", "query", "problem"),
  "messages": ("conversations", "conversation"),
  "answer": ("response", "output", "completion", "solution", "target"),
}
"""Names of these fields in other data sets."""


class Read(NamedTuple):
  """The usable rows of a file, the place of each by its id, and the other rows."""

  questions: list[records.Question]
  places: dict[str, rejects_lib.Place]
  rejects: list[rejects_lib.Reject]


def read(
  path: str | os.PathLike[str],
  *,
  limit: int | None = None,
  unusable: str = "error",
  reject_threshold: float = 0.01,
  rejects_path: str | os.PathLike[str] | None = None,
) -> Read:
  """Reads and checks the rows of a `.jsonl` or `.parquet` file, in order.

  Args:
    path: the file. A byte-order mark, CRLF line ends and blank lines are fine.
    limit: stop after this many readable rows.
    unusable: "skip" sets every unusable row aside; "error" refuses repeated ids, and
      a share of unreadable rows above the threshold.
    reject_threshold: share of unreadable rows, 0..1, that "error" also sets aside.
    rejects_path: file for the list of rows that are set aside or refused.

  Returns:
    The usable rows. A row without an id gets one derived from its content.

  Raises:
    errors.UserError: the file does not exist, has another format or no usable row, or
      a row is refused; the message names its line and id.
  """
  kept: list[records.Question] = []
  places: dict[str, rejects_lib.Place] = {}

  def keep(line: int, question: records.Question) -> None:
    kept.append(question)
    places[question.id] = rejects_lib.Place(question.id, str(path), line)

  checked = check_questions(
    path,
    limit=limit,
    unusable=unusable,
    reject_threshold=reject_threshold,
    rejects_path=rejects_path,
    keep=keep,
  )
  return Read(kept, places, checked.rejects)


def read_questions(
  path: str | os.PathLike[str], **options: Any
) -> list[records.Question]:
  """The questions of `read`; prints how many rows were set aside."""
  result = read(path, **options)
  rejects_lib.report(result.rejects, options.get("rejects_path"))
  return result.questions


class Checked(NamedTuple):
  """The number of usable rows of a file, and the other rows."""

  usable: int
  rejects: list[rejects_lib.Reject]

  @property
  def lines(self) -> frozenset[int]:
    """Lines of the rows that are set aside, for `rows`."""
    return frozenset(reject.place.line for reject in self.rejects)


def check_questions(
  path: str | os.PathLike[str],
  *,
  limit: int | None = None,
  unusable: str = "error",
  reject_threshold: float = 0.01,
  rejects_path: str | os.PathLike[str] | None = None,
  keep: Callable[[int, records.Question], None] = lambda line, question: None,
  fault: Callable[[records.Question], str | None] = lambda question: None,
) -> Checked:
  """Checks the rows of a file like `read`, without holding them in memory.

  Args:
    keep: called with the line and question of each readable row whose id is new.
    fault: why such a row cannot be used, or None.
  """
  path = pathlib.Path(path)
  count = 0
  line_by_id: dict[str, int] = {}
  rejects: list[rejects_lib.Reject] = []
  for line, row in _checked(path, limit):
    if isinstance(row, rejects_lib.Reject):
      rejects.append(row)
      continue
    place = rejects_lib.Place(row.id, str(path), line)
    first_line = line_by_id.setdefault(row.id, line)
    if first_line != line:
      repeats = f"has the id of {row_files.unit(path)} {first_line}"
      rejects.append(rejects_lib.Reject(place, repeats, "repeated"))
      continue
    keep(line, row)
    reason = fault(row)
    if reason is None:
      count += 1
    else:
      rejects.append(rejects_lib.Reject(place, reason, "refused"))
  if rejects_path is not None:
    rejects_lib.write(rejects_path, rejects)
  _check_rejects(path, count, rejects, unusable, reject_threshold, rejects_path)
  return Checked(count, rejects)


def rows(
  path: str | os.PathLike[str],
  *,
  limit: int | None = None,
  without: Container[int] = (),
) -> Iterator[tuple[int, records.Question]]:
  """Line and question of the usable rows of a file, in order, one at a time.

  Args:
    without: lines that `check_questions` set aside.
  """
  for line, row in _checked(pathlib.Path(path), limit):
    if isinstance(row, records.Question) and line not in without:
      yield line, row


def _checked(
  path: pathlib.Path, limit: int | None
) -> Iterator[tuple[int, records.Question | rejects_lib.Reject]]:
  """Line of each row with its question or a reject, up to `limit` questions."""
  count = 0
  for line, row in row_files.rows(path, FIELDS):
    interrupts.check()
    values: Any = None
    try:
      values = row_files.values(row)
      question = _question(values)
    except row_files.Fault as reason:
      place = rejects_lib.Place(_given_id(values), str(path), line)
      yield (
        line,
        rejects_lib.Reject(place, str(reason), "unreadable", row_files.excerpt(row)),
      )
      continue
    yield line, question
    count += 1
    if count == limit:
      return


def read_texts(
  path: str | os.PathLike[str], field: str, optional: Sequence[str] = ("id",)
) -> Iterator[tuple[int, dict[str, str] | rejects_lib.Reject]]:
  """Line of each row of a `.jsonl` or `.parquet` file, with its texts or a reject.

  Args:
    field: name of the field that each row must have.
    optional: names of other fields to read; an `id` may be a whole number.

  Raises:
    errors.UserError: the file cannot be read or has another format.
  """
  fields = (*optional, field)
  for line, row in row_files.rows(pathlib.Path(path), fields):
    interrupts.check()
    values: Any = None
    try:
      values = row_files.values(row)
      given = {name: values[name] for name in fields if values.get(name) is not None}
      if field not in given:
        hint = _near(field, values)
        raise row_files.Fault(
          f"has no `{field}`" + (f"; rename {hint!r}" if hint else "")
        )
      yield (
        line,
        {name: messages_lib.plain_text(name, value) for name, value in given.items()},
      )
    except row_files.Fault as reason:
      place = rejects_lib.Place(_given_id(values), str(path), line)
      yield (
        line,
        rejects_lib.Reject(place, str(reason), "unreadable", row_files.excerpt(row)),
      )


def _given_id(values: Any) -> str | None:
  """The id of a row, if it has a valid one."""
  try:
    return messages_lib.plain_text("id", values["id"])
  except (TypeError, KeyError, row_files.Fault):
    return None


def _question(values: Mapping[str, Any]) -> records.Question:
  """The question of a row.

  Raises:
    row_files.Fault: the row is not a question.
  """
  values = {key: value for key, value in values.items() if value is not None}
  has_question, has_messages = "question" in values, "messages" in values
  if has_question and has_messages:
    raise row_files.Fault("has both `question` and `messages`; keep one")
  tools = values.get("tools")
  messages: tuple[records.Message, ...]
  if has_question:
    messages = records.user_turn(messages_lib.text("question", values["question"]))
    messages = messages_lib.with_tools(messages, tools)
  elif has_messages:
    messages = messages_lib.conversation(values["messages"], tools=tools)
  else:
    raise row_files.Fault(_missing("question", values))
  if "answer" not in values:
    raise row_files.Fault(_missing("answer", values))
  reply = messages_lib.answer(values["answer"], values.get("reasoning_content"))
  domain = messages_lib.text("domain", values["domain"]) if "domain" in values else ""
  row_id = _id(values, domain, messages, values["answer"])
  return question(row_id, domain, messages, reply)


def question(
  row_id: str,
  domain: str,
  messages: tuple[records.Message, ...],
  reply: records.Message,
) -> records.Question:
  """The question that this assistant's turn answers."""
  return records.Question(
    id=row_id,
    domain=domain,
    messages=messages,
    answer=reply.content,
    reasoning_content=reply.reasoning_content,
    tool_calls=reply.tool_calls,
  )


def _missing(field: str, values: Mapping[str, Any]) -> str:
  near = _near(field, values)
  if field == "answer":
    return "has no `answer`" + (f"; rename {near!r}" if near else "")
  turns = None if near else _near("messages", values)
  hint = f"; rename {near or turns!r}" if near or turns else ""
  return f"has no `question` (or `messages`){hint}{' to `messages`' if turns else ''}"


def _near(field: str, values: Mapping[str, Any]) -> str | None:
  """The field of a row that was probably meant to be `field`, or None."""
  others = {key.lower(): key for key in values if key not in (*FIELDS, field)}
  usual = [key for key in (field, *USUAL.get(field, ())) if key in others]
  near = [*usual, *difflib.get_close_matches(field, others, n=1)]
  return others[near[0]] if near else None


def text_fault(field: str, value: Any) -> str | None:
  """Why `read_questions` would refuse a value as the text of a field, or None."""
  try:
    messages_lib.text(field, value)
  except row_files.Fault as reason:
    return str(reason)
  return None


def _id(
  values: Mapping[str, Any],
  domain: str,
  messages: Sequence[records.Message],
  answer: str,
) -> str:
  given = values.get("id")
  if given is None:
    content = records.canonical_json([domain, records.keyed(messages), answer])
    return hashlib.sha256(content).hexdigest()[:16]
  return messages_lib.plain_text("id", given)


def _check_rejects(
  path: pathlib.Path,
  kept: int,
  rejects: Sequence[rejects_lib.Reject],
  unusable: str,
  threshold: float,
  rejects_path: str | os.PathLike[str] | None,
) -> None:
  """Raises UserError if rows may not be set aside or no row is usable."""
  total = kept + len(rejects)
  if total == 0:
    raise errors.UserError(f"{path}: holds no rows; it needs at least one question")
  kinds: dict[str, list[rejects_lib.Reject]] = {}
  for reject in rejects:
    kinds.setdefault(reject.kind, []).append(reject)
  unreadable = kinds.pop("unreadable", [])
  if not kept:
    first = rejects
  elif unusable == "skip":
    return
  elif len(unreadable) > threshold * total:
    first = unreadable
  elif "repeated" in kinds:
    raise errors.UserError(_repeated(kinds["repeated"]))
  else:
    first = kinds.get("refused", [])
  if not first:
    return
  where = f" (all in {rejects_path})" if rejects_path else ""
  remedies = ["mend or delete them"]
  if first is unreadable and kept:
    remedies.append("raise data.reject_threshold")
  if kept:
    remedies.append("set data.unusable=skip to set them aside")
  raise errors.UserError(
    f"{first[0]}; {len(first)} of {total} rows are unusable{where}: "
    f"{', or '.join(remedies)}"
  )


def _repeated(rejects: Sequence[rejects_lib.Reject]) -> str:
  first = rejects[0].place
  named = ", ".join(
    f"{r.place.id!r} on line {r.place.line} {r.reason}" for r in rejects[:5]
  )
  more = f" and {len(rejects) - 5} more" if len(rejects) > 5 else ""
  return (
    f"{first.file}:{first.line}: duplicate id: {named}{more}; give every row its own "
    "id, delete the repeats (a row without an id is known by its content), or set "
    "data.unusable=skip to keep the first of each"
  )
