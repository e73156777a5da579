"""The metrics of a run: its log, its progress bar, and signs of collapse in rollouts.

`metrics.jsonl` is the authoritative record: one JSON object per line, NaN as null.
TensorBoard is optional, and its failure never stops a run.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
import pathlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from raft_jax import errors
from raft_jax.runtime import distributed, progress

# --- Log and progress bar -------------------------------------------------------------


class Log:
  """Appends rows to `metrics.jsonl` and, on request, to TensorBoard."""

  def __init__(
    self, output: pathlib.Path, *, resume_step: int, tensorboard: bool = False
  ):
    """Opens the log and drops rows after `resume_step`, whose steps were lost."""
    self._path = output / "metrics.jsonl"
    self._started = time.monotonic()
    keep_until(self._path, resume_step)
    self._file = self._path.open("a", encoding="utf-8")
    self._board = board(output / "tensorboard") if tensorboard else None

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
    if self._board is not None:
      try:
        self._board.write(
          step, {f"{split}/{name}": value for name, value in values.items()}
        )
      except OSError as error:
        warnings.warn(f"TensorBoard is off from now on: {error}", stacklevel=2)
        self._board.close()
        self._board = None

  def close(self) -> None:
    os.fsync(self._file.fileno())
    self._file.close()
    if self._board is not None:
      self._board.close()


class Board:
  """Appends scalars to a TensorBoard event file, in the caller's thread.

  tensorboardX's `SummaryWriter` uses a thread of its own: once a full disk has ended
  that thread, nothing empties its queue and the next scalar waits for ever.
  """

  def __init__(self, folder: pathlib.Path):
    """Starts a file. Raises ImportError without tensorboardX, OSError on a bad disk."""
    import tensorboardX
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event: Any = event_pb2.Event
    self._summary: Any = summary_pb2.Summary
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard merges the files of a folder, so a resumed run adds one.
    path = folder / f"events.out.tfevents.{time.time():.6f}"
    self._records = tensorboardX.RecordWriter(str(path))
    self._append(file_version="brain.Event:2")

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds one value to each named curve. Raises OSError if that fails."""
    scalars = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
    ]
    self._append(step=step, summary=self._summary(value=scalars))

  def close(self) -> None:
    # `write` has flushed every event, or raised.
    with contextlib.suppress(OSError):
      self._records.close()

  def _append(self, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
    self._records.flush()


def board(folder: pathlib.Path) -> Board | None:
  """A TensorBoard writer, or None with a warning if it cannot be opened."""
  try:
    return Board(folder)
  except (ImportError, OSError) as error:
    warnings.warn(
      f"no TensorBoard ({error}); run {errors.install('tensorboard')}", stacklevel=2
    )
    return None


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
  output: pathlib.Path, start: int, total_steps: int, tensorboard: bool
) -> Iterator[RunLog]:
  """The log of a run that continues after `start` steps."""
  if not distributed.is_primary():
    yield RunLog(None, None)
    return
  with (
    contextlib.closing(Log(output, resume_step=start, tensorboard=tensorboard)) as log,
    contextlib.closing(progress.Progress("train", total_steps, done=start)) as bar,
  ):
    yield RunLog(log, bar)


def note(values: dict[str, float]) -> str:
  """The few metrics to show beside the progress bar."""
  short_names = {
    "loss_sft": "sft",
    "loss_kd": "kd",
    "kd_weight": "λ",
    "rollout_length": "len",
    "validation_loss": "val",
    "validation_drift": "drift",
  }
  return "  ".join(
    f"{short} {values[name]:.3g}"
    for name, short in short_names.items()
    if name in values
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
