"""Fisher information of every parameter: how much the model's answers depend on it.

.. math::
  F_j = E_x E_{y \\sim p(\\cdot | x)} [(\\partial_j \\log p(y | x))^2]

This is the diagonal of the Fisher matrix, as in Kirkpatrick et al., arXiv 1612.00796.
log p(y | x) is that of the whole answer: a sum over its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax.data import batching
from raft_jax.distillation import objective, sequences
from raft_jax.models import sampling, transformer

LARGEST = 1e3
"""Upper bound of the normalised information, whose tail is heavy: larger values would
stop a parameter altogether."""


def diagonal(
  log_likelihood: Callable[[Any, Any], jax.Array],
  params: Any,
  batches: Iterable[Any],
  size: int,
) -> Any:
  """The mean over batches of B · ḡ², with ḡ the gradient of a batch's mean.

  If the answers are sampled from the model itself, the gradients of two rows are
  independent with mean 0, so their product vanishes and the estimate is unbiased for
  any B. With given answers it is biased unless B is 1.

  Args:
    log_likelihood: (params, batch) -> mean over the batch's rows of log p(y | x).
    params: where the information is taken.
    batches: batches of equal size.
    size: B, rows of a batch.

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
  """Information divided by its mean over all parameters, at most `LARGEST`.

  So a strength of the pull means the same for any model. All ones if the information is
  0 everywhere.
  """
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
  """The mean over rows of the log-probability of the whole answer, in nats."""
  rows = batch.answer_BA.shape[0]
  no_rollout = sequences.empty_trajectory(rows)
  answer_BA = sequences.length_mask(batch.answer_length_B, batch.answer_BA.shape[1])
  weights = objective.Weights(answer_BA / rows, jnp.zeros((rows, 0)))
  settings = settings._replace(cross_entropy=True, token_rule=None)
  terms, _ = objective.loss_terms(
    params, batch, no_rollout, None, weights, settings=settings
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
      dtype=settings.compute.dtype,
      unroll=settings.rollout_unroll,
    )
    yield batch._replace(answer_BA=rollout.tokens_BR, answer_length_B=rollout.length_B)
