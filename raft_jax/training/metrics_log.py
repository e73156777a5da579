"""The metrics of a run: its log, its progress bar, and signs of collapse in rollouts.

`metrics.jsonl` is the authoritative record: one JSON object per line, NaN as null.
Trackers are optional, and their failure never stops a run.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from raft_jax.runtime import distributed, interrupts, progress
from raft_jax.training import tracker_libraries, trackers

# --- Log and progress bar -------------------------------------------------------------


class Log:
  """Appends rows to `metrics.jsonl` and, on request, to trackers."""

  def __init__(
    self,
    output: pathlib.Path,
    *,
    resume_step: int,
    tracked: Sequence[str] = (),
    run: tracker_libraries.Run | None = None,
  ):
    """Opens the log and drops rows after `resume_step`, whose steps were lost.

    Args:
      tracked: names of trackers.
      run: what they are told.
    """
    self._path = output / "metrics.jsonl"
    self._started = time.monotonic()
    logged = read_rows(self._path)
    keep_until(self._path, resume_step)
    self._file = self._path.open("a", encoding="utf-8")
    self.trackers = trackers.open_all(
      tracked,
      (run or tracker_libraries.Run(output))._replace(
        step=resume_step, logged_until=last_step(logged)
      ),
      [row for row in logged if row["step"] <= resume_step],
    )

  def write(self, step: int, values: dict[str, float], split: str = "train") -> None:
    row = {
      "step": step,
      "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "wall_s": round(time.monotonic() - self._started, 3),
      "split": split,
      "values": {
        name: value if math.isfinite(value) else None for name, value in values.items()
      },
    }
    self._file.write(json.dumps(row, allow_nan=False) + "\n")
    self._file.flush()
    self.trackers.write(step, values, split)

  def close(self, status: str = "finished") -> None:
    os.fsync(self._file.fileno())
    self._file.close()
    self.trackers.close(status)


def keep_until(path: pathlib.Path, step: int) -> None:
  """Drops rows after `step`, and a torn last line, from the log of a resumed run."""
  if not path.exists():
    return
  temporary = path.with_suffix(".tmp")
  kept = "".join(f"{line}\n" for line, _ in rows_until(path, step))
  temporary.write_text(kept, encoding="utf-8")
  os.replace(temporary, path)


def rows_until(path: pathlib.Path, step: int) -> list[tuple[str, dict[str, Any]]]:
  """The complete lines of a log up to a step, each as text and as a parsed row."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      row = json.loads(line)
      if row["step"] <= step:
        rows.append((line, row))
    except (json.JSONDecodeError, KeyError, TypeError):
      continue
  return rows


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a log."""
  return [row for _, row in rows_until(path, sys.maxsize)]


def last_step(rows: Sequence[Mapping[str, Any]]) -> int:
  """The last step of a log's rows; 0 if there are none."""
  return max((row["step"] for row in rows), default=0)


@contextlib.contextmanager
def tracked(
  names: Sequence[str], run: tracker_libraries.Run
) -> Iterator[trackers.Trackers]:
  """The trackers of a run that was trained, for its scores and pictures."""
  rows = read_rows(run.output / "metrics.jsonl") if names else []
  step = last_step(rows)
  opened = trackers.open_all(names, run._replace(step=step, logged_until=step), rows)
  try:
    yield opened
  finally:
    opened.close()


class RunLog:
  """The log and the progress bar of a run; silent in all processes but the first.

  If a write fails in one process of several, the error is kept until `check`, which
  raises it in all of them. Raised at once, it would leave the others waiting.
  """

  def __init__(self, log: Log | None, bar: progress.Progress | None):
    self._log, self._bar, self._errors = log, bar, distributed.DeferredErrors()

  def write(self, step: int, values: dict[str, float]) -> None:
    """Logs the metrics after `step` steps."""
    if self._log is not None:
      self._errors.keep(functools.partial(self._log.write, step, values))
    if self._bar is not None:
      self._bar.advance(step, note(values))

  def check(self) -> None:
    """Raises the first error of a write; call it in all processes."""
    self._errors.raise_on_all()


@contextlib.contextmanager
def run_log(
  start: int, total_steps: int, tracked: Sequence[str], run: tracker_libraries.Run
) -> Iterator[RunLog]:
  """The log of a run that continues after `start` steps."""
  if not distributed.is_primary():
    yield RunLog(None, None)
    return
  log = Log(run.output, resume_step=start, tracked=tracked, run=run)
  status = "failed"
  try:
    with contextlib.closing(progress.Progress("train", total_steps, done=start)) as bar:
      yield RunLog(log, bar)
    status = "stopped" if interrupts.received else "finished"
  finally:
    log.close(status)


def note(values: dict[str, float]) -> str:
  """The few metrics to show beside the progress bar."""
  shown = {
    "loss_sft": "sft {:.3g}",
    "loss_kd": "kd {:.3g}",
    "kd_weight": "λ {:.3g}",
    "rollout_length": "len {:.3g}",
    "validation_loss": "val {:.3g}",
    "validation_drift": "drift {:.3g}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
  }
  return "  ".join(
    text.format(values[name]) for name, text in shown.items() if name in values
  )


# --- Signs of collapse ----------------------------------------------------------------


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
  """Share of a text's n-grams that occur earlier in it; 0 for short texts."""
  grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
  total = sum(grams.values())
  return 1.0 - len(grams) / total if total else 0.0


def rollout_health(
  tokens_BR: np.ndarray,
  length_B: np.ndarray,
  texts: Sequence[str],
  leaks: Sequence[str],
) -> dict[str, float]:
  """Signs of collapse in sampled texts that no loss shows.

  Args:
    tokens_BR: int token ids of the rollouts.
    length_B: tokens of each rollout.
    texts: the decoded rollouts.
    leaks: lower-case phrases of the teacher's prompt.

  Returns:
    `rollout_repeated_4gram`: mean share of repeated 4-grams; `rollout_leaked`: share of
    rollouts that contain a phrase of the teacher's prompt.
  """
  repeats = [
    repeated_ngrams(row[:length].tolist()) for row, length in zip(tokens_BR, length_B)
  ]
  leaked = [any(phrase in text.lower() for phrase in leaks) for text in texts]
  return {
    "rollout_repeated_4gram": float(np.mean(repeats)),
    "rollout_leaked": float(np.mean(leaked)),
  }
