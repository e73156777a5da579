"""Lists of messages and tools, checked: OpenAI-style objects to a conversation.

Everything here is a pure function of what a row holds. A `row_files.Fault` names the
field that cannot be used.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from raft_jax.storage import records, row_files

ROLES = ("system", "user", "assistant", "tool")

FIELDS = {
  "system": (),
  "user": (),
  "assistant": ("reasoning_content", "tool_calls"),
  "tool": ("name", "tool_call_id"),
}
"""What a turn of each role may have besides role and content."""

MASKS = ("weight", "loss", "train")
"""What other data sets call the share of a turn in the loss."""

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
"""The thinking at the start of an assistant's turn."""
_OPENS = re.compile(r"\s*<think>")


def text(field: str, value: Any) -> str:
  """The value, if it is a text that is not empty.

  Raises:
    row_files.Fault: it is none.
  """
  if not isinstance(value, str):
    raise row_files.Fault(f"`{field}` is {type(value).__name__}, not text")
  # A text of spaces, control and zero-width characters alone counts as empty.
  if all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in value):
    raise row_files.Fault(f"`{field}` is empty")
  return _encodable(field, value)


def _encodable(field: str, value: str) -> str:
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise row_files.Fault(
      f"`{field}` holds half of a surrogate pair, which no text has"
    ) from e
  return value


def plain_text(field: str, value: Any) -> str:
  """As `text`; an `id` may also be a whole number."""
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  return text(field, str(value) if field == "id" and is_integer else value)


def parse(
  value: Any, field: str = "messages", tools: Any = None
) -> tuple[records.Message, ...]:
  """The turns of a list of messages, whoever has the last word.

  Args:
    value: what the row holds.
    field: its name, for the reasons.
    tools: the row's list of tools; None or an empty list for none.

  Raises:
    row_files.Fault: a message is not one, or stands where it cannot; or a tool is none.
  """
  if not isinstance(value, list) or not value:
    raise row_files.Fault(f"`{field}` is not a non-empty list of {{role, content}}")
  turns: list[records.Message] = []
  for i, item in enumerate(value):
    turns.append(_message(f"{field}[{i}]", item, i))
    _check_tool_turn(f"{field}[{i}]", turns)
  return with_tools(turns, tools)


def with_tools(
  turns: Sequence[records.Message], tools: Any
) -> tuple[records.Message, ...]:
  """The conversation with the row's tools, which its first turn carries."""
  return (turns[0]._replace(tools=parse_tools(tools)), *turns[1:])


def conversation(
  value: Any, field: str = "messages", tools: Any = None
) -> tuple[records.Message, ...]:
  """The turns of a list of messages that the assistant has to answer.

  Raises:
    row_files.Fault: as `parse`, or the last turn is not the user's nor a tool's.
  """
  messages = parse(value, field, tools)
  if messages[-1].role not in ("user", "tool"):
    raise row_files.Fault(
      f"`{field}` does not end with a user turn; the reply is `answer`"
    )
  return messages


def learned(field: str, turn: records.Message) -> records.Message:
  """An assistant's turn as an answer to learn: its reasoning apart from its content.

  A leading `<think>...</think>` becomes the reasoning as it stands, tags included, so
  that a template can be given the answer in the form of the data.

  In turns that are not learned, `<think>` stays in the content, and the chat template
  does with it what it does.

  Args:
    field: name of the content, for the reasons.

  Raises:
    row_files.Fault: its thinking has no end, is given twice, or has no answer after it.
  """
  if not _OPENS.match(turn.content):
    return turn
  if turn.reasoning_content:
    raise row_files.Fault(
      f"`{field}` begins with <think> beside `reasoning_content`; keep one"
    )
  part = THOUGHT.match(turn.content)
  if part is None:
    raise row_files.Fault(f"`{field}` opens <think> and never closes it")
  content = turn.content[part.end() :]
  if _OPENS.match(content) or "<think>" in part[1]:
    raise row_files.Fault(f"`{field}` has two <think> parts; join them")
  if not content and not turn.tool_calls:
    raise row_files.Fault(f"`{field}` is thinking without an answer after it")
  return turn._replace(content=content, reasoning_content=part[0])


def _message(at: str, item: Any, position: int) -> records.Message:
  if not isinstance(item, Mapping):
    raise row_files.Fault(f"`{at}` is not an object {{role, content}}")
  role = item.get("role")
  others = {k: v for k, v in item.items() if k not in records.PLAIN and v}
  if role not in ROLES:
    raise row_files.Fault(f"`{at}.role` is {role!r}, not one of {', '.join(ROLES)}")
  # A weight of 0 says that the turn is not to be learned.
  masks = [k for k in MASKS if item.get(k) is not None]
  extra = [k for k in others if k not in FIELDS[role]] or masks
  if extra:  # dropping it would change the conversation
    known = ", ".join((*records.PLAIN, *FIELDS[role]))
    raise row_files.Fault(
      f"`{at}` has {extra[0]!r}; a turn of role {role} may have {known} alone"
    )
  if role == "system" and position > 0:
    raise row_files.Fault(f"`{at}` is a system turn; only the first turn may be")
  content = item.get("content")
  calls = _tool_calls(f"{at}.tool_calls", others.pop("tool_calls", []))
  named: dict[str, Any] = {k: text(f"{at}.{k}", v) for k, v in others.items()}
  if calls and content in (None, ""):
    return records.Message(role, "", tool_calls=calls, **named)
  if "reasoning_content" in named and content in (None, ""):
    raise row_files.Fault(f"`{at}` has reasoning_content and no content after it")
  return records.Message(
    role, text(f"{at}.content", content), tool_calls=calls, **named
  )


