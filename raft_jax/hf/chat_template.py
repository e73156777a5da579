"""The chat template of a model: choosing and rendering it.

Training, evaluation and the engines all render here, so they read the same text, with
a fixed date, and with thinking switched off unless the config keeps it.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raft_jax import errors

if TYPE_CHECKING:
  import transformers


_NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}\n"
"""Before a template that writes today's date (Llama 3.2, SmolLM3): the day that Llama's
writes where it has no clock. With a clock a run's ids would change at midnight, and
differ between hosts."""

_SWITCHES = re.compile(r"\b(enable_thinking|thinking)\b")
"""What templates call the switch of thinking (Qwen3 and SmolLM3; Granite, DeepSeek)."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_NAME = r"(?P<name>[^\s<>\[\]/]*(?:think|thought|reason)[^\s<>\[\]/]*)"
OPENED = re.compile(rf"(?P<left>[<\[]){_NAME}(?P<right>[>\]])\s*\Z", re.IGNORECASE)
"""A thinking part that a prompt opens and leaves open, at the end of the prompt."""
EMPTY = rf"(?P<left>[<\[]){_NAME}(?P<right>[>\]])\s*(?P=left)/(?P=name)(?P=right)\s*"
"""A thinking part that holds nothing, and the spaces after it."""


def choose(
  found: str | Mapping[str, str] | None, name: str | None, source: str
) -> str | None:
  """The template to use, of those that a tokenizer has.

  Args:
    found: as transformers has it: one template, several by name, or none.
    name: `model.chat_template`: a name, or a path of a .jinja file; None for the only
      one or the one called "default".
    source: of the model, for messages.

  Raises:
    UserError: there is no such template.
  """
  if name is not None and name.endswith(".jinja"):
    try:
      return pathlib.Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise errors.UserError(
        f"model.chat_template: {name} cannot be read ({error}); give the path of a "
        "template, or a name of the model's own"
      ) from error
  named: dict[str, str] = {}
  if isinstance(found, Mapping):
    named = dict(found)
  elif found is not None:
    named = {"default": found}
  wanted = "default" if name is None else name
  if wanted in named:
    return named[wanted]
  if name is None and not named:
    return None
  has = ", ".join(sorted(named)) or "none"
  raise errors.UserError(
    f"model.chat_template: {source} has no chat template named {wanted!r} (it has: "
    f"{has}); set it to one of those, or to the path of a .jinja file"
  )


def render(
  tokenizer: transformers.PreTrainedTokenizerFast,
  messages: Sequence[Mapping[str, Any]],
  *,
  prompt: bool,
  unfinished: bool = False,
  tools: Sequence[Any] = (),
  thinking: bool = False,
) -> str:
  """The conversation as the tokenizer's chat template writes it.

  Args:
    messages: {"role", "content"} each, in the form of OpenAI's API.
    prompt: whether the header of the answer to come follows.
    unfinished: whether the last message goes on: nothing is written after it.
    tools: JSON schemas of the tools that the assistant may call.
    thinking: position of the template's switch of thinking, if it has one.

  Raises:
    UserError: the template refuses the messages.
  """
  options = _options(str(tokenizer.chat_template), tools, thinking)
  if unfinished:
    options["continue_final_message"] = True
  try:
    text = tokenizer.apply_chat_template(
      [dict(message) for message in messages],
      tokenize=False,
      add_generation_prompt=prompt,
      **options,
    )
  except Exception as error:  # the template's own, of any kind
    roles = ", ".join(str(message["role"]) for message in messages)
    raise errors.UserError(
      f"the model's chat template refuses messages of roles {roles} ({error}); change "
      "the messages, the model, or model.chat_template"
    ) from error
  return str(text)


def _options(template: str, tools: Sequence[Any], thinking: bool) -> dict[str, Any]:
  options: dict[str, Any] = dict.fromkeys(_SWITCHES.findall(template), thinking)
  if "strftime_now" in template:
    options["chat_template"] = _NO_CLOCK + template
  if tools:
    options["tools"] = list(tools)
  return options


def marked(
  tokenizer: transformers.PreTrainedTokenizerFast,
  messages: Sequence[Mapping[str, Any]],
  *,
  tools: Sequence[Any] = (),
  thinking: bool = False,
) -> list[tuple[int, int]] | None:
  """Where the assistant's texts are in `render` of a finished conversation.

  Returns:
    First and last + 1 character of each `{% generation %}` block; None if the template
    has none.
  """
  from transformers.utils import chat_template_utils

  template = str(tokenizer.chat_template)
  if not _GENERATION.search(template):
    return None
  options = {"chat_template": template, **_options(template, tools, thinking)}
  rendered: Any = chat_template_utils.render_jinja_template(
    conversations=[[dict(message) for message in messages]],
    return_assistant_tokens_mask=True,
    **{**tokenizer.special_tokens_map, **options},
  )
  return [(start, end) for start, end in rendered[1][0] if start < end]


def closed(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
  """The template, closing the thinking part that its prompts may leave open.

  Some templates (DeepSeek-R1, Qwen3-Thinking) open a thinking part in every prompt and
  have no switch. Learnt behind such a prompt, an answer would stand inside of the part.
  Closed and empty it is as with a switch; how, the template says where it writes one.
  """
  template = str(tokenizer.chat_template)
  question = {"role": "user", "content": "?"}
  try:
    asked = render(tokenizer, [question], prompt=True)
  except errors.UserError:
    return template  # that it refuses a mere question is told by who asks more of it
  opened = OPENED.search(asked)
  if opened is None:
    return template
  end = f"{opened['left']}/{opened['name']}{opened['right']}"
  closing = _closing(tokenizer, asked, end)
  if closing is None:
    return template
  words = json.dumps(closing, ensure_ascii=False)
  # Jinja drops a last line's end, which would count before what follows.
  return (
    template.removesuffix("\n") + f'{{{{ {words} if add_generation_prompt else "" }}}}'
  )


def _closing(
  tokenizer: transformers.PreTrainedTokenizerFast, asked: str, end: str
) -> str | None:
  """From the opened part to the answer; None where the template knows no end of it."""
  answer, thought = "raft answer", "raft thought"
  said = {"role": "assistant", "content": answer}
  for turn, before in (
    (said, asked),
    ({**said, "reasoning_content": thought}, thought),
  ):
    try:
      whole = render(tokenizer, [{"role": "user", "content": "?"}, turn], prompt=False)
    except errors.UserError:
      continue
    between = whole.partition(before)[2].partition(answer)[0]
    if end in between:
      return between
  if end not in str(tokenizer.chat_template):
    return None
  line = "\n" if asked.endswith("\n") else ""
  return f"{line}{end}\n\n"


def continuation(asked: str, whole: str) -> str | None:
  """What of a finished conversation follows its prompt; None if it does not begin so.

  The prompt may end in an empty thinking part that a finished turn does not have.
  """
  if whole.startswith(asked):
    return whole[len(asked) :]
  part = re.search(rf"{EMPTY}\Z", asked, re.IGNORECASE)
  if part is None or not whole.startswith(asked[: part.start()]):
    return None
  rest = whole[part.start() :]
  # A part of another shape: which spaces are its own, nobody can tell.
  return None if re.match(rf"\s*{EMPTY}", rest, re.IGNORECASE) else rest
