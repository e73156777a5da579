"""Fisher information of every parameter: how much the model's answers hang on it.

.. math::
  F_j = E_x E_{y \\sim p(\\cdot | x)} [(\\partial_j \\log p(y | x))^2]

Its diagonal, as in Kirkpatrick et al., arXiv 1612.00796. The logarithm is of the whole
answer: a sum over its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.models import sampling, transformer

LARGEST = 1e3
"""Bound of the normalised information: heavy tails would stop what they sit on."""


def diagonal(
  log_likelihood: Callable[[Any, Any], jax.Array],
  params: Any,
  batches: Iterable[Any],
  size: int,
) -> Any:
  """Mean over batches of B · ḡ², with ḡ the gradient of the batch's mean.

  Where the labels are drawn from the model itself the gradients of two rows are
  independent and of mean 0, so that their product drops out and the value is unbiased
  for any B. With given labels it is not: then B must be 1.

  Args:
    log_likelihood: (params, batch) -> mean over the batch's rows of log p(y | x).
    params: where it is taken.
    batches: of equal size.
    size: B.

  Returns:
    A tree like `params`, float32, >= 0.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def add(total, params, batch):
    gradient = jax.grad(log_likelihood)(params, batch)
    return jax.tree.map(
      lambda t, g: t + size * jnp.square(g.astype(t.dtype)), total, gradient
    )

  total = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  count = 0
  for count, batch in enumerate(batches, 1):  # noqa: B007
    total = add(total, params, batch)
  return jax.tree.map(lambda t: t / max(count, 1), total)


def normalised(information: Any) -> Any:
  """Divided by its mean over all parameters, so that a strength means the same for any
  model, and bounded by `LARGEST`; all ones where there is no information at all."""
  leaves = jax.tree.leaves(information)
  mean = sum(jnp.sum(leaf) for leaf in leaves) / sum(leaf.size for leaf in leaves)
  return jax.tree.map(
    lambda leaf: jnp.where(
      mean > 0, jnp.minimum(leaf / jnp.where(mean > 0, mean, 1), LARGEST), 1
    ),
    information,
  )


def log_likelihood(
  params: transformer.Params, batch: batching.Batch, settings: objective.Settings
) -> jax.Array:
  """Mean over rows of the log-probability of each whole answer, in nats."""
  rows = batch.answer_BA.shape[0]
  nothing = objective.Trajectory(
    jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32)
  )
  answer_BA = objective.columns(batch.answer_length_B, batch.answer_BA.shape[1])
  weights = objective.Weights(answer_BA / rows, jnp.zeros((rows, 0)))
  settings = settings._replace(cross_entropy=True)
  terms, _ = objective.loss_terms(
    params, batch, nothing, None, weights, settings=settings
  )
  return -terms["sft"]


def sampled(
  params: transformer.Params,
  batches: Iterable[batching.Batch],
  settings: objective.Settings,
  *,
  seed: int,
  max_new_tokens: int,
  pad_id: int,
) -> Iterable[batching.Batch]:
  """The batches with answers that the model samples at temperature 1."""
  for number, batch in enumerate(batches):
    rollout = sampling.generate(
      params,
      settings.decoder,
      batch.prompt_BP,
      batch.prompt_length_B,
      batch.row_id_B,
      seed=seed,
      step=number,
      max_new_tokens=max_new_tokens,
      eos_ids=settings.eos_ids,
      pad_id=pad_id,
      dtype=settings.dtype,
      unroll=settings.rollout_unroll,
    )
    yield batch._replace(answer_BA=rollout.tokens_BR, answer_length_B=rollout.length_B)
