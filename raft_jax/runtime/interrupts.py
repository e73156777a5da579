"""Ctrl-C (SIGINT) and SIGTERM: noted at any time, acted on where work can stop.

An exception raised by a signal handler lands wherever the main thread is: a library's
callback may swallow it, and a compilation of minutes delays it. So the handlers here do
nothing. The interpreter writes each signal to a pipe, which a thread reads: the first
signal is noted, and `check` raises it at the next safe point; a second one ends the
process at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

HINT = "run the same command again to continue"

WATCHED = (signal.SIGINT, signal.SIGTERM)

SAME_S = 0.2
"""Signals this close are one: a terminal and a launcher may both pass on a Ctrl-C."""

received: list[int] = []
"""The first signal that came while `listening`; empty if none did."""


@dataclasses.dataclass
class _Process:
  """What the process does with signals; there is one of it.

  Attributes:
    before: handlers that ours replaced; empty while nobody listens.
    children: processes that signals are passed on to.
    noted_at: when the first signal came.
    terminated: exit status after SIGTERM.
    deferrals: how many `deferred` last.
    handed_over: whether `hand_over` was called.
  """

  before: dict[int, Any] = dataclasses.field(default_factory=dict)
  children: set[int] = dataclasses.field(default_factory=set)
  noted_at: float = 0.0
  terminated: int = 128 + signal.SIGTERM
  deferrals: int = 0
  handed_over: bool = False


_process = _Process()


class Stopped(SystemExit):
  """Work ended at a safe point, because of a signal. The code is the exit status."""


def status() -> int:
  """The exit status by which the signal that was noted ends the process."""
  return 128 + signal.SIGINT if received[0] == signal.SIGINT else _process.terminated


def due() -> bool:
  """Whether work should stop at the next safe point."""
  return bool(received) and not _process.deferrals


def check() -> None:
  """A safe point: nothing is lost if work stops here.

  Raises:
    Stopped: a signal came.
  """
  if due():
    raise Stopped(status())


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """`check` raises nothing meanwhile; the caller looks at `received` itself."""
  _process.deferrals += 1
  try:
    yield
  finally:
    _process.deferrals -= 1


@contextlib.contextmanager
def listening(*, terminated: int = 128 + signal.SIGTERM) -> Iterator[None]:
  """Notes signals while it lasts; its end is a safe point. May be nested.

  A signal that is ignored, as SIGINT is in a shell's background jobs, stays ignored.

  Args:
    terminated: exit status after SIGTERM.
  """
  outer, _process.terminated = _process.terminated, terminated
  main = threading.current_thread() is threading.main_thread()
  try:
    with _pipe() if main and not _process.before else contextlib.nullcontext():
      yield
      check()
  finally:
    _process.terminated = outer


@contextlib.contextmanager
def passing_on(child: int) -> Iterator[None]:
  """Signals that are noted are sent to a child process, too."""
  _process.children.add(child)
  try:
    yield
  finally:
    _process.children.discard(child)


def hand_over() -> None:
  """From now on several processes stop together, as jax tells them.

  jax has taken SIGTERM, and tells the others; a SIGINT is handed on to it. No process
  may stop alone.
  """
  _process.before.pop(signal.SIGTERM, None)  # it must not be taken back from jax
  _process.deferrals += 1
  _process.handed_over = True
  if received:
    os.kill(os.getpid(), signal.SIGTERM)


def handed_over() -> bool:
  """Whether `hand_over` was called."""
  return _process.handed_over


def at_once(number: int, frame: object = None) -> None:
  """Ends the process, with one line; also a signal handler, while nothing can be lost.

  It raises nothing: an import would turn that into a page of traceback.
  """
  del frame
  _say(f"interrupted; {HINT}\n")
  os._exit(128 + number)


@contextlib.contextmanager
def _pipe() -> Iterator[None]:
  """Takes the signals, and has a thread note those that come."""
  read, write = os.pipe()
  os.set_blocking(write, False)
  thread = threading.Thread(target=_read, args=(read,), name="signals", daemon=True)
  thread.start()
  fd_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  for watched in WATCHED:
    if signal.getsignal(watched) is not signal.SIG_IGN:
      _process.before[watched] = signal.signal(watched, _nothing)
  try:
    yield
  finally:
    for number, handler in _process.before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(fd_before)
    os.close(write)
    thread.join()
    _process.before.clear()
    received.clear()


def _nothing(number: int, frame: object) -> None:
  """A handler in Python is what makes the interpreter write to the pipe."""


def _read(pipe: int) -> None:
  with open(pipe, "rb", buffering=0) as signals:
    while number := signals.read(1):
      if number[0] in WATCHED:
        _note(number[0])


def _note(number: int) -> None:
  now = time.monotonic()
  if received and now - _process.noted_at < SAME_S:
    return
  for child in _process.children:
    with contextlib.suppress(OSError):
      os.kill(child, number)
  if received:
    at_once(number)
  _process.noted_at = now
  received.append(number)
  _say(
    "stopping at the next safe point, after the step, batch or compilation that runs; "
    "once more to stop now\n"
  )
  if _process.handed_over and number != signal.SIGTERM:
    os.kill(os.getpid(), signal.SIGTERM)


def _say(line: str) -> None:
  with contextlib.suppress(OSError):
    os.write(2, line.encode())


def _forget() -> None:
  """A fork has no thread that reads, and must not write to its parent's pipe."""
  if _process.before:
    signal.set_wakeup_fd(-1)
    for number, handler in _process.before.items():
      signal.signal(number, handler)
    _process.before.clear()
    _process.children.clear()
    received.clear()


os.register_at_fork(after_in_child=_forget)
