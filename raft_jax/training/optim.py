"""From the config's sections to the learning rate, the balancer and the optax chain.

Each part of a method is a transformation that is in the chain only if its section is
in the config, so a config without any runs plain AdamW, bit for bit.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from raft_jax import balance, errors
from raft_jax.baselines import anchors, das, freezing
from raft_jax.config import schema
from raft_jax.models import hybrid, transformer

ANCHOR, AVERAGE, SOFT_MASK = "anchor", "average", "soft_mask"
"""Names of the chain's parts whose state other modules read or set."""

# --- Learning rate and balancer -------------------------------------------------------


def warmup_cosine(
  peak: float, total_steps: int, warmup_ratio: float = 0.03
) -> optax.Schedule:
  """Linear warm-up, then a cosine to 0 at `total_steps`.

  The first step has the rate peak / warm-up steps, not 0, because a step at rate 0
  would pay for a rollout and learn nothing.
  """
  warmup = min(max(1, math.ceil(warmup_ratio * total_steps)), total_steps)
  return optax.join_schedules(
    [
      optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)),
      optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1)),
    ],
    [warmup],
  )


def make_balancer(
  settings: schema.Balance, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """The loss balancer of the `balance` section."""
  if settings.mode == "fixed":
    return balance.balance_fixed(settings.weight)
  if settings.mode == "schedule":
    return balance.balance_by_schedule(
      optax.linear_schedule(settings.start, settings.weight, total_steps)
    )
  if settings.mode == "gradient_norm":
    return balance.balance_by_gradient_norm(
      settings.weight, settings.max_weight, settings.eps
    )
  return balance.balance_by_ema(settings.decay, settings.eps, settings.max_weight)


# --- The chain ------------------------------------------------------------------------

_EXEMPT = re.compile(
  r"norm|^(ln|bias|scale)(_?\w)?$|_(ln|bias)$|^xielu_|^sinks$|^(delta_)?a_log$"
  r"|layer_scale$|^router_(expert_)?scale$"
)


def decays(params: Any) -> Any:
  """Mask tree of bools: weight decay applies to all but norm scales and biases.

  The numbers of an activation (`xielu_p`) and attention's `sinks` are exempt, too, and
  so is `a_log`, the decay of a state (`gated_delta`), as in its authors' code.
  `layer_scale` never changes. The factors of a router's input and of the weights of its
  experts (`router_scale`, `router_expert_scale`) are scales, too.

  The names in a parameter's path decide, in the spelling of this package, of Flax and
  of transformers: a name that contains `norm` (`input_norm`, `LayerNorm_0`), or is
  `ln`, `bias` or `scale`, with or without a number.
  """

  def applies(path: Any, _: Any) -> bool:
    names = jax.tree_util.keystr(path, simple=True, separator="/").lower().split("/")
    return not any(_EXEMPT.search(name) for name in names)

  return jax.tree_util.tree_map_with_path(applies, params)


Named = tuple[str, optax.GradientTransformation]


def chain(
  balancer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  weight_decay: float,
  clip: float | None,
  decay_mask: Callable[[Any], Any] = decays,
  adam: optax.GradientTransformation | None = None,
  gradients: Sequence[Named] = (),
  updates: Sequence[Named] = (),
  skips_empty: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """The optimizer: loss balancer, clipping by global norm, AdamW, and named parts.

  The balancer does not change the gradients. It is in the chain so that checkpoints and
  shardings contain its state.

  Args:
    balancer: one of `raft_jax.balance`.
    schedule: learning rate by step.
    weight_decay: decoupled, as in Loshchilov and Hutter, arXiv 1711.05101.
    clip: largest global norm of the gradient, or None for no clipping.
    decay_mask: parameters to a tree of bools, True where they decay.
    adam: replaces AdamW, and applies learning rate and decay itself.
    gradients: named parts before the clipping, such as the gradient of a penalty.
    updates: named parts after Adam, such as a mask.
    skips_empty: whether AdamW keeps its moments in steps without a token to distil;
      see `skip_empty`.
  """
  clipping = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
  if adam is None:
    moments = optax.scale_by_adam()
    # The parts of `optax.adamw`.
    adam = optax.chain(
      skip_empty(moments) if skips_empty else moments,
      optax.add_decayed_weights(weight_decay, decay_mask),
      optax.scale_by_learning_rate(schedule),
    )
  return optax.named_chain(
    ("balance", balancer),
    *gradients,
    ("clip", clipping),
    ("adamw", adam),
    *updates,
  )


# --- From the config ------------------------------------------------------------------


def pulls(anchor: schema.Anchor | None) -> bool:
  """Whether the chain has a pull to the base model; one of strength 0 is left out."""
  return anchor is not None and anchor.strength > 0


def weighs_pull(anchor: schema.Anchor | None) -> bool:
  """Whether the importance of each parameter weighs the pull."""
  return anchor is not None and pulls(anchor) and anchor.importance != "none"


def reads_anchor(anchor: schema.Anchor | None, recadam: schema.Recadam | None) -> bool:
  """Whether updates read the base model's parameters."""
  return pulls(anchor) or recadam is not None


def make_optimizer(
  config: schema.Config,
  balancer: optax.GradientTransformationExtraArgs,
  schedule: optax.Schedule,
  shapes: transformer.Params,
  decoder: transformer.DecoderConfig,
  total_steps: int,
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a run.

  Args:
    shapes: of the trained parameters.
    decoder: the model's.
    total_steps: of the run.

  Raises:
    errors.UserError: a section's values do not fit this model or run.
  """
  gradients: list[Named] = []
  updates: list[Named] = []
  skips_empty = not config.train.cross_entropy
  rates = np.asarray(jax.vmap(schedule)(np.arange(total_steps)), np.float64)
  if config.anchor is not None and pulls(config.anchor):
    pull = _pull(config.anchor, schedule, rates)
    (gradients if config.anchor.mode == "coupled" else updates).append((ANCHOR, pull))
  if config.freeze is not None:
    mask = make_mask(config.freeze, shapes, decoder, config.train.seed)
    # On the gradients, so that frozen ones do not count for the clipped norm, and on
    # the updates, so that frozen weights do not move.
    gradients.append(("count", freezing.scale(mask)))
    updates.append(("freeze", freezing.scale(mask)))
  if config.soft_mask is not None:
    _refuse_hybrid(decoder, "soft_mask: the importance of attention heads")
    updates.append((SOFT_MASK, das.soften(decoder)))
  if config.distill.teacher == "average":
    average = anchors.average_params(config.distill.average_rate)
    updates.append((AVERAGE, skip_empty(average) if skips_empty else average))
  adam = None
  if config.recadam is not None:
    adam = _recadam(config.recadam, config.train.weight_decay, schedule, rates)
    adam = skip_empty(adam, counters=("step",)) if skips_empty else adam
  return chain(
    balancer,
    schedule,
    weight_decay=config.train.weight_decay,
    clip=config.train.clip,
    adam=adam,
    gradients=gradients,
    updates=updates,
    skips_empty=skips_empty,
  )


def skip_empty(
  inner: optax.GradientTransformation, *, counters: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
  """`inner`, whose state does not change in steps without a token to distil.

  For runs whose only loss is distillation: if no rollout of a batch can be used,
  moments and averages must not move. The state has the tree of `inner`'s.

  Args:
    counters: fields of the state that count the steps of the run, and so always move.
  """
  inner = optax.with_extra_args_support(inner)

  def update(updates, state, params=None, *, valid, **extra):
    updates, moved = inner.update(updates, state, params, valid=valid, **extra)
    kept = jax.tree.map(lambda new, old: jnp.where(valid["kd"], new, old), moved, state)
    counted = {name: getattr(moved, name) for name in counters}
    return updates, kept._replace(**counted) if counted else kept

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _refuse_hybrid(decoder: transformer.DecoderConfig, what: str) -> None:
  if hybrid.is_hybrid(decoder):
    count, kind = len(hybrid.second_layers(decoder)), "attention heads of another shape"
    if decoder.delta is not None:
      kind = "linear attention"
    elif not count:
      count, kind = (
        decoder.n_layers - hybrid.first_sharing(decoder),
        "the keys and values of another layer",
      )
    raise errors.UserError(
      f"{what} is not defined for layers with {kind}, and {count} of the model's "
      f"{decoder.n_layers} layers have it; use another model or method"
    )


def make_mask(
  settings: schema.Freeze,
  shapes: transformer.Params,
  decoder: transformer.DecoderConfig,
  seed: int,
) -> Any:
  """The mask of the `freeze` section."""
  layers_of = functools.partial(hybrid.layers_of, decoder)
  if settings.mode == "names":
    return freezing.by_name(shapes, settings.names, layers_of)
  if settings.mode == "half":
    _refuse_hybrid(decoder, "freeze.mode: half of the attention projections")
    return freezing.half(shapes, seed)
  count = decoder.n_layers
  layers = count // 2 if settings.layers is None else settings.layers
  if layers > count:
    raise errors.UserError(
      f"freeze.layers: {layers}, but the model has {count}; freeze fewer"
    )
  return freezing.bottom(shapes, layers, layers_of)


def _pull(
  settings: schema.Anchor, schedule: optax.Schedule, rates: np.ndarray
) -> optax.GradientTransformationExtraArgs:
  weighted = weighs_pull(settings)
  if settings.mode == "coupled":
    return anchors.add_pull(settings.strength, weighted=weighted)
  # With a learning rate of 0 no weight moves, so there is nothing to pull back.
  strength = settings.strength / rates.sum() if rates.any() else 0.0
  return anchors.shrink_to_anchor(schedule, float(strength), weighted=weighted)


def _recadam(
  settings: schema.Recadam,
  weight_decay: float,
  schedule: optax.Schedule,
  rates: np.ndarray,
) -> optax.GradientTransformationExtraArgs:
  annealing = anchors.sigmoid_annealing(
    settings.steepness, settings.midpoint * len(rates)
  )
  largest = anchors.largest_pull(rates, annealing, settings.gamma, len(rates))
  if largest >= 1:
    raise errors.UserError(
      f"recadam.gamma: {settings.gamma:g} with train.learning_rate={rates.max():g} "
      f"pulls {largest:.3g} of the way to the base model in one step; keep it below 1: "
      "lower one of the two"
    )
  return anchors.recadam(
    schedule, annealing, settings.gamma, weight_decay=weight_decay, mask=decays
  )
