"""Pairs: questions and answers that a language model writes, and others judge.

A reply is read strictly: what is not plainly a list of pairs, or a verdict, counts as
none, and its reason is kept. What a document says stays data: see `judging.fenced`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from raft_jax.curation import documents, near_duplicates
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging
from raft_jax.storage import question_files

CRITERIA = ("faithful", "correct", "self_contained")
"""What each judge says true or false to."""

VERDICT_SCHEMA = {
  "type": "object",
  "properties": {name: {"type": "boolean"} for name in CRITERIA},
  "required": list(CRITERIA),
  "additionalProperties": False,
}

POINTERS = (
  *("the passage", "this passage", "the text", "this text", "the document"),
  *("this document", "the excerpt", "this excerpt", "the author", "mentioned above"),
)
"""Words of a question that is not clear without its passage, unless that has them."""


class Pair(NamedTuple):
  """A question and its answer, written from a chunk."""

  chunk: documents.Chunk
  question: str
  answer: str

  def place(self) -> dict[str, Any]:
    return {**self.chunk.place(), "question": self.question, "answer": self.answer}


class Placed(Protocol):
  """What can be dropped: it says where it stands; its class says what it is."""

  def place(self) -> dict[str, Any]: ...


Item = TypeVar("Item", bound=Placed)

Dropped = dict[str, Any]
"""What was dropped, and why: {what, reason, document, ...}."""


def drop(item: Placed, reason: str, **details: Any) -> Dropped:
  what = type(item).__name__.lower()
  return {"what": what, "reason": reason, **item.place(), **details}


# Writing


def write(
  chunks: Sequence[documents.Chunk],
  most: int,
  writer: calls_lib.Role,
  calls: calls_lib.Calls,
) -> tuple[list[Pair], list[Dropped]]:
  """The pairs that the writer makes of each chunk, and chunks and parts without one."""
  prompts = [
    judging.fenced("write", {"passage": chunk.text.strip()}, count=str(most))
    for chunk in chunks
  ]
  pairs, dropped = [], []
  for chunk, reply in zip(chunks, calls.ask(writer, prompts), strict=True):
    written = parse_pairs(reply)
    said = {"reply": reply.text[:500] if reply else ""}
    if isinstance(written, str):
      dropped.append(drop(chunk, written, **said))
      continue
    for number, value in enumerate(written):
      if number < most and is_pair(value):
        pairs.append(Pair(chunk, value["question"].strip(), value["answer"].strip()))
      else:
        reason = "malformed" if number < most else "surplus"
        lost = drop(chunk, reason, number=number, **said)
        dropped.append({**lost, "what": "pair"})
  return pairs, dropped


def reply_schema(most: int) -> dict[str, Any]:
  """What the prompt asks of the writer, as a JSON schema."""
  fields = {"question": {"type": "string"}, "answer": {"type": "string"}}
  form = {"type": "object", "properties": fields, "additionalProperties": False}
  pairs = {"type": "array", "items": {**form, "required": [*fields]}}
  # Servers of OpenAI's protocol want an object around the list.
  return {
    "type": "object",
    "properties": {"pairs": {**pairs, "minItems": 1, "maxItems": most}},
    "required": ["pairs"],
    "additionalProperties": False,
  }


def parse_pairs(reply: engines.Completion | None) -> list[Any] | str:
  """The list in a writer's reply, alone or under "pairs", or why there is none."""
  if reply is None or reply.finish_reason in judging.REFUSED:
    return judging.REFUSED["too_long" if reply is None else reply.finish_reason]
  if reply.finish_reason != "stop":
    return "truncated"
  value = judging.json_in(reply.text)
  if isinstance(value, dict) and list(value) == ["pairs"]:
    value = value["pairs"]
  if not isinstance(value, list):
    return "not_json"
  return value or "no_pairs"


def is_pair(value: Any) -> bool:
  """Whether a written value is a question and an answer, and no more."""
  fields = ("question", "answer")
  return (
    isinstance(value, dict)
    and set(value) == set(fields)
    and all(question_files.text_fault(name, value[name]) is None for name in fields)
  )


