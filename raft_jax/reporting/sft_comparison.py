"""A run compared with plain SFT: what each forgets at the same held-out loss."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.reporting import (
  method_comparison,
  run_folder,
  sweep_collection,
  sweep_results,
)

Cell = dict[str, Any]
"""{value, low, high}; {} if it is not known."""


class Forgetting(NamedTuple):
  """One measure of forgetting: of a run, of SFT at the run's loss, their difference."""

  measure: method_comparison.Measure
  run: Cell
  sft: Cell
  gap: Cell


class Comparison(NamedTuple):
  """What SFT learned and forgot, and the run beside it.

  Attributes:
    loss: SFT's held-out loss, nats per token.
    drift: SFT's own drift, nats per token; None if it was not measured.
    forgetting: of the measures that both runs have.
    seconds: of SFT's training.
  """

  loss: float
  drift: float | None
  forgetting: list[Forgetting]
  seconds: float

  @property
  def drift_at_equal_loss(self) -> Forgetting | None:
    """The drift of both; None if SFT's at the run's loss is not known."""
    for row in self.forgetting:
      if row.measure == method_comparison.DRIFT and row.gap:
        return row
    return None


def compare(output: pathlib.Path, sft: pathlib.Path) -> Comparison | None:
  """Compares two evaluated runs; None if the first is not evaluated yet.

  SFT's values at the run's held-out loss are those of the straight line between the
  base model and the SFT run, so they are good if both runs fit about equally well.

  Args:
    output: the run's folder.
    sft: the folder of the run of SFT.

  Raises:
    errors.UserError: the second is no evaluated run of SFT, or the two were tested on
      different items.
  """
  if not _is_evaluated(output):
    return None
  if not _is_evaluated(sft):
    raise errors.UserError(
      f"report.sft: {sft} holds no scores; run `python -m raft_jax.evaluate` with the"
      " config of that run first, or set report.sft=null"
    )
  of_sft = run_folder.read(sft)
  method = run_folder.setting(of_sft, "method")
  if method != sweep_results.SFT:
    raise errors.UserError(
      f"report.sft: {sft} is a run of method {method!r}; name a run of method: sft"
    )
  runs = [_as_swept("run", output), _as_swept(sweep_results.SFT, sft)]
  if difference := sweep_results.difference_of_items(runs):
    raise errors.UserError(
      f"report.sft: {sft} and {output} measured {difference.score} on different items;"
      " evaluate both with the same `data.test` and `evaluate` section"
    )
  domains = {"": runs}
  rows = method_comparison.at_equal_fit(domains)
  cells = rows[0].cells if rows else {}
  loss, drift = sweep_results.place(runs[1:])
  forgetting = [
    Forgetting(m, cells[m.name], cells[f"sft_{m.name}"], cells.get(f"gap_{m.name}", {}))
    for m in method_comparison.forgetting(domains)
    if f"sft_{m.name}" in cells
  ]
  seconds = sum(run_folder.series(of_sft, "step_seconds")[1])
  return Comparison(loss, drift, forgetting, seconds)


def _is_evaluated(output: pathlib.Path) -> bool:
  return (output / "evaluation" / "scores.json").exists()


def _as_swept(method: str, output: pathlib.Path) -> dict[str, Any]:
  """A run as a row of a sweep."""
  chosen = {"name": method, "group": method, "method": method, "set": {}}
  return chosen | sweep_collection.measured(output)
