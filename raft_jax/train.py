"""Fine-tuning: `python -m raft_jax.train --config C`.

The loop is straight-line and asynchronous: step n is dispatched before the metrics of
step n - 1 are read. A rerun of the same command continues from the last checkpoint and
ends with the same parameters, bit for bit, as a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from raft_jax import (
  checkpoint,
  data,
  errors,
  hf,
  metrics,
  model,
  optim,
  progress,
  sharding,
  text,
  wiring,
)
from raft_jax import config as config_lib
from raft_jax import step as step_lib


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM; a second one acts at once."""
  received: list[int] = []

  def note(number, frame):
    del frame
    received.append(number)
    signal.signal(number, signal.SIG_DFL)
    print(
      "stopping after this step; once more to stop now", file=sys.stderr, flush=True
    )

  before = {
    number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class Clock:
  """Times the phases of a step by waiting for each; only on steps chosen for it."""

  def __init__(self, *, on: bool):
    self.seconds: dict[str, float] = {}
    self._on, self._last = on, time.perf_counter()

  def lap(self, name: str, result: Any) -> None:
    if self._on:
      jax.block_until_ready(result)
      now = time.perf_counter()
      self.seconds[name], self._last = now - self._last, now


class Dispatched(NamedTuple):
  """A step that runs, or has run, on the devices; nothing of it was fetched yet."""

  step: int
  values: dict[str, jax.Array]
  batch: data.Batch
  trajectory: step_lib.Trajectory | None
  ended_B: jax.Array | None
  seconds: dict[str, float]


def run_step(
  programs: wiring.Programs,
  state: step_lib.TrainState,
  teacher_params: model.Params | None,
  batch: data.Batch,
  step: int,
  *,
  measure: bool,
  timed: bool,
) -> tuple[step_lib.TrainState, Dispatched]:
  """Rollout, teacher and update of one batch."""
  clock = Clock(on=timed)
  if programs.roll_out is None or programs.teach is None:
    nothing = step_lib.Trajectory(
      jnp.zeros((len(batch.row_id_B), 0), jnp.int32),
      jnp.zeros(len(batch.row_id_B), jnp.int32),
    )
    state, values = programs.update(state, batch, nothing, None, measure=False)
    clock.lap("update", values)
    return state, Dispatched(step, values, batch, None, None, clock.seconds)
  trajectory, ended_B = programs.roll_out(state.params, batch, step)
  clock.lap("rollout", trajectory)
  support = programs.teach(
    teacher_params, batch.teacher_BC, batch.teacher_length_B, trajectory
  )
  clock.lap("teacher", support)
  state, values = programs.update(state, batch, trajectory, support, measure=measure)
  clock.lap("update", values)
  return state, Dispatched(step, values, batch, trajectory, ended_B, clock.seconds)


def fetch(
  dispatched: Dispatched, codec: text.Codec, leaks: tuple[str, ...]
) -> dict[str, float]:
  """Waits for a step and turns what it left into numbers to log.

  Raises:
    errors.UserError: when a loss or the gradient is not finite.
  """
  values = {
    name: float(value) for name, value in jax.device_get(dispatched.values).items()
  }
  for name in ("loss_sft", "loss_kd", "grad_norm"):
    if not math.isfinite(values.get(name, 0.0)):
      raise errors.UserError(
        f"step {dispatched.step}: {name} is {values[name]}; nothing of this step was "
        "saved. Lower train.learning_rate, or try model.dtype=float32, and rerun"
      )
  batch, seconds = jax.device_get(dispatched.batch), dispatched.seconds
  tokens = {"update": batch.prompt_length_B.sum() + batch.answer_length_B.sum()}
  if dispatched.trajectory is not None:
    tokens_BR, length_B = jax.device_get(dispatched.trajectory)
    texts = [
      text.decode(codec, row[:length]) for row, length in zip(tokens_BR, length_B)
    ]
    values |= metrics.rollout_health(tokens_BR, length_B, texts, leaks)
    tokens["rollout"] = length_B.sum()
    tokens["teacher"] = batch.teacher_length_B.sum() + length_B.sum()
    tokens["update"] += length_B.sum()
  if dispatched.ended_B is not None:
    values["rollout_ended"] = float(np.mean(jax.device_get(dispatched.ended_B)))
  for phase, spent in seconds.items():
    values[f"{phase}_seconds"] = spent
    values[f"{phase}_tokens_per_s"] = float(tokens[phase] / spent)
  return values


def note(values: dict[str, float]) -> str:
  """The few numbers worth watching."""
  shown = {
    "loss_sft": "sft",
    "loss_kd": "kd",
    "kd_weight": "λ",
    "rollout_length": "len",
  }
  return "  ".join(
    f"{short} {values[name]:.3g}" for name, short in shown.items() if name in values
  )


def first_state(
  config: config_lib.Config,
  run: wiring.Prepared,
  optimizer: optax.GradientTransformationExtraArgs,
  abstract: step_lib.TrainState,
  shardings: step_lib.TrainState,
  orbax: Any,
  *,
  distil: bool,
) -> tuple[step_lib.TrainState, model.Params | None, int]:
  """The state to go on from, the frozen base model (the teacher), and the step."""
  resumes = orbax.latest_step() is not None
  base = None
  if distil or not resumes:
    base = hf.load_params(
      config.model.source, run.decoder, dtype="float32", shardings=shardings.params
    )
  if resumes:
    state, step = checkpoint.restore(orbax, abstract, run.identity)
    print(f"resuming after step {step} of {run.total_steps}")
  else:

    @functools.partial(jax.jit, out_shardings=shardings)
    def start(params: model.Params) -> step_lib.TrainState:
      # A copy: the step donates the student's buffers, the teacher keeps its own.
      params = jax.tree.map(jnp.copy, params)
      return step_lib.TrainState(jnp.int32(0), params, optimizer.init(params))

    state, step = start(base), 0
  if base is None or not distil:
    return state, None, step
  teacher = jax.tree.map(lambda leaf: leaf.astype(config.model.dtype), base)
  return state, teacher, step


def fit(config: config_lib.Config) -> None:
  """Trains a model as the config says; continues where an earlier run stopped."""
  run = wiring.prepare(config)
  output = pathlib.Path(config.output)
  settings = wiring.make_settings(config, run.decoder, run.codec)
  balancer = wiring.make_balancer(config.balance, run.total_steps)
  schedule = optim.warmup_cosine(
    config.train.learning_rate, run.total_steps, config.train.warmup_ratio
  )
  rates = np.asarray(jax.vmap(schedule)(jnp.arange(run.total_steps)))
  optimizer = optim.chain(
    balancer,
    schedule,
    weight_decay=config.train.weight_decay,
    clip=config.train.clip,
  )
  distil = wiring.distills(config, run.method)
  abstract, shardings = wiring.state_shardings(run.mesh, run.decoder, optimizer)
  programs = wiring.compile_programs(
    config, settings, run.codec, optimizer, balancer, shardings, distil=distil
  )
  leaks = text.leak_phrases(config.distill.teacher_context)
  every = config.train.measure_every
  with (
    stop_signals() as stop,
    jax.set_mesh(run.mesh),
    checkpoint.manager(output, keep=config.train.keep_checkpoints) as orbax,
  ):
    if orbax.latest_step() == run.total_steps:
      print(f"already trained: {orbax.directory / str(run.total_steps)}")
      return
    state, teacher_params, start = first_state(
      config, run, optimizer, abstract, shardings, orbax, distil=distil
    )
    log = metrics.Log(output, resume_step=start, tensorboard=config.train.tensorboard)
    bar = progress.Progress("train", run.total_steps, done=start)
    began = last_report = time.perf_counter()
    pending: Dispatched | None = None

    def report(dispatched: Dispatched) -> None:
      nonlocal last_report
      values = fetch(dispatched, run.codec, leaks)
      now = time.perf_counter()
      values["step_seconds"], last_report = now - last_report, now
      values["learning_rate"] = float(rates[dispatched.step])
      log.write(dispatched.step + 1, values)
      bar.advance(dispatched.step + 1, note(values))

    warm: set[Any] = set()
    for step, batch in enumerate(data.iterate(run.dataset, start_step=start), start):
      shape = batch.prompt_BP.shape + batch.answer_BA.shape + batch.teacher_BC.shape
      measure = every > 0 and step % every == 0
      state, dispatched = run_step(
        programs,
        state,
        teacher_params,
        jax.device_put(batch, sharding.batch(run.mesh)),
        step,
        measure=measure,
        # A step that compiles says nothing about speed.
        timed=every > 0 and step % every == every // 2 and (shape, measure) in warm,
      )
      warm.add((shape, measure))
      if pending is not None:
        report(pending)
      pending, done = dispatched, step + 1
      if done == run.total_steps or stop or done % config.train.checkpoint_every == 0:
        # The metrics of a step are read before it is saved: a NaN never is.
        report(pending)
        pending = None
        checkpoint.save(orbax, done, state, run.identity)
      if stop:
        break
    bar.close()
    log.close()
  finish(output, start, done, run.total_steps, time.perf_counter() - began, stop)


def finish(
  output: pathlib.Path, start: int, done: int, total: int, seconds: float, stop: list
) -> None:
  """The last line of a run: what was done, or how to go on."""
  if stop:
    print(
      f"stopped and saved after step {done} of {total}; rerun the same command to go on"
    )
    raise SystemExit(75 if stop[0] == signal.SIGTERM else 130)
  lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  first, last = (json.loads(line)["values"] for line in (lines[0], lines[-1]))
  print(
    f"trained {done - start} steps in {progress.clock(seconds)}; "
    f"first step: {note(first)}; last step: {note(last)}; "
    f"checkpoint: {output / checkpoint.FOLDER / str(done)}"
  )


def main() -> None:
  """Command line."""
  config_lib.run("train", fit, __doc__)


if __name__ == "__main__":
  main()
