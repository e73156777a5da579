"""Conversations as chat templates take them: objects, tools, hidden control tokens.

Texts of the data never become control tokens: before the template sees them, control
tokens that they spell are replaced by marks, which are encoded as plain text later.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from raft_jax import errors
from raft_jax.hf import chat_template
from raft_jax.storage import messages as messages_lib
from raft_jax.storage import records

if TYPE_CHECKING:
  import transformers

Edit = Callable[[str], str]

TOOLS, CALLS, RESULTS = "tools", "tool calls", "tool turns"


class Conversation(NamedTuple):
  """What a chat template is given.

  Attributes:
    turns: {"role", "content", ...} each.
    tools: JSON schemas.
    mark: stands before the numbers of hidden control tokens; "" if none is hidden.
    argument_texts: of each turn, the arguments of its calls as JSON texts, for
      templates that take no objects.
  """

  turns: list[dict[str, Any]]
  tools: list[Any]
  mark: str
  argument_texts: list[list[str]]

  @property
  def uses_tools(self) -> bool:
    """Whether a template must know tools to render it."""
    return bool(self.tools) or any(
      turn["role"] == "tool" or "tool_calls" in turn for turn in self.turns
    )


def of(
  messages: Sequence[records.Message], controls: Sequence[str], *, learned: bool = False
) -> Conversation:
  """The conversation, with its control tokens hidden.

  In an assistant's turn, the tags around a leading `<think>...</think>` are not hidden:
  the chat template knows what to do with the thinking of earlier turns.

  Args:
    controls: texts of the control tokens, longest first.
    learned: whether the last turn is an answer to learn. All of it is content.
  """
  tools = [json.loads(tool) for tool in messages[0].tools]
  turns = [records.api_turn(message, json.loads) for message in messages]
  texts = [*(text for turn in turns for text in _texts(turn)), *_texts(tools)]
  if not any(control in text for text in texts for control in controls):
    arguments = [[call.arguments for call in m.tool_calls] for m in messages]
    return Conversation(turns, tools, "", arguments)
  mark = _unused_mark(texts)
  spelled = re.compile("|".join(map(re.escape, controls)))

  def hide(text: str) -> str:
    return spelled.sub(lambda x: f"{mark}{controls.index(x[0])};", text)

  last = len(turns) - 1
  for i, turn in enumerate(turns):
    earlier = turn["role"] == "assistant" and not (learned and i == last)
    edit = _around_thinking(hide) if earlier else hide
    content = edit(turn["content"])
    turns[i] = {**_edited(turn, hide), "role": turn["role"], "content": content}
    if learned and i == last and "reasoning_content" in turn:
      thought = _around_thinking(hide)(turn["reasoning_content"])
      turns[i]["reasoning_content"] = thought
  arguments = [[hide(call.arguments) for call in m.tool_calls] for m in messages]
  return Conversation(turns, _edited(tools, hide), mark, arguments)


def hidden(mark: str) -> re.Pattern[str]:
  """Finds hidden control tokens in a rendered text; the group is a token's number."""
  return re.compile(rf"{re.escape(mark)}(\d+);")


def _around_thinking(hide: Edit) -> Edit:
  def edit(content: str) -> str:
    part = messages_lib.THOUGHT.match(content)
    if part is None:
      return hide(content)
    before, after = content[: part.start(1)], content[part.end(1) :]
    closing = before.strip().replace("<", "</", 1)
    rest = hide(after.removeprefix(closing))
    return f"{before}{hide(part[1])}{closing}{rest}"

  return edit


