"""How far training moved a model: in what it says, and in its weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax import vocab_head
from raft_jax.evaluation import intervals, scoring
from raft_jax.models import transformer
from raft_jax.storage import journal


@functools.partial(jax.jit, static_argnames=("config", "dtype", "unroll"))
def drifts(
  base_params: transformer.Params,
  params: transformer.Params,
  config: transformer.DecoderConfig,
  tokens_BT: Array,
  prompt_length_B: Array,
  length_B: Array,
  *,
  dtype: str = "float32",
  unroll: int = 1,
) -> Array:
  """Mean KL(base, model) over each row's answer tokens, nats per token, float32 [B].

  Args:
    tokens_BT: int32, prompt and the base model's answer, right-padded with anything.
    prompt_length_B: int32 tokens of each prompt, at least 1.
    length_B: int32 tokens of prompt and answer together.
  """
  hidden_BTD, base_BTD = (
    scoring.last_hidden(p, config, tokens_BT, length_B, dtype, unroll)
    for p in (params, base_params)
  )
  kl_BT = vocab_head.kl_divergence(
    hidden_BTD[:, :-1],
    transformer.output_embedding(params).astype(dtype),
    base_BTD[:, :-1],
    transformer.output_embedding(base_params).astype(dtype),
    softcap=config.logit_softcap,
  )
  return scoring.answer_mean(kl_BT, prompt_length_B, length_B)


def drift(
  base: scoring.Subject,
  who: scoring.Subject,
  rows: Sequence[tuple[Sequence[int], Sequence[int]]],
  log: journal.Journal,
  *,
  name: str,
) -> list[float]:
  """`drifts` of rows of a prompt and the base model's answer."""

  def compute(batch: list[int]) -> list[float]:
    tokens_BT, prompt_length_B, length_B = scoring.pad_joined(
      [rows[i] for i in batch],
      count=min(who.settings.batch_size, len(rows)),
      pad_id=who.codec.pad_id,
    )
    drift_B = drifts(
      base.params,
      who.params,
      who.config,
      tokens_BT,
      prompt_length_B,
      length_B,
      **scoring.precision(who),
    )
    return scoring.finite(np.asarray(drift_B)[: len(batch)], name)

  return scoring.finish(
    log,
    [scoring.item_key(who, call="drift", base=base.weights, row=row) for row in rows],
    [len(prompt) + len(answer) for prompt, answer in rows],
    compute,
    batch_size=who.settings.batch_size,
    title=scoring.bar_title(who, name),
  )


def from_base(
  base: scoring.Subject,
  trained: scoring.Subject,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  log: journal.Journal,
) -> intervals.Scores:
  """KL(base, trained) on the base model's own greedy answers to general prompts."""
  answers = scoring.answers(
    base, prompts, log, max_new_tokens=max_new_tokens, name="answers for the drift"
  )
  rows = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers)]
  values = drift(base, trained, rows, log, name="drift")
  return intervals.Scores(np.array(values))


@jax.jit
def _distances(
  base_params: transformer.Params, params: transformer.Params
) -> transformer.Params:
  def distance(path: Any, base: Array, tuned: Array) -> Array:
    # Layers are stacked on axis 0; each is a tensor of its own.
    stacked = any(getattr(key, "key", None) == "layers" for key in path)
    axes = tuple(range(1 if stacked else 0, base.ndim))
    change = jnp.sqrt(jnp.sum(jnp.square(tuned - base), axis=axes))
    return change / jnp.sqrt(jnp.sum(jnp.square(base), axis=axes))

  return jax.tree_util.tree_map_with_path(distance, base_params, params)


def weight_distances(
  base: transformer.Params, params: transformer.Params
) -> dict[str, float]:
  """Name of a tensor -> its change, relative: norm(tuned - base) / norm(base).

  RAFT (arXiv 2606.00147), App. A. It was seen not to measure forgetting: under Adam it
  mostly follows the sum of the learning rates. A tensor of zeros has no distance.
  """
  found: dict[str, float] = {}
  leaves = jax.tree_util.tree_leaves_with_path(_distances(base, params))
  for path, value in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    for layer, number in enumerate(np.atleast_1d(np.asarray(value))):
      if np.isfinite(number):
        found[f"{name}.{layer}" if np.ndim(value) else name] = float(number)
  return found
