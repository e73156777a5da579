"""Adaptive replay: which general questions a run replays, and when (MSSR).

OUR RECONSTRUCTION of memory-aware adaptive replay (MSSR, arXiv 2603.09892), whose
equations were not available to us. Its abstract names the parts: each example has a
memory strength that fades with time and grows with replay; intervals grow; what is
remembered least is preferred; losses and elapsed steps replace evaluations. The
formulas are ours, after Ebbinghaus' forgetting curve:

.. math::
  R_i(t) = \\exp(-(t - t_i) / S_i), \\quad
  P_i \\propto (1 - R_i)^a (\\epsilon + \\max(0, l_i / l^0_i - 1))^b

Example i has a strength S_i in steps, was last replayed at step t_i, and had the loss
l^0_i under the base model; l_i is a moving average of its losses since then. After a
replay at step t with a loss l,

.. math::
  S_i \\leftarrow S_i (1 + g \\min(1, l^0_i / l)), \\quad t_i \\leftarrow t

and the interval to the next event grows by a factor, or shrinks by it if the event's
mean l / l^0 is above 1 + tolerance. With a = b = 0 and a factor of 1 this is uniform
replay at a fixed interval.

The memory is a value on the host. The losses of a step are read after the next step was
dispatched, so devices never wait; intervals of at least 2 steps ensure that an event's
losses have been read before the next event is drawn. So what step n replays is a
function of the seed, n, and the losses of the steps before n.

Shapes: N examples that can be replayed, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching, token_rows

Array = np.ndarray

STRONGEST = 1e6
"""Upper bound of a strength in steps; without one, doubling would overflow float32."""
LEAST_LOSS = 1e-6
"""Nats; keeps the ratio of two losses finite."""
_STREAM = 1
"""Separates these draws from others of the same seed and step."""


class Memory(NamedTuple):
  """What is known about the examples; steps count from 1."""

  strength_N: Array  # float32, steps
  replayed_N: Array  # int32, the step of the last replay; 0: never
  loss_N: Array  # float32, nats per token, moving average
  first_N: Array  # float32, nats per token, under the base model
  interval: Array  # [] float32, steps; rounded where it is used
  due: Array  # [] int32, the step of the next event


def fresh(first_N: Array, *, strength: float, interval: float) -> Memory:
  """The memory before the first step, from the losses under the base model."""
  first_N = np.asarray(first_N, np.float32)
  return Memory(
    np.full(first_N.shape, strength, np.float32),
    np.zeros(first_N.shape, np.int32),
    first_N,
    first_N.copy(),
    np.asarray(interval, np.float32),
    np.asarray(round(interval), np.int32),
  )


def probabilities(
  memory: Memory,
  now: int,
  *,
  age_exponent: float,
  loss_exponent: float,
  floor: float,
) -> Array:
  """P_i of the module docstring, float64 [N], > 0, with sum 1.

  Args:
    now: number of the step, greater than that of every replay so far.
    age_exponent: a.
    loss_exponent: b.
    floor: epsilon, > 0: the weight of an example that was not forgotten at all.
  """
  age_N = now - memory.replayed_N.astype(np.float64)
  forgotten_N = -np.expm1(-age_N / memory.strength_N)
  risen_N = np.maximum(0.0, ratios(memory.loss_N, memory.first_N) - 1)
  weight_N = forgotten_N**age_exponent * (floor + risen_N) ** loss_exponent
  return weight_N / weight_N.sum()


def draw(probability_N: Array, count: int, *, seed: int, now: int) -> Array:
  """Draws `count` different examples without replacement, by seed and step."""
  rng = np.random.default_rng((seed, now, _STREAM))
  return rng.choice(len(probability_N), count, replace=False, p=probability_N)


def after(
  memory: Memory,
  rows: Array,
  losses: Array,
  now: int,
  *,
  growth: float,
  decay: float,
  tolerance: float,
  interval: float,
  factor: float,
  longest: float,
) -> Memory:
  """The memory after some examples were replayed.

  Args:
    rows: numbers of the replayed examples, all different.
    losses: their losses in this step, nats per token.
    growth: g.
    decay: decay of the moving averages of the losses.
    tolerance: the share by which the mean loss may rise before the interval shrinks.
    interval: the first interval, and the shortest.
    factor: factor by which the interval grows and shrinks, >= 1.
    longest: upper bound of the interval.
  """
  risen = ratios(losses, memory.first_N[rows])
  strength_N, replayed_N = memory.strength_N.copy(), memory.replayed_N.copy()
  loss_N = memory.loss_N.copy()
  grown = memory.strength_N[rows] * (1 + growth * np.minimum(1, 1 / risen))
  strength_N[rows] = np.minimum(grown, STRONGEST)
  replayed_N[rows] = now
  loss_N[rows] = decay * memory.loss_N[rows] + (1 - decay) * losses
  forgets = risen.mean() > 1 + tolerance
  wanted = float(memory.interval) * (1 / factor if forgets else factor)
  bounded = min(max(wanted, interval), longest)
  return Memory(
    strength_N,
    replayed_N,
    loss_N,
    memory.first_N,
    np.asarray(bounded, np.float32),
    np.asarray(now + round(bounded), np.int32),
  )


def ratios(losses: Array, first: Array) -> Array:
  """l / l^0, float64."""
  return np.maximum(losses.astype(np.float64), LEAST_LOSS) / np.maximum(
    first, LEAST_LOSS
  )


def count(batch_size: int, share: float) -> int:
  """How many rows make up `share` of a batch.

  Raises:
    errors.UserError: the number is not whole; names the nearest shares that are.
  """
  exact = share * batch_size
  if abs(exact - round(exact)) < 1e-6 * batch_size:
    return round(exact)
  near = [n / batch_size for n in (math.floor(exact), math.ceil(exact))]
  raise errors.UserError(
    f"replay.share: {share:g} of train.batch_size={batch_size}, as replay.adaptive "
    f"takes it, is {exact:.2f} rows; set {near[0]:.6g} or {near[1]:.6g}"
  )


class Plan(NamedTuple):
  """What a run can replay, and how.

  Attributes:
    rows: all candidates; a row's number is its index here.
    size: rows of one event.
    widths: padded widths of the run's batches.
  """

  rows: Sequence[token_rows.Row]
  size: int
  settings: schema.Adaptive
  seed: int
  pad_id: int
  widths: Sequence[tuple[int, int, int]]


def make_plan(
  replay: schema.Replay | None,
  rows: Sequence[token_rows.Row],
  *,
  batch_size: int,
  seed: int,
  pad_id: int,
  widths: Sequence[tuple[int, int, int]],
) -> Plan | None:
  """The adaptive replay of the `replay` section, or None.

  Raises:
    errors.UserError: there are fewer rows than one event takes.
  """
  if replay is None or not is_adaptive(replay):
    return None
  assert replay.adaptive is not None
  size = count(batch_size, replay.share)
  if len(rows) < size:
    raise errors.UserError(
      f"replay.questions: {len(rows)} rows are fewer than the {size} of one event; "
      "give more of them, or lower replay.share"
    )
  return Plan(rows, size, replay.adaptive, seed, pad_id, widths)


def is_adaptive(replay: schema.Replay | None) -> bool:
  """Whether a run replays adaptively; with a share of 0 it replays nothing at all."""
  return replay is not None and replay.adaptive is not None and replay.share > 0


class Replayer:
  """Mixes replayed rows into batches, and updates the memory of them.

  Attributes:
    memory: memory after the last observed step.
  """

  def __init__(self, plan: Plan, memory: Memory):
    self.memory = memory
    self._plan = plan
    self._drawn: tuple[int, Array] | None = None  # drawn, but not observed yet

  def mix(self, step: int, batch: batching.Batch) -> batching.Batch:
    """The batch of a step, counted from 0; an event replaces its last rows."""
    settings = self._plan.settings
    if step + 1 != self.memory.due:
      return batch
    chances_N = probabilities(
      self.memory,
      step + 1,
      age_exponent=settings.age_exponent,
      loss_exponent=settings.loss_exponent,
      floor=settings.floor,
    )
    chosen = draw(chances_N, self._plan.size, seed=self._plan.seed, now=step + 1)
    self._drawn = step, chosen
    rows = [self._plan.rows[i] for i in chosen]
    return batching.replace_last_rows(
      batch, rows, pad_id=self._plan.pad_id, widths=self._plan.widths
    )

  def observe(self, step: int, loss_B: Array) -> dict[str, float]:
    """Updates the memory with a step's losses by row; returns an event's metrics."""
    if self._drawn is None or self._drawn[0] != step:
      return {}
    chosen, settings = self._drawn[1], self._plan.settings
    losses = np.asarray(loss_B)[-len(chosen) :]
    self._drawn = None
    self.memory = after(
      self.memory,
      chosen,
      losses,
      step + 1,
      growth=settings.growth,
      decay=settings.decay,
      tolerance=settings.tolerance,
      interval=settings.interval,
      factor=settings.factor,
      longest=settings.longest,
    )
    risen = ratios(losses, self.memory.first_N[chosen])
    return {
      "replay_loss_ratio": float(risen.mean()),
      "replay_interval": float(self.memory.interval),
    }
