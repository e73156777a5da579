"""Schedules and the optimizer chain; every part is an optax transformation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax


def warmup_cosine(
  peak: float, total_steps: int, warmup_ratio: float = 0.03
) -> optax.Schedule:
  """Linear warm-up, then a cosine to 0 at `total_steps`.

  The first step already moves (peak / warm-up steps): a step at rate 0 would pay for a
  rollout and learn nothing.
  """
  warmup = min(max(1, math.ceil(warmup_ratio * total_steps)), total_steps)
  return optax.join_schedules(
    [
      optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)),
      optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1)),
    ],
    [warmup],
  )


_EXEMPT = re.compile(r"norm|^(ln|bias|scale)(_?\w)?$|_(ln|bias)$")


def decays(params: Any) -> Any:
  """Mask tree: True where weight decay applies: all but norm scales and biases.

  By the names in a parameter's path, of this package and as Flax and transformers have
  them: `norm` in one (`input_norm`, `LayerNorm_0`), or `ln`, `bias` or `scale` as one,
  numbered or not.
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
) -> optax.GradientTransformationExtraArgs:
  """The optimizer: loss balancer, clipping by global norm, AdamW, and what is between.

  The balancer does not touch the gradients; it sits here so that its state is part of
  the optimizer's, in checkpoints as in shardings.

  Args:
    balancer: one of `raft_jax.balance`.
    schedule: learning rate by step.
    weight_decay: decoupled, as in Loshchilov and Hutter, arXiv 1711.05101.
    clip: largest global norm of the gradient; None does not clip.
    decay_mask: parameters to a tree of bools, True where they decay.
    adam: takes AdamW's place; owns learning rate and decay.
    gradients: named parts before the clipping, such as a penalty's gradient.
    updates: named parts after Adam, such as a mask.
  """
  clipping = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
  if adam is None:
    adam = optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask)
  return optax.named_chain(
    ("balance", balancer),
    *gradients,
    ("clip", clipping),
    ("adamw", adam),
    *updates,
  )
