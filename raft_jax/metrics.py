"""What a run writes down while it trains.

`metrics.jsonl` is the record of truth: one JSON object a line, NaN written as null.
TensorBoard is optional, and its failure never stops a run.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


class Log:
  """Appends rows to `metrics.jsonl` and, when asked, to TensorBoard."""

  def __init__(
    self, output: pathlib.Path, *, resume_step: int, tensorboard: bool = False
  ):
    """Opens the log; rows after `resume_step` came from work that was lost."""
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
        for name, value in values.items():
          self._board.add_scalar(f"{split}/{name}", value, step)
      except OSError as error:
        warnings.warn(f"TensorBoard is off from here on: {error}", stacklevel=2)
        self._board = None

  def close(self) -> None:
    os.fsync(self._file.fileno())
    self._file.close()
    if self._board is not None:
      self._board.close()


def board(folder: pathlib.Path) -> Any:
  """A TensorBoard writer, or None with a warning where there can be none."""
  try:
    import tensorboardX

    return tensorboardX.SummaryWriter(str(folder))
  except (ImportError, OSError) as error:
    warnings.warn(
      f"no TensorBoard ({error}); install raft_jax[tensorboard]", stacklevel=2
    )
    return None


def keep_until(path: pathlib.Path, step: int) -> None:
  """Drops rows after `step`, and a torn last line, from a log that goes on."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (json.JSONDecodeError, KeyError, TypeError):
      continue
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(kept), encoding="utf-8")
  os.replace(temporary, path)


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
  """Share of a text's n-grams that occurred before in it; 0 for short texts."""
  grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
  total = sum(grams.values())
  return 1.0 - len(grams) / total if total else 0.0


def rollout_health(
  tokens_BR: np.ndarray,
  length_B: np.ndarray,
  texts: Sequence[str],
  leaks: Sequence[str],
) -> dict[str, float]:
  """Signs of collapse in sampled texts, which no loss shows.

  Args:
    tokens_BR: int token ids of the rollouts.
    length_B: tokens of each.
    texts: the rollouts decoded.
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
