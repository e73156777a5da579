"""Chats to token ids and back, through the model's chat template.

Content never becomes control tokens: a question or an answer that spells "<|im_end|>"
is encoded as those characters, so that data cannot end or open a turn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from raft_jax import errors
from raft_jax.hf import chat_template
from raft_jax.hf import tokenizer as tokenizer_lib
from raft_jax.storage import records

if TYPE_CHECKING:
  import tokenizers
  import transformers


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
  """A tokenizer with its chat template, and what this package needs to know of both.

  Attributes:
    hf_tokenizer: a fast tokenizer with a chat template.
    eos_ids: ids that end an answer; the first one ends an assistant's turn.
    pad_id: fills rows. It may equal an end id: masks are made from lengths.
    digest: sha256 of tokenizer and chat template; equal digests mean equal ids.
    controls: texts of the control tokens, longest first.
    plain: a tokenizer that encodes the texts of control tokens as text; None if
      `hf_tokenizer` can do so (`split_special_tokens`).
    vocab_size: of the model, whose ids are below it; None: no limit.
  """

  hf_tokenizer: transformers.PreTrainedTokenizerFast
  eos_ids: tuple[int, ...]
  pad_id: int
  digest: str
  controls: tuple[str, ...]
  plain: tokenizers.Tokenizer | None = None
  vocab_size: int | None = None


class Turn(NamedTuple):
  """A conversation as the chat template writes it.

  Attributes:
    prompt: up to and including the header of the answer.
    answer: what follows, up to and including the end token.
    mark: stands before the numbers of hidden control tokens in both texts; "" if none
      is hidden.
  """

  prompt: str
  answer: str
  mark: str


_WORDS = r"think|thought|reason|tool|function|inst|turn|role|system|user|assistant"
_MARKER = re.compile(rf"<[|｜].*[|｜]>|[<\[]\S*({_WORDS})\S*[>\]]", re.IGNORECASE)
"""Spelling of added tokens that mark thinking, tools or turns."""


def load(source: str, template: str | None = None) -> ChatTokenizer:
  """The tokenizer of a model, from the same source as its weights.

  Args:
    template: as the config key `model.chat_template`.

  Raises:
    UserError: the tokenizer has no chat template or no end token.
  """
  hf_tokenizer = tokenizer_lib.load(source, template)
  if not isinstance(hf_tokenizer.chat_template, str):
    raise errors.UserError(
      f"model {source}: the tokenizer has no chat template; use an instruction-tuned "
      "model, add chat_template to tokenizer_config.json, or name a .jinja file by "
      "model.chat_template"
    )
  eos_ids = tokenizer_lib.eos_ids(source, hf_tokenizer)
  if not eos_ids:
    raise errors.UserError(
      f"model {source}: no token ends an answer; set eos_token in tokenizer_config.json"
    )
  return of(hf_tokenizer, eos_ids, tokenizer_lib.vocab_size(source))


def of(
  hf_tokenizer: transformers.PreTrainedTokenizerFast,
  eos_ids: tuple[int, ...],
  vocab_size: int | None = None,
) -> ChatTokenizer:
  """Wraps a tokenizer; its chat template must be the one to use."""
  pad_id = hf_tokenizer.pad_token_id
  if pad_id is None or (vocab_size is not None and pad_id >= vocab_size):
    pad_id = eos_ids[0]
  backend = hf_tokenizer.backend_tokenizer.to_str()
  content = f"{backend}\0{hf_tokenizer.chat_template}"
  steering = controls(hf_tokenizer, eos_ids)
  return ChatTokenizer(
    hf_tokenizer=hf_tokenizer,
    eos_ids=eos_ids,
    pad_id=pad_id,
    digest=hashlib.sha256(content.encode()).hexdigest(),
    controls=steering,
    plain=_plain(hf_tokenizer, backend, steering),
    vocab_size=vocab_size,
  )


def controls(
  hf_tokenizer: transformers.PreTrainedTokenizerFast, eos_ids: Sequence[int]
) -> tuple[str, ...]:
  """Texts of control tokens: special tokens, and markers of turns, tools and thinking.

  Other added tokens (runs of spaces, HTML elements, words of a domain) are plain text.
  """
  template = str(hf_tokenizer.chat_template)
  texts = {
    token.content
    for index, token in hf_tokenizer.added_tokens_decoder.items()
    if token.special
    or index in eos_ids
    or _MARKER.fullmatch(token.content)
    # Every template contains spaces and letters.
    or (re.match(r"\W", token.content.strip()) and token.content.strip() in template)
  }
  return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def _plain(
  hf_tokenizer: transformers.PreTrainedTokenizerFast,
  backend: str,
  controls: Sequence[str],
) -> tokenizers.Tokenizer | None:
  """The tokenizer with all controls marked special, so that it can split them."""
  added = hf_tokenizer.added_tokens_decoder.values()
  if all(token.special for token in added if token.content in controls):
    return None
  import tokenizers

  fields = json.loads(backend)
  for token in fields["added_tokens"]:
    token["special"] = token["special"] or token["content"] in controls
  plain = tokenizers.Tokenizer.from_str(json.dumps(fields))
  plain.encode_special_tokens = True
  return plain


def encode(tokenizer: ChatTokenizer, text: str) -> list[int]:
  """Ids of plain text, without added tokens; control tokens' text stays text."""
  return _checked(tokenizer, _split(tokenizer, text, add_special_tokens=False))


