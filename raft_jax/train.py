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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax import (
  anchors,
  checkpoint,
  command_line,
  data,
  errors,
  fisher,
  hf,
  journal,
  metrics,
  model,
  progress,
  recipe,
  sharding,
  text,
  units,
  wiring,
)
from raft_jax import config as config_lib
from raft_jax import programs as programs_lib
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
  values: dict[str, Any]
  batch: data.Batch
  trajectory: step_lib.Trajectory | None
  ended_B: jax.Array | None
  seconds: dict[str, float]


def run_step(
  programs: programs_lib.Programs,
  state: step_lib.TrainState,
  frozen: model.Params,
  teacher_params: model.Params | None,
  batch: data.Batch,
  step: int,
  *,
  anchor: model.Params | None = None,
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
    state, values = programs.update(
      state, frozen, batch, nothing, None, anchor=anchor, measure=False
    )
    clock.lap("update", values)
    return state, Dispatched(step, values, batch, None, None, clock.seconds)
  trajectory, ended_B = programs.roll_out(state.params, frozen, batch, step)
  clock.lap("rollout", trajectory)
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
  state, values = programs.update(
    state, frozen, batch, compared, support, anchor=anchor, measure=measure
  )
  clock.lap("update", values)
  return state, Dispatched(
    *(step, {**values, **told}, batch, trajectory._replace(seen=None)),
    *(ended_B, clock.seconds),
  )


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
        f"step {dispatched.step + 1}: {name} is {values[name]}; nothing of it was "
        "saved. Start again in another `output` with a lower train.learning_rate, or "
        "with model.dtype=float32"
      )
  batch, seconds = jax.device_get(dispatched.batch), dispatched.seconds
  tokens = {"update": batch.prompt_length_B.sum() + batch.answer_length_B.sum()}
  if dispatched.trajectory is not None:
    tokens_BR, length_B, _ = jax.device_get(dispatched.trajectory)
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


class Beside(NamedTuple):
  """Parameters that the steps read and never change; `{}` or None where none do.

  All of the base model, in the same buffers where they agree in dtype: frozen ones,
  the teacher's, and those that updates stay near.
  """

  frozen: model.Params
  teacher: model.Params | None
  anchor: model.Params | None


def first_state(
  config: config_lib.Config, run: wiring.Prepared, built: wiring.Built, orbax: Any
) -> tuple[step_lib.TrainState, Beside, int]:
  """The state to go on from, the parameters beside it, and the step."""
  split, dtype = run.split, config.model.dtype
  resumes = orbax.latest_step() is not None
  teaches = built.base_teaches and run.teacher is None
  anchored = recipe.anchored(config)
  base = None
  if teaches or anchored or split.freeze or not resumes:
    base = hf.load_params(
      config.model.source,
      run.decoder,
      dtype="float32" if split.trains_base else dtype,
      shardings=built.base_shardings,
    )
  if resumes:
    state, step = checkpoint.restore(orbax, built.abstract)
    print(f"resuming after step {step} of {run.total_steps}")
  else:
    assert base is not None
    state, step = new_state(config, run, built, base), 0
  anchor = base if anchored else None
  if base is not None and (teaches or split.freeze):
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), base)
  frozen = split.freeze(base) if split.freeze and base is not None else {}
  teacher = base if teaches else None
  if built.base_teaches and run.teacher is not None:
    teacher = hf.load_params(
      str(config.distill.source),
      run.teacher,
      dtype=dtype,
      shardings=wiring.param_shardings(run.mesh, run.teacher),
    )
  return state, Beside(frozen, teacher, anchor), step


def new_state(
  config: config_lib.Config,
  run: wiring.Prepared,
  built: wiring.Built,
  base: model.Params,
) -> step_lib.TrainState:
  """The state before the first step."""

  @functools.partial(jax.jit, out_shardings=built.shardings)
  def start(base: model.Params) -> step_lib.TrainState:
    params = run.split.start(base)
    return step_lib.TrainState(jnp.int32(0), params, built.optimizer.init(params))

  state = start(base)
  found: dict[str, Any] = {}
  if run.general is not None and config.anchor is not None:
    information = importance(config.anchor, config.train.seed, run, built, base)
    pull = state.opt_state[recipe.ANCHOR]
    found[recipe.ANCHOR] = anchors.with_importance(pull, information)
  if run.probed is not None and config.soft_mask is not None:
    found[recipe.SOFT_MASK] = units.importance(
      base,
      placed(run, run.probed, "importance of units"),
      settings=built.settings,
      rate=config.soft_mask.drop,
      seed=config.train.seed,
    )
  return state._replace(opt_state={**state.opt_state, **found})


