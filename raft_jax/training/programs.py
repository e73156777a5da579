"""A training step as compiled programs: rollout, teacher and update.

`run_step` runs them in order. `plan` calls it with programs that only compile.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from raft_jax.baselines import sdpo
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import objective, sequences
from raft_jax.distillation import step as step_lib
from raft_jax.models import partition, sampling, transformer
from raft_jax.runtime import interrupts
from raft_jax.training import optim

# --- One step -------------------------------------------------------------------------


class RolloutStatus(NamedTuple):
  """How each rollout of a step went; see `sampling.Rollout`."""

  ended_B: jax.Array
  finite_B: jax.Array


class Programs(NamedTuple):
  """The compiled parts of a step; all but `update` are None if nothing is distilled.

  Attributes:
    update: see `distillation.step.update`.
    roll_out: (trained tree, frozen tree, batch, step) -> the trajectory, and how each
      rollout went (None if the trajectory is the answers).
    score_teacher: see `objective.score_teacher`.
    teacher_params: (frozen teacher or None, state, frozen tree) -> the teacher's
      parameters.
    rollout_mesh: on which `roll_out` runs, if not on the run's mesh.
  """

  update: Callable[..., tuple[step_lib.TrainState, dict[str, jax.Array]]]
  roll_out: Callable[..., tuple[sequences.Trajectory, RolloutStatus | None]] | None = (
    None
  )
  score_teacher: Callable[..., objective.Support] | None = None
  teacher_params: Callable[..., transformer.Params] | None = None
  rollout_mesh: Mesh | None = None


class Dispatched(NamedTuple):
  """A step that runs, or has run, on the devices; nothing was fetched yet.

  Attributes:
    step: its number, from 0.
    metrics: scalars to log, and the rows' losses if they are wanted.
    trajectory: None if nothing was distilled.
    status: how each rollout went, if there were rollouts.
    seconds: of each phase, if the step was timed.
  """

  step: int
  metrics: dict[str, Any]
  batch: batching.Batch
  trajectory: sequences.Trajectory | None
  status: RolloutStatus | None
  seconds: dict[str, float]


class Stopwatch:
  """Seconds between laps."""

  def __init__(self) -> None:
    self._last = time.perf_counter()

  def lap(self) -> float:
    """Seconds since the lap before, or since the start."""
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    return seconds


class PhaseClock:
  """Times the phases of a step by waiting for each one, if it is on."""

  def __init__(self, *, on: bool):
    self.seconds: dict[str, float] = {}
    self._on, self._stopwatch = on, Stopwatch()

  def lap(self, phase: str, result: Any) -> None:
    """Ends a phase, whose last array is in `result`."""
    if self._on:
      jax.block_until_ready(result)
      self.seconds[phase] = self._stopwatch.lap()


TeacherContextBuilder = Callable[
  [batching.Batch, sequences.Trajectory], sdpo.TeacherContext
]
"""Makes teacher contexts that depend on the rollouts; runs on the host."""


def run_step(
  programs: Programs,
  state: step_lib.TrainState,
  reference: step_lib.ReferenceParams,
  batch: batching.Batch,
  step: int,
  *,
  build_teacher_context: TeacherContextBuilder | None = None,
  gradient_stats: bool = False,
  timed: bool = False,
) -> tuple[step_lib.TrainState, Dispatched]:
  """Dispatches one step: roll out, score by the teacher, update."""
  clock = PhaseClock(on=timed)
  update = functools.partial(programs.update, anchor=reference.anchor)

  if programs.roll_out is None or programs.score_teacher is None:
    no_rollout = sequences.empty_trajectory(len(batch.row_id_B))
    state, metrics = update(
      state, reference.frozen, batch, no_rollout, None, gradient_stats=False
    )
    clock.lap("update", metrics)
    return state, Dispatched(step, metrics, batch, None, None, clock.seconds)

  with contextlib.ExitStack() as stack:
    if programs.rollout_mesh is not None:
      stack.enter_context(jax.set_mesh(programs.rollout_mesh))
    rollout, status = programs.roll_out(state.params, reference.frozen, batch, step)
  clock.lap("rollout", rollout)
  interrupts.check()

  compared = rollout
  context_metrics: dict[str, float] = {}
  if build_teacher_context is not None:
    batch, compared, context_metrics = build_teacher_context(batch, rollout)
  teacher = reference.teacher
  if programs.teacher_params is not None:
    teacher = programs.teacher_params(teacher, state, reference.frozen)
  support = programs.score_teacher(
    teacher,
    batch.teacher_BC,
    batch.teacher_length_B,
    compared,
    batch.teacher_packing,
  )
  clock.lap("teacher", support)
  interrupts.check()

  # It is not split into micro-batches.
  batch = batch._replace(teacher_packing=None)
  state, metrics = update(
    state, reference.frozen, batch, compared, support, gradient_stats=gradient_stats
  )
  clock.lap("update", metrics)
  return state, Dispatched(
    step=step,
    metrics={**metrics, **context_metrics},
    batch=batch,
    trajectory=rollout._replace(sampler_stats=None),
    status=status,
    seconds=clock.seconds,
  )


# --- Compiling ------------------------------------------------------------------------


class Rollouts(NamedTuple):
  """How trajectories are made.

  Attributes:
    share: of steps whose trajectory is a rollout; the others use the answers.
    pad_id: of the tokenizer.
  """

  share: float
  seed: int
  max_new_tokens: int
  temperature: float
  top_p: float
  pad_id: int


def rollout_share(distill: schema.Distill) -> float:
  """Share of the steps whose trajectory is a rollout."""
  shares = {"rollout": 1.0, "answer": 0.0, "mixed": distill.on_policy}
  return shares[distill.trajectory]


def rolls_out(share: float, *, seed: int, step: int) -> bool:
  """Whether the trajectory of a step is a rollout: a function of seed and step."""
  if share in (0.0, 1.0):
    return share == 1.0
  return bool(np.random.default_rng((seed, step)).random() < share)


def roll_out(
  params: transformer.Params,
  frozen: transformer.Params,
  batch: batching.Batch,
  step: int,
  *,
  settings: objective.Settings,
  rollouts: Rollouts,
) -> tuple[sequences.Trajectory, RolloutStatus | None]:
  """The trajectory of a step; see `Programs.roll_out`."""
  if not rolls_out(rollouts.share, seed=rollouts.seed, step=step):
    return sequences.Trajectory(batch.answer_BA, batch.answer_length_B), None
  rollout = sampling.generate(
    partition.combine(frozen, params),
    settings.decoder,
    batch.prompt_BP,
    batch.prompt_length_B,
    batch.row_id_B,
    seed=rollouts.seed,
    step=step,
    max_new_tokens=rollouts.max_new_tokens,
    temperature=rollouts.temperature,
    top_p=rollouts.top_p,
    eos_ids=settings.eos_ids,
    pad_id=rollouts.pad_id,
    dtype=settings.compute.dtype,
    unroll=settings.rollout_unroll,
    top_tokens=settings.sampler_top_k,
  )
  trajectory = sequences.Trajectory(rollout.tokens_BR, rollout.length_B, rollout.stats)
  return trajectory, RolloutStatus(rollout.ended_B, rollout.finite_B)


TEACHERS: dict[str, Callable[..., transformer.Params]] = {
  "base": lambda base, state, frozen: base,
  "live": lambda base, state, frozen: partition.combine(frozen, state.params),
  "average": lambda base, state, frozen: partition.combine(
    frozen, state.opt_state[optim.AVERAGE].average
  ),
}
"""`distill.teacher` -> `Programs.teacher_params`."""


def compile_programs(
  settings: objective.Settings,
  rollouts: Rollouts,
  *,
  optimizer: optax.GradientTransformationExtraArgs,
  balancer: optax.GradientTransformationExtraArgs,
  state_shardings: step_lib.TrainState,
  teacher: str | None,
  rollout_mesh: Mesh | None = None,
) -> Programs:
  """Jits rollout, teacher and update; each compiles once per batch width.

  Args:
    state_shardings: where the update leaves the state.
    teacher: a key of `TEACHERS`; None distils nothing.
    rollout_mesh: see `Programs`.
  """
  update = jax.jit(
    functools.partial(
      step_lib.update, optimizer=optimizer, balancer=balancer, settings=settings
    ),
    static_argnames="gradient_stats",
    donate_argnums=0,
    out_shardings=(state_shardings, None),
  )
  if teacher is None:
    return Programs(update)
  return Programs(
    update,
    functools.partial(roll_out, settings=settings, rollouts=rollouts),
    jax.jit(functools.partial(objective.score_teacher, settings=settings)),
    TEACHERS[teacher],
    rollout_mesh,
  )
