"""One training step as a pure function: the balanced gradient, and what it moves.

Shapes as in `objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raft_jax import balance
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.models import partition, sharding, transformer


class TrainState(NamedTuple):
  """All that a step changes; a tree of arrays, of their shapes or of shardings."""

  step: Any  # [] int32, steps taken
  params: transformer.Params  # the trainable tree, float32
  opt_state: Any


class Gradients(NamedTuple):
  """The balanced gradient of a step and what it was made of."""

  balanced: transformer.Params
  losses: dict[str, Array]
  valid: dict[str, Array]  # whether any token entered each loss
  norms: dict[str, Array] | None  # of each loss's gradient, where taken apart
  cosine: Array | None
  seen: dict[str, Array]


Parts = tuple[
  batching.Batch, objective.Trajectory, objective.Support | None, objective.Weights
]
Losses = Callable[
  [transformer.Params, Parts], tuple[dict[str, Array], dict[str, Array]]
]
"""`loss_terms` of what is trained and of a batch, or of a part of it."""


def gradients_together(
  loss: Losses, params: transformer.Params, parts: Parts, weigh: Any
) -> Gradients:
  """One backward pass: both losses, one pullback, the weights, and (1, lambda) back."""
  terms, pullback, seen = jax.vjp(lambda p: loss(p, parts), params, has_aux=True)
  valid = any_token(parts[-1])
  balanced = pullback(weigh(losses=terms, valid=valid))[0]
  return Gradients(balanced, terms, valid, None, None, seen)


def gradients_apart(
  loss: Losses,
  params: transformer.Params,
  parts: Parts,
  weigh: Any,
  *,
  micro_batches: int = 1,
  measure: bool = False,
) -> Gradients:
  """One gradient tree a loss, summed over micro-batches until the weights are known.

  The weights depend on the losses of the whole batch, which is why the trees cannot be
  added earlier. Costs one more backward pass and one more tree than
  `gradients_together`. With `measure` it also gives both norms and their cosine; not
  otherwise, so that a batch in parts is weighted as the whole one is.
  """

  def of_micro_batch(part: Parts):
    terms, pullback, seen = jax.vjp(lambda p: loss(p, part), params, has_aux=True)
    one, zero = jnp.float32(1), jnp.float32(0)
    trees = {"sft": pullback({"sft": one, "kd": zero})[0]}
    if part[2] is not None:
      trees["kd"] = pullback({"sft": zero, "kd": one})[0]
    rows_B = seen.pop(objective.ROWS, None)  # the only thing that is not summed
    return (trees, terms, seen), rows_B

  def add(total: Any, part: Parts):
    found, rows_B = of_micro_batch(part)
    return jax.tree.map(jnp.add, total, found), rows_B

  # Rows i, i + M, ... form micro-batch i: a batch spread over devices in blocks of rows
  # is then split without moving a row.
  stacked = jax.tree.map(
    lambda x: x.reshape(
      x.shape[0] // micro_batches, micro_batches, *x.shape[1:]
    ).swapaxes(0, 1),
    parts,
  )
  first = jax.tree.map(lambda x: x[0], stacked)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_micro_batch, first)[0]
  )
  (trees, terms, seen), rows_MB = jax.lax.scan(add, zeros, stacked)
  if rows_MB is not None:
    seen[objective.ROWS] = rows_MB.swapaxes(0, 1).reshape(-1)
  valid = any_token(parts[-1])
  norms = cosine = None
  if measure and "kd" in trees:
    norms = {name: optax.tree.norm(tree) for name, tree in trees.items()}
    product = jnp.maximum(norms["sft"] * norms["kd"], 1e-30)
    # Not `optax.tree.vdot`: it flattens every array, and so gathers it whole.
    cosine = optax.tree.sum(optax.tree.mul(trees["sft"], trees["kd"])) / product
  weights = weigh(losses=terms, valid=valid, gradient_norms=norms)
  balanced = trees["sft"]
  if "kd" in trees:
    balanced = jax.tree.map(
      lambda sft, kd: weights["sft"] * sft + weights["kd"] * kd, balanced, trees["kd"]
    )
  return Gradients(balanced, terms, valid, norms, cosine, seen)


def any_token(weights: objective.Weights) -> dict[str, Array]:
  """Whether any token enters each loss."""
  return {"sft": jnp.any(weights.sft_BA > 0), "kd": jnp.any(weights.kd_BR > 0)}


def update(
  state: TrainState,
  frozen: transformer.Params,
  batch: batching.Batch,
  trajectory: objective.Trajectory,
  support: objective.Support | None,
  *,
  optimizer: optax.GradientTransformationExtraArgs,
  balancer: optax.GradientTransformationExtraArgs,
  settings: objective.Settings,
  anchor: transformer.Params | None = None,
  measure: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
  """Moves the parameters by one optimizer step.

  Args:
    frozen: parameters beside the trained ones; see `trainable`.
    support: None trains on the answers alone.
    optimizer: from `optim.chain`, with `balancer` under the name `balance`.
    anchor: the base model's parameters, for the optimizers that stay near them.
    measure: take the two gradients apart, for their norms and cosine.

  Returns:
    The next state and float32 scalars to log.
  """
  weights = objective.token_weights(batch, trajectory, settings)

  def weigh(**observed: Any) -> dict[str, Array]:
    # Eq. 11-12: lambda contains the current step's losses, so the balancer moves before
    # the gradient exists; the chain makes the same move below and keeps it.
    _, advanced = balancer.update({}, state.opt_state["balance"], **observed)
    return balance.loss_weights(advanced)

  def loss(params: transformer.Params, part: Parts):
    return objective.loss_terms(
      partition.combine(frozen, params), *part, settings=settings
    )

  parts = (batch, trajectory, support, weights)
  if measure or settings.micro_batches > 1:
    taken = gradients_apart(
      loss,
      state.params,
      parts,
      weigh,
      micro_batches=settings.micro_batches,
      measure=measure,
    )
  else:
    taken = gradients_together(loss, state.params, parts, weigh)
  updates, opt_state = optimizer.update(
    taken.balanced,
    state.opt_state,
    state.params,
    losses=taken.losses,
    valid=taken.valid,
    gradient_norms=taken.norms,
    anchor=anchor,
  )
  params = optax.apply_updates(state.params, updates)
  if not settings.cross_entropy:
    params, opt_state = _unless_empty(
      taken.valid["kd"], (params, opt_state), (state.params, state.opt_state)
    )
  metrics = describe(taken, opt_state["balance"], trajectory)
  if not settings.cross_entropy:
    metrics = {name: value for name, value in metrics.items() if name not in OF_BOTH}
  return TrainState(state.step + 1, params, opt_state), metrics


def _unless_empty(valid: Array, moved: Any, before: Any) -> Any:
  """What moved, or where no token entered the loss what was there: no decay, and no
  momentum of earlier steps. Only time passes: all counts but Adam's of its gradients.
  """

  def choose(new: Any, old: Any) -> Any:
    if not isinstance(new, optax.ScaleByAdamState) and jnp.ndim(new) == 0:
      return new
    return jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, old)

  return jax.tree.map(
    choose, moved, before, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
  )


OF_BOTH = frozenset(
  {"loss_sft", "ema_sft", "kd_ratio", "grad_norm_sft", "grad_norm_kd", "grad_cosine"}
)
"""What is not worth logging where there is no cross-entropy."""


def describe(
  taken: Gradients,
  balance_state: balance.BalanceState,
  trajectory: objective.Trajectory,
) -> dict[str, Array]:
  """Scalars to log of one step."""
  out = {
    "loss_sft": taken.losses["sft"],
    "grad_norm": optax.tree.norm(taken.balanced),
  }
  seen = dict(taken.seen)
  if objective.ROWS in seen:
    out[objective.ROWS] = sharding.everywhere(seen.pop(objective.ROWS))
  if not seen:
    return out
  kd_weight = balance.loss_weights(balance_state)["kd"]
  out |= {
    "loss_kd": taken.losses["kd"],
    "ema_sft": balance_state.ema["sft"],
    "ema_kd": balance_state.ema["kd"],
    "kd_weight": kd_weight,
    "kd_ratio": kd_weight * taken.losses["kd"] / taken.losses["sft"],
    # NaN is logged as null: without a rollout there is no mass to speak of.
    "teacher_mass_in_support": jnp.where(
      taken.valid["kd"], seen["teacher_mass_in_support"], jnp.nan
    ),
    "student_mass_outside_support": jnp.where(
      taken.valid["kd"], 1.0 - seen["student_mass_in_support"], jnp.nan
    ),
    "rollout_length": jnp.mean(trajectory.length_B.astype(jnp.float32)),
    "rollout_empty": jnp.mean(trajectory.length_B == 0),
  }
  for name in objective.POSITION_BINS:
    # 0/0 is NaN on purpose: no rollout reached this far, and the log shows null.
    out[f"kd_at_{name}"] = seen[f"kd_sum_at_{name}"] / seen[f"kd_count_at_{name}"]
  if taken.norms is not None:
    out |= {f"grad_norm_{name}": norm for name, norm in taken.norms.items()}
    out["grad_cosine"] = taken.cosine
  return out
