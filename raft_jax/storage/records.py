"""The records that stages hand to each other, and their canonical JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors

PLAIN = ("role", "content")
"""The fields of a turn without reasoning and tools."""


class ToolCall(NamedTuple):
  """A call of a tool by the assistant.

  Attributes:
    arguments: JSON text of an object, whose keys keep the order of the data.
  """

  name: str
  arguments: str
  id: str = ""


class _Turn(NamedTuple):
  role: str
  content: str
  reasoning_content: str = ""
  tool_calls: tuple[ToolCall, ...] = ()
  name: str = ""
  tool_call_id: str = ""
  tools: tuple[str, ...] = ()


class Message(_Turn):
  """A turn of a conversation.

  Attributes:
    role: "system", "user", "assistant" or "tool".
    content: "" in a turn that only calls tools.
    reasoning_content: what the assistant thought before the content.
    tool_calls: what the assistant calls after the content.
    name: of the tool that a "tool" turn reports of.
    tool_call_id: of the call that a "tool" turn answers.
    tools: only in the first turn: JSON texts of the tools of the whole conversation.
  """

  __slots__ = ()

  def _asdict(self) -> dict[str, Any]:
    """Role and content, and those other fields that are not empty.

    A conversation without tools and reasoning therefore has the JSON, the digests and
    the rendering of bare {role, content}.
    """
    fields = {k: v for k, v in super()._asdict().items() if v or k in PLAIN}
    if self.tool_calls:
      fields["tool_calls"] = [call._asdict() for call in self.tool_calls]
    return fields


def message(fields: Mapping[str, Any]) -> Message:
  """Inverse of `Message._asdict`, also from its JSON."""
  given = dict(fields)
  if "tool_calls" in given:
    given["tool_calls"] = tuple(ToolCall(**call) for call in given["tool_calls"])
  if "tools" in given:
    given["tools"] = tuple(given["tools"])
  return Message(**given)


def _extras(turn: Message) -> dict[str, Any]:
  """The fields of a turn besides role and content, without the empty ones."""
  return {k: v for k, v in turn._asdict().items() if k not in PLAIN}


def keyed(messages: Sequence[Message]) -> list[Any]:
  """The form in which a conversation enters digests and the keys of journals."""
  return [
    [turn.role, turn.content, *([extras] if (extras := _extras(turn)) else [])]
    for turn in messages
  ]


def api_turn(turn: Message, arguments: Callable[[str], Any] = str) -> dict[str, Any]:
  """A turn in the form of OpenAI's API, and of chat templates; without `tools`.

  Args:
    arguments: what becomes of a call's JSON text. Templates take an object.
  """
  fields = turn._replace(tools=())._asdict()
  if turn.tool_calls:
    fields["tool_calls"] = [
      {
        "type": "function",
        "function": {"name": call.name, "arguments": arguments(call.arguments)},
        **({"id": call.id} if call.id else {}),
      }
      for call in turn.tool_calls
    ]
  return fields


def as_text(turn: Message) -> str:
  """The content, and below it the calls of tools as NAME(ARGUMENTS)."""
  calls = [f"{call.name}({call.arguments})" for call in turn.tool_calls]
  return "\n".join([*([turn.content] if turn.content or not calls else []), *calls])


def user_turn(content: str) -> tuple[Message, ...]:
  """A conversation of one user turn. Some chat templates refuse system turns."""
  return (Message("user", content),)


def last_user(messages: Sequence[Message]) -> int:
  """The place of the last user turn, which results of tools may follow.

  Without a user turn, that of the last turn.
  """
  users = [i for i, turn in enumerate(messages) if turn.role == "user"]
  return users[-1] if users else len(messages) - 1


def as_reply(answer: str | Message) -> Message:
  """An answer as the assistant's turn."""
  return answer if isinstance(answer, Message) else Message("assistant", answer)


@dataclasses.dataclass(frozen=True)
class Question:
  """One training or test example.

  Attributes:
    messages: ends with a user turn, or with the results of tools.
    answer: text of the assistant's turn that follows; "" if it only calls tools.
    reasoning_content, tool_calls: of that turn.
  """

  id: str
  domain: str
  messages: tuple[Message, ...]
  answer: str
  reasoning_content: str = ""
  tool_calls: tuple[ToolCall, ...] = ()

  @property
  def reply(self) -> Message:
    """The whole turn that is the answer."""
    return Message("assistant", self.answer, self.reasoning_content, self.tool_calls)

  def extras(self) -> dict[str, Any]:
    """Fields of the answer besides its text, without the empty ones."""
    return _extras(self.reply)


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
  question = refined.question
  return canonical_json(
    {
      **vars(refined),
      "question": {
        "id": question.id,
        "domain": question.domain,
        "messages": [turn._asdict() for turn in question.messages],
        "answer": question.answer,
        **question.extras(),
      },
      "rounds": [vars(fusion) for fusion in refined.rounds],
    }
  )


def from_json(data: bytes) -> Refined:
  """Inverse of `to_json`. Raises errors.UserError for anything else."""
  try:
    tree = json.loads(data)
    question = tree.pop("question")
    messages = tuple(map(message, question["messages"]))
    calls = tuple(ToolCall(**call) for call in question.pop("tool_calls", ()))
    rounds = tuple(
      Round(**{**r, "scores": tuple(r["scores"])}) for r in tree.pop("rounds")
    )
    return Refined(
      question=Question(**{**question, "messages": messages, "tool_calls": calls}),
      rounds=rounds,
      **tree,
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
