"""Losses and choice logits of a model, item by item, through a journal.

Each finished item is appended to a journal under a key made of the model, the item and
the settings. Items that the journal holds are not computed again, and a run that is
killed loses at most one batch.
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
from raft_jax.data import token_rows
from raft_jax.generation import engines
from raft_jax.hf import chat
from raft_jax.models import transformer
from raft_jax.runtime import interrupts, progress
from raft_jax.storage import journal
from raft_jax.training import tree_fingerprints

LOSS_WIDTH, PROMPT_WIDTH, CHOICE_WIDTH = 64, 32, 256
"""Rows are padded to multiples of these, so that few shapes are compiled."""


class Settings(NamedTuple):
  """How a model is run; the dtype is part of the journal's keys."""

  batch_size: int
  dtype: str
  unroll: int
  rollout_unroll: int = 1


class EvalModel(NamedTuple):
  """A model to evaluate.

  Attributes:
    fingerprints: those of `params`, part of the journal's keys.
    title: its name in the progress bars; None for no bars.
    server: the engine that writes its answers; None for the built-in sampler.
  """

  params: transformer.Params
  config: transformer.DecoderConfig
  tokenizer: chat.ChatTokenizer
  settings: Settings
  fingerprints: dict[str, list[int]]
  title: str | None
  server: engines.Generator | None = None


def eval_model(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  tokenizer: chat.ChatTokenizer,
  settings: Settings,
  title: str | None,
  server: engines.Generator | None = None,
) -> EvalModel:
  """A model to evaluate, with the fingerprints of its parameters."""
  fingerprints = tree_fingerprints.by_path(params)
  return EvalModel(params, config, tokenizer, settings, fingerprints, title, server)


class AnsweredPrompts(NamedTuple):
  """Prompts, each with its answer behind it.

  Attributes:
    tokens_BT: int32, prompt and answer, right-padded with anything.
    prompt_length_B: int32 tokens of each prompt, at least 1.
    length_B: int32 tokens of prompt and answer together.
  """

  tokens_BT: Any
  prompt_length_B: Any
  length_B: Any


jit = functools.partial(jax.jit, static_argnames=("config", "dtype", "unroll"))


@jit
def answer_losses(
  params: transformer.Params,
  rows: AnsweredPrompts,
  *,
  config: transformer.DecoderConfig,
  dtype: str,
  unroll: int,
) -> Array:
  """Mean negative log-likelihood of each row's answer, nats per token, EOS included.

  Returns:
    float32 [B].
  """
  tokens_BT = rows.tokens_BT
  hidden_BTD = last_hidden(params, config, tokens_BT, rows.length_B, dtype, unroll)
  nll_BT = vocab_head.cross_entropy(
    hidden_BTD[:, :-1],
    transformer.output_embedding(params).astype(dtype),
    tokens_BT[:, 1:],
    softcap=config.logit_softcap,
  )
  return answer_mean(nll_BT, rows)


@jit
def choice_logits(
  params: transformer.Params,
  tokens_BT: Array,
  length_B: Array,
  choices_K: Array,
  *,
  config: transformer.DecoderConfig,
  dtype: str,
  unroll: int,
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
    compute=transformer.Compute(dtype=dtype, unroll=unroll),
  )
  return hidden_BTD


def answer_mean(values_BT: Array, rows: AnsweredPrompts) -> Array:
  """Each row's mean over the tokens of its answer, [B].

  Args:
    values_BT: values of the tokens 1, 2, ... of each row.
  """
  column = jnp.arange(1, values_BT.shape[1] + 1)
  start_B1, end_B1 = rows.prompt_length_B[:, None], rows.length_B[:, None]
  answer_BT = (column >= start_B1) & (column < end_B1)
  total_B = jnp.sum(jnp.where(answer_BT, values_BT, 0.0), axis=-1)
  return total_B / jnp.maximum(jnp.sum(answer_BT, axis=-1), 1)


