"""Chats to token ids and back, through the model's chat template.

Content never becomes control tokens: a question or an answer that spells "<|im_end|>"
is encoded as those characters, so that data cannot end or open a turn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raft_jax import errors
from raft_jax.hf import chat_template, conversation
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
    thinking: whether the template is rendered with thinking on, and the reasoning of
      answers is learned.
  """

  hf_tokenizer: transformers.PreTrainedTokenizerFast
  eos_ids: tuple[int, ...]
  pad_id: int
  digest: str
  controls: tuple[str, ...]
  plain: tokenizers.Tokenizer | None = None
  vocab_size: int | None = None
  thinking: bool = False


_WORDS = r"think|thought|reason|tool|function|inst|turn|role|system|user|assistant"
_MARKER = re.compile(rf"<[|｜].*[|｜]>|[<\[]\S*({_WORDS})\S*[>\]]", re.IGNORECASE)
"""Spelling of added tokens that mark thinking, tools or turns."""


def load(
  source: str, template: str | None = None, *, thinking: bool = False
) -> ChatTokenizer:
  """The tokenizer of a model, from the same source as its weights.

  Args:
    template: as the config key `model.chat_template`.
    thinking: whether `data.thinking` is `keep`.

  Raises:
    UserError: the tokenizer has no chat template or no end token.
  """
  hf_tokenizer = tokenizer_lib.load(source, template, thinking=thinking)
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
  vocab_size = tokenizer_lib.vocab_size(source)
  return of(hf_tokenizer, eos_ids, vocab_size, thinking=thinking)


def of(
  hf_tokenizer: transformers.PreTrainedTokenizerFast,
  eos_ids: tuple[int, ...],
  vocab_size: int | None = None,
  *,
  thinking: bool = False,
) -> ChatTokenizer:
  """Wraps a tokenizer; its chat template must be the one to use."""
  pad_id = hf_tokenizer.pad_token_id
  if pad_id is None or (vocab_size is not None and pad_id >= vocab_size):
    pad_id = eos_ids[0]
  backend = hf_tokenizer.backend_tokenizer.to_str()
  content = f"{backend}\0{hf_tokenizer.chat_template}"
  if thinking:
    content += "\0thinking"
  steering = controls(hf_tokenizer, eos_ids)
  return ChatTokenizer(
    hf_tokenizer=hf_tokenizer,
    eos_ids=eos_ids,
    pad_id=pad_id,
    digest=hashlib.sha256(content.encode()).hexdigest(),
    controls=steering,
    plain=_plain(hf_tokenizer, backend, steering),
    vocab_size=vocab_size,
    thinking=thinking,
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
  whole = for_template(tokenizer, messages)
  return rendered_ids(tokenizer, render(tokenizer, whole, prompt=True), whole.mark)


def rendered_ids(tokenizer: ChatTokenizer, rendered: str, mark: str) -> list[int]:
  """Ids of a rendered text; hidden control tokens are encoded as text."""
  if not mark:
    return raw_ids(tokenizer, rendered, add_special_tokens=False)
  ids: list[int] = []
  for number, piece in enumerate(conversation.hidden(mark).split(rendered)):
    if number % 2:
      ids.extend(encode(tokenizer, tokenizer.controls[int(piece)]))
    else:
      ids.extend(raw_ids(tokenizer, piece, add_special_tokens=False))
  return ids


def spelled_out(tokenizer: ChatTokenizer, rendered: str, mark: str) -> str:
  """A rendered text with the hidden control tokens spelled out again."""
  if not mark:
    return rendered
  return conversation.hidden(mark).sub(
    lambda found: tokenizer.controls[int(found[1])], rendered
  )


def for_template(
  tokenizer: ChatTokenizer,
  messages: Sequence[records.Message],
  *,
  learned: bool = False,
) -> conversation.Conversation:
  """What the chat template is given; arguments and errors as for `conversation`."""
  hidden = conversation.of(messages, tokenizer.controls, learned=learned)
  return conversation.fitted(
    tokenizer.hf_tokenizer, hidden, thinking=tokenizer.thinking
  )


def render(
  tokenizer: ChatTokenizer, whole: conversation.Conversation, *, prompt: bool
) -> str:
  """The text that the chat template writes of what `for_template` gives it."""
  return chat_template.render(
    tokenizer.hf_tokenizer,
    whole.turns,
    tools=whole.tools,
    prompt=prompt,
    thinking=tokenizer.thinking,
  )
