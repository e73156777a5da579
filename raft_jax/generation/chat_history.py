"""A conversation with one model or several, whose answers come token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Literal, NamedTuple

from raft_jax import errors
from raft_jax.generation import thinking
from raft_jax.hf import chat
from raft_jax.models import streaming
from raft_jax.storage import records


@dataclasses.dataclass
class Speaker:
  """A model in a conversation, with what was said to it and by it.

  Attributes:
    title: its name for the reader.
    messages: the finished turns, as it reads them.
    memory: what it need not read again.
  """

  title: str
  network: streaming.Network
  tokenizer: chat.ChatTokenizer
  messages: list[records.Message] = dataclasses.field(default_factory=list)
  memory: streaming.Memory = dataclasses.field(default_factory=streaming.Memory)


class Sampling(NamedTuple):
  """How answers are sampled; temperature 0 is greedy."""

  max_new_tokens: int
  temperature: float
  top_p: float
  seed: int


class Reply(NamedTuple):
  """An answer as far as it has come.

  Attributes:
    text: without a character of which some bytes are still missing.
    tokens: number of tokens, the end token included.
    end: `stop` at an end token, `length` at the limit, `""` before.
  """

  text: str = ""
  tokens: int = 0
  end: Literal["", "stop", "length"] = ""


def reset(speaker: Speaker) -> None:
  """Begins a new conversation."""
  speaker.messages = []


def prompt_ids(speaker: Speaker, question: str) -> list[int]:
  """Ids of the conversation with a further question.

  Raises:
    UserError: the model has no room for it and an answer, or its chat template refuses
      it.
  """
  turns = [*speaker.messages, records.Message("user", question)]
  ids = chat.prompt_ids(speaker.tokenizer, turns)
  limit = speaker.network.config.max_positions
  if len(ids) >= limit:
    before = " with the turns before it" if speaker.messages else ""
    remedy = " or begin anew with /reset" if speaker.messages else ""
    raise errors.UserError(
      f"the question{before} takes {len(ids)} tokens, and the model ({speaker.title}) "
      f"has room for {limit}; ask a shorter one{remedy}"
    )
  return ids


def answer(
  speaker: Speaker, question: str, ids: Sequence[int], sampling: Sampling, number: int
) -> Generator[Reply]:
  """Yields the answer after each step of the model: a part of the prompt, or a token.

  When it ends, or the caller closes it, question and answer become turns of the
  conversation, unless the answer is empty.

  Args:
    ids: from `prompt_ids`.
    number: of the question; a repeated question is sampled anew.
  """
  tokenizer = speaker.tokenizer
  room = speaker.network.config.max_positions - len(ids)
  drawing = streaming.Drawing(
    max_new_tokens=min(sampling.max_new_tokens, room),
    temperature=sampling.temperature,
    top_p=sampling.top_p,
    eos_ids=tokenizer.eos_ids,
    seed=sampling.seed,
    step=number,
  )
  drawn: list[int] = []
  reply = Reply()
  try:
    for token in streaming.stream(speaker.network, speaker.memory, ids, drawing):
      if token is not None:
        drawn.append(token)
        reply = _reply(tokenizer, drawn, drawing.max_new_tokens)
      yield reply
  finally:
    _keep(speaker, question, reply.text)


def _reply(
  tokenizer: chat.ChatTokenizer, drawn: Sequence[int], max_new_tokens: int
) -> Reply:
  if drawn[-1] in tokenizer.eos_ids:
    return Reply(thinking.decode(tokenizer, drawn[:-1]), len(drawn), "stop")
  text = thinking.decode(tokenizer, drawn)
  if len(drawn) == max_new_tokens:
    return Reply(text, len(drawn), "length")
  return Reply(text.rstrip("\ufffd"), len(drawn))


def _keep(speaker: Speaker, question: str, text: str) -> None:
  """Adds a question and its answer, without thinking, to the conversation."""
  marks = thinking.own(speaker.tokenizer.hf_tokenizer.chat_template)
  said = thinking.answer(text, marks)
  said = text if said == text else said.strip()
  if said.strip():
    speaker.messages += [
      records.Message("user", question),
      records.Message("assistant", said),
    ]


def together(answers: Sequence[Iterator[Reply]]) -> Iterator[list[Reply]]:
  """Advances several answers in turn, a step at a time; yields all of them each time.

  The caller closes the answers.
  """
  latest = [Reply() for _ in answers]
  unfinished = dict(enumerate(answers))
  while unfinished:
    for place, steps in list(unfinished.items()):
      reply = next(steps, None)
      if reply is None:
        del unfinished[place]
      else:
        latest[place] = reply
        yield latest
