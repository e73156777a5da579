"""Text to token ids and back: chat template, teacher context, control-token safety.

Content never becomes control tokens: an instruction or an answer that spells
"<|im_end|>" is encoded as those characters, so data cannot end a turn or open one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raft_jax import errors
from raft_jax.hf import chat_template
from raft_jax.hf import tokenizer as tokenizer_lib
from raft_jax.storage import records

if TYPE_CHECKING:
  import tokenizers
  import transformers


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
  """A tokenizer and what the rest of the package needs to know about it.

  Attributes:
    hf_tokenizer: a fast tokenizer with a chat template.
    eos_ids: ids that end an answer; the first ends an assistant's turn.
    pad_id: fills rows. It may equal an end id: masks come from lengths, never from it.
    digest: sha256 of tokenizer and chat template; equal digests, equal ids.
    controls: texts of the control tokens, longest first.
    plain: the tokenizer to which every control token's text is text; None where
      `tokenizer` can be told so.
    vocab_size: of the model, whose ids are below it; None for all.
  """

  hf_tokenizer: transformers.PreTrainedTokenizerFast
  eos_ids: tuple[int, ...]
  pad_id: int
  digest: str
  controls: tuple[str, ...]
  plain: tokenizers.Tokenizer | None = None
  vocab_size: int | None = None


FORMS = ("paper", "chat", "example", "sibling", "none")

KNOWLEDGE = "Background reference knowledge:"
INSTRUCTION = "\nAnswer the question based on the reference knowledge:\n"
ANSWER = "\nAnswer:"
"""The teacher's words, RAFT (arXiv 2606.00147) Eq. 7 and App. H."""


EXAMPLE = "\n\nThis is an example for a response to the question:\n"
OWN_WORDS = (
  "\n\nNow answer with a response of your own, including the thinking process."
)
"""The teacher's words in self-distillation for continual learning, arXiv 2601.19897;
the first line as published, the second in its sense."""


SOLUTION = "\n\nThis is a correct solution:\n"
SOLVE_AGAIN = "\n\nNow solve the original question correctly."
"""The teacher's words in SDPO, arXiv 2601.20802, in the sense of those published."""


_WORDS = r"think|thought|reason|tool|function|inst|turn|role|system|user|assistant"
_MARKER = re.compile(rf"<[|｜].*[|｜]>|[<\[]\S*({_WORDS})\S*[>\]]", re.IGNORECASE)
"""How added tokens are spelled that mark thinking, tools or turns."""


def load(source: str, template: str | None = None) -> ChatTokenizer:
  """The tokenizer of a model, from the same source as its weights.

  Args:
    template: which chat template, as `model.chat_template`.

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
  """Wraps a tokenizer whose chat template is the one to use."""
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
  """Added tokens that steer: special ones, and those of templates, tools and thinking.

  Others (runs of spaces, HTML's elements, words of a domain) are ordinary text.
  """
  template = str(hf_tokenizer.chat_template)
  found = {
    token.content
    for index, token in hf_tokenizer.added_tokens_decoder.items()
    if token.special
    or index in eos_ids
    or _MARKER.fullmatch(token.content)
    # Spaces and letters are in every template.
    or (re.match(r"\W", token.content.strip()) and token.content.strip() in template)
  }
  return tuple(sorted(found, key=lambda text: (-len(text), text)))


def _plain(
  hf_tokenizer: transformers.PreTrainedTokenizerFast,
  backend: str,
  controls: Sequence[str],
) -> tokenizers.Tokenizer | None:
  """The tokenizer with all controls marked special, so that they can be split."""
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
  """Ids of plain text: nothing is added, and control tokens' text stays text."""
  return _checked(tokenizer, _split(tokenizer, text, add_special_tokens=False))


def document_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
  """Ids of a text without a chat: with the tokens (BOS) that the tokenizer adds."""
  return _checked(tokenizer, _split(tokenizer, text, add_special_tokens=True))


def raw_ids(
  tokenizer: ChatTokenizer, text: str, *, add_special_tokens: bool
) -> list[int]:
  """Ids of a text in which control tokens' text stands for the tokens themselves."""
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
  """The ids, which the model's embedding has rows for.

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

  Equal to transformers' `apply_chat_template` unless a message spells a control token
  or the template writes today's date. Each such spelling is encoded on its own, as
  text, and the rest as ever; the date is always the same one.

  Raises:
    UserError: the template refuses the messages (their roles or order).
  """
  hidden, mark = _hidden(tokenizer, messages)
  return _pieces(tokenizer, _render(tokenizer, hidden, prompt=True), mark)


def turn_ids(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message], answer: str
) -> tuple[list[int], list[int]]:
  """What is learned of a conversation: its prompt, and the answer up to its end token.

  Both together are the chat template's ids of the finished conversation, with what it
  writes before the answer, around it and in place of the spaces that it trims. Two
  exceptions: where its prompt has an empty thinking part and its finished turns have
  none, the part stays; and no token spans the prompt's end, since the model goes on
  from the prompt's own ids.

  Raises:
    UserError: the template refuses the messages; its prompt is no part of the finished
      conversation; or it drops a part of the answer.
  """
  return _learned(tokenizer, *_turn(tokenizer, messages, answer))


