"""What the stages hand to each other: frozen records, and their strict reading.

Input is JSONL or Parquet with rows `{id?, domain?, question | messages, answer}`; other
fields are ignored. A row we cannot use is set aside with its line and reason, never
guessed at. Text is kept byte for byte: no stripping, no Unicode normalisation.
Refined records travel as canonical JSON.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.runtime import interrupts
from raft_jax.storage import rejects as rejects_lib
from raft_jax.storage import row_files

ROLES = ("system", "user", "assistant")
FIELDS = ("id", "domain", "question", "messages", "answer")
USUAL = {
  "question": ("prompt", "instruction", "input", "query", "problem"),
  "messages": ("conversations", "conversation"),
  "answer": ("response", "output", "completion", "solution", "target"),
}
"""What other data sets call these fields."""


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


# Questions in


class Read(NamedTuple):
  """The usable rows of a file, where each is (by its id), and the other rows."""

  questions: list[Question]
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
      unreadable rows above the threshold.
    reject_threshold: share of unreadable rows (0..1) that "error" sets aside, too.
    rejects_path: where to list the rows that are set aside or refused.

  Returns:
    The usable rows. A row without an id gets one derived from its content.

  Raises:
    errors.UserError: no such file, not one of the two formats, no usable row, or one
      that is refused; it is named by line and id.
  """
  kept: list[Question] = []
  places: dict[str, rejects_lib.Place] = {}

  def keep(line: int, question: Question) -> None:
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


def read_questions(path: str | os.PathLike[str], **options: Any) -> list[Question]:
  """The questions of `read`; tells of rows that were set aside."""
  found = read(path, **options)
  rejects_lib.tell(found.rejects, options.get("rejects_path"))
  return found.questions


class Checked(NamedTuple):
  """How many rows of a file can be used, and the others."""

  usable: int
  rejects: list[rejects_lib.Reject]

  @property
  def lines(self) -> frozenset[int]:
    """Of the rows that are set aside, for `rows`."""
    return frozenset(reject.place.line for reject in self.rejects)


def check_questions(
  path: str | os.PathLike[str],
  *,
  limit: int | None = None,
  unusable: str = "error",
  reject_threshold: float = 0.01,
  rejects_path: str | os.PathLike[str] | None = None,
  keep: Callable[[int, Question], None] = lambda line, question: None,
  fault: Callable[[Question], str | None] = lambda question: None,
) -> Checked:
  """Checks the rows of a file and keeps none; all else as `read`.

  Args:
    keep: is given every readable row and its line, once an id.
    fault: why such a row cannot be used after all, or None.
  """
  path = pathlib.Path(path)
  count = 0
  lines: dict[str, int] = {}  # of each id
  found: list[rejects_lib.Reject] = []
  for line, row in _checked(path, limit):
    if isinstance(row, rejects_lib.Reject):
      found.append(row)
      continue
    place = rejects_lib.Place(row.id, str(path), line)
    seen = lines.setdefault(row.id, line)
    if seen != line:
      repeats = f"has the id of {row_files.unit(path)} {seen}"
      found.append(rejects_lib.Reject(place, repeats, "repeated"))
      continue
    keep(line, row)
    reason = fault(row)
    if reason is None:
      count += 1
    else:
      found.append(rejects_lib.Reject(place, reason, "refused"))
  if rejects_path is not None:
    rejects_lib.write(rejects_path, found)
  _check_rejects(path, count, found, unusable, reject_threshold, rejects_path)
  return Checked(count, found)


def rows(
  path: str | os.PathLike[str],
  *,
  limit: int | None = None,
  without: Container[int] = (),
) -> Iterator[tuple[int, Question]]:
  """Line and question of the usable rows of a file, in order, one at a time.

  Args:
    without: lines that `check_questions` set aside.
  """
  for line, row in _checked(pathlib.Path(path), limit):
    if isinstance(row, Question) and line not in without:
      yield line, row


def _checked(
  path: pathlib.Path, limit: int | None
) -> Iterator[tuple[int, Question | rejects_lib.Reject]]:
  """Line and question of each row, up to `limit` questions; else why it is none."""
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
  path: str | os.PathLike[str], field: str, others: Sequence[str] = ("id",)
) -> Iterator[tuple[int, dict[str, str] | rejects_lib.Reject]]:
  """Rows of any `.jsonl` or `.parquet` file: line, and texts by field or why not.

  Args:
    field: that every row must have.
    others: that it may have; a whole number is fine as `id`.

  Raises:
    errors.UserError: the file cannot be read, or is no file of the two formats.
  """
  fields = (*others, field)
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
      yield line, {name: _plain_text(name, value) for name, value in given.items()}
    except row_files.Fault as reason:
      place = rejects_lib.Place(_given_id(values), str(path), line)
      yield (
        line,
        rejects_lib.Reject(place, str(reason), "unreadable", row_files.excerpt(row)),
      )


def _given_id(values: Any) -> str | None:
  """The id that a row of whatever kind gives, if that is one."""
  try:
    return _plain_text("id", values["id"])
  except (TypeError, KeyError, row_files.Fault):
    return None


