"""How far training moved a model: in its output distribution and in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax import vocab_head
from raft_jax.evaluation import greedy_answers, intervals, scoring
from raft_jax.models import hybrid, transformer
from raft_jax.storage import journal


@scoring.jit
def answer_kl(
  base_params: transformer.Params,
  params: transformer.Params,
  rows: scoring.AnsweredPrompts,
  *,
  config: transformer.DecoderConfig,
  dtype: str,
  unroll: int,
) -> Array:
  """Mean KL(base ‖ model) over the tokens of each answer, nats per token, float32 [B].

  Args:
    rows: with the base model's answers.
  """
  hidden_BTD, base_BTD = (
    scoring.last_hidden(p, config, rows.tokens_BT, rows.length_B, dtype, unroll)
    for p in (params, base_params)
  )
  kl_BT = vocab_head.kl_divergence(
    hidden_BTD[:, :-1],
    transformer.output_embedding(params).astype(dtype),
    base_BTD[:, :-1],
    transformer.output_embedding(base_params).astype(dtype),
    softcap=config.logit_softcap,
  )
  return scoring.answer_mean(kl_BT, rows)


def row_drifts(
  base: scoring.EvalModel,
  trained: scoring.EvalModel,
  rows: Sequence[tuple[Sequence[int], Sequence[int]]],
  log: journal.Journal,
  *,
  name: str,
) -> list[float]:
  """`answer_kl` of every row: a prompt and the base model's answer to it."""

  def compute(batch: list[int]) -> list[float]:
    padded = scoring.pad_joined(
      [rows[i] for i in batch],
      count=min(trained.settings.batch_size, len(rows)),
      pad_id=trained.tokenizer.pad_id,
    )
    kl_B = answer_kl(
      base.params,
      trained.params,
      padded,
      config=trained.config,
      **scoring.precision(trained),
    )
    return scoring.check_finite(np.asarray(kl_B)[: len(batch)], name)

  return scoring.compute_missing(
    log,
    [
      scoring.item_key(trained, call="drift", base=base.fingerprints, row=row)
      for row in rows
    ],
    [len(prompt) + len(answer) for prompt, answer in rows],
    compute,
    batch_size=trained.settings.batch_size,
    title=scoring.bar_title(trained, name),
  )


def from_base(
  base: scoring.EvalModel,
  trained: scoring.EvalModel,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  log: journal.Journal,
  *,
  name: str = "drift",
) -> intervals.ItemScores:
  """KL(base ‖ trained) on the base model's own greedy answers to prompts, [prompts].

  Args:
    name: for the progress bar and for errors.
  """
  answers = greedy_answers.generate(
    base, prompts, log, max_new_tokens=max_new_tokens, name=f"answers for the {name}"
  )
  rows = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers)]
  values = row_drifts(base, trained, rows, log, name=name)
  return intervals.ItemScores(np.array(values))


@jax.jit
def _distances(
  base_params: transformer.Params, params: transformer.Params
) -> transformer.Params:
  def distance(path: Any, base: Array, tuned: Array) -> Array:
    # Layers are stacked on axis 0; each layer's part is a tensor of its own.
    stacked = any(getattr(key, "key", None) == "layers" for key in path)
    axes = tuple(range(1 if stacked else 0, base.ndim))
    change = jnp.sqrt(jnp.sum(jnp.square(tuned - base), axis=axes))
    return change / jnp.sqrt(jnp.sum(jnp.square(base), axis=axes))

  return jax.tree_util.tree_map_with_path(distance, base_params, params)


def weight_distances(
  base: transformer.Params,
  params: transformer.Params,
  decoder: transformer.DecoderConfig,
) -> dict[str, float]:
  """The relative change of every tensor: norm(tuned - base) / norm(base), by name.

  RAFT (arXiv 2606.00147), App. A. In our runs it did not measure forgetting: under Adam
  it mostly follows the sum of the learning rates. A tensor that is zero in the base
  model is left out.
  """
  distances: dict[str, float] = {}
  leaves = jax.tree_util.tree_leaves_with_path(_distances(base, params))
  for path, value in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    layers = hybrid.layers_of(decoder, path[-1].key) if np.ndim(value) else (0,)
    for layer, number in zip(layers, np.atleast_1d(np.asarray(value)), strict=True):
      if np.isfinite(number):
        distances[f"{name}.{layer}" if np.ndim(value) else name] = float(number)
  return distances
