"""What a model does on every item: losses, greedy answers and choices.

Finished items go to a journal, keyed by the content of the model, the item and the
settings: what is there is not computed again, and a killed run loses one batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax import errors, vocab_head
from raft_jax.data import batching
from raft_jax.generation import engines
from raft_jax.hf import chat
from raft_jax.models import sampling, transformer
from raft_jax.runtime import progress
from raft_jax.storage import journal, records
from raft_jax.training import checkpoint

LOSS_WIDTH, PROMPT_WIDTH, CHOICE_WIDTH = 64, 32, 256
"""Rows are padded to multiples of these, so that few shapes are compiled."""


class Settings(NamedTuple):
  """What the measured values depend on beside the model and the items."""

  batch_size: int
  dtype: str
  unroll: int
  rollout_unroll: int = 1


class Subject(NamedTuple):
  """A model that is measured.

  Attributes:
    weights: fingerprints of `params`, part of the journal's keys.
    title: what the progress bars call it; None for no bars.
    server: who writes its answers; None for the built-in sampler.
  """

  params: transformer.Params
  config: transformer.DecoderConfig
  codec: chat.Codec
  settings: Settings
  weights: dict[str, list[int]]
  title: str | None
  server: engines.Generator | None = None


class Answer(NamedTuple):
  """A greedy answer; `tokens` and `ids` count the EOS, `ended` says that there is one.

  A server tells no `ids`.
  """

  text: str
  tokens: int
  ended: bool
  ids: Sequence[int] = ()


def subject(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  codec: chat.Codec,
  settings: Settings,
  title: str | None,
  server: engines.Generator | None = None,
) -> Subject:
  """A model that is measured, with the fingerprints of its weights."""
  weights = checkpoint.named_fingerprints(params)
  return Subject(params, config, codec, settings, weights, title, server)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "unroll"))
def answer_losses(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  tokens_BT: Array,
  prompt_length_B: Array,
  length_B: Array,
  *,
  dtype: str = "float32",
  unroll: int = 1,
) -> Array:
  """Mean negative log-likelihood of each row's answer, nats per token, EOS included.

  Args:
    tokens_BT: int32, prompt and answer, right-padded with anything.
    prompt_length_B: int32 tokens of each prompt, at least 1.
    length_B: int32 tokens of prompt and answer together.

  Returns:
    float32 [B].
  """
  hidden_BTD = last_hidden(params, config, tokens_BT, length_B, dtype, unroll)
  nll_BT = vocab_head.cross_entropy(
    hidden_BTD[:, :-1],
    transformer.output_embedding(params).astype(dtype),
    tokens_BT[:, 1:],
    softcap=config.logit_softcap,
  )
  return answer_mean(nll_BT, prompt_length_B, length_B)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "unroll"))
def choice_logits(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  tokens_BT: Array,
  length_B: Array,
  choices_K: Array,
  *,
  dtype: str = "float32",
  unroll: int = 1,
) -> Array:
  """Logits of the given tokens after each prompt, float32 [B, K].

  Args:
    tokens_BT: int32 prompts, right-padded with anything.
    length_B: int32 tokens of each.
    choices_K: int32 token ids.
  """
  hidden_BTD = last_hidden(params, config, tokens_BT, length_B, dtype, unroll)
  last_BD = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
  return vocab_head.gather(
    last_BD,
    transformer.output_embedding(params).astype(dtype),
    jnp.broadcast_to(choices_K, (len(length_B), len(choices_K))),
    softcap=config.logit_softcap,
  )


def last_hidden(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  tokens_BT: Array,
  length_B: Array,
  dtype: str,
  unroll: int,
) -> Array:
  """Final hidden states [B, T, D] of right-padded rows."""
  valid_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
  hidden_BTD, _ = transformer.forward(
    params,
    config,
    tokens_BT,
    transformer.positions(valid_BT),
    transformer.causal_mask(valid_BT),
    dtype=dtype,
    unroll=unroll,
  )
  return hidden_BTD


def answer_mean(values_BT: Array, prompt_length_B: Array, length_B: Array) -> Array:
  """Mean over the answer's tokens of values that belong to tokens 1, 2, ..."""
  column = jnp.arange(1, values_BT.shape[1] + 1)
  answer_BT = (column >= prompt_length_B[:, None]) & (column < length_B[:, None])
  total_B = jnp.sum(jnp.where(answer_BT, values_BT, 0.0), axis=-1)
  return total_B / jnp.maximum(jnp.sum(answer_BT, axis=-1), 1)


