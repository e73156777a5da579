"""Greedy answers of a model, from the built-in sampler or from its server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax import errors
from raft_jax.evaluation import scoring
from raft_jax.generation import engines, thinking
from raft_jax.hf import answer_turns
from raft_jax.models import sampling
from raft_jax.storage import journal, records


class Answer(NamedTuple):
  """A greedy answer.

  Attributes:
    tokens: number of tokens, the end token included.
    ended: whether the answer has an end token.
    ids: the tokens; empty if a server wrote the answer.
  """

  text: str
  tokens: int
  ended: bool
  ids: Sequence[int] = ()


def generate(
  model: scoring.EvalModel,
  prompts: Sequence[Sequence[int]],
  log: journal.Journal,
  *,
  max_new_tokens: int,
  name: str,
  messages: Sequence[tuple[records.Message, ...]] | None = None,
) -> list[Answer]:
  """The greedy answer to every prompt; thinking is left out of its text.

  Args:
    name: the kind of answers, for the progress bar and for errors.
    messages: the conversations that the prompts were made from. If they are given and
      the model has a server, the server answers. Give None if the answers' token ids
      are needed, which a server does not return.
  """
  if model.server is not None and messages is not None:
    return _generate_on_server(
      model, model.server, messages, log, max_new_tokens=max_new_tokens, name=name
    )
  tokenizer = model.tokenizer
  replies = scoring.compute_missing(
    log,
    [
      scoring.item_key(
        model,
        call="greedy",
        prompt=prompt,
        tokenizer=tokenizer.digest,
        ends=tokenizer.eos_ids,
        max_new_tokens=max_new_tokens,
      )
      for prompt in prompts
    ],
    [len(prompt) for prompt in prompts],
    lambda batch: _sample(
      model,
      [prompts[i] for i in batch],
      batch_size=min(model.settings.batch_size, len(prompts)),
      max_new_tokens=max_new_tokens,
      name=scoring.bar_title(model, name) or name,
    ),
    batch_size=model.settings.batch_size,
    title=scoring.bar_title(model, name),
  )
  marks = thinking.own(tokenizer.hf_tokenizer.chat_template)
  return [
    Answer(
      text=_without_thinking(reply["text"], marks),
      tokens=len(reply["ids"]),
      ended=reply["ended"],
      ids=reply["ids"],
    )
    for reply in replies
  ]


def _sample(
  model: scoring.EvalModel,
  prompts: Sequence[Sequence[int]],
  *,
  batch_size: int,
  max_new_tokens: int,
  name: str,
) -> list[dict[str, Any]]:
  """Text, ids and end of each reply of the built-in sampler.

  Raises:
    UserError: the model's logits are not finite.
  """
  prompt_BP, prompt_length_B = scoring.pad(
    prompts,
    count=batch_size,
    multiple=scoring.PROMPT_WIDTH,
    pad_id=model.tokenizer.pad_id,
  )
  rollout = sampling.generate(
    model.params,
    model.config,
    prompt_BP,
    prompt_length_B,
    np.arange(batch_size, dtype=np.int32),
    seed=0,
    step=0,
    max_new_tokens=max_new_tokens,
    temperature=0.0,
    top_p=1.0,
    eos_ids=model.tokenizer.eos_ids,
    pad_id=model.tokenizer.pad_id,
    dtype=model.settings.dtype,
    unroll=model.settings.rollout_unroll,
  )
  tokens_BR, length_B, ended_B, finite_B = (np.asarray(leaf) for leaf in rollout[:4])
  if not finite_B.all():
    raise errors.UserError(f"{name}: {sampling.NOT_FINITE}")
  rows = [tokens_BR[i, : length_B[i]].tolist() for i in range(len(prompts))]
  return [
    {"text": thinking.decode(model.tokenizer, ids), "ids": ids, "ended": bool(ended)}
    for ids, ended in zip(rows, ended_B)
  ]


def _without_thinking(reply: str, marks: Sequence[thinking.Marks]) -> str:
  """The answer in a reply; empty if the thinking never ended."""
  answer = thinking.answer(reply, marks)
  answer = answer if answer == reply else answer.strip()
  return "" if thinking.left_in(answer, marks) else answer


def _generate_on_server(
  model: scoring.EvalModel,
  server: engines.Generator,
  conversations: Sequence[tuple[records.Message, ...]],
  log: journal.Journal,
  *,
  max_new_tokens: int,
  name: str,
) -> list[Answer]:
  """The greedy answers of the model's server.

  Raises:
    UserError: the server refuses a request, or its context is too short for it.
  """

  def read(
    reply: engines.Completion | errors.UserError,
  ) -> dict[str, Any] | errors.UserError:
    if isinstance(reply, errors.UserError):
      return reply
    if reply.finish_reason == "too_long":
      return errors.UserError(
        f"evaluate.servers: {server.identity} has no room for a prompt and"
        f" {max_new_tokens} new tokens ({name}); serve it with a longer context"
      )
    tokens = reply.completion_tokens
    if tokens is None:  # the server serves this model, so its tokens are this model's
      tokens = len(answer_turns.answer_ids(model.tokenizer, reply.text))
    return {
      "text": "" if thinking.left_in(reply.text) else reply.text,
      "tokens": tokens,
      "ended": reply.finish_reason == "stop",
    }

  def compute(batch: list[int]) -> list[dict[str, Any] | errors.UserError]:
    requests = [
      engines.Request(conversations[i], max_new_tokens, 0.0, 1.0, seed=0) for i in batch
    ]
    return [read(reply) for reply in engines.in_order(server, requests)]

  answers = scoring.compute_missing(
    log,
    [
      scoring.item_key(
        model,
        call="served",
        server=server.identity,
        messages=records.keyed(messages),
        max_new_tokens=max_new_tokens,
      )
      for messages in conversations
    ],
    [server.count_tokens(messages) for messages in conversations],
    compute,
    batch_size=model.settings.batch_size,
    title=scoring.bar_title(model, name),
  )
  return [Answer(**answer) for answer in answers]