def _learned(
  tokenizer: ChatTokenizer, asked: str, said: str, mark: str
) -> tuple[list[int], list[int]]:
  prompt = _pieces(tokenizer, asked, mark)
  whole = _pieces(tokenizer, asked + said, mark)
  learned = whole[len(prompt) :]
  if whole[: len(prompt)] != prompt:
    learned = _pieces(tokenizer, said, mark)
    if tokenizer.hf_tokenizer.decode(prompt + learned) != tokenizer.hf_tokenizer.decode(
      whole
    ):
      raise errors.UserError(
        f"the model's tokenizer joins the end of the prompt {asked[-40:]!r} and the "
        f"answer {_seen(tokenizer, said, mark)[:40]!r} into one token; choose another "
        "template by model.chat_template"
      )
  if learned[-1:] != [tokenizer.eos_ids[0]]:
    learned = [*learned, tokenizer.eos_ids[0]]  # the template writes no end token
  return prompt, learned


def _turn(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message], answer: str
) -> tuple[str, str, str]:
  """The prompt, what follows it with the end token, and the mark of hidden controls."""
  turns = [*messages, records.Message("assistant", answer)]
  hidden, mark = _hidden(tokenizer, turns)
  asked = _render(tokenizer, hidden[:-1], prompt=True)
  whole = _render(tokenizer, hidden, prompt=False)
  rest = chat_template.continuation(asked, whole)
  core = hidden[-1].content.strip()
  if rest is None or core not in rest:
    same = sum(
      1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(asked, whole))
    )
    begins = max(0, same - 40)
    fault = (
      "writes another text before a finished answer than before one to come"
      if rest is None
      else "leaves out a part of the answer"
    )
    raise errors.UserError(
      f"the model's chat template {fault}: its prompt ends in "
      f"{_seen(tokenizer, asked[begins:], mark)[-200:]!r}, and with the answer it "
      f"reads {_seen(tokenizer, whole[begins:], mark)[:200]!r} there; choose another "
      "template by model.chat_template"
    )
  end = str(
    tokenizer.hf_tokenizer.decode([tokenizer.eos_ids[0]], skip_special_tokens=False)
  )
  cut = rest.find(end, rest.find(core) + len(core))
  if cut < 0:  # as with `{{ content }}` alone: what follows is the next turn's
    return asked, rest[: rest.rfind(core) + len(core)], mark
  return asked, rest[: cut + len(end)], mark


def _hidden(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message]
) -> tuple[list[records.Message], str]:
  """Messages without the control tokens that they spell, and what stands for these."""
  controls = tokenizer.controls
  if not any(c in m.content for m in messages for c in controls):
    return list(messages), ""
  mark = _unused_mark([m.content for m in messages])
  spelled = re.compile("|".join(map(re.escape, controls)))

  def hide(content: str) -> str:
    return spelled.sub(lambda x: f"{mark}{controls.index(x[0])};", content)

  return [m._replace(content=hide(m.content)) for m in messages], mark


def _pieces(tokenizer: ChatTokenizer, rendered: str, mark: str) -> list[int]:
  """Ids of a rendered text: its control tokens, and as text those that were hidden."""
  if not mark:
    return raw_ids(tokenizer, rendered, add_special_tokens=False)
  ids: list[int] = []
  for number, piece in enumerate(re.split(f"{re.escape(mark)}(\\d+);", rendered)):
    if number % 2:
      ids.extend(encode(tokenizer, tokenizer.controls[int(piece)]))
    else:
      ids.extend(raw_ids(tokenizer, piece, add_special_tokens=False))
  return ids


