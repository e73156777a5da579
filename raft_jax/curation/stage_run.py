"""One run of a curation stage: its folder, its lock on the config, and its calls."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from raft_jax.config import run_lock, schema
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import ray_workers
from raft_jax.storage import journal


class StageRun(NamedTuple):
  """A stage and the folder that it fills.

  Attributes:
    stage: name of the stage's command.
    config: the run's config.
    identity_keys: keys of `config` that decide what the folder holds.
    folder: what the stage writes, below `config.output`.
  """

  stage: str
  config: schema.Config
  identity_keys: Sequence[str]
  folder: pathlib.Path


def begin(
  config: schema.Config, stage: str, identity_keys: Sequence[str], folder_name: str
) -> StageRun:
  """Checks that the output folder belongs to this config; writes nothing.

  Raises:
    UserError: the folder was made with other values of `identity_keys`.
  """
  run_lock.check_lock(config, stage, identity_keys)
  folder = pathlib.Path(config.output) / folder_name
  return StageRun(stage, config, identity_keys, folder)


def make_folder(run: StageRun) -> None:
  """Makes the stage's folder, and beside it `config`, which marks a run's output."""
  (run.folder.parent / "config").mkdir(parents=True, exist_ok=True)
  run.folder.mkdir(exist_ok=True)


def lock(run: StageRun) -> None:
  """Records the config, so that no later run fills this folder with other settings."""
  run_lock.lock_config(run.config, run.stage, run.identity_keys)


def is_complete(run: StageRun, inputs: str, sealed_inputs: str | None) -> bool:
  """Whether the sealed folder was made from these inputs; if so, prints that.

  Args:
    inputs: digest of everything that the stage's files depend on.
    sealed_inputs: the digest in the folder's manifest, or None if it is unfinished.
  """
  if sealed_inputs != inputs:
    return False
  lock(run)
  print(f"{run.folder}: already complete, nothing to do")
  return True


@contextlib.contextmanager
def calling(
  run: StageRun, book: journal.Journal, seed: int, ray: int | None = None
) -> Iterator[calls_lib.Calls]:
  """Locks the config and yields calls that go through the journal `book`.

  The config is locked here and not earlier: a run that stopped at a fault of its input
  must not bind the next one. A signal ends the calls after a micro-batch, and no model
  stays in memory.

  Args:
    ray: size of the workers on a Ray cluster that make the calls, as
      `ray_workers.Workers.size`; None: this process makes them.
  """
  lock(run)
  with ray_workers.connected(ray) as workers:
    calls = calls_lib.Calls(book, seed, workers=workers)
    with calls_lib.interruptible(calls):
      yield calls