def document_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
  """Ids of a text outside a chat, with the tokens (BOS) that the tokenizer adds."""
  return _checked(tokenizer, _split(tokenizer, text, add_special_tokens=True))


def raw_ids(
  tokenizer: ChatTokenizer, text: str, *, add_special_tokens: bool
) -> list[int]:
  """Ids of a text in which the text of a control token means the token."""
  ids = tokenizer.hf_tokenizer(
    text,
    add_special_tokens=add_special_tokens,
    split_special_tokens=False,
    verbose=False,
  )["input_ids"]
  return _checked(tokenizer, ids)


def _split(
  tokenizer: ChatTokenizer, text: str, *, add_special_tokens: bool
) -> list[int]:
  if tokenizer.plain is not None:
    return tokenizer.plain.encode(text, add_special_tokens=add_special_tokens).ids
  return tokenizer.hf_tokenizer(
    text,
    add_special_tokens=add_special_tokens,
    split_special_tokens=True,
    verbose=False,
  )["input_ids"]


def _checked(tokenizer: ChatTokenizer, ids: list[int]) -> list[int]:
  """The ids, after checking that the model's embedding has rows for them.

  Raises:
    UserError: a token was added to the tokenizer and not to the model.
  """
  if tokenizer.vocab_size is None or max(ids, default=0) < tokenizer.vocab_size:
    return ids
  token = tokenizer.hf_tokenizer.convert_ids_to_tokens(max(ids))
  raise errors.UserError(
    f"a text needs the token {token!r}, whose id {max(ids)} is beyond the model's "
    f"vocab_size {tokenizer.vocab_size}: it was added to the tokenizer, not to the "
    "model; fetch both from the same model, resize the model's embeddings where it was "
    "made, or take the token out of the chat template and the texts"
  )


def decode(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
  """Text of ids, without control tokens."""
  return str(
    tokenizer.hf_tokenizer.decode(
      list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
  )


def prompt_ids(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message]
) -> list[int]:
  """The chat template's ids up to and including the assistant's header.

  Equal to transformers' `apply_chat_template`, unless a message spells a control token
  (the spelling is encoded on its own, as text) or the template writes today's date (it
  is always the same date here).

  Raises:
    UserError: the template refuses the messages (their roles or order).
  """
  hidden, mark = _hidden(tokenizer, messages)
  return rendered_ids(tokenizer, _render(tokenizer, hidden, prompt=True), mark)


def turn_ids(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message], answer: str
) -> tuple[list[int], list[int]]:
  """Ids of the prompt, and of the answer up to its end token, for training.

  Together they are the chat template's ids of the finished conversation, with the text
  that it writes around the answer and the spaces that it trims. There are two
  exceptions: an empty thinking part that only the prompt has stays, and no token spans
  the end of the prompt, because the model continues from the prompt's own ids.

  Raises:
    UserError: the template refuses the messages, its prompt is not a prefix of the
      finished conversation, or it drops a part of the answer.
  """
  return learned_ids(tokenizer, render_turn(tokenizer, messages, answer))


def learned_ids(tokenizer: ChatTokenizer, turn: Turn) -> tuple[list[int], list[int]]:
  """The ids of a turn's prompt and of its answer up to the end token."""
  prompt = rendered_ids(tokenizer, turn.prompt, turn.mark)
  finished = rendered_ids(tokenizer, turn.prompt + turn.answer, turn.mark)
  learned = finished[len(prompt) :]
  if finished[: len(prompt)] != prompt:
    learned = rendered_ids(tokenizer, turn.answer, turn.mark)
    decode_raw = tokenizer.hf_tokenizer.decode
    if decode_raw(prompt + learned) != decode_raw(finished):
      answer = spelled_out(tokenizer, turn.answer, turn.mark)
      raise errors.UserError(
        f"the model's tokenizer joins the end of the prompt {turn.prompt[-40:]!r} and "
        f"the answer {answer[:40]!r} into one token; choose another template by "
        "model.chat_template"
      )
  if learned[-1:] != [tokenizer.eos_ids[0]]:
    learned = [*learned, tokenizer.eos_ids[0]]  # the template writes no end token
  return prompt, learned


