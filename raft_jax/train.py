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
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from raft_jax import errors
from raft_jax.baselines import mssr
from raft_jax.config import cli, schema
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.distillation import step as step_lib
from raft_jax.evaluation import validation
from raft_jax.hf import chat, teacher_prompts
from raft_jax.models import sharding, transformer
from raft_jax.runtime import distributed, interrupts, progress
from raft_jax.storage import journal
from raft_jax.training import checkpoint, initial_state, metrics_log, setup, step_memory
from raft_jax.training import programs as programs_lib

SEEN_WITHIN_S = 10.0
"""A file system may show one host late what another has just written."""


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
  values: dict[str, Any]
  batch: batching.Batch
  trajectory: objective.Trajectory | None
  ended_B: jax.Array | None
  seconds: dict[str, float]


def run_step(
  programs: programs_lib.Programs,
  state: step_lib.TrainState,
  frozen: transformer.Params,
  teacher_params: transformer.Params | None,
  batch: batching.Batch,
  step: int,
  *,
  anchor: transformer.Params | None = None,
  measure: bool,
  timed: bool,
) -> tuple[step_lib.TrainState, Dispatched]:
  """Rollout, teacher and update of one batch."""
  clock = Clock(on=timed)
  if programs.roll_out is None or programs.teach is None:
    rows = len(batch.row_id_B)
    nothing = objective.Trajectory(
      np.zeros((rows, 0), np.int32), np.zeros(rows, np.int32)
    )
    state, values = programs.update(
      state, frozen, batch, nothing, None, anchor=anchor, measure=False
    )
    clock.lap("update", values)
    return state, Dispatched(step, values, batch, None, None, clock.seconds)
  trajectory, ended_B = programs.roll_out(state.params, frozen, batch, step)
  clock.lap("rollout", trajectory)
  interrupts.check()
  compared = trajectory
  told: dict[str, float] = {}
  if programs.instruct is not None:
    batch, compared, told = programs.instruct(batch, trajectory)
  if programs.teacher is not None:
    teacher_params = programs.teacher(teacher_params, state, frozen)
  support = programs.teach(
    teacher_params, batch.teacher_BC, batch.teacher_length_B, compared
  )
  clock.lap("teacher", support)
  interrupts.check()
  state, values = programs.update(
    state, frozen, batch, compared, support, anchor=anchor, measure=measure
  )
  clock.lap("update", values)
  return state, Dispatched(
    *(step, {**values, **told}, batch, trajectory._replace(seen=None)),
    *(ended_B, clock.seconds),
  )


def fetch(
  dispatched: Dispatched, tokenizer: chat.ChatTokenizer, leaks: tuple[str, ...]
) -> dict[str, float]:
  """Waits for a step and turns what it left into numbers to log.

  Raises:
    errors.UserError: when a loss or the gradient is not finite.
  """
  # At once: where several processes train, each fetching is a program of its own.
  values, batch, trajectory, ended_B = distributed.to_host(
    (
      dispatched.values,
      dispatched.batch,
      dispatched.trajectory,
      dispatched.ended_B,
    )
  )
  values = {
    name: float(value) for name, value in values.items() if name != objective.ROWS
  }
  for name in ("loss_sft", "loss_kd", "grad_norm"):
    if not math.isfinite(values.get(name, 0.0)):
      raise errors.UserError(
        f"step {dispatched.step + 1}: {name} is {values[name]}; nothing of it was "
        "saved. Start again in another `output` with a lower train.learning_rate, or "
        "with model.dtype=float32"
      )
  tokens = {"update": batch.prompt_length_B.sum() + batch.answer_length_B.sum()}
  if trajectory is not None:
    tokens_BR, length_B, _ = trajectory
    texts = [
      chat.decode(tokenizer, row[:length]) for row, length in zip(tokens_BR, length_B)
    ]
    values |= metrics_log.rollout_health(tokens_BR, length_B, texts, leaks)
    tokens["rollout"] = length_B.sum()
    tokens["teacher"] = batch.teacher_length_B.sum() + length_B.sum()
    tokens["update"] += length_B.sum()
  if ended_B is not None:
    values["rollout_ended"] = float(np.mean(ended_B))
  for phase, spent in dispatched.seconds.items():
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
    "validation_loss": "val",
    "validation_drift": "drift",
  }
  return "  ".join(
    f"{short} {values[name]:.3g}" for name, short in shown.items() if name in values
  )