def importance(
  settings: config_lib.Anchor,
  seed: int,
  run: wiring.Prepared,
  built: wiring.Built,
  base: model.Params,
) -> model.Params:
  """The Fisher information that weighs the pull to the base model."""
  batches = placed(run, run.general, "importance of parameters")
  size = 1
  if settings.importance == "sampled":
    size = settings.batch_size
    batches = fisher.sampled(
      base,
      batches,
      built.settings,
      seed=seed,
      max_new_tokens=settings.max_new_tokens,
      pad_id=run.codec.pad_id,
    )
  information = fisher.diagonal(
    functools.partial(fisher.log_likelihood, settings=built.settings),
    base,
    batches,
    size,
  )
  return fisher.normalised(information)


def placed(run: wiring.Prepared, batches: Any, title: str) -> Iterable[data.Batch]:
  """Batches on their devices, with a bar of how many were used."""
  for batch in progress.watched(batches, title, unit="step"):
    yield jax.device_put(batch, sharding.batch(run.mesh))


def reporter(
  run: wiring.Prepared,
  built: wiring.Built,
  leaks: tuple[str, ...],
  log: metrics.Log,
  bar: progress.Progress,
) -> Callable[[Dispatched], None]:
  """A function that waits for a step, logs it and moves the bar."""
  last = time.perf_counter()

  def report(dispatched: Dispatched) -> None:
    nonlocal last
    values = fetch(dispatched, run.codec, leaks)
    now = time.perf_counter()
    values["step_seconds"], last = now - last, now
    values["learning_rate"] = float(built.rates[dispatched.step])
    log.write(dispatched.step + 1, values)
    bar.advance(dispatched.step + 1, note(values))

  return report


def loop(
  settings: config_lib.Train,
  run: wiring.Prepared,
  built: wiring.Built,
  state: step_lib.TrainState,
  beside: Beside,
  start: int,
  *,
  report: Callable[[Dispatched], None],
  save: Callable[[int, step_lib.TrainState], None],
  stop: list[int],
) -> int:
  """Trains from step `start` to the end or to a signal; returns the steps done."""
  every = settings.measure_every
  warm: set[Any] = set()
  pending: Dispatched | None = None
  done = start
  for step, batch in enumerate(data.iterate(run.dataset, start_step=start), start):
    shape = batch.prompt_BP.shape + batch.answer_BA.shape + batch.teacher_BC.shape
    measure = every > 0 and step % every == 0
    # A step that compiles says nothing about speed.
    timed = every > 0 and step % every == every // 2 and (shape, measure) in warm
    if timed and pending is not None:
      report(pending)  # or its wait would be counted into this step's phases
      pending = None
    state, dispatched = run_step(
      built.programs,
      state,
      beside.frozen,
      beside.teacher,
      jax.device_put(batch, sharding.batch(run.mesh)),
      step,
      anchor=beside.anchor,
      measure=measure,
      timed=timed,
    )
    warm.add((shape, measure))
    if pending is not None:
      report(pending)
    pending, done = dispatched, step + 1
    stopping = bool(stop)  # once: a signal may come between two looks
    if done == run.total_steps or stopping or done % settings.checkpoint_every == 0:
      # The metrics of a step are read before it is saved: a NaN never is.
      report(pending)
      pending = None
      save(done, state)
    if stopping:
      break
  return done


def fit(config: config_lib.Config) -> None:
  """Trains a model as the config says; continues where an earlier run stopped."""
  run = wiring.prepare(config)
  built = wiring.build(config, run)
  output = pathlib.Path(config.output)
  leaks = text.leak_phrases(config.distill.teacher_context)
  with (
    journal.locked(output / ".train"),
    stop_signals() as stop,
    jax.set_mesh(run.mesh),
    checkpoint.manager(output, keep=config.train.keep_checkpoints) as orbax,
  ):
    if checkpoint.check_latest(orbax, run.identity) == run.total_steps:
      print(f"already trained: {orbax.directory / str(run.total_steps)}")
      return
    state, beside, start = first_state(config, run, built, orbax)
    began = time.perf_counter()
    with (
      contextlib.closing(
        metrics.Log(output, resume_step=start, tensorboard=config.train.tensorboard)
      ) as log,
      contextlib.closing(
        progress.Progress("train", run.total_steps, done=start)
      ) as bar,
    ):
      done = loop(
        config.train,
        run,
        built,
        state,
        beside,
        start,
        report=reporter(run, built, leaks, log, bar),
        save=lambda step, state: checkpoint.save(orbax, step, state, run.identity),
        stop=stop,
      )
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
  command_line.run("train", fit, __doc__)


if __name__ == "__main__":
  main()
