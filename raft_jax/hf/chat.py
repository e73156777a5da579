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
from raft_jax.hf import answer_span, chat_template, conversation
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
  whole = _fitted(tokenizer, conversation.of(messages, tokenizer.controls))
  return rendered_ids(tokenizer, _render(tokenizer, whole, prompt=True), whole.mark)


def turn_ids(
  tokenizer: ChatTokenizer,
  messages: Sequence[records.Message],
  answer: str | records.Message,
) -> tuple[list[int], list[int]]:
  """Ids of the prompt, and of the answer up to its end token, for training.

  Together they are the chat template's ids of the finished conversation, with the text
  that it writes around the answer and the spaces that it trims. There are two
  exceptions: an empty thinking part that only the prompt has stays, and no token spans
  the end of the prompt, because the model continues from the prompt's own ids.

  Text after the end token is not learned, even where the template marks it as the
  assistant's (the line end of ChatML): generation stops at the end token.

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
  if not learned or learned[-1] not in tokenizer.eos_ids:
    learned = [*learned, tokenizer.eos_ids[0]]  # the template writes no end token
  return prompt, learned


def render_turn(
  tokenizer: ChatTokenizer,
  messages: Sequence[records.Message],
  answer: str | records.Message,
) -> Turn:
  """The template's text of the messages and the answer to them.

  Where the template marks the assistant's texts (`{% generation %}`), the answer is
  what it marks, from the end of the prompt on. See `answer_span.own`.

  Args:
    answer: a text, or an assistant's turn. Its reasoning is left out unless the
      tokenizer's `thinking` is on.

  Raises:
    UserError: as `turn_ids`.
  """
  reply = as_reply(answer)
  if not tokenizer.thinking:
    reply = reply._replace(reasoning_content="")
  hidden = conversation.of([*messages, reply], tokenizer.controls, learned=True)
  whole = _fitted(tokenizer, hidden)
  prompt = _render(tokenizer, whole._replace(turns=whole.turns[:-1]), prompt=True)
  written, finished, rest = _finish(tokenizer, whole, prompt)
  ends = tokenizer.eos_ids[: None if reply.tool_calls else 1]
  texts = [
    str(tokenizer.hf_tokenizer.decode([i], skip_special_tokens=False)) for i in ends
  ]
  cut = answer_span.turn_end(rest, whole.turns[-1], texts)
  answered = Turn(prompt, rest[:cut], whole.mark)
  spans = chat_template.marked(
    tokenizer.hf_tokenizer,
    written.turns,
    tools=written.tools,
    thinking=tokenizer.thinking,
  )
  if spans is None:
    return answered
  before = len(finished) - len(rest)
  shifted = [(first - before, last - before) for first, last in spans]
  gap = answer_span.own_start(answered.answer, shifted)
  return Turn(prompt + rest[:gap], answered.answer[gap:], whole.mark)


def _finish(
  tokenizer: ChatTokenizer, whole: conversation.Conversation, prompt: str
) -> tuple[conversation.Conversation, str, str]:
  """The conversation in a form of which the template writes the whole answer, its text,
  and what of the text follows the prompt.

  Raises:
    UserError: there is none.
  """
  *earlier, last = whole.turns
  fault: errors.UserError | None = None
  for form in answer_span.forms(last, str(tokenizer.hf_tokenizer.chat_template)):
    written = whole._replace(turns=[*earlier, form])
    finished = _render(tokenizer, written, prompt=False)
    rest = chat_template.continuation(prompt, finished)
    if rest is not None and answer_span.content_end(rest, last) is not None:
      return written, finished, rest
    part = None if rest is None else "a part of the answer"
    if "reasoning_content" in last:
      part = "the answer's reasoning (data.thinking is keep)"
    error = _refused_template(tokenizer, prompt, finished, whole.mark, left_out=part)
    fault = fault or error
  assert fault is not None
  raise fault


def as_reply(answer: str | records.Message) -> records.Message:
  """An answer as the assistant's turn."""
  if isinstance(answer, records.Message):
    return answer
  return records.Message("assistant", answer)


def _refused_template(
  tokenizer: ChatTokenizer,
  prompt: str,
  finished: str,
  mark: str,
  *,
  left_out: str | None,
) -> errors.UserError:
  """The error with the place where prompt and finished turn part."""
  same = sum(
    1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(prompt, finished))
  )
  start = max(0, same - 40)
  fault = (
    f"leaves out {left_out}"
    if left_out
    else "writes another text before a finished answer than before one to come"
  )
  if tokenizer.thinking and not left_out:
    fault += " (the answer has no reasoning, and data.thinking is keep)"
  return errors.UserError(
    f"the model's chat template {fault}: its prompt ends in "
    f"{spelled_out(tokenizer, prompt[start:], mark)[-200:]!r}, and with the answer it "
    f"reads {spelled_out(tokenizer, finished[start:], mark)[:200]!r} there; choose "
    "another template by model.chat_template"
  )


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


def _fitted(
  tokenizer: ChatTokenizer, hidden: conversation.Conversation
) -> conversation.Conversation:
  return conversation.fitted(
    tokenizer.hf_tokenizer, hidden, thinking=tokenizer.thinking
  )


def _render(
  tokenizer: ChatTokenizer, fitted: conversation.Conversation, *, prompt: bool
) -> str:
  return chat_template.render(
    tokenizer.hf_tokenizer,
    fitted.turns,
    tools=fitted.tools,
    prompt=prompt,
    thinking=tokenizer.thinking,
  )


def answer_ids(tokenizer: ChatTokenizer, answer: str) -> list[int]:
  """Ids of an answer after a question, with its end token."""
  if tokenizer.thinking:  # some templates then want thinking in an answer
    return [*encode(tokenizer, answer), tokenizer.eos_ids[0]]
  return turn_ids(tokenizer, records.user_turn("?"), answer)[1]
