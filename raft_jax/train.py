"""Fine-tuning: `python -m raft_jax.train --config C`.

A rerun of the same command continues from the last checkpoint and ends with the same
parameters, bit for bit, as a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import time

import jax

from raft_jax.config import cli, schema
from raft_jax.evaluation import validation
from raft_jax.models import sharding
from raft_jax.runtime import distributed, progress
from raft_jax.training import (
  checkpoint,
  initial_state,
  loop,
  metrics_log,
  output_lock,
  run_inputs,
  step_memory,
)


def fit(config: schema.Config, on_corrupt: str = "stop") -> None:
  """Trains a model as the config says, or continues an earlier run of it.

  Args:
    on_corrupt: "previous" continues from the step before a damaged checkpoint.
  """
  output = pathlib.Path(config.output)
  join(config.cluster)
  is_primary = distributed.leads()
  with contextlib.ExitStack() as stack:
    if not is_primary:
      stack.enter_context(contextlib.redirect_stdout(None))
    plan, inputs = distributed.together(lambda: run_inputs.prepare(config))
    shared = run_inputs.shared_facts(config, inputs.identity)
    distributed.agree({**shared, **distributed.versions()})
    panel = validation.read(config, inputs.codec, plan.decoder)
    print(sharding.describe(plan.mesh))

    output_lock.lock(output, stack, is_primary=is_primary)
    stop = stack.enter_context(distributed.stop_signals())
    stack.enter_context(jax.set_mesh(plan.mesh))
    total, keep = plan.schedule.total_steps, config.train.keep_checkpoints
    checkpoints = stack.enter_context(checkpoint.manager(output, keep=keep))
    newest = checkpoint.check_latest(
      checkpoints, inputs.identity, on_corrupt=on_corrupt
    )
    if newest is not None:
      verdict = validation.so_far(config, newest)
      if newest == total or verdict.over:
        print(f"already trained: {checkpoints.directory / str(newest)}")
        if config.watch is not None:
          print(validation.summary(config, verdict, newest, total))
        return
    distributed.together(lambda: step_memory.check(plan))
    start = initial_state.start(
      config, plan, inputs, checkpoints, on_corrupt=on_corrupt
    )
    began = time.perf_counter()
    board = config.train.tensorboard
    log = stack.enter_context(metrics_log.run_log(output, start.step, total, board))
    watcher = stack.enter_context(
      validation.watching(
        config, plan, inputs, start.reference, panel, checkpoints, start.step
      )
    )
    done = loop.train(
      plan,
      inputs,
      start,
      checkpoints=checkpoints,
      log=log,
      validate=None if watcher is None else watcher.look,
      stop=stop,
    )
  if is_primary:
    print_end(output, start.step, done, total, time.perf_counter() - began, stop)
    if watcher is not None:
      print(validation.summary(config, watcher.verdict, done, total))
  if stop:
    raise SystemExit(75 if stop[0] == signal.SIGTERM else 130)


def join(cluster: schema.Cluster) -> None:
  """Joins the other processes of the run, if there are any."""
  distributed.join(
    asked=cluster.join,
    coordinator=cluster.coordinator,
    processes=cluster.processes,
    index=cluster.index,
    heartbeat_s=cluster.heartbeat_s,
  )


def print_end(
  output: pathlib.Path, start: int, done: int, total: int, seconds: float, stop: list
) -> None:
  """The last line of a run: what was done, or how to continue."""
  if stop:
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
