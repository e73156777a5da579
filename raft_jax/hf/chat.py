"""Text to token ids and back: chat template, teacher context, control-token safety.

Content never becomes control tokens: an instruction or an answer that spells
"<|im_end|>" is encoded as those characters, so data cannot end a turn or open one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raft_jax import errors
from raft_jax.hf import tokenizer as hf_tokenizer

if TYPE_CHECKING:
  import transformers

  from raft_jax.storage import records


@dataclasses.dataclass(frozen=True)
class Codec:
  """A tokenizer and what the rest of the package needs to know about it.

  Attributes:
    tokenizer: a fast tokenizer with a chat template.
    eos_ids: ids that end an answer; the first ends an assistant's turn.
    pad_id: fills rows. It may equal an end id: masks come from lengths, never from it.
    digest: sha256 of tokenizer and chat template; equal digests, equal ids.
    controls: texts of the control tokens, longest first.
  """

  tokenizer: transformers.PreTrainedTokenizerFast
  eos_ids: tuple[int, ...]
  pad_id: int
  digest: str
  controls: tuple[str, ...]


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


_NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}\n"
"""Before a template that writes today's date (Llama 3.2, SmolLM3): the day that Llama's
writes where it has no clock. With a clock a run's ids would change at midnight, and
differ between hosts."""


def load(source: str) -> Codec:
  """The codec of a model, from the same source as its weights.

  Raises:
    UserError: the tokenizer has no chat template or no end token.
  """
  tokenizer = hf_tokenizer.load(source)
  if not isinstance(tokenizer.chat_template, str):
    raise errors.UserError(
      f"model {source}: the tokenizer has no chat template; use an instruction-tuned "
      "model, or add chat_template to tokenizer_config.json"
    )
  eos_ids = hf_tokenizer.eos_ids(source, tokenizer)
  if not eos_ids:
    raise errors.UserError(
      f"model {source}: no token ends an answer; set eos_token in tokenizer_config.json"
    )
  pad_id = tokenizer.pad_token_id
  content = tokenizer.backend_tokenizer.to_str() + "\0" + tokenizer.chat_template
  special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
  return Codec(
    tokenizer=tokenizer,
    eos_ids=eos_ids,
    pad_id=eos_ids[0] if pad_id is None else pad_id,
    digest=hashlib.sha256(content.encode()).hexdigest(),
    controls=tuple(sorted(special, key=lambda text: (-len(text), text))),
  )


def encode(codec: Codec, text: str) -> list[int]:
  """Ids of plain text: nothing is added, and control tokens' text stays text."""
  return codec.tokenizer(
    text, add_special_tokens=False, split_special_tokens=True, verbose=False
  )["input_ids"]


def document_ids(codec: Codec, text: str) -> list[int]:
  """Ids of a text without a chat: with the tokens (BOS) that the tokenizer adds."""
  return codec.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]


def decode(codec: Codec, ids: Sequence[int]) -> str:
  """Text of ids, without control tokens."""
  return str(
    codec.tokenizer.decode(
      list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
  )


def prompt_ids(codec: Codec, messages: Sequence[records.Message]) -> list[int]:
  """The chat template's ids up to and including the assistant's header.

  Equal to transformers' `apply_chat_template` unless a message spells a control token
  or the template writes today's date. Each such spelling is encoded on its own, as
  text, and the rest as ever; the date is always the same one.

  Raises:
    UserError: the template refuses the messages (their roles or order).
  """
  controls = codec.controls
  if not any(c in m.content for m in messages for c in controls):
    return _encode_rendered(codec, _render(codec, messages))
  mark = _unused_mark([m.content for m in messages])
  spelled = re.compile("|".join(map(re.escape, controls)))
  marked = [
    m._replace(
      content=spelled.sub(lambda x: f"{mark}{controls.index(x[0])};", m.content)
    )
    for m in messages
  ]
  pieces = re.split(f"{re.escape(mark)}(\\d+);", _render(codec, marked))
  ids: list[int] = []
  for number, piece in enumerate(pieces):
    if number % 2:
      ids.extend(encode(codec, controls[int(piece)]))
    else:
      ids.extend(_encode_rendered(codec, piece))
  return ids


def _encode_rendered(codec: Codec, text: str) -> list[int]:
  return codec.tokenizer(
    text, add_special_tokens=False, split_special_tokens=False, verbose=False
  )["input_ids"]


def _render(codec: Codec, messages: Sequence[records.Message]) -> str:
  options: dict[str, Any] = {}
  # Answers are trained without a thinking part (the switch of Qwen3 and SmolLM3).
  if "enable_thinking" in codec.tokenizer.chat_template:
    options["enable_thinking"] = False
  if "strftime_now" in codec.tokenizer.chat_template:
    options["chat_template"] = _NO_CLOCK + codec.tokenizer.chat_template
  try:
    text = codec.tokenizer.apply_chat_template(
      [m._asdict() for m in messages],
      tokenize=False,
      add_generation_prompt=True,
      **options,
    )
  except Exception as error:  # the template's own, of any kind
    roles = ", ".join(m.role for m in messages)
    raise errors.UserError(
      f"the model's chat template refuses messages of roles {roles} ({error}); change "
      "the messages or the model"
    ) from error
  return str(text)


def _unused_mark(contents: Sequence[str]) -> str:
  """A private-use string that no content holds."""
  mark = "\ue000"
  while any(mark in content for content in contents):
    mark += "\ue000"
  return mark + "\ue001"


def answer_ids(codec: Codec, answer: str) -> list[int]:
  """Ids of an answer and the id that ends the assistant's turn."""
  return [*encode(codec, answer), codec.eos_ids[0]]


def teacher_ids(
  codec: Codec, messages: Sequence[records.Message], answer: str, form: str
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
  *earlier, question = messages
  if form == "none":
    return prompt_ids(codec, messages)
  if form == "chat":
    content = KNOWLEDGE + answer + INSTRUCTION + question.content + ANSWER
    return prompt_ids(codec, [*earlier, question._replace(content=content)])
  if form == "example":
    content = question.content + EXAMPLE + answer + OWN_WORDS
    return prompt_ids(codec, [*earlier, question._replace(content=content)])
  if form == "sibling":
    content = question.content + SOLUTION + answer + SOLVE_AGAIN
    return prompt_ids(codec, [*earlier, question._replace(content=content)])
  if form == "paper":
    asked = "\n".join(m.content for m in messages)
    pieces = (KNOWLEDGE, answer, INSTRUCTION, asked, ANSWER)
    return [i for piece in pieces for i in encode(codec, piece)]
  raise ValueError(f"teacher form {form!r} is not one of {', '.join(FORMS)}")


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
