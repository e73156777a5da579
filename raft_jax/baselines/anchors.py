"""Optax transformations that keep the parameters near the base model.

Each takes θ₀ as the keyword `anchor`, so one copy of it serves as teacher, anchor and
base of pruning, and neither the optimizer's state nor its checkpoints hold another. The
place of a transformation in the chain matters; its docstring states it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class PullState(NamedTuple):
  """State of the pulls to the anchor."""

  step: jax.Array  # shape=(), int32; updates made
  importance: Any  # like the parameters, or () for equal weights


def add_pull(
  strength: float, *, weighted: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Adds the gradient of a quadratic penalty: the coupled form of L2-SP and EWC.

  .. math::
    g \\leftarrow g + \\lambda F \\odot (\\theta - \\theta_0), \\quad
    \\Omega = \\frac\\lambda2 \\sum_j F_j (\\theta_j - \\theta_{0,j})^2

  F = 1 is L2-SP: Li, Grandvalet and Davoine, *Explicit Inductive Bias for Transfer
  Learning*, arXiv 1802.01483. With F a Fisher information it is EWC: Kirkpatrick et
  al., *Overcoming catastrophic forgetting in neural networks*, arXiv 1612.00796. Stands
  before Adam, which rescales it together with the gradient.

  Args:
    strength: λ >= 0, in units of the loss.
    weighted: Whether the state holds an F, ones until `with_importance` sets it.

  Returns:
    A transformation whose update takes the keyword `anchor`, a tree like the
    parameters.

  Raises:
    ValueError: If `strength` < 0.
  """
  _check_not_negative(strength=strength)

  def update(updates, state, params, *, anchor, **extra):
    del extra
    pulled = _map(
      lambda u, p, a, f: u + (strength * f * (p - a)).astype(u.dtype),
      updates,
      params,
      anchor,
      _importance(state, params),
    )
    return pulled, _counted(state)

  return optax.GradientTransformationExtraArgs(_pull_init(weighted), update)


