"""Files of questions: strict reading of rows, whatever their format.

Rows are conversations in one of the formats of `row_formats`; other fields are ignored.
A row that cannot be used is set aside with its line and the reason; nothing is guessed.
Text is kept byte for byte: no stripping, no Unicode normalisation.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.runtime import interrupts
from raft_jax.storage import messages as messages_lib
from raft_jax.storage import records, row_files, row_formats, row_layout, sources
from raft_jax.storage import rejects as rejects_lib

HEAD = 100
"""Rows among which a file's format is found."""


class Read(NamedTuple):
  """The usable rows of a source, the place of each by its id, and the other rows.

  Attributes:
    formats: the format of each file.
  """

  questions: list[records.Question]
  places: dict[str, rejects_lib.Place]
  rejects: list[rejects_lib.Reject]
  formats: Mapping[str, str] = {}


def read(
  path: str | os.PathLike[str],
  *,
  layout: row_layout.Layout = row_layout.DETECTED,
  limit: int | None = None,
  unusable: str = "error",
  reject_threshold: float = 0.01,
  rejects_path: str | os.PathLike[str] | None = None,
) -> Read:
  """Reads and checks the rows of a source, in order.

  Args:
    path: the source (`sources`). A byte-order mark, CRLF line ends and blank lines are
      fine.
    layout: what the config says about its rows.
    limit: stop after this many readable questions.
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

  def keep(place: rejects_lib.Place, question: records.Question) -> None:
    kept.append(question)
    places[question.id] = place

  checked = check_questions(
    path,
    layout=layout,
    limit=limit,
    unusable=unusable,
    reject_threshold=reject_threshold,
    rejects_path=rejects_path,
    keep=keep,
  )
  return Read(kept, places, checked.rejects, checked.formats)


def read_questions(
  path: str | os.PathLike[str], **options: Any
) -> list[records.Question]:
  """The questions of `read`; prints how many rows were set aside."""
  result = read(path, **options)
  rejects_lib.report(result.rejects, options.get("rejects_path"))
  return result.questions


def text_answers(
  contents: Read,
) -> tuple[list[records.Question], list[rejects_lib.Reject]]:
  """The questions whose answers can be scored, and the others as rejects."""
  calls = [
    rejects_lib.Reject(
      contents.places[question.id],
      "its answer is a tool call, and only answers of text are scored",
      "refused",
    )
    for question in contents.questions
    if question.tool_calls
  ]
  return [question for question in contents.questions if not question.tool_calls], calls


class Checked(NamedTuple):
  """The number of usable rows of a source, the other rows, and the files' formats."""

  usable: int
  rejects: list[rejects_lib.Reject]
  formats: Mapping[str, str]

  @property
  def places(self) -> frozenset[rejects_lib.Place]:
    """Places of the rows that are set aside, for `rows`."""
    return frozenset(reject.place for reject in self.rejects)


def check_questions(
  path: str | os.PathLike[str],
  *,
  layout: row_layout.Layout = row_layout.DETECTED,
  limit: int | None = None,
  unusable: str = "error",
  reject_threshold: float = 0.01,
  rejects_path: str | os.PathLike[str] | None = None,
  keep: Callable[[rejects_lib.Place, records.Question], None] = lambda place, q: None,
  fault: Callable[[records.Question], str | None] = lambda question: None,
) -> Checked:
  """Checks the rows of a source like `read`, without holding them in memory.

  Args:
    keep: called with the place and question of each readable row whose id is new.
    fault: why such a row cannot be used, or None.
  """
  count = 0
  place_by_id: dict[str, rejects_lib.Place] = {}
  rejects: list[rejects_lib.Reject] = []
  formats: dict[str, str] = {}
  for place, item in _checked(path, layout, limit, formats):
    if isinstance(item, rejects_lib.Reject):
      rejects.append(item)
      continue
    first = place_by_id.setdefault(item.id, place)
    if first is not place:
      rejects.append(rejects_lib.Reject(place, _repeats(place, first), "repeated"))
      continue
    keep(place, item)
    reason = fault(item)
    if reason is None:
      count += 1
    else:
      rejects.append(rejects_lib.Reject(place, reason, "refused"))
  for file, name in formats.items():
    _announce(file, name)
  if rejects_path is not None:
    rejects_lib.write(rejects_path, rejects)
  check_rejects(path, count, rejects, unusable, reject_threshold, rejects_path)
  return Checked(count, rejects, formats)


def _repeats(place: rejects_lib.Place, first: rejects_lib.Place) -> str:
  if place.file == first.file:
    return f"has the id of {row_files.unit(place.file)} {first.line}"
  return f"has the id of {first.file}:{first.line}"


_announced: set[tuple[str, str]] = set()


def _announce(file: str, name: str) -> None:
  """Prints a file's format once a process, unless it is the first of the table."""
  if name != "question" and (file, name) not in _announced:
    _announced.add((file, name))
    print(f"{file}: format: {name}", file=sys.stderr)


def rows(
  path: str | os.PathLike[str],
  *,
  layout: row_layout.Layout = row_layout.DETECTED,
  limit: int | None = None,
  without: Container[rejects_lib.Place] = (),
) -> Iterator[tuple[rejects_lib.Place, records.Question]]:
  """Place and question of the usable rows of a source, in order, one at a time.

  Args:
    without: places that `check_questions` set aside.
  """
  for place, item in _checked(path, layout, limit, {}):
    if isinstance(item, records.Question) and place not in without:
      yield place, item


