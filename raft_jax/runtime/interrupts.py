"""Ctrl-C (SIGINT) and SIGTERM, which stop work at its next safe point.

A signal handler's exception would be raised wherever the main thread is: a library's
callback may swallow it, and a long compilation delays it. So the handlers here do
nothing. The interpreter writes each signal to a pipe, which a thread reads. The first
signal is recorded, and `check` raises it at the next safe point; a second one ends the
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
"""Signals within this time count as one: both terminal and launcher may send Ctrl-C."""

received: list[int] = []
"""The first signal received while `listening`; empty if there was none."""


@dataclasses.dataclass
class _Process:
  """The process's handling of signals; there is one instance.

  Attributes:
    before: handlers that ours replaced; empty outside `listening`.
    children: processes that signals are passed on to.
    received_at: time of the first signal.
    terminated: exit status after SIGTERM.
    deferrals: number of open `deferred` contexts.
    handed_over: whether `hand_over` was called.
  """

  before: dict[int, Any] = dataclasses.field(default_factory=dict)
  children: set[int] = dataclasses.field(default_factory=set)
  received_at: float = 0.0
  terminated: int = 128 + signal.SIGTERM
  deferrals: int = 0
  handed_over: bool = False


_process = _Process()


class Stopped(SystemExit):
  """Work stopped at a safe point after a signal. The code is the exit status."""


def status() -> int:
  """The exit status for the signal that was received."""
  return 128 + signal.SIGINT if received[0] == signal.SIGINT else _process.terminated


def due() -> bool:
  """Whether work should stop at the next safe point."""
  return bool(received) and not _process.deferrals


def check() -> None:
  """Marks a safe point: nothing is lost if work stops here.

  Raises:
    Stopped: a signal was received.
  """
  if due():
    raise Stopped(status())


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """Keeps `check` from raising while it is open; the caller reads `received`."""
  _process.deferrals += 1
  try:
    yield
  finally:
    _process.deferrals -= 1


@contextlib.contextmanager
def listening(*, terminated: int = 128 + signal.SIGTERM) -> Iterator[None]:
  """Records signals while it is open; its end is a safe point. It may be nested.

  A signal that was ignored before stays ignored, such as SIGINT in the background jobs
  of a shell.

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
  """Sends signals to a child process, too, while it is open."""
  _process.children.add(child)
  try:
    yield
  finally:
    _process.children.discard(child)


def hand_over() -> None:
  """Lets jax decide from now on when all processes stop; none may stop alone.

  jax handles SIGTERM and informs the other processes. A SIGINT is passed on to it.
  """
  _process.before.pop(signal.SIGTERM, None)  # jax keeps it
  _process.deferrals += 1
  _process.handed_over = True
  if received:
    os.kill(os.getpid(), signal.SIGTERM)


def handed_over() -> bool:
  """Whether `hand_over` was called."""
  return _process.handed_over


def at_once(number: int, frame: object = None) -> None:
  """Ends the process with one line. It is also a handler while nothing can be lost.

  It does not raise, because an exception during an import prints a long traceback.
  """
  del frame
  _say(f"interrupted; {HINT}\n")
  os._exit(128 + number)


@contextlib.contextmanager
def _pipe() -> Iterator[None]:
  """Installs the handlers and a thread that records signals."""
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
  """Does nothing; with a Python handler, the interpreter writes to the pipe."""


def _read(pipe: int) -> None:
  with open(pipe, "rb", buffering=0) as signals:
    while number := signals.read(1):
      if number[0] in WATCHED:
        _receive(number[0])


def _receive(number: int) -> None:
  """Records the first signal, passes it on, and ends the process at the second."""
  now = time.monotonic()
  if received and now - _process.received_at < SAME_S:
    return
  for child in _process.children:
    with contextlib.suppress(OSError):
      os.kill(child, number)
  if received:
    at_once(number)
  _process.received_at = now
  received.append(number)
  _say(
    "stopping after the current step, batch or compilation; send the signal again to "
    "stop now\n"
  )
  if _process.handed_over and number != signal.SIGTERM:
    os.kill(os.getpid(), signal.SIGTERM)


def _say(line: str) -> None:
  with contextlib.suppress(OSError):
    os.write(2, line.encode())


def _forget() -> None:
  """Resets a forked child, which has no reader and must not use its parent's pipe."""
  if _process.before:
    signal.set_wakeup_fd(-1)
    for number, handler in _process.before.items():
      signal.signal(number, handler)
    _process.before.clear()
    _process.children.clear()
    received.clear()


os.register_at_fork(after_in_child=_forget)
