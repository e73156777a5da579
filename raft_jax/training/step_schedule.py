"""At which steps a run does more than train: measure, time, validate, save."""

from __future__ import annotations

from typing import NamedTuple

from raft_jax.config import schema


class StepSchedule(NamedTuple):
  """At which steps a run does more than train.

  Attributes:
    gradient_stats_every: steps between two measurements of both gradients; 0: never.
    gradient_stats_early: also measure at steps 1, 2, 4, ..., while the distillation
      loss grows from 0.
    validate_every: steps between two validations; None: never.
  """

  total_steps: int
  checkpoint_every: int
  gradient_stats_every: int
  gradient_stats_early: bool
  validate_every: int | None


def takes_gradient_stats(schedule: StepSchedule, step: int) -> bool:
  """Whether a step, counted from 0, takes each loss's own gradient."""
  every = schedule.gradient_stats_every
  if every == 0:
    return False
  early = schedule.gradient_stats_early and step < every and step & (step - 1) == 0
  return step % every == 0 or early


def times_phases(schedule: StepSchedule, step: int) -> bool:
  """Whether a step, counted from 0, waits for each phase to time it."""
  every = schedule.gradient_stats_every
  return every > 0 and step % every == every // 2


def validates(schedule: StepSchedule, done: int) -> bool:
  """Whether to validate after `done` steps."""
  every = schedule.validate_every
  return every is not None and (done % every == 0 or done == schedule.total_steps)


def saves(schedule: StepSchedule, done: int) -> bool:
  """Whether to save a checkpoint after `done` steps."""
  return done % schedule.checkpoint_every == 0 or done == schedule.total_steps


def make(
  train: schema.Train,
  balance: schema.Balance,
  validation: schema.Validation | None,
  total_steps: int,
) -> StepSchedule:
  """At which steps a run does more than train."""
  return StepSchedule(
    total_steps=total_steps,
    checkpoint_every=train.checkpoint_every,
    gradient_stats_every=train.gradient_stats_every,
    gradient_stats_early=balance.mode == "gradient_norm",
    validate_every=None if validation is None else validation.every,
  )