def reporter(
  run: setup.Prepared,
  built: setup.Built,
  leaks: tuple[str, ...],
  log: metrics_log.Log | None,
  bar: progress.Progress | None,
  replayer: mssr.Replayer | None,
  watcher: validation.Watcher | None,
  faults: distributed.DeferredErrors,
) -> Callable[..., None]:
  """A function that waits for a step and, where there are any, moves log and bar.

  Given the parameters after the step, too, it has the watcher look at them. What goes
  wrong with the log is kept in `faults`.
  """
  last = time.perf_counter()

  def report(dispatched: Dispatched, params: transformer.Params | None = None) -> None:
    nonlocal last
    values = fetch(dispatched, run.tokenizer, leaks)
    if replayer is not None:
      loss_B = distributed.to_host(dispatched.values[objective.ROWS])
      values |= replayer.observe(dispatched.step, loss_B)
    now = time.perf_counter()
    values["step_seconds"], last = now - last, now
    values["learning_rate"] = float(built.rates[dispatched.step])
    if watcher is not None and params is not None:
      # The step's values were found finite: the panel is not asked about a NaN.
      values |= watcher.look(dispatched.step + 1, params)
      last = time.perf_counter()
      values["validation_seconds"] = last - now
    if log is not None:
      faults.keep(functools.partial(log.write, dispatched.step + 1, values))
    if bar is not None:
      bar.advance(dispatched.step + 1, note(values))

  return report


def measures(step: int, every: int, *, soon: bool) -> bool:
  """Whether the two gradients are taken apart at a step, from 0.

  Args:
    every: steps between two times; 0: never.
    soon: also after 1, 2, 4, ... steps, while the distillation loss grows from nothing.
  """
  if every == 0:
    return False
  return step % every == 0 or (soon and step < every and step & (step - 1) == 0)


def loop(
  config: schema.Config,
  run: setup.Prepared,
  built: setup.Built,
  state: step_lib.TrainState,
  beside: initial_state.Beside,
  start: int,
  *,
  replayer: mssr.Replayer | None,
  watcher: validation.Watcher | None,
  report: Callable[..., None],
  save: Callable[[int, step_lib.TrainState], None],
  stops: Callable[[int], bool],
) -> int:
  """Trains from step `start` to the end, until `stops` or the watcher says that it is
  over; returns the steps done.

  A signal stops the first step between its programs, which may compile for minutes:
  there is nothing to save yet. Later ones end and are saved.
  """
  every = config.train.gradient_stats_every
  soon = config.balance.mode == "gradient_norm"
  warm: set[Any] = set()
  pending: Dispatched | None = None
  done = start
  for step, batch in enumerate(batching.iterate(run.dataset, start_step=start), start):
    if replayer is not None:
      batch = replayer.mix(step, batch)
    shape = batch.prompt_BP.shape + batch.answer_BA.shape + batch.teacher_BC.shape
    measure = measures(step, every, soon=soon)
    # A step that compiles says nothing about speed.
    timed = every > 0 and step % every == every // 2 and (shape, measure) in warm
    if timed and pending is not None:
      report(pending)  # or its wait would be counted into this step's phases
      pending = None
    with interrupts.deferred() if step > start else contextlib.nullcontext():
      state, dispatched = run_step(
        built.programs,
        state,
        beside.frozen,
        beside.teacher,
        sharding.spread(sharding.batch(run.mesh), batch),
        step,
        anchor=beside.anchor,
        measure=measure,
        timed=timed,
      )
    warm.add((shape, measure))
    if pending is not None:
      report(pending)
    pending, done = dispatched, step + 1
    stopping = stops(done)  # once: a signal may come between two askings
    if watcher is not None and watcher.due(done):
      report(pending, state.params)  # before the next step takes their buffers
      pending, stopping = None, stopping or watcher.verdict.over
    if done == run.total_steps or stopping or done % config.train.checkpoint_every == 0:
      # The metrics of a step are read before it is saved: a NaN never is.
      if pending is not None:
        report(pending)
        pending = None
      save(done, state)
    if stopping:
      break
  return done


