"""One training step as a pure function: both losses, λ, the gradient and the update.

The names of shapes are those of `objective`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raft_jax import balance
from raft_jax.data import batching
from raft_jax.distillation import answer_losses, objective, sequences
from raft_jax.models import experts, partition, sharding, transformer

T = TypeVar("T")


class TrainState(NamedTuple):
  """Everything that a step changes; a tree of arrays, of shapes or of shardings."""

  step: Any  # [] int32, steps taken
  params: transformer.Params  # the trainable tree, float32
  opt_state: Any


class ReferenceParams(NamedTuple):
  """Parameters that the steps read and never change.

  All of them come from the base model and share buffers where their dtypes agree.

  Attributes:
    frozen: the frozen tree beside the trained one (see `models.partition`), or `{}`.
    teacher: the frozen teacher's, or None if the student itself is the teacher or
      nothing is distilled.
    anchor: float32, for optimizers that stay near the base model; else None.
    base: the base model, if validation compares the trained model with it; else None.
  """

  frozen: transformer.Params
  teacher: transformer.Params | None
  anchor: transformer.Params | None
  base: transformer.Params | None = None


class LossInputs(NamedTuple):
  """A batch, or one micro-batch of it, as `objective.loss_terms` reads it."""

  batch: batching.Batch
  trajectory: sequences.Trajectory
  support: objective.Support | None
  weights: objective.Weights


class StepGradient(NamedTuple):
  """The balanced gradient of a step and the values that it was made from."""

  balanced: transformer.Params
  losses: dict[str, Array]
  valid: dict[str, Array]  # whether any token entered each loss
  norms: dict[str, Array] | None  # of each loss's own gradient, if both were taken
  cosine: Array | None  # of the angle between the two gradients
  aux: dict[str, Any]


LossFunction = Callable[
  [transformer.Params, LossInputs], tuple[dict[str, Array], dict[str, Any]]
]
"""`objective.loss_terms` of the trained parameters."""


def update(
  state: TrainState,
  frozen: transformer.Params,
  batch: batching.Batch,
  trajectory: sequences.Trajectory,
  support: objective.Support | None,
  *,
  optimizer: optax.GradientTransformationExtraArgs,
  balancer: optax.GradientTransformationExtraArgs,
  settings: objective.Settings,
  anchor: transformer.Params | None = None,
  gradient_stats: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
  """Takes one optimizer step.

  Args:
    frozen: the frozen tree beside the trained one; see `models.partition`.
    support: the teacher's; None trains on the answers alone.
    optimizer: a chain with `balancer` under the name `balance`.
    anchor: the base model's parameters, for optimizers that stay near them.
    gradient_stats: take each loss's own gradient, to log both norms and their cosine.

  Returns the next state and scalars to log.
  """
  weights = objective.mean_weights(batch, trajectory, settings)
  inputs = LossInputs(batch, trajectory, support, weights)
  median = median_over_micro_batches(
    partition.combine(frozen, state.params), batch, settings
  )

  def both_losses(params: transformer.Params, part: LossInputs):
    whole = partition.combine(frozen, params)
    return objective.loss_terms(whole, *part, settings=settings, median=median)

  def loss_weights(**observed: Any) -> dict[str, Array]:
    # λ depends on the losses of this step (Eq. 11-12), so the balancer is advanced
    # before the gradient exists; `optimizer.update` repeats the advance and keeps it.
    _, advanced = balancer.update({}, state.opt_state["balance"], **observed)
    return balance.loss_weights(advanced)

  take: Callable[..., StepGradient] = balanced_gradient
  if gradient_stats or settings.micro_batches > 1:
    take = functools.partial(
      separate_gradients,
      micro_batches=settings.micro_batches,
      with_stats=gradient_stats,
    )
  gradient = take(both_losses, state.params, inputs, loss_weights)
  updates, opt_state = optimizer.update(
    gradient.balanced,
    state.opt_state,
    state.params,
    losses=gradient.losses,
    valid=gradient.valid,
    gradient_norms=gradient.norms,
    anchor=anchor,
  )
  params = optax.apply_updates(state.params, updates)
  metrics = step_metrics(gradient, opt_state["balance"], trajectory)
  if not settings.cross_entropy:
    params = unless_empty(gradient.valid["kd"], params, state.params)
    metrics = {k: value for k, value in metrics.items() if k not in NEED_BOTH_LOSSES}
  return TrainState(state.step + 1, params, opt_state), metrics


def unless_empty(
  has_tokens: Array, params: transformer.Params, old_params: transformer.Params
) -> transformer.Params:
  """Keeps the old parameters if distillation, the only loss, had no token.

  So neither weight decay nor momentum moves them; `optim.skip_empty` does the same for
  the optimizer's state.
  """
  return jax.tree.map(
    lambda new, old: jnp.where(has_tokens, new, old), params, old_params
  )


def balanced_gradient(
  both_losses: LossFunction,
  params: transformer.Params,
  inputs: LossInputs,
  loss_weights: Callable[..., dict[str, Array]],
) -> StepGradient:
  """The gradient in one backward pass: both losses, then one pullback of (1, λ)."""
  losses, pullback, aux = jax.vjp(
    lambda p: both_losses(p, inputs), params, has_aux=True
  )
  valid = any_token(inputs.weights)
  (balanced,) = pullback(loss_weights(losses=losses, valid=valid))
  return StepGradient(balanced, losses, valid, None, None, aux)


def separate_gradients(
  both_losses: LossFunction,
  params: transformer.Params,
  inputs: LossInputs,
  loss_weights: Callable[..., dict[str, Array]],
  *,
  micro_batches: int = 1,
  with_stats: bool = False,
) -> StepGradient:
  """The gradient as a weighted sum of each loss's own, over micro-batches.

  λ depends on the losses of the whole batch, so the two trees cannot be added before
  the last micro-batch. Costs one more backward pass and one more tree than
  `balanced_gradient`.

  Args:
    with_stats: also compute both norms and their cosine. The balancer sees the norms
      only then, so that micro-batches weigh the losses as the unsplit batch does.
  """

  def of_micro_batch(part: LossInputs):
    losses, pullback, aux = jax.vjp(
      lambda p: both_losses(p, part), params, has_aux=True
    )
    one, zero = jnp.float32(1), jnp.float32(0)
    gradients = {"sft": pullback({"sft": one, "kd": zero})[0]}
    if part.support is not None:
      gradients["kd"] = pullback({"sft": zero, "kd": one})[0]
    row_losses_B = aux.pop(objective.ROW_LOSSES, None)  # the only value not summed
    return (gradients, losses, aux), row_losses_B

  def accumulate(total: Any, part: LossInputs):
    summed, row_losses_B = of_micro_batch(part)
    return jax.tree.map(jnp.add, total, summed), row_losses_B

  stacked = stack_micro_batches(inputs, micro_batches)
  first = jax.tree.map(lambda x: x[0], stacked)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_micro_batch, first)[0]
  )
  (gradients, losses, aux), row_losses_MB = jax.lax.scan(accumulate, zeros, stacked)
  if row_losses_MB is not None:
    aux[objective.ROW_LOSSES] = row_losses_MB.swapaxes(0, 1).reshape(-1)
  valid = any_token(inputs.weights)
  norms = cosine = None
  if with_stats and "kd" in gradients:
    norms, cosine = norms_and_cosine(gradients)
  weights = loss_weights(losses=losses, valid=valid, gradient_norms=norms)
  balanced = gradients["sft"]
  if "kd" in gradients:
    balanced = jax.tree.map(
      lambda sft, kd: weights["sft"] * sft + weights["kd"] * kd,
      gradients["sft"],
      gradients["kd"],
    )
  return StepGradient(balanced, losses, valid, norms, cosine, aux)


def median_over_micro_batches(
  params: transformer.Params, batch: batching.Batch, settings: objective.Settings
) -> Array | None:
  """The median of the batch's row losses, which no micro-batch can know on its own.

  None if the batch is not split or its tokens' weights need no median. Costs one more
  forward pass over the answers.
  """
  needed = answer_losses.needs_median(settings.token_rule)
  if settings.micro_batches == 1 or not needed:
    return None
  row_loss_MB = jax.lax.map(
    lambda part: objective.row_losses(params, part, settings),
    stack_micro_batches(batch, settings.micro_batches),
  )
  row_loss_B = row_loss_MB.swapaxes(0, 1).reshape(-1)
  return answer_losses.median_of_rows(row_loss_B, batch.answer_length_B)


def stack_micro_batches(inputs: T, micro_batches: int) -> T:
  """The batch as `micro_batches` parts, stacked on a new first axis.

  Rows i, i + M, ... form micro-batch i, so a batch that is sharded over devices in
  blocks of rows is split without moving a row.
  """

  def split(x: Array) -> Array:
    rows = x.shape[0] // micro_batches
    return x.reshape(rows, micro_batches, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, inputs)


def norms_and_cosine(
  gradients: dict[str, transformer.Params],
) -> tuple[dict[str, Array], Array]:
  """The norm of each loss's gradient and the cosine of the angle between them."""
  norms = {name: optax.tree.norm(tree) for name, tree in gradients.items()}
  product = jnp.maximum(norms["sft"] * norms["kd"], 1e-30)
  # Not `optax.tree.vdot`, which flattens every array and so gathers it.
  dot = optax.tree.sum(optax.tree.mul(gradients["sft"], gradients["kd"]))
  return norms, dot / product


