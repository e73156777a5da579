"""The records that stages hand to each other, and their canonical JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

from raft_jax import errors


class Message(NamedTuple):
  role: str
  content: str


def user_turn(content: str) -> tuple[Message, ...]:
  """A conversation of one user turn. Some chat templates refuse system turns."""
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
  """One fused answer. The score of a judge that abstains is None.

  `mean` is None if all judges abstain.
  """

  text: str
  scores: tuple[float | None, ...]
  mean: float | None


@dataclasses.dataclass(frozen=True)
class Refined:
  """A question with all intermediate results of its refinement.

  Any ablation of the filter is another selection from these fields.

  Attributes:
    similarity: cosine of answer and rewrite, -1..1; None: not computable.
    answer: the chosen answer.
    chosen: which one that is: "original", "rewrite" or "fused".
    reason: why it was chosen.
  """

  question: Question
  rewrite: str
  similarity: float | None
  rounds: tuple[Round, ...]
  answer: str
  chosen: str
  reason: str


def to_json(refined: Refined) -> bytes:
  """Canonical JSON: sorted keys, UTF-8, no NaN, so equal records have equal bytes.

  Raises:
    ValueError: a number is not finite, or a text holds a lone surrogate.
  """
  # Not `dataclasses.asdict`: it copies every text, which takes as long as a call.
  question = vars(refined.question)
  messages = [m._asdict() for m in refined.question.messages]
  return canonical_json(
    {
      **vars(refined),
      "question": {**question, "messages": messages},
      "rounds": [vars(fusion) for fusion in refined.rounds],
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


def canonical_json(value: Any) -> bytes:
  """Sorted keys, no spaces, UTF-8."""
  text = json.dumps(
    value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
  )
  return text.encode("utf-8")
