"""Conversations with their answers, as a chat template writes them: text and ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from raft_jax import errors
from raft_jax.hf import answer_span, chat, chat_template, conversation
from raft_jax.storage import records


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


def ids(
  tokenizer: chat.ChatTokenizer,
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
  return learned_ids(tokenizer, render(tokenizer, messages, answer))


def learned_ids(
  tokenizer: chat.ChatTokenizer, turn: Turn
) -> tuple[list[int], list[int]]:
  """The ids of a turn's prompt and of its answer up to the end token."""
  prompt = chat.rendered_ids(tokenizer, turn.prompt, turn.mark)
  finished = chat.rendered_ids(tokenizer, turn.prompt + turn.answer, turn.mark)
  learned = finished[len(prompt) :]
  if finished[: len(prompt)] != prompt:
    learned = chat.rendered_ids(tokenizer, turn.answer, turn.mark)
    decode_raw = tokenizer.hf_tokenizer.decode
    if decode_raw(prompt + learned) != decode_raw(finished):
      answer = chat.spelled_out(tokenizer, turn.answer, turn.mark)
      raise errors.UserError(
        f"the model's tokenizer joins the end of the prompt {turn.prompt[-40:]!r} and "
        f"the answer {answer[:40]!r} into one token; choose another template by "
        "model.chat_template"
      )
  if not learned or learned[-1] not in tokenizer.eos_ids:
    learned = [*learned, tokenizer.eos_ids[0]]  # the template writes no end token
  return prompt, learned


def render(
  tokenizer: chat.ChatTokenizer,
  messages: Sequence[records.Message],
  answer: str | records.Message,
) -> Turn:
  """The template's text of the messages and the answer to them.

  Where the template marks the assistant's texts (`{% generation %}`), the answer is
  what it marks, from the end of the prompt on. See `answer_span.own_start`.

  Args:
    answer: a text, or an assistant's turn. Its reasoning is left out unless the
      tokenizer's `thinking` is on.

  Raises:
    UserError: as `ids`.
  """
  reply = records.as_reply(answer)
  if not tokenizer.thinking:
    reply = reply._replace(reasoning_content="")
  whole = chat.for_template(tokenizer, [*messages, reply], learned=True)
  prompt = chat.render(tokenizer, whole._replace(turns=whole.turns[:-1]), prompt=True)
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
  tokenizer: chat.ChatTokenizer, whole: conversation.Conversation, prompt: str
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
    finished = chat.render(tokenizer, written, prompt=False)
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


def _refused_template(
  tokenizer: chat.ChatTokenizer,
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
  before = chat.spelled_out(tokenizer, prompt[start:], mark)
  there = chat.spelled_out(tokenizer, finished[start:], mark)
  if tokenizer.thinking and not left_out:
    fault += " (the answer has no reasoning, and data.thinking is keep)"
  return errors.UserError(
    f"the model's chat template {fault}: its prompt ends in {before[-200:]!r}, and "
    f"with the answer it reads {there[:200]!r} there; choose another template by "
    "model.chat_template"
  )


def answer_ids(tokenizer: chat.ChatTokenizer, answer: str) -> list[int]:
  """Ids of an answer after a question, with its end token."""
  if tokenizer.thinking:  # some templates then want thinking in an answer
    return [*chat.encode(tokenizer, answer), tokenizer.eos_ids[0]]
  return ids(tokenizer, records.user_turn("?"), answer)[1]