def _texts(value: Any) -> Iterator[str]:
  """All texts in a value of JSON, keys included."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    for key, item in value.items():
      yield key
      yield from _texts(item)
  elif isinstance(value, list):
    for item in value:
      yield from _texts(item)


def _edited(value: Any, edit: Edit) -> Any:
  """The value with its texts edited; keys that are words of a schema stay."""
  if isinstance(value, str):
    return edit(value)
  if isinstance(value, dict):
    return {
      key if key.isidentifier() else edit(key): _edited(item, edit)
      for key, item in value.items()
    }
  if isinstance(value, list):
    return [_edited(item, edit) for item in value]
  return value


def _unused_mark(texts: Sequence[str]) -> str:
  """A string of private-use characters that no text contains."""
  mark = "\ue000"
  while any(mark in text for text in texts):
    mark += "\ue000"
  return mark + "\ue001"


# --- What the template knows ----------------------------------------------------------


def fitted(
  tokenizer: transformers.PreTrainedTokenizerFast,
  conversation: Conversation,
  *,
  thinking: bool,
) -> Conversation:
  """The conversation in a form of which the chat template writes all tools and calls.

  A turn of calls alone has the content "" if the template then writes the calls, else
  no content (transformers makes a null content absent too). The arguments of a call are
  an object, or else its JSON text, which DeepSeek's template wants.

  Raises:
    UserError: the template refuses the conversation, or leaves out its tools, a call or
      the result of one.
  """
  if not conversation.uses_tools:
    return conversation
  faults = []
  for absent, as_text in itertools.product((False, True), (False, True)):
    turns = [
      _with_calls(turn, arguments if as_text else None, absent=absent)
      for turn, arguments in zip(conversation.turns, conversation.argument_texts)
    ]
    try:
      _check_tools(tokenizer, turns, conversation.tools, thinking)
    except errors.UserError as error:
      faults.append(error)
      continue
    return conversation._replace(turns=turns)
  raise faults[0]


def _with_calls(
  turn: dict[str, Any], arguments: Sequence[str] | None, *, absent: bool
) -> dict[str, Any]:
  """A turn in one of the forms of `fitted`."""
  if "tool_calls" not in turn:
    return turn
  calls = turn["tool_calls"]
  if arguments is not None:
    calls = [
      {**call, "function": {**call["function"], "arguments": text}}
      for call, text in zip(calls, arguments, strict=True)
    ]
  if absent and not turn["content"]:
    turn = {key: value for key, value in turn.items() if key != "content"}
  return {**turn, "tool_calls": calls}


def _check_tools(
  tokenizer: transformers.PreTrainedTokenizerFast,
  turns: Sequence[dict[str, Any]],
  tools: Sequence[Any],
  thinking: bool,
) -> None:
  """Renders the conversation with other words in its tools, and looks for them.

  Raises:
    UserError: the template refuses it, or leaves some out.
  """
  words: dict[str, str] = {}  # the word, and what it stands for
  tool_names: dict[str, str] = {}

  def word(what: str) -> str:
    words[made := f"raft{len(words)}word"] = what
    return made

  def name(given: str) -> str:
    return tool_names.setdefault(given, f"raft_tool_{len(tool_names)}x")

  marked = [_renamed(tool, name) for tool in tools]
  if marked:
    last = next((i for i, t in enumerate(turns) if t["role"] == "user"), 0)
    first = [dict(turn) for turn in turns[: last + 1]]
    text = chat_template.render(
      tokenizer, first, tools=marked, prompt=True, thinking=thinking
    )
    for given, made in tool_names.items():
      if made not in text:
        raise _missing(TOOLS, given)
  probe = []
  for turn in turns:
    probe.append(turn := dict(turn))
    if turn["role"] == "tool":
      turn["content"] = word(RESULTS)
      if "name" in turn:
        turn["name"] = name(turn["name"])
    for call in turn.get("tool_calls", ()):
      words[name(call["function"]["name"])] = CALLS
    if "tool_calls" in turn:
      turn["tool_calls"] = [_probed(call, name, word) for call in turn["tool_calls"]]
  text = chat_template.render(
    tokenizer, probe, tools=marked, prompt=False, thinking=thinking
  )
  for made, what in words.items():
    if made not in text:
      raise _missing(what)


def _renamed(tool: Any, name: Edit) -> Any:
  if "function" in tool:
    return {**tool, "function": _renamed(tool["function"], name)}
  return {**tool, "name": name(tool["name"])}


def _probed(call: dict[str, Any], name: Edit, word: Edit) -> dict[str, Any]:
  """A call with another name, and other texts in its arguments."""
  function = call["function"]
  is_text = isinstance(function["arguments"], str)
  given = json.loads(function["arguments"]) if is_text else function["arguments"]
  arguments = {
    key: word(CALLS) if isinstance(item, str) else item for key, item in given.items()
  }
  if not any(isinstance(item, str) for item in arguments.values()):
    arguments["raft"] = word(CALLS)
  written = json.dumps(arguments) if is_text else arguments
  named = {"name": name(function["name"]), "arguments": written}
  return {**call, "function": named}


def _missing(what: str, name: str | None = None) -> errors.UserError:
  named = "" if name is None else f" (such as {name!r})"
  return errors.UserError(
    f"the chat template has no {what}: it leaves those of the row out{named}; choose "
    "another by model.chat_template"
  )
