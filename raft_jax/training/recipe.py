"""The parts of a method that act on updates: from the config's sections to the chain.

Each part is a transformation that is there only where its section is, so that a config
without it runs plain AdamW, bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from raft_jax import balance, errors
from raft_jax.baselines import anchors, das, freezing
from raft_jax.config import schema
from raft_jax.models import transformer
from raft_jax.training import optim

ANCHOR, AVERAGE, SOFT_MASK = "anchor", "average", "soft_mask"
"""Names of parts in the chain whose state others read or set."""


def make_balancer(
  config: schema.Balance, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """The balancer that the config asks for."""
  if config.mode == "fixed":
    return balance.balance_fixed(config.weight)
  if config.mode == "schedule":
    return balance.balance_by_schedule(
      optax.linear_schedule(config.start, config.weight, total_steps)
    )
  if config.mode == "gradient_norm":
    return balance.balance_by_gradient_norm(
      config.weight, config.max_weight, config.eps
    )
  return balance.balance_by_ema(config.decay, config.eps, config.max_weight)


def pulls(anchor: schema.Anchor | None) -> bool:
  """Whether there is a pull: one of strength 0 is not computed at all."""
  return anchor is not None and anchor.strength > 0


def weighs(anchor: schema.Anchor | None) -> bool:
  """Whether the pull is weighted by the importance of each parameter."""
  return anchor is not None and pulls(anchor) and anchor.importance != "none"


def anchored(config: schema.Config) -> bool:
  """Whether updates read the base model's parameters."""
  return pulls(config.anchor) or config.recadam is not None


def make_optimizer(
  config: schema.Config,
  balancer: optax.GradientTransformationExtraArgs,
  schedule: optax.Schedule,
  shapes: transformer.Params,
  decoder: transformer.DecoderConfig,
  total_steps: int,
) -> optax.GradientTransformationExtraArgs:
  """The whole chain: balance, gradients, clipping, Adam, updates.

  Args:
    shapes: of what is trained.
    decoder: of the model.
    total_steps: of the run.

  Raises:
    errors.UserError: a section's values do not fit this model or run.
  """
  gradients: list[optim.Named] = []
  updates: list[optim.Named] = []
  rates = np.asarray(jax.vmap(schedule)(np.arange(total_steps)), np.float64)
  if config.anchor is not None and pulls(config.anchor):
    pull = _pull(config.anchor, schedule, rates)
    (gradients if config.anchor.mode == "coupled" else updates).append((ANCHOR, pull))
  if config.freeze is not None:
    mask = make_mask(config.freeze, shapes, config.train.seed)
    # On the gradients for the norm that is clipped, on the updates for the weights.
    gradients.append(("count", freezing.scale(mask)))
    updates.append(("freeze", freezing.scale(mask)))
  if config.soft_mask is not None:
    updates.append((SOFT_MASK, das.soften(decoder)))
  if config.distill.teacher == "average":
    updates.append((AVERAGE, anchors.average_params(config.distill.average_rate)))
  adam = None
  if config.recadam is not None:
    adam = _recadam(config.recadam, config.train.weight_decay, schedule, rates)
  return optim.chain(
    balancer,
    schedule,
    weight_decay=config.train.weight_decay,
    clip=config.train.clip,
    adam=adam,
    gradients=gradients,
    updates=updates,
  )


def make_mask(config: schema.Freeze, shapes: transformer.Params, seed: int) -> Any:
  """The mask of the `freeze` section."""
  if config.mode == "names":
    return freezing.by_name(shapes, config.names)
  if config.mode == "half":
    return freezing.half(shapes, seed)
  count = shapes["layers"]["q"].shape[0]
  layers = count // 2 if config.layers is None else config.layers
  if layers > count:
    raise errors.UserError(
      f"freeze.layers: {layers}, but the model has {count}; freeze fewer"
    )
  return freezing.bottom(shapes, layers)


def _pull(
  config: schema.Anchor, schedule: optax.Schedule, rates: np.ndarray
) -> optax.GradientTransformationExtraArgs:
  weighted = weighs(config)
  if config.mode == "coupled":
    return anchors.add_pull(config.strength, weighted=weighted)
  # A run that does not move (rate 0) has nothing to pull back.
  strength = config.strength / rates.sum() if rates.any() else 0.0
  return anchors.shrink_to_anchor(schedule, float(strength), weighted=weighted)


def _recadam(
  config: schema.Recadam,
  weight_decay: float,
  schedule: optax.Schedule,
  rates: np.ndarray,
) -> optax.GradientTransformationExtraArgs:
  annealing = anchors.sigmoid_annealing(config.steepness, config.midpoint * len(rates))
  largest = anchors.largest_pull(rates, annealing, config.gamma, len(rates))
  if largest >= 1:
    raise errors.UserError(
      f"recadam.gamma: {config.gamma:g} with train.learning_rate={rates.max():g} pulls "
      f"{largest:.3g} of the way to the base model in one step; keep it below 1: lower "
      "one of the two"
    )
  return anchors.recadam(
    schedule, annealing, config.gamma, weight_decay=weight_decay, mask=optim.decays
  )
