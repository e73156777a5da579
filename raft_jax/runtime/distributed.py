"""Several processes that train as one: joining, agreeing, stopping together.

Each process runs the same programs on its own devices, so that none may decide anything
alone: what one of them finds wrong, or is told, must reach the others before the next
program. With a single process every function here is the plain thing.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from raft_jax import errors

T = TypeVar("T")

# --- Joining --------------------------------------------------------------------------


def launcher(environment: Mapping[str, str]) -> str | None:
  """Who started several processes, or None; the same signs that jax goes by.

  A Cloud TPU VM outside GKE shows no sign without asking its metadata server.
  """

  def number(name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 1

  # Set within `srun` only: a batch script knows the tasks, too, but is one process.
  if "SLURM_STEP_NODELIST" in environment and number("SLURM_NTASKS") > 1:
    return "Slurm"
  if "OMPI_MCA_orte_hnp_uri" in environment and number("OMPI_COMM_WORLD_SIZE") > 1:
    return "Open MPI"
  workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get(
    "TPU_WORKER_HOSTNAMES", ""
  )
  if "," in workers or number("MEGASCALE_NUM_SLICES") > 1:
    return "GKE"
  if environment.get("JAX_COORDINATOR_ADDRESS"):
    return "JAX_COORDINATOR_ADDRESS"
  return None


def join(
  *,
  asked: bool | None,
  coordinator: str | None,
  processes: int | None,
  index: int | None,
  heartbeat_s: int,
) -> None:
  """Makes this process one of several, before anything touches a device.

  Args:
    asked: None joins where `launcher` sees several processes, or a coordinator is
      given; True always, as jax finds them (on Cloud TPU VMs it asks for them).
    coordinator: host:port of process 0; like the next two it may come from the
      environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), and
      Slurm, Open MPI, GKE and Cloud TPU need none of them.
    processes: how many there are.
    index: this one's number, from 0.
    heartbeat_s: a process silent for so long is lost, which ends the others.

  Raises:
    errors.UserError: the others cannot be found or reached.
  """
  started = launcher(os.environ)
  if asked is False or not (asked or coordinator or started):
    return
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  processes = _given(processes, "JAX_NUM_PROCESSES")
  index = _given(index, "JAX_PROCESS_ID")
  if coordinator and not coordinator.rpartition(":")[2].isdigit():
    raise errors.UserError(
      f"cluster.coordinator (or JAX_COORDINATOR_ADDRESS): {coordinator!r} names no "
      "port; write host:port"
    )
  explicit = None not in (coordinator, processes, index)
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      index,
      cluster_detection_method="deactivate" if explicit else None,
      heartbeat_timeout_seconds=heartbeat_s,
      shutdown_timeout_seconds=heartbeat_s,
    )
  except (ValueError, RuntimeError, OSError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise errors.UserError(
      f"cluster: could not join the other processes ({reason[:200]}); give "
      "cluster.coordinator, cluster.processes and cluster.index (or "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID), or set "
      "cluster.join=false to run alone"
    ) from error


def _given(value: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  if value is not None or text is None:
    return value
  if not text.isdigit():
    raise errors.UserError(f"{variable}: {text!r} is not a number; set or unset it")
  return int(text)


def refuse(stage: str) -> None:
  """Refuses to run a stage for a single process in several.

  Raises:
    errors.UserError: `launcher` sees several.
  """
  started = launcher(os.environ)
  if started is not None:
    raise errors.UserError(
      f"{stage} runs in one process, and {started} says that this is one of several; "
      "start it once, e.g. with `srun --ntasks=1` or without JAX_COORDINATOR_ADDRESS"
    )


def leads() -> bool:
  """Whether this is the process that writes and prints for all."""
  return jax.process_index() == 0


# --- Agreeing -------------------------------------------------------------------------


def exchange(text: str) -> list[str]:
  """What every process says, in the order of their numbers; waits for all of them."""
  if jax.process_count() == 1:
    return [text]
  own = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([own.size]))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: own.size] = own
  rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:size]).decode() for row, [size] in zip(rows, sizes)]


def together(work: Callable[[], T]) -> T:
  """Does what any process may find impossible; then all of them do.

  The work must not wait for other processes itself.

  Raises:
    errors.UserError: that of the first process that had one, and on which host.
  """
  result: Any = None
  own, passes = "", False
  try:
    result = work()
  except (errors.UserError, OSError) as error:
    if jax.process_count() == 1:
      raise
    own, passes = str(error), isinstance(error, errors.TryAgainError)
  own_words = json.dumps([socket.gethostname(), own, passes])
  said = [json.loads(text) for text in exchange(own_words)]
  faults = {fault for _, fault, _ in said}
  if faults == {""}:
    return result
  for number, (host, fault, passes) in enumerate(said):
    if fault:
      place = "" if len(faults) == 1 else f"process {number} on {host}: "
      raise (errors.TryAgainError if passes else errors.UserError)(place + fault)
  raise AssertionError


class Faults:
  """What one process alone may find impossible, kept until all can hear of it.

  Were it raised at once, the others would wait for this process until jax gave it up.
  """

  def __init__(self) -> None:
    self._first: Exception | None = None

  def keep(self, work: Callable[[], None]) -> None:
    """Does the work, unless some failed before. Alone, a fault is raised at once."""
    try:
      if self._first is None:
        work()
    except (errors.UserError, OSError) as error:
      if jax.process_count() == 1:
        raise
      self._first = error

  def tell(self) -> None:
    """Raises the fault, in all processes; call it in all of them."""
    together(self._tell)

  def _tell(self) -> None:
    if self._first is not None:
      raise self._first


def agree(facts: Mapping[str, Any]) -> None:
  """Checks that all processes were started with the same facts.

  Raises:
    errors.UserError: names the host that differs, in what, and from what.
  """
  said = exchange(json.dumps([socket.gethostname(), facts], sort_keys=True))
  fault = difference([json.loads(text) for text in said])
  if fault is not None:
    raise errors.UserError(fault)


def difference(said: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
  """In words, the first fact on which a process is not with the most; None if none.

  Args:
    said: host and facts of every process.
  """
  for name in sorted({name for _, facts in said for name in facts}):
    values = [json.dumps(facts.get(name), sort_keys=True) for _, facts in said]
    common, count = collections.Counter(values).most_common(1)[0]
    if count < len(said):
      odd = next(number for number, value in enumerate(values) if value != common)
      usual = values.index(common)
      return (
        f"{name}: {values[odd]} in process {odd} on {said[odd][0]}, but {common} in "
        f"process {usual} on {said[usual][0]}; start all of them with the same config, "
        "data and versions"
      )
  return None


LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
  """What decides which programs a process runs, beside its config and data."""
  sources = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
  code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
  return {
    "version of python": platform.python_version(),
    "sha256 of raft_jax": code,
    **{f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES},
  }


# --- Arrays ---------------------------------------------------------------------------


def whole(tree: Any) -> Any:
  """The values of arrays that lie on all processes' devices, as numpy arrays.

  Every process must ask for the same ones at the same time, under `jax.set_mesh`.
  """
  if jax.process_count() > 1:
    tree = jax.jit(_same, out_shardings=jax.P())(tree)
  return jax.device_get(tree)


def _same(tree: Any) -> Any:
  return tree


# --- Stopping -------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM; a second one acts at once.

  Where processes have joined, jax has taken SIGTERM and tells the others: a handler of
  our own would silently turn that off. A SIGINT is handed on to it.
  """
  received: list[int] = []
  joined = jax.distributed.is_initialized()

  def note(number, frame):
    del frame
    received.append(number)
    signal.signal(number, signal.SIG_DFL)
    print(
      "stopping after this step; once more to stop now", file=sys.stderr, flush=True
    )
    if joined:
      os.kill(os.getpid(), signal.SIGTERM)

  own = (signal.SIGINT,) if joined else (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, note) for number in own}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def stops(received: list[int], done: int) -> bool:
  """Whether to stop after `done` steps; ask after each step, in every process.

  Args:
    received: from `stop_signals`; gets a SIGTERM that another process was sent.
  """
  if not jax.distributed.is_initialized():
    return bool(received)
  if not multihost_utils.reached_preemption_sync_point(done):
    return False
  if not received:
    received.append(signal.SIGTERM)
  return True
