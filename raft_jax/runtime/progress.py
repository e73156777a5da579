"""Progress of long work: a bar with rate and time left, or plain lines in a log."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich import console, progress

from raft_jax.runtime import interrupts


class Progress:
  """A bar with rate and time left; without a terminal, a plain line at an interval.

  Without a title nothing is shown, for work that is a part of work with its own bar.
  """

  def __init__(
    self,
    title: str | None,
    total: int,
    *,
    done: int = 0,
    unit: str = "step",
    every_s=15.0,
  ):
    self._console = console.Console(stderr=True)
    self._title, self._total, self._unit, self._every = title, total, unit, every_s
    self._first = self._done = done
    self._started = self._last = time.monotonic()
    self._bar = None
    if title is not None and self._console.is_terminal:
      self._bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=self._console,
      )
      self._task = self._bar.add_task(title, total=total, completed=done, note="")
      self._bar.start()

  def advance(self, done: int, note: str = "") -> None:
    """Shows that `done` of the total are finished."""
    self._done, now = done, time.monotonic()
    if self._bar is not None:
      self._bar.update(self._task, completed=done, note=note)
    elif self._title is not None and (
      now - self._last >= self._every or done == self._total
    ):
      self._last = now
      rate = (done - self._first) / max(now - self._started, 1e-9)
      left = (self._total - done) / rate if rate > 0 else float("inf")
      self._console.print(
        f"{self._title}: {done}/{self._total} {self._unit}s, "
        f"{rate:.3g} {self._unit}s/s, {clock(left)} left  {note}",
        highlight=False,
        markup=False,
        soft_wrap=True,
      )

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()


def with_bar(items: Any, title: str, *, unit: str) -> Iterator[Any]:
  """Yields the items and shows progress; each item starts at a safe point."""
  bar = Progress(title, len(items), unit=unit)
  for done, item in enumerate(items):
    interrupts.check()
    bar.advance(done)
    yield item
  bar.advance(len(items))
  bar.close()


def amounts(by_name: Mapping[str, float | None]) -> str:
  """Names and amounts as text; None means unknown."""
  return ", ".join(
    f"{name} {'unknown' if value is None else format(round(value, 1), ',')}"
    for name, value in by_name.items()
  )


def clock(seconds: float) -> str:
  """Seconds as h:mm:ss, or `?` when unknown."""
  if not math.isfinite(seconds):
    return "?"
  return str(datetime.timedelta(seconds=round(seconds)))
