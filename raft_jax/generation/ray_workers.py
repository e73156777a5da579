"""Engines in the processes of a Ray cluster, which do micro-batches side by side.

Ray places each worker on a node with enough free GPUs, waits for nodes that join, and
restarts workers that are lost. The command itself keeps the journal: a worker gets
requests, returns replies, and needs no access to the output folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.generation import engines, sentence_encoder
from raft_jax.runtime import environment, interrupts, threads

ATTEMPTS = 4
"""How often a micro-batch is tried whose worker is lost."""

_QUIET_S = 10.0
"""A longer wait for a first worker is explained."""


_Batch = tuple[tuple[int, Any], ...]
"""Items, each with its place."""


class Held(NamedTuple):
  """The workers that now run or wait for a place.

  Attributes:
    gpus: number of GPUs of each.
    actors: all of them.
    idle: those that have nothing to do, or why one cannot start.
  """

  gpus: int
  actors: list[Any]
  idle: queue.SimpleQueue[Any]


class Workers:
  """Workers with the engine of one pass; `connected` makes it.

  Attributes:
    size: GPUs of all workers together; number of workers where an engine takes no GPU.
  """

  def __init__(self, size: int):
    self.size = size
    self._held: Held | None = None

  def hold(self, gpus: int = 0) -> None:
    """Starts workers with `gpus` GPUs each, if others or none run; at 0 any will do.

    Returns when one has started. The others join as soon as Ray has a place for them.
    """
    import ray

    if self._held is None or gpus not in (0, self._held.gpus):
      self.release()
      actor_class = ray.remote(_Worker).options(  # type: ignore[attr-defined]
        num_cpus=1, num_gpus=gpus, max_restarts=-1
      )
      actors = [actor_class.remote() for _ in range(self.size // max(gpus, 1))]
      self._held = Held(gpus, actors, queue.SimpleQueue())
      for actor in actors:
        _join(actor, self._held.idle)
      self._await_first(self._held)

  def generate(
    self,
    generator: engines.Generator,
    requests: Iterable[engines.Request],
    at_once: int,
  ) -> Iterator[tuple[int, engines.Completion | errors.UserError]]:
    """As `generator.generate`, which each worker does for `at_once` requests at a time.

    A worker loads the weights at its first call.
    """

    def work(batch: _Batch) -> Sequence[engines.Completion | errors.UserError]:
      some = [request for _, request in batch]
      return self._run(_generate, generator, generator.identity, some)

    return self._as_finished(work, requests, at_once)

  def compare(
    self,
    encoder: sentence_encoder.Encoder,
    pairs: Iterable[tuple[str, str]],
    at_once: int,
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `sentence_encoder.compare`, which each worker does for `at_once` pairs."""
    which = (encoder.source, encoder.threads)

    def work(batch: _Batch) -> Sequence[dict[str, Any]]:
      return self._run(_compare, which, encoder.identity, [pair for _, pair in batch])

    return self._as_finished(work, pairs, at_once)

  def _as_finished(
    self, work: Callable[[_Batch], Sequence[Any]], items: Iterable[Any], at_once: int
  ) -> Iterator[tuple[int, Any]]:
    assert self._held is not None, "hold() comes first"
    waiting = enumerate(items)
    batches = iter(lambda: tuple(itertools.islice(waiting, at_once)), ())
    workers = len(self._held.actors)
    for batch, values in threads.as_finished(work, batches, workers):
      for (place, _), value in zip(batch, values, strict=True):
        yield place, value

  def release(self) -> None:
    """Ends all workers, which frees their GPUs."""
    import ray

    for actor in self._held.actors if self._held else ():
      ray.kill(actor)
    self._held = None

  def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function` in a worker; if that is lost, in another. Threads may call it.

    Raises:
      TryAgainError: every worker that tried it was lost.
    """
    import ray

    held = self._held
    assert held is not None, "hold() comes first"
    reason = ""
    for _ in range(ATTEMPTS):
      actor = _next(held.idle)
      try:
        result = ray.get(actor.run.remote(function, *arguments))
      except ray.exceptions.RayTaskError as error:  # raised by the function
        held.idle.put(actor)
        if error.cause is None:
          raise
        raise error.cause from error
      except ray.exceptions.RayError as error:
        _join(actor, held.idle)  # Ray restarts it, on this node or another
        reason = type(error).__name__
        print(f"Ray lost a worker ({reason}); another one does its batch", flush=True)
      else:
        held.idle.put(actor)
        return result
    raise errors.TryAgainError(
      f"Ray lost {ATTEMPTS} workers at one batch ({reason}); `ray logs` or the nodes' "
      "memory may say why: lower batch_size or memory_share; run the same command "
      "again: finished calls are kept"
    )

  def _await_first(self, held: Held) -> None:
    """Waits until a worker has started; after some time, says what Ray lacks."""
    import ray

    explain_at = time.monotonic() + _QUIET_S
    while True:
      with contextlib.suppress(queue.Empty):
        held.idle.put(_started(held.idle.get(timeout=0.2)))
        return
      interrupts.check()
      if time.monotonic() > explain_at:
        explain_at = float("inf")
        free = ray.available_resources()
        print(
          f"waiting for Ray: a worker needs 1 CPU and {held.gpus} GPUs of one node; "
          f"free in the cluster: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} "
          "GPUs",
          flush=True,
        )


@contextlib.contextmanager
def connected(size: int | None) -> Iterator[Workers | None]:
  """Connects to the Ray cluster of RAY_ADDRESS; without it, starts one here.

  Args:
    size: as `Workers.size`; None: no workers.

  Raises:
    UserError: the cluster cannot be joined: it runs another version of Ray or Python.
  """
  if size is None:
    yield None
    return
  _connect()
  workers = Workers(size)
  try:
    yield workers
  finally:
    import ray

    workers.release()
    ray.shutdown()


def check(size: int | None, roles: Mapping[str, schema.ModelEndpoint]) -> None:
  """Checks the option --ray before anything is loaded.

  Args:
    roles: config key -> the language models of the stage.

  Raises:
    TryAgainError: nobody listens at RAY_ADDRESS.
    UserError: Ray is not installed, or `size` is too small for a role.
  """
  if size is None:
    return
  if size < 1:
    raise errors.UserError(f"command line: --ray {size}: must be 1 or more")
  for key, role in roles.items():
    gpus = role.tensor_parallel * role.pipeline_parallel
    if gpus > size:
      raise errors.UserError(
        f"command line: --ray {size}: {key} takes {gpus} GPUs (tensor_parallel x "
        f"pipeline_parallel); use --ray {gpus} or more"
      )
  if importlib.util.find_spec("ray") is None:
    raise errors.UserError(
      f"command line: --ray: Ray is not installed; run {errors.install('ray')}"
    )
  _check_address(os.environ.get("RAY_ADDRESS", ""))


def _connect() -> None:
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  import ray

  in_main = threading.current_thread() is threading.main_thread()
  terminate = signal.getsignal(signal.SIGTERM)
  try:
    # Without an address Ray would look for a cluster of this machine in a file, which
    # outlives a killed cluster, and wait for that one.
    address = os.environ.get("RAY_ADDRESS") or "local"
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
  except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
    reason = " ".join(str(error).split())[:300]
    raise errors.UserError(f"cannot join a Ray cluster: {reason}") from error
  finally:
    if in_main:
      signal.signal(signal.SIGTERM, terminate)  # Ray sets its own
  total = ray.cluster_resources()
  print(
    f"Ray: {len(ray.nodes())} nodes with {total.get('CPU', 0):g} CPUs and "
    f"{total.get('GPU', 0):g} GPUs",
    flush=True,
  )


def _check_address(address: str) -> None:
  """Refuses an address at which nobody listens, where `ray.init` waits for minutes.

  Args:
    address: HOST:PORT; other forms are left to Ray.
  """
  if address.startswith("ray://"):
    raise errors.UserError(
      f"RAY_ADDRESS={address}: is Ray's client, which --ray does not support; run the "
      "command on a machine of the cluster, or with `ray job submit`"
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    return
  try:
    socket.create_connection((host, int(port)), timeout=10).close()
  except OSError as error:
    raise errors.TryAgainError(
      f"RAY_ADDRESS={address}: no Ray cluster answers ({error.strerror or error}); "
      "start one there, or unset RAY_ADDRESS to use this machine alone"
    ) from error


def _join(actor: Any, idle: queue.SimpleQueue[Any]) -> None:
  """Puts a worker among the idle ones when it has started; else its error."""
  # Ray repeats this call until the worker has a place, however often that is lost.
  started = actor.ready.options(max_task_retries=-1).remote().future()
  started.add_done_callback(lambda done: idle.put(done.exception() or actor))


def _next(idle: queue.SimpleQueue[Any]) -> Any:
  """The next idle worker; the wait for one is a safe point."""
  while True:
    interrupts.check()
    with contextlib.suppress(queue.Empty):
      return _started(idle.get(timeout=0.5))


def _started(worker: Any) -> Any:
  if isinstance(worker, BaseException):
    reason = (str(worker).strip().splitlines() or [type(worker).__name__])[-1]
    raise errors.UserError(
      f"a Ray worker cannot start ({reason[:300]}); all nodes need this environment, "
      "at the same path, and this folder"
    ) from worker
  return worker


# --- In a worker ----------------------------------------------------------------------


class _Worker:
  """The process of a worker; `engines.resident` keeps one model in it."""

  def __init__(self) -> None:
    environment.set_aside(os.environ)

  def ready(self) -> None:
    """Returns when the worker has started."""

  def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _generate(
  generator: engines.Generator, identity: str, requests: Sequence[engines.Request]
) -> Sequence[engines.Completion | errors.UserError]:
  _check_identity(generator.identity, identity)
  return engines.in_order(generator, requests)


def _compare(
  which: tuple[str, int], identity: str, pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
  encoder = _encoder(which)
  _check_identity(encoder.identity, identity)
  return sentence_encoder.compare(encoder, pairs)


@functools.cache
def _encoder(which: tuple[str, int]) -> sentence_encoder.Encoder:
  # With the command's number of threads, for its bits; Ray would give a worker one.
  source, threads = which
  return sentence_encoder.load(source, threads=threads)


def _check_identity(own: str, expected: str) -> None:
  """Refuses other weights than those that the journal's keys name."""
  if own != expected:
    raise errors.UserError(
      f"node {socket.gethostname()} has another model than the command: {own}, not "
      f"{expected}; give all nodes the same files and versions"
    )
