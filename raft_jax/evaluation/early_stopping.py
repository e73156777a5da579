"""The best step of a run by its validations, and whether training is over.

The best step has the lowest validation loss among the validations whose drift is at
most `validation.max_drift`. Training is over after `validation.patience` validations in
a row without a new best. The rule reads only logged rows, so a resumed run decides the
same.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from raft_jax.config import schema
from raft_jax.training import metrics_log


class ValidationPoint(NamedTuple):
  """What a validation measured, in nats per token; `drift` is None if not measured."""

  step: int
  loss: float
  drift: float | None


class Status(NamedTuple):
  """The best validation so far, if there is one, and whether training is over.

  Attributes:
    since_best: validations since the best one, or since the start.
  """

  best: ValidationPoint | None
  since_best: int
  over: bool


def status(
  points: Sequence[ValidationPoint], *, max_drift: float | None, patience: int | None
) -> Status:
  """Applies the rule to all validations so far; of equal losses the first is the best.

  Args:
    points: in the order of their steps.
    max_drift: nats per token; None: no limit.
    patience: validations in a row without a new best; None: never over.
  """
  best, since_best = None, 0
  for point in points:
    allowed = max_drift is None or (
      point.drift is not None and point.drift <= max_drift
    )
    if allowed and (best is None or point.loss < best.loss):
      best, since_best = point, 0
    else:
      since_best += 1
  return Status(best, since_best, patience is not None and since_best >= patience)


def logged_points(output: pathlib.Path, until: int) -> list[ValidationPoint]:
  """The validations in a run's log, up to a step."""
  points = []
  for _, row in metrics_log.rows_until(output / "metrics.jsonl", until):
    values = row.get("values", {})
    if "validation_loss" in values:
      loss, drift = values["validation_loss"], values.get("validation_drift")
      points.append(ValidationPoint(row["step"], loss, drift))
  return points


def status_at(
  settings: schema.Validation | None, output: pathlib.Path, step: int
) -> Status:
  """The status of a run after a step, from its log."""
  if settings is None:
    return Status(None, 0, over=False)
  points = logged_points(output, step)
  return status(points, max_drift=settings.max_drift, patience=settings.patience)


def summary(
  settings: schema.Validation, reached: Status, *, step: int, total_steps: int
) -> str:
  """Which step is the best, and why training ended before its last step.

  Args:
    reached: the status after `step`.
  """
  best = reached.best
  if best is not None:
    text = f"best step: {best.step} (validation loss {best.loss:.3g}"
    if best.drift is not None:
      text += f", drift {best.drift:.3g}"
    text += ")"
  elif reached.since_best:
    text = f"best step: none; the drift always exceeded {settings.max_drift:g}"
  else:
    text = "best step: none; no validation has run yet"
  if reached.over and step < total_steps:
    text += (
      f"; stopped early at step {step} of {total_steps}: no new best in the last "
      f"{reached.since_best} validations (validation.patience)"
    )
  return text
