"""Several processes that train as one: they join, agree and stop together.

All processes run the same programs on their own devices, so none may decide alone: an
error or a signal in one of them must reach the others before the next program. With a
single process, the functions here do nothing special.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from raft_jax import errors
from raft_jax.runtime import interrupts

T = TypeVar("T")

# --- Joining --------------------------------------------------------------------------


def launcher(environment: Mapping[str, str]) -> str | None:
  """The launcher that started several processes, or None; by the signs that jax reads.

  A Cloud TPU VM outside GKE shows no sign unless its metadata server is asked.
  """

  def number(name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 1

  # Set within `srun` only; a batch script also has SLURM_NTASKS, but is one process.
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
  wanted: bool | None,
  coordinator: str | None,
  processes: int | None,
  index: int | None,
  heartbeat_s: int,
) -> None:
  """Joins this process to the others, before anything uses a device.

  Args:
    wanted: None joins if `launcher` sees several processes or a coordinator is given;
      True joins as jax detects the processes (on Cloud TPU VMs it asks for them); False
      never joins.
    coordinator: host:port of process 0. This and the next two may also come from the
      environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID); Slurm,
      Open MPI, GKE and Cloud TPU need none of them.
    processes: number of processes.
    index: of this process, from 0.
    heartbeat_s: seconds without a heartbeat after which a process counts as lost, which
      ends the others.

  Raises:
    errors.UserError: the other processes cannot be found or reached.
  """
  started = launcher(os.environ)
  if wanted is False or not (wanted or coordinator or started):
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
  interrupts.hand_over()


def _given(value: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  if value is not None or text is None:
    return value
  if not text.isdigit():
    raise errors.UserError(f"{variable}: {text!r} is not a number; set or unset it")
  return int(text)


def refuse(stage: str) -> None:
  """Refuses to run a stage in several processes that needs a single one.

  Raises:
    errors.UserError: `launcher` sees several.
  """
  started = launcher(os.environ)
  if started is not None:
    raise errors.UserError(
      f"{stage} runs in one process, and {started} says that this is one of several; "
      "start it once, e.g. with `srun --ntasks=1` or without JAX_COORDINATOR_ADDRESS"
    )


def is_primary() -> bool:
  """Whether this is the process that writes and prints for all of them."""
  return jax.process_index() == 0


# --- Agreeing -------------------------------------------------------------------------


def gather_texts(text: str) -> list[str]:
  """The texts of all processes, in the order of their indices; waits for all."""
  if jax.process_count() == 1:
    return [text]
  encoded = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([encoded.size]))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: encoded.size] = encoded
  rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:size]).decode() for row, [size] in zip(rows, sizes)]


def run_on_all(work: Callable[[], T]) -> T:
  """Runs `work` in every process; if it fails in one, all raise.

  `work` must not wait for other processes.

  Raises:
    errors.UserError: of the first process that failed, with its host.
  """
  result: Any = None
  message, is_temporary = "", False
  try:
    result = work()
  except (errors.UserError, OSError) as error:
    if jax.process_count() == 1:
      raise
    message, is_temporary = str(error), isinstance(error, errors.TryAgainError)
  report = json.dumps([socket.gethostname(), message, is_temporary])
  reports = [json.loads(text) for text in gather_texts(report)]
  messages = {message for _, message, _ in reports}
  if messages == {""}:
    return result
  for index, (host, message, is_temporary) in enumerate(reports):
    if message:
      place = "" if len(messages) == 1 else f"process {index} on {host}: "
      kind = errors.TryAgainError if is_temporary else errors.UserError
      raise kind(place + message)
  raise AssertionError


class DeferredErrors:
  """The first error of one process, kept until all processes can raise it.

  If it were raised at once, the others would wait until jax counts this one as lost.
  """

  def __init__(self) -> None:
    self._first: Exception | None = None

  def keep(self, work: Callable[[], None]) -> None:
    """Runs `work`, unless an error is kept; a single process raises at once."""
    try:
      if self._first is None:
        work()
    except (errors.UserError, OSError) as error:
      if jax.process_count() == 1:
        raise
      self._first = error

  def raise_on_all(self) -> None:
    """Raises the kept error in all processes; call it in all of them."""
    run_on_all(self._raise)

  def _raise(self) -> None:
    if self._first is not None:
      raise self._first


def assert_same(facts: Mapping[str, Any]) -> None:
  """Checks that all processes have the same facts.

  Raises:
    errors.UserError: names a host that differs, the fact, and both values.
  """
  texts = gather_texts(json.dumps([socket.gethostname(), facts], sort_keys=True))
  message = difference([json.loads(text) for text in texts])
  if message is not None:
    raise errors.UserError(message)


def difference(processes: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
  """A message on the first fact in which a process differs from most; None if none.

  Args:
    processes: host and facts of each process.
  """
  for name in sorted({name for _, facts in processes for name in facts}):
    values = [json.dumps(facts.get(name), sort_keys=True) for _, facts in processes]
    common, count = collections.Counter(values).most_common(1)[0]
    if count < len(processes):
      odd = next(index for index, value in enumerate(values) if value != common)
      usual = values.index(common)
      return (
        f"{name}: {values[odd]} in process {odd} on {processes[odd][0]}, but {common} "
        f"in process {usual} on {processes[usual][0]}; start all of them with the same "
        "config, data and versions"
      )
  return None


LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
  """The versions that decide, with config and data, which programs a process runs."""
  sources = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
  code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
  return {
    "version of python": platform.python_version(),
    "sha256 of raft_jax": code,
    **{f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES},
  }


# --- Arrays ---------------------------------------------------------------------------


def to_host(tree: Any) -> Any:
  """The full values of arrays that are spread over all processes, as numpy arrays.

  All processes must call this with the same arrays, under `jax.set_mesh`.
  """
  if jax.process_count() > 1:
    tree = jax.jit(_same, out_shardings=jax.P())(tree)
  return jax.device_get(tree)


def _same(tree: Any) -> Any:
  return tree


# --- Stopping -------------------------------------------------------------------------


def should_stop(done: int) -> bool:
  """Whether to stop after `done` steps; call this after each step in all processes.

  A SIGTERM to another process counts as received in this one.
  """
  received = interrupts.received
  if not interrupts.handed_over():
    return bool(received)
  if not multihost_utils.reached_preemption_sync_point(done):
    return False
  if not received:
    received.append(signal.SIGTERM)
  return True
