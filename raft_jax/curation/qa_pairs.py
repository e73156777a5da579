"""Question/answer pairs that a language model writes and other models judge.

Replies are parsed strictly: one that is not plainly a list of pairs, or a verdict, is
dropped with its reason. A document's text is fenced as data: see `judging.fenced`.
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
"""The criteria that each judge answers with true or false."""

VERDICT_SCHEMA = {
  "type": "object",
  "properties": {name: {"type": "boolean"} for name in CRITERIA},
  "required": list(CRITERIA),
  "additionalProperties": False,
}

REFERENCES = (
  *("the passage", "this passage", "the text", "this text", "the document"),
  *("this document", "the excerpt", "this excerpt", "the author", "mentioned above"),
)
"""Phrases of a question that is unclear without its passage, unless the passage has
them."""


class Pair(NamedTuple):
  """A question and its answer, written from a chunk."""

  chunk: documents.Chunk
  question: str
  answer: str

  def place(self) -> dict[str, Any]:
    return {**self.chunk.place(), "question": self.question, "answer": self.answer}


class Placed(Protocol):
  """An item that can be dropped; dropped.jsonl names its class and its place."""

  def place(self) -> dict[str, Any]: ...


Item = TypeVar("Item", bound=Placed)

Dropped = dict[str, Any]
"""A row of dropped.jsonl: {what, reason, document, ...}."""


def drop(item: Placed, reason: str, **details: Any) -> Dropped:
  """The row for a dropped item."""
  what = type(item).__name__.lower()
  return {"what": what, "reason": reason, **item.place(), **details}


# Writing


def write(
  chunks: Sequence[documents.Chunk],
  max_pairs: int,
  writer: calls_lib.Role,
  calls: calls_lib.Calls,
) -> tuple[list[Pair], list[Dropped]]:
  """The pairs that the writer makes from each chunk, and what is dropped.

  Dropped are chunks without a usable reply, and pairs that are malformed or too many.
  """
  prompts = [
    judging.fenced("write", {"passage": chunk.text.strip()}, count=str(max_pairs))
    for chunk in chunks
  ]
  pairs, dropped = [], []
  for chunk, reply in zip(chunks, calls.ask(writer, prompts), strict=True):
    written = parse_pairs(reply)
    shown = {"reply": reply.text[:500] if reply else ""}
    if isinstance(written, str):
      dropped.append(drop(chunk, written, **shown))
      continue
    for number, value in enumerate(written):
      if number < max_pairs and is_pair(value):
        pairs.append(Pair(chunk, value["question"].strip(), value["answer"].strip()))
      else:
        reason = "malformed" if number < max_pairs else "surplus"
        row = drop(chunk, reason, number=number, **shown)
        dropped.append({**row, "what": "pair"})
  return pairs, dropped


def reply_schema(max_pairs: int) -> dict[str, Any]:
  """The JSON schema of the reply that the writer's prompt requests."""
  fields = {"question": {"type": "string"}, "answer": {"type": "string"}}
  form = {"type": "object", "properties": fields, "additionalProperties": False}
  pairs = {"type": "array", "items": {**form, "required": [*fields]}}
  # Servers of OpenAI's protocol require an object around the list.
  return {
    "type": "object",
    "properties": {"pairs": {**pairs, "minItems": 1, "maxItems": max_pairs}},
    "required": ["pairs"],
    "additionalProperties": False,
  }


def parse_pairs(reply: engines.Completion | None) -> list[Any] | str:
  """The list in a writer's reply, alone or under "pairs"; or why it has none."""
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
  """Whether a value is a question and an answer, and nothing more."""
  fields = ("question", "answer")
  return (
    isinstance(value, dict)
    and set(value) == set(fields)
    and all(question_files.text_fault(name, value[name]) is None for name in fields)
  )


def drop_flawed(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Dropped]]:
  """The pairs in which no rule finds a flaw; no judge sees the others."""
  kept, dropped = [], []
  for pair in pairs:
    reason = _flaw(pair)
    if reason is None:
      kept.append(pair)
    else:
      dropped.append(drop(pair, reason))
  return kept, dropped


def _flaw(pair: Pair) -> str | None:
  passage = pair.chunk.text.lower()
  question = pair.question.lower()
  if any(phrase in question and phrase not in passage for phrase in REFERENCES):
    return "points_at_passage"
  if near_duplicates.normal(pair.question) == near_duplicates.normal(pair.answer):
    return "echo"
  if any(f'"{name}"' in pair.question + pair.answer for name in CRITERIA):
    return "steers_judge"
  answer = engines.Completion(pair.answer, "stop", 0, 0)
  return judging.flaw(answer, pair.chunk.text + "\n" + pair.question)


# Judging


def verify(
  pairs: Sequence[Pair], judges: Sequence[calls_lib.Role], calls: calls_lib.Calls
) -> tuple[list[Pair], list[Dropped], list[dict[str, int]]]:
  """The pairs that more than half of the judges approve in all criteria.

  An abstention is no vote, but the judge still counts in the panel.

  Returns:
    The approved pairs; the others, each with the judges' verdicts in the order of the
    config; and how each judge voted.
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
    verdicts = [replies[i] for replies in panel]
    reason = objection(verdicts)
    if reason is None:
      kept.append(pair)
    else:
      dropped.append(drop(pair, reason, verdicts=verdicts))
  counts = [collections.Counter(map(_vote, replies)) for replies in panel]
  votes = {"approved": True, "disapproved": False, "abstained": None}
  return kept, dropped, [{v: c[vote] for v, vote in votes.items()} for c in counts]


def _vote(verdict: Mapping[str, bool] | None) -> bool | None:
  return None if verdict is None else all(verdict.values())


def objection(verdicts: Sequence[Mapping[str, bool] | None]) -> str | None:
  """The criterion that most judges deny a pair, or None if a majority approves it."""
  decision = judging.majority([_vote(verdict) for verdict in verdicts])
  if decision is None:
    return "undecided"
  denied = collections.Counter(
    name for verdict in verdicts for name in CRITERIA if verdict and not verdict[name]
  )
  return None if decision else f"not_{max(CRITERIA, key=lambda name: denied[name])}"


# Duplicates


def drop_repeats(
  items: Sequence[Item],
  content: Callable[[Item], str],
  threshold: float,
  key: Callable[[Item], str] | None = None,
) -> tuple[list[Item], list[Dropped]]:
  """Drops the later of any two near duplicates.

  Splits are not considered, so that no text has a near duplicate in another split.

  Args:
    content: the text of an item that is compared.
    key: items with the same normalised `key` are duplicates too.
  """
  dropped = []
  by_key: dict[str, Item] = {}
  different = []
  for item in items:
    first = by_key.setdefault(near_duplicates.normal((key or content)(item)), item)
    if first is item:
      different.append(item)
    else:
      dropped.append(drop(item, "duplicate", of=first.place()))
  kept = []
  matches = near_duplicates.find([content(item) for item in different], threshold)
  for item, match in zip(different, matches, strict=True):
    if match is None:
      kept.append(item)
    else:
      of, jaccard = different[match.earlier].place(), round(match.jaccard, 4)
      dropped.append(drop(item, "near_duplicate", of=of, jaccard=jaccard))
  return kept, dropped
