"""Strict parsing of chat completions of OpenAI's protocol: no value is coerced.

Fields that many servers leave out may be missing, unless that could change the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from raft_jax.generation import engines, openai_errors, thinking

End = Literal["stop", "length", "filtered"]

_ENDS: dict[str, End] = {
  **dict.fromkeys(
    (
      *("stop", "eos", "eos_token", "stop_sequence", "stop_token", "end_turn"),
      *("complete", "completed", "finished"),
    ),
    "stop",
  ),
  **dict.fromkeys(
    ("length", "max_tokens", "max_output_tokens", "max_length", "token_limit"), "length"
  ),
  **dict.fromkeys(
    (
      *("content_filter", "content_filtered", "safety", "recitation", "blocklist"),
      *("prohibited_content", "sensitive", "refusal", "guardrail_intervened"),
    ),
    "filtered",
  ),
}
"""The finish reasons of servers, in lower case."""

_BROKEN = ("error", "abort", "aborted", "cancelled", "timeout", "network_error")
"""Finish reasons of a reply that the server broke off; the same request may succeed."""


class NoReply(ValueError):
  """A body that is no usable chat completion.

  Attributes:
    temporary: whether the same request may succeed a little later.
  """

  def __init__(self, reason: str, *, temporary: bool = False):
    super().__init__(reason)
    self.temporary = temporary


class Refused(ValueError):
  """An error that the server reports in the body of a reply."""

  def __init__(self, fault: openai_errors.Fault):
    super().__init__(fault.message)
    self.fault = fault


def parsed(raw: bytes, shown: str) -> Any:
  """The value of a JSON body, or its text if it is not JSON.

  A stream of events, although none was requested, is joined to one completion.

  Args:
    shown: the body as text, decoded by the charset in its header.
  """
  try:
    return json.loads(raw)
  except UnicodeDecodeError:
    with_charset = shown
  except (ValueError, RecursionError):
    with_charset = shown.removeprefix("\ufeff")
  if with_charset.lstrip().startswith(("data:", "event:", ":")):
    return _joined(with_charset)
  try:
    return json.loads(with_charset)
  except (ValueError, RecursionError):
    return with_charset


def _joined(events: str) -> Any:
  """The chat completion whose pieces are in a stream of server-sent events."""
  fields: dict[str, Any] = {}
  pieces: dict[str, list[str]] = {}
  message: dict[str, Any] = {}
  choice: dict[str, Any] = {"index": 0, "finish_reason": None}
  for line in events.splitlines():
    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
      continue
    try:
      event = json.loads(line[5:])
    except (ValueError, RecursionError):
      raise NoReply("a stream of events that breaks off", temporary=True) from None
    if not isinstance(event, Mapping) or openai_errors.of(event) is not None:
      return event
    fields |= {k: v for k, v in event.items() if k != "choices" and v is not None}
    listed = event.get("choices")
    for part in listed if isinstance(listed, list) else []:
      if not isinstance(part, Mapping) or "message" in part:
        return event
      delta = part.get("delta")
      if part.get("index") in (None, 0) and isinstance(delta, Mapping):
        choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
        for name, value in delta.items():
          if isinstance(value, str) and name != "role":
            pieces.setdefault(name, []).append(value)
          elif value and name != "role":
            message[name] = value
  if choice["finish_reason"] is None:
    raise NoReply("a stream of events that breaks off", temporary=True)
  choice["message"] = message | {name: "".join(p) for name, p in pieces.items()}
  return {**fields, "choices": [choice]}


def completion(
  body: Any, limit: int, marks: Sequence[thinking.Marks]
) -> engines.Completion:
  """The reply in a body, without its thinking.

  Args:
    body: as returned by `parsed`.
    limit: the largest number of tokens that was requested.
    marks: the model's marks around its thinking.

  Raises:
    Refused: the body reports an error.
    NoReply: the body is no usable chat completion.
  """
  fault = openai_errors.of(body)
  if fault is not None:
    raise Refused(fault)
  if isinstance(body, str):
    title = openai_errors.page_title(body)
    if title is not None:
      # A gateway's page says its status in words: "502 Bad Gateway".
      temporary = re.match(r"(error )?(408|429|5\d\d)\b", title.lower()) is not None
      raise NoReply(f"the page {title!r}", temporary=temporary)
    # Text that begins as JSON was cut off on its way.
    broken = not body.strip() or body.lstrip().startswith(("{", "["))
    raise NoReply(_shown(body) if body.strip() else "an empty body", temporary=broken)
  if not isinstance(body, Mapping) or not isinstance(body.get("choices"), list):
    raise NoReply(f"no list `choices`, but {_shown(body)}")
  choices = body["choices"]
  if not choices:
    raise NoReply("`choices` is empty", temporary=True)
  first = [c for c in choices if isinstance(c, Mapping) and c.get("index") == 0]
  choice = first[0] if first else choices[0]
  if not isinstance(choice, Mapping) or not isinstance(choice.get("message"), Mapping):
    raise NoReply(f"a choice without `message`: {_shown(choice)}")
  if choice.get("error"):
    raise Refused(
      openai_errors.of({"error": choice["error"]}) or openai_errors.Fault("?")
    )
  prompt, count, thought = _usage(body.get("usage"))
  message = choice["message"]
  text, declined = _content(message)
  end = _end(choice.get("finish_reason"), count, limit)
  if declined or end == "filtered":
    return engines.Completion("", "filtered", prompt, count)
  if not text and (message.get("tool_calls") or message.get("function_call")):
    raise NoReply("a call of a tool and no text; switch off the server's tools")
  text = _with_thinking(text, message, marks)
  # A cut may leave half a surrogate pair, which no file takes.
  text = text.encode("utf-8", "replace").decode()
  reply = engines.Completion(text, end, prompt, count, thought)
  return engines.strip_thinking(reply, marks)


def _shown(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return repr(" ".join(text.split())[:100])


def _usage(usage: Any) -> tuple[int | None, int | None, int]:
  """Tokens of prompt and reply (None if unknown), and of thinking."""
  counts = usage if isinstance(usage, Mapping) else {}
  prompt, count, total = (
    _count(counts.get(f"{name}_tokens")) for name in ("prompt", "completion", "total")
  )
  if total is not None and prompt is not None and count is None:
    count = max(total - prompt, 0)
  details = counts.get("completion_tokens_details")
  inner = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
  return prompt, count, _count(inner) or 0


def _count(value: Any) -> int | None:
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  return value if is_integer and value >= 0 else None


def _end(reason: Any, count: int | None, limit: int) -> End:
  word = reason.strip().lower() if isinstance(reason, str) else reason
  if word in _BROKEN:
    raise NoReply(
      f"a reply that it broke off (finish_reason {reason!r})", temporary=True
    )
  if isinstance(word, str) and word in _ENDS:
    return _ENDS[word]
  if word in (None, "") and count is not None:
    return "stop" if count < limit else "length"  # shorter than the limit: it is whole
  raise NoReply(
    f"finish_reason {reason!r}, and whether the reply is whole is not known (known are"
    " stop, length, content_filter and their like); use another server"
  )


def _content(message: Mapping[str, Any]) -> tuple[str, bool]:
  """The text of a message, with thinking in marks, and whether the server declined."""
  content = message.get("content")
  if content is None or isinstance(content, str):
    return content or "", bool(not content and message.get("refusal"))
  if not isinstance(content, list):
    raise NoReply(f"`content` that is neither text nor a list: {_shown(content)}")
  parts = list(map(_part, content))
  declined = any(isinstance(p, Mapping) and p.get("type") == "refusal" for p in content)
  return "".join(parts), declined


_TEXTS = ("text", "output_text", "refusal")
_THOUGHTS = ("thinking", "reasoning", "reasoning_text", "redacted_thinking")


def _part(part: Any) -> str:
  """One part of a message's content."""
  if isinstance(part, str):
    return part
  kind = part.get("type") if isinstance(part, Mapping) else None
  if kind in _THOUGHTS:
    return _marked("".join(_strings(part)))
  field = "refusal" if kind == "refusal" else "text"
  text = part.get(field) if kind in _TEXTS else None
  if not isinstance(text, str):
    raise NoReply(
      f"a part of `content` that is no text (type {_shown(kind)}); use a model that "
      "answers with text"
    )
  return text


def _strings(part: Any) -> Iterator[str]:
  """The texts in a thinking part, which may itself be a list of parts."""
  if isinstance(part, str):
    yield part
  elif isinstance(part, list):
    for each in part:
      yield from _strings(each)
  elif isinstance(part, Mapping):
    for name in ("thinking", "reasoning", "text", "summary"):
      yield from _strings(part.get(name))


def _marked(thought: str) -> str:
  opening, closing = thinking.THINK
  inner = thought.replace(opening, "").replace(closing, "")
  return f"{opening}{inner}{closing}"


def _with_thinking(
  text: str, message: Mapping[str, Any], marks: Sequence[thinking.Marks]
) -> str:
  """The text with the thinking that a server moved to another field, to be counted."""
  if thinking.answer(text, marks) != text:
    return text  # the thinking is also in the text
  names = ("reasoning", "reasoning_content", "thinking")
  thoughts = ("".join(_strings(message.get(name))) for name in names)
  thought = next(filter(None, thoughts), "")
  return _marked(thought) + text if thought else text