@interrupts.listening(terminated=os.EX_TEMPFAIL)
def fit(config: schema.Config, on_corrupt: str = "stop") -> None:
  """Trains a model as the config says; continues where an earlier run stopped.

  Args:
    on_corrupt: "previous" goes on from the step before a damaged checkpoint.
  """
  cluster, output = config.cluster, pathlib.Path(config.output)
  distributed.join(
    wanted=cluster.join,
    coordinator=cluster.coordinator,
    processes=cluster.processes,
    index=cluster.index,
    heartbeat_s=cluster.heartbeat_s,
  )
  leads = distributed.is_primary()
  with contextlib.ExitStack() as stack:
    if not leads:
      stack.enter_context(contextlib.redirect_stdout(None))
    run = distributed.run_on_all(lambda: setup.prepare(config))
    interrupts.check()
    distributed.assert_same({**setup.facts(config, run), **distributed.versions()})
    panel = validation.read(config, run.tokenizer, run.decoder)
    built = setup.build(config, run)
    print(sharding.describe(run.mesh))
    enter(output, stack, leads=leads)
    stack.enter_context(jax.set_mesh(run.mesh))
    orbax = stack.enter_context(
      checkpoint.manager(output, keep=config.train.keep_checkpoints)
    )
    newest = checkpoint.check_latest(orbax, run.identity, on_corrupt=on_corrupt)
    if newest is not None:
      known = validation.so_far(config, newest)
      if newest == run.total_steps or known.over:
        print(f"already trained: {orbax.directory / str(newest)}")
        if config.validation is not None:
          print(validation.summary(config, known, newest, run.total_steps))
        return
    interrupts.check()
    distributed.run_on_all(lambda: step_memory.check(config, run, built))
    state, beside, memory, start = initial_state.first_state(
      config, run, built, orbax, on_corrupt
    )
    replayer = None
    if run.replay is not None and memory is not None:
      replayer = mssr.Replayer(run.replay, memory)
    began = time.perf_counter()
    faults = distributed.DeferredErrors()

    def save(step: int, state: step_lib.TrainState) -> None:
      faults.raise_on_all()
      checkpoint.save(
        orbax, step, initial_state.saved(run, state, replayer), run.identity
      )

    with (
      journals(config, run, start, leads=leads) as (log, bar),
      validation.watching(config, run, built, beside, panel, orbax, start) as watcher,
    ):
      done = loop(
        config,
        run,
        built,
        state,
        beside,
        start,
        replayer=replayer,
        watcher=watcher,
        report=reporter(
          *(
            run,
            built,
            teacher_prompts.leak_phrases(config.distill.teacher_context),
            log,
            bar,
          ),
          *(replayer, watcher, faults),
        ),
        save=save,
        stops=distributed.should_stop,
      )
  if leads:
    finish(output, start, done, run.total_steps, time.perf_counter() - began)
    if watcher is not None:
      print(validation.summary(config, watcher.verdict, done, run.total_steps))
  if interrupts.received:
    raise interrupts.Stopped(interrupts.status())


def enter(output: pathlib.Path, stack: contextlib.ExitStack, *, leads: bool) -> None:
  """Locks the output folder, for all processes by the first.

  Raises:
    errors.UserError: another run holds it, or a process sees another folder there.
  """
  path = output / ".train"

  def lock() -> None:
    if leads:
      stack.enter_context(journal.locked(path))

  def see() -> None:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not _says(journal.holder(path), name):
      if time.monotonic() > deadline:
        raise errors.UserError(
          f"output: {output} holds nothing of what process 0 wrote there; choose a "
          "folder on a file system that all processes share"
        )
      time.sleep(0.2)

  distributed.run_on_all(lock)
  name = distributed.gather_texts(journal.holder(path).read_text() if leads else "")[0]
  distributed.run_on_all(see)


def _says(path: pathlib.Path, text: str) -> bool:
  with contextlib.suppress(OSError):
    return path.read_text() == text
  return False


@contextlib.contextmanager
def journals(
  config: schema.Config, run: setup.Prepared, start: int, *, leads: bool
) -> Iterator[tuple[metrics_log.Log | None, progress.Progress | None]]:
  """The log and the bar, in the process that writes for all."""
  if not leads:
    yield None, None
    return
  with (
    contextlib.closing(
      metrics_log.Log(
        pathlib.Path(config.output),
        resume_step=start,
        tensorboard=config.train.tensorboard,
      )
    ) as log,
    contextlib.closing(progress.Progress("train", run.total_steps, done=start)) as bar,
  ):
    yield log, bar


def finish(
  output: pathlib.Path, start: int, done: int, total: int, seconds: float
) -> None:
  """The last line of a run: what was done, or how to go on."""
  if interrupts.received and done < total:
    print(
      f"stopped and saved after step {done} of {total}; rerun the same command to go on"
    )
    return
  lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  first, last = (json.loads(line)["values"] for line in (lines[0], lines[-1]))
  print(
    f"trained {done - start} steps in {progress.clock(seconds)}; "
    f"first step: {note(first)}; last step: {note(last)}; "
    f"checkpoint: {output / checkpoint.FOLDER / str(done)}"
  )


OPTIONS = {
  "--on-corrupt": {
    "metavar": "stop|previous",
    "choices": ("stop", "previous"),
    "default": "stop",
    "help": "a damaged checkpoint: say so and stop (default), or go on from the one "
    "before",
  }
}


def main() -> None:
  """Command line."""
  cli.run("train", fit, __doc__, options=OPTIONS)


if __name__ == "__main__":
  main()
