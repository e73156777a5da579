"""Balance of the two losses: L = L_SFT + λ L_KD, with λ in the optimizer state.

A balancer is an optax transformation that does not change the gradients and keeps the
weights in its state. All balancers share `BalanceState`, and one call serves them all,
because each takes the keywords that it needs and ignores the rest. Put it first in the
chain, and get the new weights *before* the gradients exist, by updating an empty tree::

  tx = optax.named_chain(("balance", balance_by_ema()), ("adamw", optax.adamw(5e-6)))
  losses, pullback = jax.vjp(both_losses, params)       # {"sft": ..., "kd": ...}
  _, balanced = balancer.update({}, opt_state["balance"], losses=losses)
  grads, = pullback(loss_weights(balanced))             # λ is a constant to it
  updates, opt_state = tx.update(grads, opt_state, params, losses=losses)

The last line advances the *old* state by the same losses, so `opt_state["balance"]`
then equals `balanced`; nothing is advanced twice. Losses must be means over the whole
batch (all devices, all micro-batches), and the step must use the weights of the current
losses, not those of the step before. The arguments of a balancer are static, so
`optax.inject_hyperparams` does not work with one; for a planned change of λ use
`balance_by_schedule`. Needs jax and optax only.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

LOSSES = ("sft", "kd")


class BalanceState(NamedTuple):
  """State of every balancer; its tree, shapes and dtypes never change."""

  counts: dict[str, jax.Array]  # how often each loss moved; shape=(), int32
  ema: dict[str, jax.Array]  # bias-corrected mean of each; shape=(), float32
  weights: dict[str, jax.Array]  # weight of each loss; shape=(), float32


def loss_weights(state: BalanceState) -> dict[str, jax.Array]:
  """Weights of the losses, `{"sft": 1, "kd": λ}`, float32 scalars.

  Args:
    state: State of a balancer.

  Returns:
    The weight of each loss, to be used as the cotangent of `{"sft": ..., "kd": ...}`.
    They are float32 like the result of `losses.masked_mean`; cast them for losses of
    another type. They carry no gradient, because updates stop it.
  """
  return state.weights


def ema_init(weight: jax.typing.ArrayLike = 0.0) -> BalanceState:
  """State before the first step.

  Args:
    weight: λ until an update changes it.

  Returns:
    Zero counts and means, weights `{"sft": 1, "kd": weight}`.
  """
  return BalanceState(
    counts={name: jnp.zeros((), jnp.int32) for name in LOSSES},
    ema={name: jnp.zeros((), jnp.float32) for name in LOSSES},
    weights=_weights(weight),
  )


def ema_update(
  state: BalanceState,
  losses: Mapping[str, jax.typing.ArrayLike],
  *,
  decay: float = 0.9,
  eps: float = 1e-8,
  max_weight: float | None = None,
  valid: Mapping[str, jax.typing.ArrayLike] | None = None,
) -> BalanceState:
  """One step of RAFT's balance (Eq. 11-12 of arXiv 2606.00147).

  .. math::
    m_k \\leftarrow \\beta m_k + (1 - \\beta) L_k, \\quad
    \\hat m_k = m_k / (1 - \\beta^s), \\quad
    \\lambda = \\hat m_{sft} / (\\hat m_{kd} + \\epsilon)

  The means include the current losses: at step 1, λ = L_sft / (L_kd + ε). The state
  holds the bias-corrected mean, which moves by (L - m̂)·(1 - β) / (1 - β^s), so it can
  be read without knowing β.

  Args:
    state: From `ema_init` or the step before.
    losses: `{"sft": ..., "kd": ...}`, scalars >= 0, means over the whole batch; no
      gradient. Check them for NaN first: a mean never forgets one.
    decay: β in [0, 1); with 0 only the current losses count.
    eps: ε > 0 in the denominator, in units of the loss.
    max_weight: Upper bound of λ, or None. Without it a vanishing L_kd makes λ as large
      as L_sft / ε, which amplifies rounding errors.
    valid: `{"sft": ..., "kd": ...}`, bool scalars. A loss that is not valid (no token
      counted) changes neither its mean nor its count. None means that both are valid.

  Returns:
    The next state. λ is 0 until both losses have moved once.

  Raises:
    ValueError: If `losses` or `valid` has other names, or a number is out of range.
  """
  _check_ema(decay, eps, max_weight)
  _check_names("losses", losses)
  valid = dict.fromkeys(LOSSES, True) if valid is None else valid
  _check_names("valid", valid)
  log_decay = math.log(decay) if decay > 0 else -math.inf
  counts, ema = {}, {}
  for name in LOSSES:
    moves = jnp.asarray(valid[name], bool)
    counts[name] = state.counts[name] + moves.astype(jnp.int32)
    # expm1 keeps 1 - β^s exact for β near 1; max keeps a loss that never moved finite.
    gain = jnp.expm1(log_decay) / jnp.expm1(jnp.maximum(counts[name], 1) * log_decay)
    gap = _scalar(losses[name]) - state.ema[name]
    ema[name] = state.ema[name] + jnp.where(moves, gain * gap, 0)
  weight = _cap(ema["sft"] / (ema["kd"] + eps), max_weight)
  both_moved = (counts["sft"] > 0) & (counts["kd"] > 0)
  return BalanceState(counts, ema, _weights(jnp.where(both_moved, weight, 0)))


def balance_by_ema(
  decay: float = 0.9, eps: float = 1e-8, max_weight: float | None = None
) -> optax.GradientTransformationExtraArgs:
  """RAFT's balance: λ is the ratio of the two losses' running means.

  `update(updates, state, params=None, *, losses, valid=None)` calls `ema_update`.
  `losses` is keyword-only and has no default, so a call without it is a TypeError. The
  updates pass unchanged.

  Args:
    decay: β in [0, 1).
    eps: ε > 0 in the denominator.
    max_weight: Upper bound of λ, or None.

  Returns:
    An `optax.GradientTransformationExtraArgs` with state `BalanceState`.

  Raises:
    ValueError: If a number is out of range.
  """
  _check_ema(decay, eps, max_weight)

  def init(params):
    del params
    return ema_init()

  def update(updates, state, params=None, *, losses, valid=None, **extra):
    del params, extra
    return updates, ema_update(
      state, losses, decay=decay, eps=eps, max_weight=max_weight, valid=valid
    )

  return optax.GradientTransformationExtraArgs(init, update)


def balance_fixed(weight: float) -> optax.GradientTransformationExtraArgs:
  """A constant λ. Its state never changes, and it ignores all keywords.

  Args:
    weight: λ >= 0.

  Returns:
    An `optax.GradientTransformationExtraArgs` with state `BalanceState`.

  Raises:
    ValueError: If `weight` < 0.
  """
  if weight < 0:
    raise ValueError(f"weight={weight} must be >= 0")

  def init(params):
    del params
    return ema_init(weight)

  def update(updates, state, params=None, **extra):
    del params, extra
    return updates, state

  return optax.GradientTransformationExtraArgs(init, update)


def balance_by_schedule(
  schedule: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
  """λ as a function of the step: the n-th update (from 0) sets λ = schedule(n).

  Both counts hold the number of updates. It ignores all keywords.

  Args:
    schedule: Step count (int32 scalar) to λ >= 0.

  Returns:
    An `optax.GradientTransformationExtraArgs` with state `BalanceState`.
  """

  def init(params):
    del params
    state = ema_init()
    return state._replace(weights=_weights(schedule(state.counts["kd"])))

  def update(updates, state, params=None, **extra):
    del params, extra
    weights = _weights(schedule(state.counts["kd"]))
    counts = {name: optax.safe_increment(state.counts[name]) for name in LOSSES}
    return updates, state._replace(counts=counts, weights=weights)

  return optax.GradientTransformationExtraArgs(init, update)


ROUND_OFF = 1e-6
"""In float32, a gradient smaller than this share of the other is only rounding."""


def balance_by_gradient_norm(
  ratio: float = 1.0, max_weight: float | None = None, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
  """Experimental: λ such that ‖λ g_KD‖ = ratio · ‖g_SFT‖.

  `update(..., gradient_norms=None, valid=None)` takes the norms of the two losses' own
  gradients, `{"sft": ..., "kd": ...}`, and whether any token entered each loss. λ does
  not change if a step passes None because it did not measure, if a loss had no token,
  or if g_KD is only rounding (as at the first step of a teacher that sees what the
  student does). λ is 0 until the first measurement, so measure at steps 1 and 2.
  `BalanceState.ema` holds the last norms, and the counts how often they were measured.

  Args:
    ratio: Target ratio of the weighted norms, > 0.
    max_weight: Upper bound of λ, or None.
    eps: Added to ‖g_KD‖, > 0.

  Returns:
    An `optax.GradientTransformationExtraArgs` with state `BalanceState`.

  Raises:
    ValueError: If a number is out of range or `gradient_norms` has other names.
  """
  _check_positive(ratio=ratio, eps=eps, max_weight=max_weight)

  def init(params):
    del params
    return ema_init()

  def update(updates, state, params=None, *, gradient_norms=None, valid=None, **extra):
    del params, extra
    if gradient_norms is None:
      return updates, state
    _check_names("gradient_norms", gradient_norms)
    norms = {name: _scalar(gradient_norms[name]) for name in LOSSES}
    usable = norms["kd"] > ROUND_OFF * norms["sft"]
    if valid is not None:
      _check_names("valid", valid)
      usable &= jnp.asarray(valid["sft"]) & jnp.asarray(valid["kd"])
    counts = {name: optax.safe_increment(state.counts[name]) for name in LOSSES}
    weight = _cap(ratio * norms["sft"] / (norms["kd"] + eps), max_weight)
    moved = BalanceState(counts, norms, _weights(weight))
    return updates, jax.tree.map(
      lambda new, old: jnp.where(usable, new, old), moved, state
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _scalar(value: jax.typing.ArrayLike) -> jax.Array:
  """A float32 scalar without gradient, whose type no later update can change."""
  return jax.lax.stop_gradient(jnp.asarray(value, jnp.float32)).reshape(())


def _weights(weight: jax.typing.ArrayLike) -> dict[str, jax.Array]:
  return {"sft": jnp.ones((), jnp.float32), "kd": _scalar(weight)}


def _cap(weight: jax.Array, max_weight: float | None) -> jax.Array:
  return weight if max_weight is None else jnp.minimum(weight, max_weight)


def _check_names(what: str, given: Mapping[str, object]) -> None:
  if set(given) != set(LOSSES):
    raise ValueError(f"{what} must be named {sorted(LOSSES)}, got {sorted(given)}")


def _check_positive(**numbers: float | None) -> None:
  for name, number in numbers.items():
    if number is not None and not number > 0:
      raise ValueError(f"{name}={number} must be > 0")


def _check_ema(decay: float, eps: float, max_weight: float | None) -> None:
  if not 0 <= decay < 1:
    raise ValueError(f"decay={decay} must be in [0, 1)")
  _check_positive(eps=eps, max_weight=max_weight)