def by_length(
  indices: Sequence[int], lengths: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
  """Batches of indices of like length, longest first: memory runs out at once."""
  ordered = sorted(indices, key=lambda i: (-lengths[i], i))
  for start in range(0, len(ordered), batch_size):
    yield ordered[start : start + batch_size]


def pad(
  rows: Sequence[Sequence[int]], *, count: int, multiple: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded int32 [count, W] and lengths [count]; the last row fills the batch."""
  rows = [*rows, *[rows[-1]] * (count - len(rows))]
  lengths_B = np.array([len(row) for row in rows], np.int32)
  width = -(-int(lengths_B.max()) // multiple) * multiple
  tokens_BW = np.full((count, width), pad_id, np.int32)
  for row, tokens in zip(tokens_BW, rows):
    row[: len(tokens)] = tokens
  return tokens_BW, lengths_B


def finish(
  log: journal.Journal,
  keys: Sequence[str],
  lengths: Sequence[int],
  compute: Callable[[list[int]], list[Any]],
  *,
  batch_size: int,
  title: str | None,
) -> list[Any]:
  """The value of every key, in order; what the journal lacks is computed in batches.

  Raises:
    UserError: the first that `compute` returned, after the rest of its batch was kept.
  """
  todo = [i for i, key in enumerate(keys) if key not in log.calls]
  done = len(keys) - len(todo)
  bar = progress.Progress(title, len(keys), done=done, unit="item")
  for batch in by_length(todo, lengths, batch_size):
    values = compute(batch)
    failed = [value for value in values if isinstance(value, errors.UserError)]
    found = zip(batch, values)
    log.append({keys[i]: v for i, v in found if not isinstance(v, errors.UserError)})
    if failed:
      raise failed[0]
    done += len(batch)
    bar.advance(done)
  bar.close()
  return [log.calls[key] for key in keys]


def bar_title(who: Subject, name: str) -> str | None:
  """What a progress bar says of work on a model."""
  return None if who.title is None else f"{who.title}: {name}"


def item_key(who: Subject, **item: Any) -> str:
  """The journal's key of one result of a model."""
  return journal.content_key(
    model=dataclasses.asdict(who.config),
    weights=who.weights,
    dtype=who.settings.dtype,
    **item,
  )


def precision(who: Subject) -> dict[str, Any]:
  """How the forward pass is computed."""
  return {"dtype": who.settings.dtype, "unroll": who.settings.unroll}


def losses(
  who: Subject, rows: Sequence[batching.Row], log: journal.Journal, *, name: str
) -> list[float]:
  """`answer_losses` of every row."""

  def compute(batch: list[int]) -> list[float]:
    tokens_BT, prompt_length_B, length_B = pad_joined(
      [(rows[i].prompt, rows[i].answer) for i in batch],
      count=min(who.settings.batch_size, len(rows)),
      pad_id=who.codec.pad_id,
    )
    loss_B = answer_losses(
      who.params, who.config, tokens_BT, prompt_length_B, length_B, **precision(who)
    )
    return finite(np.asarray(loss_B)[: len(batch)], name)

  return finish(
    log,
    [item_key(who, call="loss", prompt=row.prompt, answer=row.answer) for row in rows],
    [len(row.prompt) + len(row.answer) for row in rows],
    compute,
    batch_size=who.settings.batch_size,
    title=bar_title(who, name),
  )


def answers(
  who: Subject,
  prompts: Sequence[Sequence[int]],
  log: journal.Journal,
  *,
  max_new_tokens: int,
  name: str,
  messages: Sequence[tuple[records.Message, ...]] | None = None,
) -> list[Answer]:
  """The greedy answer to every prompt.

  Args:
    messages: what the prompts are made of, for the subject's server if it has one;
      None where token ids are wanted, which a server does not tell.
  """
  if who.server is not None and messages is not None:
    return served(who, messages, log, max_new_tokens=max_new_tokens, name=name)
  codec = who.codec

  def compute(batch: list[int]) -> list[dict[str, Any]]:
    prompt_BP, length_B = pad(
      [prompts[i] for i in batch],
      count=min(who.settings.batch_size, len(prompts)),
      multiple=PROMPT_WIDTH,
      pad_id=codec.pad_id,
    )
    rollout = sampling.generate(
      who.params,
      who.config,
      prompt_BP,
      length_B,
      np.arange(len(length_B), dtype=np.int32),
      seed=0,
      step=0,
      max_new_tokens=max_new_tokens,
      temperature=0.0,
      top_p=1.0,
      eos_ids=codec.eos_ids,
      pad_id=codec.pad_id,
      dtype=who.settings.dtype,
      unroll=who.settings.rollout_unroll,
    )
    tokens_BR, length_B, ended_B = (np.asarray(leaf) for leaf in rollout[:3])
    rows = [tokens_BR[i, : length_B[i]].tolist() for i in range(len(batch))]
    return [
      {"text": chat.decode(codec, ids), "ids": ids, "ended": bool(ended)}
      for ids, ended in zip(rows, ended_B)
    ]

  limits = {"ends": codec.eos_ids, "max_new_tokens": max_new_tokens}
  found = finish(
    log,
    [
      item_key(who, call="greedy", prompt=prompt, tokenizer=codec.digest, **limits)
      for prompt in prompts
    ],
    [len(prompt) for prompt in prompts],
    compute,
    batch_size=who.settings.batch_size,
    title=bar_title(who, name),
  )
  return [Answer(**answer, tokens=len(answer["ids"])) for answer in found]


def served(
  who: Subject,
  asked: Sequence[tuple[records.Message, ...]],
  log: journal.Journal,
  *,
  max_new_tokens: int,
  name: str,
) -> list[Answer]:
  """The greedy answers of the subject's server; thinking is left out of their text.

  Raises:
    UserError: the server refuses a request, or finds it too long.
  """
  server = who.server
  assert server is not None

  def answer(
    reply: engines.Completion | errors.UserError,
  ) -> dict[str, Any] | errors.UserError:
    if isinstance(reply, errors.UserError):
      return reply
    if reply.finish_reason == "too_long":
      return errors.UserError(
        f"evaluate.servers: {server.identity} has no room for a prompt and"
        f" {max_new_tokens} new tokens ({name}); serve it with a longer context"
      )
    return {
      "text": engines.without_thinking(reply).text,
      "tokens": reply.completion_tokens,
      "ended": reply.finish_reason == "stop",
    }

  def compute(batch: list[int]) -> list[dict[str, Any] | errors.UserError]:
    replies = server.generate(
      [engines.Request(asked[i], max_new_tokens, 0.0, 1.0, seed=0) for i in batch]
    )
    return [answer(reply) for reply in replies]

  found = finish(
    log,
    [
      item_key(
        who,
        call="served",
        server=server.identity,
        messages=messages,
        max_new_tokens=max_new_tokens,
      )
      for messages in asked
    ],
    [server.count_tokens(messages) for messages in asked],
    compute,
    batch_size=who.settings.batch_size,
    title=bar_title(who, name),
  )
  return [Answer(**answer) for answer in found]


def choices(
  who: Subject,
  prompts: Sequence[Sequence[int]],
  letters: Sequence[int],
  log: journal.Journal,
  *,
  name: str,
) -> list[list[float]]:
  """`choice_logits` of the tokens `letters` after every prompt."""

  def compute(batch: list[int]) -> list[list[float]]:
    tokens_BT, length_B = pad(
      [prompts[i] for i in batch],
      count=min(who.settings.batch_size, len(prompts)),
      multiple=CHOICE_WIDTH,
      pad_id=who.codec.pad_id,
    )
    logits_BK = choice_logits(
      who.params, who.config, tokens_BT, length_B, np.array(letters), **precision(who)
    )
    return finite(np.asarray(logits_BK)[: len(batch)], name)

  return finish(
    log,
    [
      item_key(who, call="choice", prompt=prompt, letters=letters) for prompt in prompts
    ],
    [len(prompt) for prompt in prompts],
    compute,
    batch_size=who.settings.batch_size,
    title=bar_title(who, name),
  )


def pad_joined(
  rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, count: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Padded tokens of prompt and answer, the prompts' lengths and those of both."""
  tokens_BT, length_B = pad(
    [(*prompt, *answer) for prompt, answer in rows],
    count=count,
    multiple=LOSS_WIDTH,
    pad_id=pad_id,
  )
  prompt_length_B = length_B.copy()
  prompt_length_B[: len(rows)] = [len(prompt) for prompt, _ in rows]
  return tokens_BT, prompt_length_B, length_B


def finite(values: np.ndarray, name: str) -> list[Any]:
  """The values as a list.

  Raises:
    UserError: one is not finite.
  """
  if not np.isfinite(values).all():
    raise errors.UserError(
      f"{name} is not finite: the weights are damaged or training diverged; train again"
      " with a lower train.learning_rate"
    )
  return values.tolist()