def _seen(tokenizer: ChatTokenizer, rendered: str, mark: str) -> str:
  """A rendered text as its reader knows it."""
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
  """A private-use string that no content holds."""
  mark = "\ue000"
  while any(mark in content for content in contents):
    mark += "\ue000"
  return mark + "\ue001"


def answer_ids(tokenizer: ChatTokenizer, answer: str) -> list[int]:
  """Ids of an answer as it is learned behind a question, with its end token."""
  return turn_ids(tokenizer, records.user_turn("?"), answer)[1]


def row_ids(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message], answer: str, form: str
) -> tuple[list[int], list[int], list[int]]:
  """Prompt, answer and teacher's context of a row, as `turn_ids` and `teacher_ids`.

  Raises:
    UserError: as `turn_ids`, of the student's prompt or the teacher's context; or the
      template writes an answer in another way behind the one than behind the other.
  """
  asked, said, mark = _turn(tokenizer, messages, answer)
  prompt, learned = _learned(tokenizer, asked, said, mark)
  if form == "none":
    return prompt, learned, prompt
  if form == "paper":  # raw text that no template writes
    return prompt, learned, teacher_ids(tokenizer, messages, answer, form)
  read, follows, its_mark = _turn(tokenizer, taught(messages, answer, form), answer)
  said, follows = _seen(tokenizer, said, mark), _seen(tokenizer, follows, its_mark)
  if follows != said:
    raise errors.UserError(
      "the model's chat template writes the answer as "
      f"{said[:200]!r} behind the question, and as {follows[:200]!r} behind what the "
      "teacher reads; choose another template by model.chat_template"
    )
  return prompt, learned, _pieces(tokenizer, read, its_mark)


def teacher_ids(
  tokenizer: ChatTokenizer, messages: Sequence[records.Message], answer: str, form: str
) -> list[int]:
  """The frozen teacher's context; the rollout's ids follow it unchanged.

  RAFT (arXiv 2606.00147) Eq. 7 and App. H.

  Args:
    messages: the conversation, ending with the user's question.
    answer: the reference answer that the teacher may read.
    form: "paper": the paper's pieces, each tokenised on its own, one after another;
      earlier messages stand above the question. "chat": the same words as the last user
      turn of the chat template. "example": the question, and the answer as an example
      of one (Shenfeld et al., arXiv 2601.19897), in the last user turn. "sibling": the
      same with the answer as a correct solution (SDPO). "none": the student's own
      prompt, without the answer.
  """
  if form == "none":
    return prompt_ids(tokenizer, messages)
  if form == "paper":
    asked = "\n".join(m.content for m in messages)
    pieces = (KNOWLEDGE, answer, INSTRUCTION, asked, ANSWER)
    return [i for piece in pieces for i in encode(tokenizer, piece)]
  return prompt_ids(tokenizer, taught(messages, answer, form))


def taught(
  messages: Sequence[records.Message], answer: str, form: str
) -> list[records.Message]:
  """The conversation that the teacher reads, in the forms that the template writes."""
  *earlier, question = messages
  contents = {
    "chat": KNOWLEDGE + answer + INSTRUCTION + question.content + ANSWER,
    "example": question.content + EXAMPLE + answer + OWN_WORDS,
    "sibling": question.content + SOLUTION + answer + SOLVE_AGAIN,
  }
  if form not in contents:
    raise ValueError(f"teacher form {form!r} is not one of {', '.join(FORMS)}")
  return [*earlier, question._replace(content=contents[form])]


def leak_phrases(form: str) -> tuple[str, ...]:
  """Lower-case phrases of the teacher's context that a rollout should not repeat."""
  if form == "none":
    return ()
  if form == "sibling":
    return ("correct solution", "the original question")
  if form == "example":
    return (
      *("this is an example", "the example response", "response of your own"),
      *("based on the example", "the thinking process"),
    )
  return (
    "the answer to this question",
    "background reference knowledge",
    "reference knowledge",
    "based on the reference",
    "answer the question based on",
  )