def _question(values: Mapping[str, Any]) -> Question:
  """A checked question, else row_files.Fault."""
  values = {key: value for key, value in values.items() if value is not None}
  has_question, has_messages = "question" in values, "messages" in values
  if has_question and has_messages:
    raise row_files.Fault("has both `question` and `messages`; keep one")
  messages: tuple[Message, ...]
  if has_question:
    messages = user_turn(_text("question", values["question"]))
  elif has_messages:
    messages = _messages(values["messages"])
  else:
    raise row_files.Fault(_missing("question", values))
  if "answer" not in values:
    raise row_files.Fault(_missing("answer", values))
  answer = _text("answer", values["answer"])
  domain = _text("domain", values["domain"]) if "domain" in values else ""
  return Question(_id(values, domain, messages, answer), domain, messages, answer)


def _missing(field: str, values: Mapping[str, Any]) -> str:
  near = _near(field, values)
  if field == "answer":
    return "has no `answer`" + (f"; rename {near!r}" if near else "")
  turns = None if near else _near("messages", values)
  hint = f"; rename {near or turns!r}" if near or turns else ""
  return f"has no `question` (or `messages`){hint}{' to `messages`' if turns else ''}"


def _near(field: str, values: Mapping[str, Any]) -> str | None:
  """Which of a row's other fields seems to be meant."""
  others = {key.lower(): key for key in values if key not in (*FIELDS, field)}
  usual = [key for key in (field, *USUAL.get(field, ())) if key in others]
  near = [*usual, *difflib.get_close_matches(field, others, n=1)]
  return others[near[0]] if near else None


def _text(field: str, value: Any) -> str:
  if not isinstance(value, str):
    raise row_files.Fault(f"`{field}` is {type(value).__name__}, not text")
  # Spaces, control and zero-width characters alone are as empty as nothing.
  if all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in value):
    raise row_files.Fault(f"`{field}` is empty")
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise row_files.Fault(
      f"`{field}` holds half of a surrogate pair, which no text has"
    ) from e
  return value


def text_fault(field: str, value: Any) -> str | None:
  """Why `read_questions` would refuse a value as the text of a field, or None."""
  try:
    _text(field, value)
  except row_files.Fault as reason:
    return str(reason)
  return None


def _messages(value: Any) -> tuple[Message, ...]:
  if not isinstance(value, list) or not value:
    raise row_files.Fault("`messages` is not a non-empty list of {role, content}")
  messages = []
  for i, item in enumerate(value):
    at = f"messages[{i}]"
    if not isinstance(item, Mapping):
      raise row_files.Fault(f"`{at}` is not an object {{role, content}}")
    extra = [k for k, v in item.items() if k not in Message._fields and v]
    if extra:  # e.g. tool calls: dropping them would change what was said
      raise row_files.Fault(
        f"`{at}` has {extra[0]!r}; only role and content are supported"
      )
    role = item.get("role")
    if role not in ROLES:
      raise row_files.Fault(f"`{at}.role` is {role!r}, not one of {', '.join(ROLES)}")
    if role == "system" and i > 0:
      raise row_files.Fault(f"`{at}` is a system turn; only the first turn may be")
    messages.append(Message(role, _text(f"{at}.content", item.get("content"))))
  if messages[-1].role != "user":
    raise row_files.Fault(
      "`messages` does not end with a user turn; the reply is `answer`"
    )
  return tuple(messages)


def _id(values: Mapping[str, Any], domain: str, messages: Any, answer: str) -> str:
  given = values.get("id")
  if given is None:
    return hashlib.sha256(_canonical([domain, messages, answer])).hexdigest()[:16]
  return _plain_text("id", given)


def _plain_text(field: str, value: Any) -> str:
  whole = isinstance(value, int) and not isinstance(value, bool)
  return _text(field, str(value) if field == "id" and whole else value)


def _check_rejects(
  path: pathlib.Path,
  kept: int,
  found: Sequence[rejects_lib.Reject],
  unusable: str,
  threshold: float,
  rejects_path: str | os.PathLike[str] | None,
) -> None:
  """Raises UserError where rows may not be set aside, or none is left."""
  total = kept + len(found)
  if total == 0:
    raise errors.UserError(f"{path}: holds no rows; it needs at least one question")
  kinds: dict[str, list[rejects_lib.Reject]] = {}
  for reject in found:
    kinds.setdefault(reject.kind, []).append(reject)
  unreadable = kinds.pop("unreadable", [])
  if not kept:
    first = found
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


def _repeated(found: Sequence[rejects_lib.Reject]) -> str:
  first = found[0].place
  named = ", ".join(
    f"{r.place.id!r} on line {r.place.line} {r.reason}" for r in found[:5]
  )
  more = f" and {len(found) - 5} more" if len(found) > 5 else ""
  return (
    f"{first.file}:{first.line}: duplicate id: {named}{more}; give every row its own "
    "id, delete the repeats (a row without an id is known by its content), or set "
    "data.unusable=skip to keep the first of each"
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