def sound(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Dropped]]:
  """The pairs in which no rule finds a flaw: no judge need see the others."""
  kept, dropped = [], []
  for pair in pairs:
    reason = _flaw(pair)
    if reason is None:
      kept.append(pair)
    else:
      dropped.append(drop(pair, reason))
  return kept, dropped


def _flaw(pair: Pair) -> str | None:
  given = pair.chunk.text.lower()
  asked = pair.question.lower()
  if any(words in asked and words not in given for words in POINTERS):
    return "points_at_passage"
  if near_duplicates.normal(pair.question) == near_duplicates.normal(pair.answer):
    return "echo"
  if any(f'"{name}"' in pair.question + pair.answer for name in CRITERIA):
    return "steers_judge"
  said = engines.Completion(pair.answer, "stop", 0, 0)
  return judging.flaw(said, pair.chunk.text + "\n" + pair.question)


# Judging


def verify(
  pairs: Sequence[Pair], judges: Sequence[calls_lib.Role], calls: calls_lib.Calls
) -> tuple[list[Pair], list[Dropped], list[dict[str, int]]]:
  """The pairs of which more than half of the judges approve, in all criteria.

  An abstention counts as no vote, but stays in the panel. What each judge said stands
  beside a dropped pair, in the order of the config.
  """
  prompts = [
    judging.fenced(
      "verify",
      {
        "passage": pair.chunk.text.strip(),
        "question": pair.question,
        "answer": pair.answer,
      },
    )
    for pair in pairs
  ]
  panel = [
    [
      None if reply is None else judging.parse_flags(reply.text, CRITERIA)
      for reply in calls.ask(role, prompts)
    ]
    for role in judges
  ]
  kept, dropped = [], []
  for i, pair in enumerate(pairs):
    verdicts = [said[i] for said in panel]
    reason = objection(verdicts)
    if reason is None:
      kept.append(pair)
    else:
      dropped.append(drop(pair, reason, verdicts=verdicts))
  counted = [collections.Counter(map(_vote, said)) for said in panel]
  words = {"approved": True, "disapproved": False, "abstained": None}
  return kept, dropped, [{w: c[vote] for w, vote in words.items()} for c in counted]


def _vote(verdict: Mapping[str, bool] | None) -> bool | None:
  return None if verdict is None else all(verdict.values())


def objection(verdicts: Sequence[Mapping[str, bool] | None]) -> str | None:
  """What most judges missed in a pair, or None where a majority approves of it."""
  decision = judging.majority([_vote(verdict) for verdict in verdicts])
  if decision is None:
    return "undecided"
  missed = collections.Counter(
    name for verdict in verdicts for name in CRITERIA if verdict and not verdict[name]
  )
  return None if decision else f"not_{max(CRITERIA, key=lambda name: missed[name])}"


# Duplicates


def unlike(
  items: Sequence[Item],
  content: Callable[[Item], str],
  threshold: float,
  key: Callable[[Item], str] | None = None,
) -> tuple[list[Item], list[Dropped]]:
  """The items of which no two are near duplicates; the later of two goes.

  It goes whichever split each would be in, so that no near duplicate is in two.

  Args:
    content: what is compared.
    key: two items for which this is the same are duplicates too.
  """
  dropped = []
  seen: dict[str, Item] = {}
  first = []
  for item in items:
    same = seen.setdefault(near_duplicates.normal((key or content)(item)), item)
    if same is item:
      first.append(item)
    else:
      dropped.append(drop(item, "duplicate", of=same.place()))
  kept = []
  matches = near_duplicates.find([content(item) for item in first], threshold)
  for item, match in zip(first, matches, strict=True):
    if match is None:
      kept.append(item)
    else:
      of, jaccard = first[match.earlier].place(), round(match.jaccard, 4)
      dropped.append(drop(item, "near_duplicate", of=of, jaccard=jaccard))
  return kept, dropped
