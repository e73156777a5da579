"""Fine-tuning: `python -m raft_jax.train --config C`.

A rerun of the same command continues from the last checkpoint and ends with the same
parameters, bit for bit, as a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time

import jax

from raft_jax.config import cli, schema
from raft_jax.config import load as config_load
from raft_jax.evaluation import early_stopping
from raft_jax.evaluation import validation as validation_lib
from raft_jax.hf import carried_tensors
from raft_jax.models import sharding, transformer
from raft_jax.runtime import distributed, interrupts, progress
from raft_jax.training import (
  checkpoint,
  initial_state,
  loop,
  metrics_log,
  output_lock,
  run_identity,
  run_inputs,
  step_memory,
  trackers,
)


@interrupts.listening(terminated=os.EX_TEMPFAIL)
def fit(config: schema.Config, on_corrupt: str = "stop") -> None:
  """Trains a model as the config says, or continues an earlier run of it.

  Args:
    on_corrupt: "previous" continues from the step before a damaged checkpoint.
  """
  settings, output = config.validation, pathlib.Path(config.output)
  trackers.require(config.train.trackers)
  join(config.cluster)
  is_primary = distributed.is_primary()
  with contextlib.ExitStack() as stack:
    if not is_primary:
      stack.enter_context(contextlib.redirect_stdout(None))
    plan, inputs = distributed.run_on_all(lambda: run_inputs.prepare(config))
    interrupts.check()
    distributed.assert_same(run_identity.shared_facts(config, inputs.identity))
    validation_set = validation_lib.read(
      settings, config.data, inputs.tokenizer, plan.decoder, source=config.model.source
    )
    print(sharding.describe(plan.mesh))
    count = transformer.parameter_count(plan.decoder)
    tower = carried_tensors.describe(config.model.source, count)
    if tower is not None:
      print(tower)

    output_lock.lock(output, stack, is_primary=is_primary)
    stack.enter_context(jax.set_mesh(plan.mesh))
    total, keep = plan.schedule.total_steps, config.train.keep_checkpoints
    checkpoints = stack.enter_context(checkpoint.manager(output, keep=keep))
    newest = checkpoint.check_latest(
      checkpoints, inputs.identity, on_corrupt=on_corrupt
    )
    if newest is not None and is_over(settings, output, newest, total):
      return
    interrupts.check()
    distributed.run_on_all(lambda: step_memory.check(plan))

    start = initial_state.start(
      config, plan, inputs, checkpoints, on_corrupt=on_corrupt
    )
    began = time.perf_counter()
    tracked = trackers.describe(
      config.train, output, config_load.values(config, trackers.SETTINGS)
    )
    log = stack.enter_context(
      metrics_log.run_log(start.step, total, config.train.trackers, tracked)
    )
    validation = stack.enter_context(
      validation_lib.during_training(
        config, plan, inputs, start.reference, validation_set, checkpoints, start.step
      )
    )
    validate = None if validation is None else validation.run
    done = loop.train(
      plan, inputs, start, checkpoints=checkpoints, log=log, validate=validate
    )
  if is_primary:
    print_end(output, start.step, done, total, time.perf_counter() - began)
    if validation is not None:
      print_best(settings, validation.status, done, total)
  if interrupts.received:
    raise interrupts.Stopped(interrupts.status())


def is_over(
  settings: schema.Validation | None, output: pathlib.Path, step: int, total: int
) -> bool:
  """Whether training ended with the checkpoint of a step; if so, prints that."""
  status = early_stopping.status_at(settings, output, step)
  if step != total and not status.over:
    return False
  print(f"already trained: {output.resolve() / checkpoint.FOLDER / str(step)}")
  print_best(settings, status, step, total)
  return True


def print_best(
  settings: schema.Validation | None,
  status: early_stopping.Status,
  step: int,
  total_steps: int,
) -> None:
  """Prints the best step of a run that was validated."""
  if settings is not None:
    print(early_stopping.summary(settings, status, step=step, total_steps=total_steps))


def join(cluster: schema.Cluster) -> None:
  """Joins the other processes of the run, if there are any."""
  distributed.join(
    wanted=cluster.join,
    coordinator=cluster.coordinator,
    processes=cluster.processes,
    index=cluster.index,
    heartbeat_s=cluster.heartbeat_s,
  )


def print_end(
  output: pathlib.Path, start: int, done: int, total: int, seconds: float
) -> None:
  """The last line of a run: what was done, or how to continue."""
  if interrupts.received and done < total:
    print(
      f"stopped and saved after step {done} of {total}; rerun the same command to go on"
    )
    return
  lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  first, last = (json.loads(line)["values"] for line in (lines[0], lines[-1]))
  print(
    f"trained {done - start} steps in {progress.clock(seconds)}; "
    f"first step: {metrics_log.note(first)}; last step: {metrics_log.note(last)}; "
    f"checkpoint: {output / checkpoint.FOLDER / str(done)}"
  )


OPTIONS = {
  "--on-corrupt": {
    "metavar": "stop|previous",
    "choices": ("stop", "previous"),
    "default": "stop",
    "help": "a damaged checkpoint: stop with an error (default), or continue from the "
    "one before",
  }
}


def main() -> None:
  """Command line."""
  cli.run("train", fit, __doc__, options=OPTIONS)


if __name__ == "__main__":
  main()
