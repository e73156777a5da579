"""What the fields of a row mean: the formats of fine-tuning data.

Each format is a pure function from the fields of a row to a conversation that ends with
the assistant; `examples` are the answers of it that are learned.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax.storage import messages as messages_lib
from raft_jax.storage import records, row_files

Values = Mapping[str, Any]
Turns = tuple[records.Message, ...]

SPEAKERS = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "chatgpt": "assistant",
  "assistant": "assistant",
  "bot": "assistant",
  "chatbot": "assistant",
  "model": "assistant",
  "system": "system",
  "tool": "tool",
  "observation": "tool",
  "function_response": "tool",
}
"""The role of each speaker of a ShareGPT turn, whatever its case."""

USUAL = {
  "question": ("prompt", "instruction", "input", "query", "problem"),
  "messages": ("conversations", "conversation"),
  "answer": ("response", "output", "completion", "solution", "target"),
}
"""Names of these fields in other data sets."""


class Format(NamedTuple):
  """A format of rows.

  Attributes:
    needs: the fields of a row, in words.
    answer: the field of the last turn, for reasons.
    fits: whether a row, without its nulls, has them.
    conversation: the turns of such a row.
  """

  needs: str
  answer: str
  fits: Callable[[Values], bool]
  conversation: Callable[[Values], Turns]


# --- Formats --------------------------------------------------------------------------


def _question(values: Values) -> Turns:
  has_question, has_messages = "question" in values, "messages" in values
  if has_question and has_messages:
    raise row_files.Fault("has both `question` and `messages`; keep one")
  tools = values.get("tools")
  if has_question:
    turns = records.user_turn(messages_lib.text("question", values["question"]))
    turns = messages_lib.with_tools(turns, tools)
  elif has_messages:
    turns = messages_lib.conversation(
      _as_text(values["messages"], "messages"), tools=tools
    )
  else:
    raise row_files.Fault(_missing("question", values))
  if "answer" not in values:
    raise row_files.Fault(_missing("answer", values))
  answer = records.Message("assistant", messages_lib.text("answer", values["answer"]))
  if values.get("reasoning_content") not in (None, ""):
    reasoning = messages_lib.text("reasoning_content", values["reasoning_content"])
    answer = answer._replace(reasoning_content=reasoning)
  return (*turns, answer)


def _messages(values: Values) -> Turns:
  turns = _parsed("messages", _value(values, "messages"))
  return _ended(messages_lib.with_tools(turns, values.get("tools")), "messages")


def _prompt_completion(values: Values) -> Turns:
  before = _side(values, "prompt", "user")
  after = _side(values, "completion", "assistant")
  if after[0].role != "assistant":
    raise row_files.Fault(f"`completion` begins with a turn of the {after[0].role}")
  late = [turn for turn in after if turn.role == "system"]
  if late:
    raise row_files.Fault("`completion` has a system turn; only the first turn may be")
  turns = messages_lib.with_tools((*before, *after), values.get("tools"))
  return _ended(turns, "completion")


def _side(values: Values, field: str, role: str) -> Turns:
  value = _value(values, field)
  if isinstance(value, list):
    return _parsed(field, value)
  return (records.Message(role, messages_lib.text(field, value)),)


def _alpaca(values: Values) -> Turns:
  instruction, output = _value(values, "instruction"), _value(values, "output")
  question = messages_lib.text("instruction", instruction)
  given = _optional(values, "input")
  return (
    *_system(values),
    *_history(values.get("history") or []),
    records.Message("user", f"{question}\n{given}" if given else question),
    records.Message("assistant", messages_lib.text("output", output)),
  )


def _history(value: Any) -> list[records.Message]:
  turns = []
  if not isinstance(value, list):
    raise row_files.Fault("`history` is not a list of [question, answer] pairs")
  for i, pair in enumerate(value):
    if not isinstance(pair, list) or len(pair) != 2:
      raise row_files.Fault(f"`history[{i}]` is not a pair [question, answer]")
    for role, k in (("user", 0), ("assistant", 1)):
      text = messages_lib.text(f"history[{i}][{k}]", pair[k])
      turns.append(records.Message(role, text))
  return turns


def _sharegpt(values: Values) -> Turns:
  value = _value(values, "conversations")
  if isinstance(value, list):
    value = [_spoken(f"conversations[{i}]", item) for i, item in enumerate(value)]
  turns = _parsed("conversations", value)
  system = _system(values)
  if system and turns[0].role == "system":
    raise row_files.Fault(
      "has two system turns: `system`, and `conversations[0]`; keep one"
    )
  turns = messages_lib.with_tools((*system, *turns), values.get("tools"))
  return _ended(turns, "conversations")


def _spoken(at: str, item: Any) -> Any:
  """A turn {from, value} as {role, content}; other keys are kept."""
  if not isinstance(item, Mapping):
    return item
  turn = {key: value for key, value in item.items() if value is not None}
  if "from" in turn and "role" in turn:
    raise row_files.Fault(f"`{at}` has both `from` and `role`; keep one")
  speaker_key = "from" if "from" in turn else "role"
  speaker = turn.pop(speaker_key, None)
  if speaker == "function_call":
    return {"role": "assistant", "tool_calls": _calls(f"{at}.value", turn.get("value"))}
  role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
  if role is None:
    raise row_files.Fault(
      f"`{at}.{speaker_key}` is {speaker!r}, not one of {', '.join(SPEAKERS)}"
    )
  text_key = "value" if speaker_key == "from" else "content"
  return {"role": role, "content": turn.pop(text_key, None), **turn}


def _calls(field: str, value: Any) -> Any:
  """The calls of a `function_call` turn: JSON text of {name, arguments}, or a list."""
  try:
    calls = row_files.parse_json(messages_lib.text(field, value))
  except row_files.Fault as fault:
    raise row_files.Fault(f"`{field}` {fault}") from fault
  return calls if isinstance(calls, list) else [calls]


FORMATS = {
  "question": Format(
    "`question` or `messages`, and `answer`",
    "answer",
    lambda row: "answer" in row and ("question" in row or "messages" in row),
    _question,
  ),
  "messages": Format(
    "`messages` that end with the assistant",
    "messages[-1].content",
    lambda row: "messages" in row and ("answer" not in row or _is_answered(row)),
    _messages,
  ),
  "prompt_completion": Format(
    "`prompt` and `completion`",
    "completion",
    lambda row: "prompt" in row and "completion" in row,
    _prompt_completion,
  ),
  "alpaca": Format(
    "`instruction` and `output`",
    "output",
    lambda row: "instruction" in row and "output" in row,
    _alpaca,
  ),
  "sharegpt": Format(
    "`conversations`",
    "conversations[-1].value",
    lambda row: isinstance(row.get("conversations"), list),
    _sharegpt,
  ),
}
"""The formats that a row may have, by the name that `data.format` gives them."""

FIELDS = (
  *("id", "domain", "question", "messages", "answer", "prompt", "completion"),
  *("instruction", "input", "output", "system", "history", "conversations", "tools"),
  "reasoning_content",
)
"""All fields that formats know; other fields of a row are ignored."""


def _is_answered(row: Values) -> bool:
  last = row["messages"][-1:] if isinstance(row["messages"], list) else []
  return any(isinstance(m, Mapping) and m.get("role") == "assistant" for m in last)


# --- Parts of formats -----------------------------------------------------------------


def _value(values: Values, field: str) -> Any:
  if field not in values:
    raise row_files.Fault(f"has no `{field}`")
  return values[field]


def _parsed(field: str, value: Any) -> Turns:
  return messages_lib.parse(_as_text(value, field), field)


def _as_text(value: Any, field: str) -> Any:
  """A list of messages in which a content of text parts is their text, joined."""
  if isinstance(value, str):
    raise row_files.Fault(
      f"`{field}` is text, not a list of turns; a CSV or TSV file cannot hold lists: "
      "use JSONL or Parquet"
    )
  if not isinstance(value, list):
    return value
  return [
    {**item, "content": _joined(f"{field}[{i}].content", item["content"])}
    if isinstance(item, Mapping) and isinstance(item.get("content"), list)
    else item
    for i, item in enumerate(value)
  ]


def _joined(at: str, parts: list[Any]) -> str:
  texts = []
  for i, part in enumerate(parts):
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
      raise row_files.Fault(
        f"`{at}[{i}]` is {kind!r}; only {{type: text, text}} is read"
      )
    texts.append(part["text"])
  return "".join(texts)


def _optional(values: Values, field: str) -> str:
  """A text that may be empty or missing."""
  value = values.get(field)
  if value is None or (isinstance(value, str) and not value.strip()):
    return ""
  return messages_lib.text(field, value)


def _system(values: Values) -> Turns:
  text = _optional(values, "system")
  return (records.Message("system", text),) if text else ()


def _ended(turns: Turns, field: str) -> Turns:
  """The turns, if they end with an answer to something."""
  if not any(turn.role == "assistant" for turn in turns):
    raise row_files.Fault(f"`{field}` has no assistant turn, which would be learned")
  if turns[-1].role != "assistant":
    raise row_files.Fault(
      f"`{field}` ends with a turn of the {turns[-1].role}; it must end with the "
      "assistant's, which is learned"
    )
  return turns


def _missing(field: str, values: Values) -> str:
  near = near_field(field, values)
  if field == "answer":
    return "has no `answer`" + (f"; rename {near!r}" if near else "")
  if "chosen" in values and "rejected" in values:
    return "is a pair of preferences (`chosen`, `rejected`), which has no one answer"
  turns = None if near else near_field("messages", values)
  hint = f"; rename {near or turns!r}" if near or turns else ""
  return f"has no `question` (or `messages`){hint}{' to `messages`' if turns else ''}"


def near_field(field: str, values: Values) -> str | None:
  """The field of a row that was probably meant to be `field`, or None."""
  own = ("id", "domain", "question", "messages", "answer", field)
  others = {key.lower(): key for key in values if key not in own}
  usual = [key for key in (field, *USUAL.get(field, ())) if key in others]
  near = [*usual, *difflib.get_close_matches(field, others, n=1)]
  return others[near[0]] if near else None


# --- Conversations --------------------------------------------------------------------


def fitting_formats(row: Values) -> list[str]:
  return [name for name, known in FORMATS.items() if known.fits(row)]


def conversation(row: Values, name: str) -> Turns:
  """The turns of a row of a file whose format is `name`.

  Raises:
    row_files.Fault: the row has another format, or cannot be used.
  """
  if not FORMATS[name].fits(row):
    others = fitting_formats(row)
    if others:
      raise row_files.Fault(
        f"is {others[0]}, and the file is {name}; put it into a file of its own"
      )
  return FORMATS[name].conversation(row)


# --- Turns ----------------------------------------------------------------------------


class Example(NamedTuple):
  """An answer to learn and what comes before it.

  Attributes:
    number: of the answer among the assistant's turns, from 1; 1 for the last alone.
  """

  number: int
  before: Turns
  answer: records.Message


def examples(
  conversation: Sequence[records.Message], turns: str, name: str
) -> list[Example]:
  """The answers of a conversation that are learned.

  Args:
    name: of its format.
    turns: "last", or "each": all but what the assistant says before the user does.

  Raises:
    row_files.Fault: two of the assistant's turns follow each other.
  """
  found = []
  number = 0
  for i, turn in enumerate(conversation):
    if turn.role != "assistant":
      continue
    number += 1
    before = tuple(conversation[:i])
    if turns == "last" and i + 1 < len(conversation):
      continue
    if any(message.role == "user" for message in before):
      if before[-1].role in ("assistant", "system"):
        raise row_files.Fault(
          f"turn {i + 1} is the assistant's, after the {before[-1].role}'s; join them"
        )
      is_last = i + 1 == len(conversation)
      field = FORMATS[name].answer if is_last else f"turn {i + 1}"
      answer = messages_lib.learned(field, turn)
      found.append(Example(number if turns == "each" else 1, before, answer))
  if not found:
    raise row_files.Fault("has no turn of the user before the assistant's")
  return found