def shrink_to_anchor(
  schedule: optax.Schedule, strength: float, *, weighted: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Pulls the updated parameters back to θ₀: the decoupled form of L2-SP and EWC.

  .. math::
    \\theta \\leftarrow \\theta' - \\frac{\\eta_t \\lambda F}{1 + \\eta_t \\lambda F}
    \\odot (\\theta' - \\theta_0), \\quad \\theta' = \\theta + u

  with u the optimizer's update. It is the proximal step of the penalty of `add_pull`:
  equal to u - ηλF(θ - θ₀) up to second order, and stable for any λF. Stands last, after
  the learning rate. Weight decay works against it.

  Args:
    schedule: Learning rate η by update.
    strength: λ >= 0. Over a run, a weight that nothing else moves keeps about
      exp(-Σ_t η_t λ F) of its distance.
    weighted: As in `add_pull`.

  Returns:
    A transformation whose update takes the keyword `anchor`.

  Raises:
    ValueError: If `strength` < 0.
  """
  _check_not_negative(strength=strength)

  def update(updates, state, params, *, anchor, **extra):
    del extra
    rate = schedule(state.step) * strength

    def shrink(u, p, a, f):
      share = rate * f / (1 + rate * f)
      # (p - a) first: added to p itself, the small update would lose digits.
      return u - (share * ((p - a) + u)).astype(u.dtype)

    shrunk = _map(shrink, updates, params, anchor, _importance(state, params))
    return shrunk, _counted(state)

  return optax.GradientTransformationExtraArgs(_pull_init(weighted), update)


def with_importance(state: PullState, importance: Any) -> PullState:
  """The state with this F, in the dtypes that it had; checkpoints store it."""
  return state._replace(
    importance=jax.tree.map(
      lambda old, new: new.astype(old.dtype), state.importance, importance
    )
  )


class RecAdamState(NamedTuple):
  """State of `recadam`."""

  step: jax.Array  # shape=(), int32; updates made
  first: Any  # like the parameters; mean of the gradient
  second: Any  # like the parameters; mean of its square


def sigmoid_annealing(steepness: float, midpoint: float) -> optax.Schedule:
  """λ(t) = 1 / (1 + exp(-k (t - t₀))), t = 1 at the first update."""
  return lambda count: jax.nn.sigmoid(steepness * (count + 1 - midpoint))


def recadam(
  schedule: optax.Schedule,
  annealing: optax.Schedule,
  gamma: float,
  *,
  weight_decay: float = 0.0,
  mask: Callable[[Any], Any] | None = None,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
  """Adam with an objective that anneals from staying at θ₀ to the task.

  .. math::
    \\theta' = \\theta - \\eta_t \\frac{\\sqrt{1 - \\beta_2^t}}{1 - \\beta_1^t}
      \\lambda(t) \\frac{m_t}{\\sqrt{v_t} + \\epsilon}, \\quad
    \\theta \\leftarrow
      \\theta' - \\eta_t (1 - \\lambda(t)) \\gamma (\\theta' - \\theta_0)

  Chen et al., *Recall and Learn*, arXiv 2004.12651, as in its published code: λ does
  not enter the moments, and ε is added before the bias correction. `recadam` applies
  the learning rate itself and replaces AdamW in the chain.

  Args:
    schedule: Learning rate η by update; η (1 - λ) γ must stay below 1, or the pull
      overshoots θ₀.
    annealing: λ by update, in 0..1; see `sigmoid_annealing`. λ = 1 is Adam.
    gamma: γ >= 0, strength of the pull.
    weight_decay: Decoupled weight decay of the parameters that `mask` marks.
    mask: Parameters to a tree of bools; None marks all.
    b1, b2, eps: β₁ and β₂ of the moments, and ε.

  Returns:
    A transformation whose update takes the keyword `anchor`.

  Raises:
    ValueError: If `gamma` or `weight_decay` is below 0.
  """
  _check_not_negative(gamma=gamma, weight_decay=weight_decay)

  def update(updates, state, params, *, anchor, **extra):
    del extra
    rate, weight = schedule(state.step), annealing(state.step)
    count = optax.safe_increment(state.step)
    first = optax.tree.update_moment(updates, state.first, b1, 1)
    second = optax.tree.update_moment_per_elem_norm(updates, state.second, b2, 2)
    step = rate * jnp.sqrt(1 - b2**count) / (1 - b1**count) * weight
    pull = rate * (1 - weight) * gamma
    decays = mask(params) if mask else jax.tree.map(lambda _: True, params)

    def move(m, v, p, a, decay):
      u = -step * m / (jnp.sqrt(v) + eps)
      u = u - pull * ((p - a) + u)
      return u - rate * weight_decay * decay * (p + u)

    moves = _map(move, first, second, params, anchor, decays)
    return moves, RecAdamState(count, first, second)

  return optax.GradientTransformationExtraArgs(_recadam_init, update)


def _recadam_init(params: Any) -> RecAdamState:
  first, second = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
  return RecAdamState(jnp.zeros((), jnp.int32), first, second)


def largest_pull(
  rates: Any, annealing: optax.Schedule, gamma: float, steps: int
) -> float:
  """max_t η_t (1 - λ(t)) γ of a run; `recadam` needs it below 1.

  Args:
    rates: η of every step, [steps].
    annealing: λ by step.
    gamma: γ.
    steps: number of steps.
  """
  weights = jax.vmap(annealing)(jnp.arange(steps))
  largest = float(jnp.max(jnp.asarray(rates) * (1 - weights)) * gamma)
  return largest if math.isfinite(largest) else math.inf


class AverageState(NamedTuple):
  """State of `average_params`."""

  average: Any  # like the parameters, float32


def average_params(rate: float) -> optax.GradientTransformationExtraArgs:
  """Keeps a moving average of the parameters, as for a teacher; updates pass unchanged.

  .. math:: \\phi \\leftarrow (1 - r) \\phi + r \\theta, \\quad \\phi_0 = \\theta_0

  Stands last, so θ includes this update. In bfloat16 a small r would be rounded away,
  so the average is at least float32.

  Args:
    rate: r in 0..1; 0 keeps φ at its start, 1 follows θ.

  Raises:
    ValueError: If `rate` is outside 0..1.
  """
  if not 0 <= rate <= 1:
    raise ValueError(f"rate={rate} must be in 0..1")

  def init(params):
    return AverageState(
      jax.tree.map(
        lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True),
        params,
      )
    )

  def update(updates, state, params, **extra):
    del extra
    average = jax.tree.map(
      lambda f, p, u: f + rate * ((p - f) + u), state.average, params, updates
    )
    return updates, AverageState(average)

  return optax.GradientTransformationExtraArgs(init, update)


def _pull_init(weighted: bool) -> Callable[[Any], PullState]:
  def init(params):
    ones = jax.tree.map(jnp.ones_like, params) if weighted else ()
    return PullState(jnp.zeros((), jnp.int32), ones)

  return init


def _importance(state: PullState, params: Any) -> Any:
  if isinstance(state.importance, tuple) and not state.importance:
    return jax.tree.map(lambda _: 1.0, params)
  return state.importance


def _map(f: Callable[..., jax.Array], first: Any, *others: Any) -> Any:
  """`jax.tree.map` that keeps the leaves which `optax.masked` left out."""

  def masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)

  return jax.tree.map(
    lambda leaf, *rest: leaf if masked(leaf) else f(leaf, *rest),
    first,
    *others,
    is_leaf=masked,
  )


def _counted(state: PullState) -> PullState:
  return state._replace(step=optax.safe_increment(state.step))


def _check_not_negative(**numbers: float) -> None:
  for name, number in numbers.items():
    if number < 0:
      raise ValueError(f"{name}={number} must be >= 0")
