"""Where an answer lies in the text that the chat template writes of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raft_jax import errors
from raft_jax.storage import messages as messages_lib


def forms(turn: Mapping[str, Any], template: str) -> Iterator[dict[str, Any]]:
  """The forms in which a chat template may take an assistant's turn, best first.

  Reasoning is a field of its own, or else stands in the content between `<think>` tags.
  Tags that the data does not have are tried only where the template knows them.
  """
  reasoning = turn.get("reasoning_content")
  if not reasoning:
    yield dict(turn)
    return
  content = turn.get("content", "")
  plain = {key: value for key, value in turn.items() if key != "reasoning_content"}
  yield {**turn, "reasoning_content": _thought(reasoning)}
  if messages_lib.THOUGHT.match(reasoning):
    yield {**plain, "content": reasoning + content}
  elif "</think>" in template:
    yield {**plain, "content": f"<think>\n{reasoning}\n</think>\n\n{content}"}


def _thought(reasoning: str) -> str:
  """The reasoning without `<think>` tags."""
  part = messages_lib.THOUGHT.match(reasoning)
  return part[1].strip() if part else reasoning


def content_end(rest: str, turn: Mapping[str, Any]) -> int | None:
  """Where the last text of an assistant's turn ends; None if one of them is left out.

  Args:
    rest: what follows the prompt in the finished conversation.
  """
  end = 0
  for text in (_thought(turn.get("reasoning_content", "")), turn.get("content", "")):
    core = text.strip()
    start = rest.find(core, end)
    if start < 0:
      return None
    end = start + len(core)
  for call in turn.get("tool_calls", ())[-1:]:
    name = call["function"]["name"]
    start = rest.rfind(name)
    if start < 0:
      return None
    end = max(end, start + len(name))
  return end


def turn_end(rest: str, turn: Mapping[str, Any], ends: Sequence[str]) -> int:
  """Where the answer ends: behind the first end token after its last text.

  Without an end token, as with `{{ content }}` alone, it ends with its content: what
  follows belongs to the next turn.

  Raises:
    UserError: no end token follows a tool call.
  """
  start = content_end(rest, turn) or 0
  found = [(rest.find(end, start), len(end)) for end in ends]
  places = [place + length for place, length in found if place >= 0]
  if places:
    return min(places)
  if turn.get("tool_calls"):
    raise errors.UserError(
      "the model's chat template writes no end token after a tool call, so that the "
      "call cannot be learned as an answer; choose another by model.chat_template"
    )
  core = turn["content"].strip()
  return rest.rfind(core) + len(core)


def own_start(answer: str, spans: Sequence[tuple[int, int]]) -> int:
  """Where the template's marks say that the assistant's own text begins.

  What a template writes before it is read and not learned. The end token is learned
  even where the marks leave it out, since a model that never learns it never stops.

  Args:
    answer: from the end of the prompt to the end token.
    spans: first and last + 1 character of each marked text.

  Raises:
    UserError: no text of the answer is marked, or not all of it from there on.
  """
  own = [(max(first, 0), last) for first, last in spans if last > 0]
  own = [span for span in own if span[0] < len(answer)]
  if not own:
    raise errors.UserError(
      "the model's chat template has {% generation %} marks and none of them encloses "
      f"the answer {answer[:200]!r}; choose another by model.chat_template"
    )
  for (_, end), (begin, _) in itertools.pairwise(own):
    if begin > end:
      raise errors.UserError(
        "the model's chat template marks only parts of the answer by {% generation %}: "
        f"not {answer[end:begin][:200]!r}; choose another by model.chat_template"
      )
  return own[0][0]
