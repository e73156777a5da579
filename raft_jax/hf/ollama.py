"""An Ollama Modelfile: the chat template as a Go template, and where answers end.

Ollama does not run the Jinja template in a GGUF file. It compares it with a list of
templates that it knows, and sends the bare prompt if none is similar; a similar one may
have another default system message. Therefore the Modelfile says the template itself,
derived from what the Jinja template writes around the messages of a conversation. It is
left out, with the reason, if the two do not write the same for every conversation that
is tried.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from raft_jax import errors
from raft_jax.hf import chat_template

if TYPE_CHECKING:
  import transformers

MARK = "# Written by raft_jax"
"""The beginning of the first line, which marks a file as an earlier export."""
Messages = Sequence[Mapping[str, str]]


class Frames(NamedTuple):
  """The text that a chat template writes around each message.

  Attributes:
    default: before everything if there is no system message.
    system, user, assistant: before and after a message of that role.
    asks: after the last message, before the answer.
  """

  default: str
  system: tuple[str, str]
  user: tuple[str, str]
  assistant: tuple[str, str]
  asks: str


def check_target(path: pathlib.Path) -> None:
  """Refuses a target that is there and that is no Modelfile of an earlier export."""
  if not path.exists() and not path.is_symlink():
    return
  ours = path.is_file() and not path.is_symlink()
  if not ours or not path.read_bytes().startswith(MARK.encode()):
    raise errors.UserError(f"{path}: is not an earlier export; move it away")


def modelfile(
  gguf_name: str,
  tokenizer: transformers.PreTrainedTokenizerFast,
  ends: Sequence[int],
  *,
  add_bos: bool,
) -> str:
  """The text of a Modelfile.

  Args:
    gguf_name: of the GGUF file in the same folder.
    ends: from `hf_tokenizer.eos_ids`.
    add_bos: whether the GGUF file has texts begin with BOS, which the template must
      then not write again.
  """
  lines = [
    f"{MARK}: `ollama create NAME -f THIS_FILE`, then `ollama run NAME`.",
    f"FROM ./{gguf_name}",
  ]
  frames = find_frames(tokenizer, add_bos=add_bos) if tokenizer.chat_template else None
  if frames is None:
    lines.append(
      "# No TEMPLATE: the model's chat template is absent, or is more than text around"
      " each message. Ollama may use a similar one of its own."
    )
  else:
    lines.append(f'TEMPLATE """{go_template(frames)}"""')
    system = _default_system(frames)
    if system:
      lines.append(f'SYSTEM """{system}"""')
  for token in tokenizer.convert_ids_to_tokens(list(ends)):
    if '"' not in token:
      lines.append(f'PARAMETER stop "{token}"')
  return "\n".join(lines) + "\n"


def _default_system(frames: Frames) -> str | None:
  """The message that stands for an absent system message."""
  before, after = frames.system
  text = frames.default
  framed = text.startswith(before) and text.endswith(after)
  if not before + after or not framed or len(text) < len(before + after):
    return None
  return text[len(before) : len(text) - len(after)]


def go_template(frames: Frames) -> str:
  """The template for Go's text/template, over Ollama's `.System` and `.Messages`.

  A last message of the assistant is left open, to be continued.
  """
  default = f"{{{{ if not .System }}}}{frames.default}{{{{ end }}}}"
  system, user, assistant = frames.system, frames.user, frames.assistant
  return (
    (default if frames.default else "")
    + "{{ range $i, $m := .Messages }}"
    + "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    + f'{{{{ if eq $m.Role "system" }}}}{system[0]}{{{{ $m.Content }}}}{system[1]}'
    + f'{{{{ else if eq $m.Role "user" }}}}{user[0]}{{{{ $m.Content }}}}{user[1]}'
    + f'{{{{ else if eq $m.Role "assistant" }}}}{assistant[0]}{{{{ $m.Content }}}}'
    + f"{{{{ if not $last }}}}{assistant[1]}{{{{ end }}}}{{{{ end }}}}"
    + f'{{{{ if and $last (ne $m.Role "assistant") }}}}{frames.asks}{{{{ end }}}}'
    + "{{ end }}"
  )


def find_frames(
  tokenizer: transformers.PreTrainedTokenizerFast, *, add_bos: bool
) -> Frames | None:
  """What the chat template writes around messages; None if that is not all it does."""
  bos = tokenizer.bos_token if add_bos else None

  def render(messages: Messages, prompt: bool) -> str:
    text = chat_template.render(tokenizer, list(messages), prompt=prompt)
    return text.removeprefix(bos) if bos else text

  try:
    for frames in _candidates(render):
      literals = "".join(itertools.chain(*frames))
      unsafe = any(mark in literals for mark in ("{{", "}}", '"""'))
      if not unsafe and all(
        _fill(frames, talk) == render(talk, True) for talk in _conversations()
      ):
        return frames
  except errors.UserError:  # it refuses one of the conversations
    return None
  return None


def _candidates(render: Callable[[Messages, bool], str]) -> Iterator[Frames]:
  """Frames that agree with a few conversations.

  They differ in where a message's text ends and the next one's begins. The first is
  split where the template itself ends finished conversations.
  """
  s, u, a, v = "raft system", "raft question", "raft answer", "raft more"
  talk = _talk(("system", s), ("user", u), ("assistant", a), ("user", v))
  parts, rest = [], render(talk, True)
  for word in (s, u, a, v):
    before, found, rest = rest.partition(word)
    if not found:
      return
    parts.append(before)
  before_s, before_u, before_a, before_v = parts
  bare, _, asks = render(_talk(("user", u)), True).partition(u)
  ended = render(talk[:2], False).partition(u)[2]
  if not (asks.startswith(ended) and before_a.startswith(ended)):
    ended = _common_start(before_a, asks)
  answered = render(talk[:3], False).partition(a)[2]
  shared = _common_end(_common_end(before_u, before_v), bare)
  begins = [before_v.removeprefix(answered), shared]
  for begin in begins:
    if shared.endswith(begin):
      yield Frames(
        default=bare.removesuffix(begin),
        system=(before_s, before_u.removesuffix(begin)),
        user=(begin, ended),
        assistant=(before_a.removeprefix(ended), before_v.removesuffix(begin)),
        asks=asks.removeprefix(ended),
      )


def _talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
  return [{"role": role, "content": content} for role, content in turns]


def _conversations() -> list[list[dict[str, str]]]:
  system = ("system", "Be brief.\n\nAnswer in <b>German</b>.")
  first, second = ("user", "What is a tort?\n- define it"), ("user", "{{ 1 }} ünd?")
  answer, other = ("assistant", "A wrong."), ("assistant", "A   'wrong'\n\n…")
  talks = [
    [first],
    [first, answer, second],
    [first, answer, second, other, ("user", "So?")],
  ]
  return [_talk(*talk) for turns in talks for talk in (turns, [system, *turns])]


def _fill(frames: Frames, messages: Messages) -> str:
  """What the frames write for a conversation that ends with the user."""
  text = frames.default if messages[0]["role"] != "system" else ""
  around = frames._asdict()
  for message in messages:
    before, after = around[message["role"]]
    text += before + message["content"] + after
  return text + frames.asks


def _common_start(one: str, other: str) -> str:
  pairs = zip(one, other, strict=False)
  return "".join(x for x, _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))


def _common_end(one: str, other: str) -> str:
  return _common_start(one[::-1], other[::-1])[::-1]