def _checked(
  path: str | os.PathLike[str],
  layout: row_layout.Layout,
  limit: int | None,
  formats: dict[str, str],
) -> Iterator[tuple[rejects_lib.Place, records.Question | rejects_lib.Reject]]:
  """Place of each row with its questions or a reject, up to `limit` questions.

  Args:
    formats: the format of each file is put here.
  """
  count = 0
  for part in sources.parts(path):
    file = sources.part_name(part)
    every = sources.part_rows(part, row_layout.columns_to_read(layout))
    head = list(itertools.islice(every, HEAD))
    name = row_layout.detect(file, _readable(head), layout)
    if head:
      formats[file] = name
    for line, row in itertools.chain(head, every):
      interrupts.check()
      values: Any = None
      try:
        values = row_layout.fields(row_files.values(row), layout.columns)
        questions = _questions(values, name, layout.turns)
      except row_files.Fault as reason:
        place = rejects_lib.Place(_given_id(values), file, line)
        excerpt = row_files.excerpt(row)
        yield place, rejects_lib.Reject(place, str(reason), "unreadable", excerpt)
        continue
      for question in questions:
        yield rejects_lib.Place(question.id, file, line), question
        count += 1
        if count == limit:
          return


def _readable(head: Sequence[tuple[int, row_files.Row]]) -> Iterator[Mapping[str, Any]]:
  for _, row in head:
    try:
      values = row_files.values(row)
    except row_files.Fault:
      continue
    yield values


def read_texts(
  path: str | os.PathLike[str], field: str, optional: Sequence[str] = ("id",)
) -> Iterator[tuple[rejects_lib.Place, dict[str, str] | rejects_lib.Reject]]:
  """Place of each row of a source, with its texts or a reject.

  Args:
    field: name of the field that each row must have.
    optional: names of other fields to read; an `id` may be a whole number.

  Raises:
    errors.UserError: the file cannot be read or has another format.
  """
  fields = (*optional, field)
  for part in sources.parts(path):
    file = sources.part_name(part)
    for line, row in sources.part_rows(part, fields):
      interrupts.check()
      values: Any = None
      try:
        values = row_files.values(row)
        texts = _texts(values, field, fields)
        yield rejects_lib.Place(texts.get("id"), file, line), texts
      except row_files.Fault as reason:
        place = rejects_lib.Place(_given_id(values), file, line)
        excerpt = row_files.excerpt(row)
        yield place, rejects_lib.Reject(place, str(reason), "unreadable", excerpt)


def _texts(
  values: Mapping[str, Any], field: str, fields: Sequence[str]
) -> dict[str, str]:
  given = {name: values[name] for name in fields if values.get(name) is not None}
  if field not in given:
    hint = row_formats.near_field(field, values)
    raise row_files.Fault(f"has no `{field}`" + (f"; rename {hint!r}" if hint else ""))
  return {name: messages_lib.plain_text(name, value) for name, value in given.items()}


def _given_id(values: Any) -> str | None:
  """The id of a row, if it has a valid one."""
  try:
    return messages_lib.plain_text("id", values["id"])
  except (TypeError, KeyError, row_files.Fault):
    return None


def _questions(
  values: Mapping[str, Any], name: str, turns: str
) -> list[records.Question]:
  """The questions of a row of a file whose format is `name`.

  Every one has the id of the row. With turns="each", that of the second answer of the
  assistant is ID#2, and so on.

  Raises:
    row_files.Fault: the row cannot be used.
  """
  conversation = row_formats.conversation(values, name)
  domain = messages_lib.text("domain", values["domain"]) if "domain" in values else ""
  row_id = _id(values, domain, conversation)
  found = []
  for example in row_formats.examples(conversation, turns, name):
    question_id = f"{row_id}#{example.number}" if example.number > 1 else row_id
    found.append(question(question_id, domain, example.before, example.answer))
  return found


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


def text_fault(field: str, value: Any) -> str | None:
  """Why `read_questions` would refuse a value as the text of a field, or None."""
  try:
    messages_lib.text(field, value)
  except row_files.Fault as reason:
    return str(reason)
  return None


def _id(
  values: Mapping[str, Any], domain: str, conversation: Sequence[records.Message]
) -> str:
  given = values.get("id")
  if given is None:
    *before, last = records.keyed(conversation)
    answer = last[1] if len(last) == 2 else last  # the text of a plain answer
    content = records.canonical_json([domain, before, answer])
    return hashlib.sha256(content).hexdigest()[:16]
  return messages_lib.plain_text("id", given)


def check_rejects(
  path: str | os.PathLike[str],
  kept: int,
  rejects: Sequence[rejects_lib.Reject],
  unusable: str,
  threshold: float,
  rejects_path: str | os.PathLike[str] | None,
) -> None:
  """Raises UserError if rows may not be set aside or no row is usable.

  Args:
    kept: number of usable rows.
    unusable, threshold, rejects_path: as for `read`.
  """
  total = kept + len(rejects)
  if total == 0:
    raise errors.UserError(
      f"{os.fspath(path)}: holds no rows; it needs at least one question"
    )
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