def _check_tool_turn(at: str, turns: Sequence[records.Message]) -> None:
  """Refuses a last turn that is the result of a tool that nobody called."""
  if turns[-1].role != "tool":
    return
  results = 1
  while len(turns) > results and turns[-results - 1].role == "tool":
    results += 1
  calls = turns[-results - 1].tool_calls if len(turns) > results else ()
  if not calls:
    raise row_files.Fault(f"`{at}` is a tool turn without a tool call before it")
  if results > len(calls):
    raise row_files.Fault(
      f"`{at}` is tool turn {results} after {len(calls)} tool calls; each has one"
    )
  ids = [call.id for call in calls]
  given = turns[-1].tool_call_id
  if given and any(ids) and given not in ids:
    raise row_files.Fault(
      f"`{at}.tool_call_id` is {given!r}, and the calls before it have the ids "
      f"{', '.join(map(repr, ids))}"
    )


def _tool_calls(field: str, value: Any) -> tuple[records.ToolCall, ...]:
  if not isinstance(value, list):
    raise row_files.Fault(f"`{field}` is {type(value).__name__}, not a list of calls")
  return tuple(_tool_call(f"{field}[{i}]", item) for i, item in enumerate(value))


def _tool_call(at: str, item: Any) -> records.ToolCall:
  """A call as {id?, type?, function: {name, arguments}}, or {name, arguments} alone."""
  if not isinstance(item, Mapping):
    raise row_files.Fault(f"`{at}` is not an object {{function: {{name, arguments}}}}")
  call, where = item, at
  if item.get("function") is not None:
    call, where = item["function"], f"{at}.function"
    if not isinstance(call, Mapping):
      raise row_files.Fault(f"`{where}` is not an object {{name, arguments}}")
  if item.get("type") not in (None, "function"):
    raise row_files.Fault(f"`{at}.type` is {item['type']!r}, not 'function'")
  number = text(f"{at}.id", item["id"]) if item.get("id") not in (None, "") else ""
  name = text(f"{where}.name", call.get("name"))
  given = call.get("arguments")
  arguments = _json(f"{where}.arguments", given)
  if not isinstance(arguments, Mapping):
    raise row_files.Fault(
      f"`{where}.arguments` is {type(arguments).__name__}, not an object or its JSON "
      "text"
    )
  # A text stays as it is: some templates write it out.
  if not isinstance(given, str):
    given = _json_text(f"{where}.arguments", arguments)
  return records.ToolCall(name, given, number)


def parse_tools(value: Any) -> tuple[str, ...]:
  """The JSON text of each tool of a list of schemas, or of the list's JSON text.

  Raises:
    row_files.Fault: it is no such list.
  """
  if value in (None, ""):
    return ()
  value = _json("tools", value)
  if not isinstance(value, list):
    raise row_files.Fault(f"`tools` is {type(value).__name__}, not a list of schemas")
  names: dict[str, int] = {}
  for i, tool in enumerate(value):
    at = f"tools[{i}]"
    schema = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(schema, Mapping) or not isinstance(schema.get("name"), str):
      raise row_files.Fault(
        f"`{at}` is not a schema {{type: function, function: {{name, description, "
        "parameters}}"
      )
    text(f"{at}.name", schema["name"])
    if not isinstance(schema.get("parameters") or {}, Mapping):
      raise row_files.Fault(f"`{at}.parameters` is not a JSON schema (an object)")
    first = names.setdefault(schema["name"], i)
    if first != i:
      raise row_files.Fault(f"`{at}` has the name of tools[{first}]")
  return tuple(_json_text(f"tools[{i}]", tool) for i, tool in enumerate(value))


def _json(field: str, value: Any) -> Any:
  """The value, or what its text says in JSON."""
  if not isinstance(value, str):
    return value
  try:
    return row_files.parse_json(value)
  except row_files.Fault as reason:
    raise row_files.Fault(f"`{field}` {reason}") from reason


def _json_text(field: str, value: Any) -> str:
  """JSON text that keeps the order of keys, which templates write out."""
  try:
    written = json.dumps(value, ensure_ascii=False, allow_nan=False)
  except (TypeError, ValueError) as reason:
    raise row_files.Fault(f"`{field}` is not JSON: {reason}") from reason
  return _encodable(field, written)
