"""The training loop.

It is asynchronous: the metrics of step n - 1 are read after step n was dispatched, so
the devices never wait for the host. A run that stops and resumes ends with the same
parameters, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from raft_jax import errors
from raft_jax.baselines import mssr, sdpo
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.hf import chat
from raft_jax.models import sampling, sharding, transformer
from raft_jax.runtime import distributed, interrupts
from raft_jax.training import (
  initial_state,
  metrics_log,
  packed_batches,
  run_inputs,
  run_plan,
  step_schedule,
  throughput,
)
from raft_jax.training import programs as programs_lib

Validate = Callable[[int, transformer.Params], tuple[dict[str, float], bool]]
"""(steps done, trained tree) -> metrics to log, and whether to stop training."""


def train(
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  start: initial_state.Start,
  *,
  checkpoints: Any,
  log: metrics_log.RunLog,
  validate: Validate | None,
) -> int:
  """Trains until the last step, a signal or the validation; returns the steps saved."""
  schedule, state, done = plan.schedule, start.state, start.step
  replayer, build_teacher_context = start.replayer, context_builder(plan, inputs)
  stopwatch = programs_lib.Stopwatch()
  read = functools.partial(read_metrics, plan, inputs, replayer, stopwatch)
  compiled: set[tuple[int, ...]] = set()
  pending: programs_lib.Dispatched | None = None  # dispatched, but not read yet
  for step, batch in enumerate(batching.iterate(inputs.dataset, start_step=done), done):
    batch = batch if replayer is None else replayer.mix(step, batch)
    if start.token_weights is not None:
      batch = batching.with_token_weights(batch, start.token_weights)
    if inputs.packer is not None:
      batch = packed_batches.packed(inputs.packer, plan, batch, step)
    gradient_stats = step_schedule.takes_gradient_stats(schedule, step)
    compiles = is_new((*padded_widths(batch), gradient_stats), compiled)
    timed = step_schedule.times_phases(schedule, step) and not compiles
    if timed and pending is not None:  # or its wait would count as this step's
      log.write(done, read(pending))
      pending = None

    # Dispatch this step, then read the metrics of the one before it.
    # A signal may end the first step, which compiles for long and has nothing to save.
    with interrupts.deferred() if step > start.step else contextlib.nullcontext():
      state, dispatched = programs_lib.run_step(
        plan.programs,
        state,
        start.reference,
        sharding.spread(sharding.batch(plan.mesh), batch),
        step,
        build_teacher_context=build_teacher_context,
        gradient_stats=gradient_stats,
        timed=timed,
      )
    if pending is not None:
      log.write(done, read(pending))
    pending, done = dispatched, step + 1

    stopping = distributed.should_stop(done)  # the only check: once per step
    validating = validate is not None and step_schedule.validates(schedule, done)
    saving = stopping or step_schedule.saves(schedule, done)
    if validating or saving:
      # Read first: a step that is not finite must end here, before it is saved.
      metrics, pending = read(pending), None
      if validate is not None and validating:
        # Before the next step, which takes the buffers of these parameters.
        validation, is_over = validate(done, state.params)
        metrics |= validation | {"validation_seconds": stopwatch.lap()}
        stopping = stopping or is_over
      log.write(done, metrics)
    if saving or stopping:
      log.check()
      initial_state.save(checkpoints, plan, inputs, done, state, replayer)
    if stopping:
      break
  return done


def context_builder(
  plan: run_plan.RunPlan, inputs: run_inputs.RunInputs
) -> programs_lib.TeacherContextBuilder | None:
  """What makes the teacher's contexts from the rollouts, if they depend on these."""
  if plan.siblings is None:
    return None
  return functools.partial(
    sdpo.build_teacher_context,
    tokenizer=inputs.tokenizer,
    questions_by_row=inputs.questions_by_row,
    siblings=plan.siblings,
  )


def is_new(program: tuple[int, ...], compiled: set[tuple[int, ...]]) -> bool:
  """Whether a step compiles, after which its time would say nothing about its speed."""
  new = program not in compiled
  compiled.add(program)
  return new


def padded_widths(batch: batching.Batch) -> tuple[int, ...]:
  """The shape of a batch, for which programs compile once."""
  lanes = [
    0 if packing is None else packing.token_GNL.shape[1]
    for packing in (batch.packing, batch.teacher_packing)
  ]
  shapes = batch.prompt_BP.shape + batch.answer_BA.shape + batch.teacher_BC.shape
  return (*shapes, *lanes)


def read_metrics(
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  replayer: mssr.Replayer | None,
  stopwatch: programs_lib.Stopwatch,
  dispatched: programs_lib.Dispatched,
) -> dict[str, float]:
  """Waits for a step and returns its metrics; updates the memory of the replay.

  Raises:
    errors.UserError: a loss, the gradient or a rollout's logits are not finite.
  """
  # In one call: with several processes each fetch is a program of its own.
  metrics, batch, trajectory, status = distributed.to_host(
    (
      dispatched.metrics,
      dispatched.batch,
      dispatched.trajectory,
      dispatched.status,
    )
  )
  row_losses_B = metrics.pop(objective.ROW_LOSSES, None)
  values = {name: float(value) for name, value in metrics.items()}
  check_finite(values, dispatched.step)
  tokens = {"update": batch.prompt_length_B.sum() + batch.answer_length_B.sum()}
  if trajectory is not None:
    rollout_BR, length_B, _ = trajectory
    texts = [
      chat.decode(inputs.tokenizer, row[:length])
      for row, length in zip(rollout_BR, length_B)
    ]
    values |= metrics_log.rollout_health(rollout_BR, length_B, texts, plan.leak_phrases)
    tokens["rollout"] = length_B.sum()
    tokens["teacher"] = batch.teacher_length_B.sum() + length_B.sum()
    if not plan.settings.on_answers:  # or they are the answers, which are read once
      tokens["update"] += length_B.sum()
  if status is not None:
    check_rollouts(status, batch.row_id_B, dispatched.step)
    values["rollout_ended"] = float(np.mean(status.ended_B))
  for phase, seconds in dispatched.seconds.items():
    values[f"{phase}_seconds"] = seconds
    values[f"{phase}_tokens_per_s"] = float(tokens[phase] / seconds)
  if replayer is not None:
    values |= replayer.observe(dispatched.step, row_losses_B)
  values["step_seconds"] = stopwatch.lap()
  if status is not None:
    tokens["rollout"] += batch.prompt_length_B.sum()
  values |= throughput.of_step(plan.meter, tokens, values["step_seconds"])
  values["learning_rate"] = float(plan.rates[dispatched.step])
  return values


def check_finite(values: dict[str, float], step: int) -> None:
  """Raises UserError naming the loss or gradient norm that is not finite."""
  for name in ("loss_sft", "loss_kd", "grad_norm"):
    if not math.isfinite(values.get(name, 0.0)):
      raise errors.UserError(
        f"step {step + 1}: {name} is {values[name]}; this step was not saved. Start "
        "again in another `output` with a lower train.learning_rate, or with "
        "model.dtype=float32"
      )


def check_rollouts(
  status: programs_lib.RolloutStatus, row_id_B: np.ndarray, step: int
) -> None:
  """Raises UserError naming the rows whose rollouts were drawn from bad logits."""
  if not np.all(status.finite_B):
    rows = ", ".join(map(str, row_id_B[~np.asarray(status.finite_B)]))
    raise errors.UserError(
      f"step {step + 1}: rollouts of rows {rows}: {sampling.NOT_FINITE}; this step was "
      "not saved"
    )