def render_turn(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message], answer: str
) -> Turn:
  """The template's text of the messages and the answer to them.

  Raises:
    UserError: as `turn_ids`.
  """
  turns = [*messages, records.Message("assistant", answer)]
  hidden, mark = _hidden(tokenizer, turns)
  prompt = _render(tokenizer, hidden[:-1], prompt=True)
  finished = _render(tokenizer, hidden, prompt=False)
  rest = chat_template.continuation(prompt, finished)
  core = hidden[-1].content.strip()
  if rest is None or core not in rest:
    _refuse_template(tokenizer, prompt, finished, mark, answer_is_cut=rest is not None)
  assert rest is not None
  end = str(
    tokenizer.hf_tokenizer.decode([tokenizer.eos_ids[0]], skip_special_tokens=False)
  )
  cut = rest.find(end, rest.find(core) + len(core))
  if cut < 0:  # as with `{{ content }}` alone: what follows belongs to the next turn
    return Turn(prompt, rest[: rest.rfind(core) + len(core)], mark)
  return Turn(prompt, rest[: cut + len(end)], mark)


def _refuse_template(
  tokenizer: ChatTokenizer,
  prompt: str,
  finished: str,
  mark: str,
  *,
  answer_is_cut: bool,
) -> None:
  """Raises UserError, with the place where prompt and finished turn part."""
  same = sum(
    1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(prompt, finished))
  )
  start = max(0, same - 40)
  fault = (
    "leaves out a part of the answer"
    if answer_is_cut
    else "writes another text before a finished answer than before one to come"
  )
  raise errors.UserError(
    f"the model's chat template {fault}: its prompt ends in "
    f"{spelled_out(tokenizer, prompt[start:], mark)[-200:]!r}, and with the answer it "
    f"reads {spelled_out(tokenizer, finished[start:], mark)[:200]!r} there; choose "
    "another template by model.chat_template"
  )


def _hidden(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message]
) -> tuple[list[records.Message], str]:
  """Messages with marks in place of spelled control tokens, and the mark."""
  controls = tokenizer.controls
  if not any(c in m.content for m in messages for c in controls):
    return list(messages), ""
  mark = _unused_mark([m.content for m in messages])
  spelled = re.compile("|".join(map(re.escape, controls)))

  def hide(content: str) -> str:
    return spelled.sub(lambda x: f"{mark}{controls.index(x[0])};", content)

  return [m._replace(content=hide(m.content)) for m in messages], mark


def rendered_ids(tokenizer: ChatTokenizer, rendered: str, mark: str) -> list[int]:
  """Ids of a rendered text; hidden control tokens are encoded as text."""
  if not mark:
    return raw_ids(tokenizer, rendered, add_special_tokens=False)
  ids: list[int] = []
  for number, piece in enumerate(re.split(f"{re.escape(mark)}(\\d+);", rendered)):
    if number % 2:
      ids.extend(encode(tokenizer, tokenizer.controls[int(piece)]))
    else:
      ids.extend(raw_ids(tokenizer, piece, add_special_tokens=False))
  return ids


def spelled_out(tokenizer: ChatTokenizer, rendered: str, mark: str) -> str:
  """A rendered text with the hidden control tokens spelled out again."""
  if not mark:
    return rendered
  return re.sub(
    f"{re.escape(mark)}(\\d+);", lambda x: tokenizer.controls[int(x[1])], rendered
  )


def _render(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message], *, prompt: bool
) -> str:
  turns = [message._asdict() for message in messages]
  return chat_template.render(tokenizer.hf_tokenizer, turns, prompt=prompt)


def _unused_mark(contents: Sequence[str]) -> str:
  """A string of private-use characters that no content contains."""
  mark = "\ue000"
  while any(mark in content for content in contents):
    mark += "\ue000"
  return mark + "\ue001"


def answer_ids(tokenizer: ChatTokenizer, answer: str) -> list[int]:
  """Ids of an answer after a question, with its end token."""
  return turn_ids(tokenizer, records.user_turn("?"), answer)[1]