def any_token(weights: objective.Weights) -> dict[str, Array]:
  """Whether any token enters each loss."""
  return {"sft": jnp.any(weights.sft_BA > 0), "kd": jnp.any(weights.kd_BR > 0)}


NEED_BOTH_LOSSES = frozenset(
  {"loss_sft", "ema_sft", "kd_ratio", "grad_norm_sft", "grad_norm_kd", "grad_cosine"}
)
"""Metrics that mean nothing without the cross-entropy."""


OF_TOKEN_WEIGHTS = ("token_weight", "loss_sft_unweighted")
"""Metrics of a run that weighs its tokens: the mean weight, and the loss without it."""


def step_metrics(
  gradient: StepGradient,
  balance_state: balance.BalanceState,
  trajectory: sequences.Trajectory,
) -> dict[str, Array]:
  """The scalars of one step to log."""
  metrics = {
    "loss_sft": gradient.losses["sft"],
    "grad_norm": optax.tree.norm(gradient.balanced),
  }
  aux = dict(gradient.aux)
  if objective.ROW_LOSSES in aux:
    row_losses_B = aux.pop(objective.ROW_LOSSES)
    metrics[objective.ROW_LOSSES] = sharding.everywhere(row_losses_B)
  if objective.EXPERT_LOAD in aux:
    metrics |= experts.metrics(aux.pop(objective.EXPERT_LOAD))
  metrics |= {name: aux.pop(name) for name in OF_TOKEN_WEIGHTS if name in aux}
  if not aux:  # nothing was distilled
    return metrics
  kd_weight, any_rollout = (
    balance.loss_weights(balance_state)["kd"],
    gradient.valid["kd"],
  )
  metrics |= {
    "loss_kd": gradient.losses["kd"],
    "ema_sft": balance_state.ema["sft"],
    "ema_kd": balance_state.ema["kd"],
    "kd_weight": kd_weight,
    "kd_ratio": kd_weight * gradient.losses["kd"] / gradient.losses["sft"],
    # Without a rollout there is no mass; NaN is logged as null.
    "teacher_mass_in_support": jnp.where(
      any_rollout, aux["teacher_mass_in_support"], jnp.nan
    ),
    "student_mass_outside_support": jnp.where(
      any_rollout, 1.0 - aux["student_mass_in_support"], jnp.nan
    ),
    "rollout_length": jnp.mean(trajectory.length_B.astype(jnp.float32)),
    "rollout_empty": jnp.mean(trajectory.length_B == 0),
  }
  for name in objective.POSITION_BINS:
    # If no rollout reaches this bin, 0 / 0 gives NaN, which is logged as null.
    metrics[f"kd_at_{name}"] = aux[f"kd_sum_at_{name}"] / aux[f"kd_count_at_{name}"]
  if gradient.norms is not None:
    metrics |= {f"grad_norm_{name}": norm for name, norm in gradient.norms.items()}
    metrics["grad_cosine"] = gradient.cosine
  return metrics
