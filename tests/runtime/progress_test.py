"""Progress where no one watches, and in a terminal."""

import os
import pty
import sys
import time

import pytest

from raft_jax.runtime import progress


class Time:
  """A clock that moves when told to."""

  def __init__(self):
    self.now = 1000.0

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Time()
  monkeypatch.setattr(progress, "time", clock)
  return clock


def lines(capsys):
  out, err = capsys.readouterr()
  assert out == ""  # stdout belongs to results
  assert "\x1b" not in err
  return [line.rstrip() for line in err.splitlines()]


def test_one_line_an_interval_and_always_the_last(clock, capsys):
  bar = progress.Progress("train", 100, every_s=15.0)
  for done in range(1, 101):
    clock.now += 0.5
    bar.advance(done)
  bar.close()
  # Half a second a step: a line at 15, 30 and 45 s, and the last at 50 s.
  assert lines(capsys) == [
    "train: 30/100 steps, 2 steps/s, 0:00:35 left",
    "train: 60/100 steps, 2 steps/s, 0:00:20 left",
    "train: 90/100 steps, 2 steps/s, 0:00:05 left",
    "train: 100/100 steps, 2 steps/s, 0:00:00 left",
  ]


def test_slow_work_gets_one_line_each_time(clock, capsys):
  bar = progress.Progress("judge", 3, unit="call", every_s=15.0)
  for done in (1, 2, 3):
    clock.now += 4000
    bar.advance(done)
  assert lines(capsys) == [
    "judge: 1/3 calls, 0.00025 calls/s, 2:13:20 left",
    "judge: 2/3 calls, 0.00025 calls/s, 1:06:40 left",
    "judge: 3/3 calls, 0.00025 calls/s, 0:00:00 left",
  ]


def test_work_done_before_does_not_count_as_speed(clock, capsys):
  """Resumed at 90 of 100, one step in 20 s: 9 steps are 3 minutes."""
  bar = progress.Progress("train", 100, done=90)
  clock.now += 20
  bar.advance(91)
  assert lines(capsys) == ["train: 91/100 steps, 0.05 steps/s, 0:03:00 left"]


def test_no_work_done_yet_has_an_unknown_end(clock, capsys):
  bar = progress.Progress("train", 10)
  clock.now += 20
  bar.advance(0)
  assert lines(capsys) == ["train: 0/10 steps, 0 steps/s, ? left"]


def test_a_note_is_printed_as_it_is_on_one_line(clock, capsys):
  """Brackets are markup to rich; a long line is not to be folded."""
  bar = progress.Progress("train [bold]", 1)
  note = "sft 2.5  [red]kd[/red] " + "x" * 200
  bar.advance(1, note)
  (line,) = lines(capsys)
  assert line.startswith("train [bold]: 1/1 steps, ")
  assert line.endswith(note)


def test_work_without_a_title_shows_nothing(clock, capsys):
  bar = progress.Progress(None, 2)
  for done in (1, 2):
    clock.now += 20
    bar.advance(done)
  bar.close()
  assert lines(capsys) == []


def test_clock():
  assert progress.clock(0.4) == "0:00:00"
  assert progress.clock(3723) == "1:02:03"
  assert progress.clock(90_000) == "1 day, 1:00:00"
  assert progress.clock(float("inf")) == progress.clock(float("nan")) == "?"


def test_a_terminal_gets_a_bar(monkeypatch):
  reads, writes = pty.openpty()
  monkeypatch.setenv("TERM", "xterm")
  with os.fdopen(writes, "w") as terminal:
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.Progress("train", 3, every_s=0)
    for done in (1, 2, 3):
      bar.advance(done, note=f"[sft] 2.{done}")
    bar.close()
    time.sleep(0.1)
    shown = os.read(reads, 1 << 16).decode()
  os.close(reads)
  assert "\x1b" in shown
  assert "3/3" in shown
  assert "[sft] 2.3" in shown
  assert "steps/s" not in shown