def by_length(
  indices: Sequence[int], lengths: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
  """Batches of items of similar length, longest first.

  If memory is too small, the first batch already shows it.
  """
  ordered = sorted(indices, key=lambda i: (-lengths[i], i))
  for start in range(0, len(ordered), batch_size):
    yield ordered[start : start + batch_size]


def pad(
  rows: Sequence[Sequence[int]], *, count: int, multiple: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows padded on the right, int32 [count, W], and their lengths [count].

  Fewer rows than `count` are filled up with copies of the last one.
  """
  rows = [*rows, *[rows[-1]] * (count - len(rows))]
  lengths_B = np.array([len(row) for row in rows], np.int32)
  width = -(-int(lengths_B.max()) // multiple) * multiple
  tokens_BW = np.full((count, width), pad_id, np.int32)
  for row, tokens in zip(tokens_BW, rows):
    row[: len(tokens)] = tokens
  return tokens_BW, lengths_B


def compute_missing(
  log: journal.Journal,
  keys: Sequence[str],
  lengths: Sequence[int],
  compute: Callable[[list[int]], list[Any]],
  *,
  batch_size: int,
  title: str | None,
) -> list[Any]:
  """The value of every key, in order; computes in batches what the journal lacks.

  Args:
    lengths: tokens of each item, by which batches are formed.
    compute: indices of items -> their values, or a UserError in place of one.

  Raises:
    UserError: the first that `compute` returned, after the other values of its batch
      were written to the journal.
  """
  todo = [i for i, key in enumerate(keys) if key not in log.calls]
  done = len(keys) - len(todo)
  bar = progress.Progress(title, len(keys), done=done, unit="item")
  for batch in by_length(todo, lengths, batch_size):
    interrupts.check()
    values = compute(batch)
    failed = [value for value in values if isinstance(value, errors.UserError)]
    log.append(
      {
        keys[i]: value
        for i, value in zip(batch, values)
        if not isinstance(value, errors.UserError)
      }
    )
    if failed:
      raise failed[0]
    done += len(batch)
    bar.advance(done)
  bar.close()
  return [log.calls[key] for key in keys]


def bar_title(model: EvalModel, name: str) -> str | None:
  """The title of a progress bar."""
  return None if model.title is None else f"{model.title}: {name}"


def item_key(model: EvalModel, **item: Any) -> str:
  """The key in the journal of one result of a model."""
  return journal.content_key(
    model=dataclasses.asdict(model.config),
    weights=model.fingerprints,
    dtype=model.settings.dtype,
    **item,
  )


def precision(model: EvalModel) -> dict[str, Any]:
  """Keyword arguments of the forward pass."""
  return {"dtype": model.settings.dtype, "unroll": model.settings.unroll}


def losses(
  model: EvalModel, rows: Sequence[token_rows.Row], log: journal.Journal, *, name: str
) -> list[float]:
  """`answer_losses` of every row."""

  def compute(batch: list[int]) -> list[float]:
    padded = pad_joined(
      [(rows[i].prompt, rows[i].answer) for i in batch],
      count=min(model.settings.batch_size, len(rows)),
      pad_id=model.tokenizer.pad_id,
    )
    loss_B = answer_losses(
      model.params, padded, config=model.config, **precision(model)
    )
    return check_finite(np.asarray(loss_B)[: len(batch)], name)

  return compute_missing(
    log,
    [
      item_key(model, call="loss", prompt=row.prompt, answer=row.answer) for row in rows
    ],
    [len(row.prompt) + len(row.answer) for row in rows],
    compute,
    batch_size=model.settings.batch_size,
    title=bar_title(model, name),
  )


def choices(
  model: EvalModel,
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
      count=min(model.settings.batch_size, len(prompts)),
      multiple=CHOICE_WIDTH,
      pad_id=model.tokenizer.pad_id,
    )
    logits_BK = choice_logits(
      model.params,
      tokens_BT,
      length_B,
      np.array(letters),
      config=model.config,
      **precision(model),
    )
    return check_finite(np.asarray(logits_BK)[: len(batch)], name)

  return compute_missing(
    log,
    [
      item_key(model, call="choice", prompt=prompt, letters=letters)
      for prompt in prompts
    ],
    [len(prompt) for prompt in prompts],
    compute,
    batch_size=model.settings.batch_size,
    title=bar_title(model, name),
  )


def pad_joined(
  rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, count: int, pad_id: int
) -> AnsweredPrompts:
  """Prompts with their answers, padded to `count` rows of one width."""
  tokens_BT, length_B = pad(
    [(*prompt, *answer) for prompt, answer in rows],
    count=count,
    multiple=LOSS_WIDTH,
    pad_id=pad_id,
  )
  prompt_length_B = length_B.copy()
  prompt_length_B[: len(rows)] = [len(prompt) for prompt, _ in rows]
  return AnsweredPrompts(tokens_BT, prompt_length_B, length_B)


def check_finite(values: np.ndarray, name: str) -> list[Any]:
  """The values as a list.

  Raises:
    UserError: a value is not finite.
  """
  if not np.isfinite(values).all():
    raise errors.UserError(
      f"{name} is not finite: the weights are damaged or training diverged; train again"
      " with a lower train.learning_rate"
    )
  return values.tolist()
