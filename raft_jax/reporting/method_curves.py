"""Methods as curves over their learning rates and steps: fit against drift, and cost.

Any method drifts less at a lower learning rate, so a method is not a point but a curve.
It begins at the base model, the limit of a learning rate of 0, and joins the method's
settings in the order of their drift. Two numbers are read off each curve: the least
drift at which the method fits the domain as well as SFT at its best, and the lowest
held-out loss at a drift of at most `DRIFT_LIMIT`.

The 95 % intervals are over items and seeds: every resample draws both, and reads the
numbers off its own curves. The order of the settings is that of their means.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from raft_jax.evaluation import intervals
from raft_jax.reporting import method_comparison, sweep_results

DRIFT_LIMIT = 0.05
"""Nats per token: the drift at which held-out losses are compared."""

VALIDATION = method_comparison.Measure("validation_loss", "validation loss")

Curve = Sequence[list[sweep_results.Run]]
"""The settings of a curve in their order, each a list of runs with different seeds."""

Line = list[tuple[np.ndarray, np.ndarray]]
"""Points (x [S], y [S]) in the order of a curve."""


def headlines(domains: method_comparison.Domains) -> list[method_comparison.Row]:
  """The two numbers and the relative cost of each method that all domains have.

  The cells are `settings` (how many the curve has), `best_fit` (the method's lowest
  loss by `fit_measure`), `drift_at_best` (its drift at SFT's lowest such loss),
  `loss_at_limit` (its held-out loss at `DRIFT_LIMIT`), `seconds` (of a training step)
  and `memory` (of the training process), the last two in multiples of SFT's.
  """
  fit, drift = fit_measure(domains), method_comparison.DRIFT
  curves = [
    {label: _curve(alike) for label, alike in sweep_results.methods(runs).items()}
    for runs in domains.values()
  ]
  best = [_lowest(_sft(runs), fit) for runs in domains.values()]
  limits = [np.array(DRIFT_LIMIT)] * len(best)
  rows = []
  for label in method_comparison.in_all(curves):
    parts = [by_label[label] for by_label in curves]
    own = list(zip(domains.values(), parts))
    drifts = [_line(runs, part, fit, drift) for runs, part in own]
    losses = [_line(runs, part, drift, method_comparison.FIT) for runs, part in own]
    cells = {
      "best_fit": _described([_lowest(part, fit) for part in parts]),
      "drift_at_best": _read_off(drifts, best),
      "loss_at_limit": _read_off(losses, limits),
    }
    cells = {name: cell for name, cell in cells.items() if cell}
    if cells:
      cells["settings"] = {"value": min(map(len, parts))}
      seeds = min(len(same) for part in parts for same in part)
      costs = {name: _cost(domains, parts, key) for name, key in COSTS.items()}
      rows.append(method_comparison.Row(label, seeds, cells | costs))
  return rows


def fit_measure(domains: method_comparison.Domains) -> method_comparison.Measure:
  """The loss that SFT's best setting has the lowest of: validation, else held out."""
  settings = [same for runs in domains.values() for same in _sft(runs)]
  validated = settings and all(
    sweep_results.having(same, VALIDATION.name) for same in settings
  )
  return VALIDATION if validated else method_comparison.FIT


def points(
  domains: method_comparison.Domains,
) -> dict[str, list[tuple[float, float]]]:
  """(drift, held-out loss) along each method's curve; the base model's come first.

  Values are means over seeds and domains, of the settings that all domains have.
  """
  labelled = [dict(sweep_results.settings(runs)) for runs in domains.values()]
  bases = [
    runs[0]["scores"]["scores"]["base"]["held_out_loss"]["value"]
    for runs in domains.values()
  ]
  curves = {}
  for label, alike in sweep_results.methods(next(iter(domains.values()))).items():
    places = [
      [sweep_results.place(by_label[setting]) for by_label in labelled]
      for setting in dict(sweep_results.settings([r for same in alike for r in same]))
      if all(setting in by_label for by_label in labelled)
    ]
    means = [
      (statistics.fmean(drifts), statistics.fmean(losses))
      for losses, drifts in (zip(*place) for place in places)
      if None not in drifts
    ]
    if means:
      curves[label] = [(0.0, statistics.fmean(bases)), *sorted(means)]
  return curves


def _curve(settings: Curve) -> Curve:
  """The runs whose drift was measured, by setting, in the order of their mean drift."""
  measured = [
    [run for run in same if sweep_results.values(run)["drift"]] for same in settings
  ]
  drifts = [(sweep_results.place(same)[1] or 0.0, same) for same in measured if same]
  return [same for _, same in sorted(drifts, key=lambda pair: pair[0])]


def _sft(runs: Sequence[sweep_results.Run]) -> Curve:
  """The curve of the first method that is SFT; empty if there is none."""
  of_sft = (
    alike
    for alike in sweep_results.methods(runs).values()
    if alike[0][0]["method"] == sweep_results.SFT
  )
  return _curve(next(of_sft, []))


def _lowest(
  settings: Curve, measure: method_comparison.Measure
) -> method_comparison.Samples:
  """The lowest score among the settings, found anew in every resample."""
  scores = [sweep_results.samples_over_seeds(same, measure.name) for same in settings]
  measured = [score for score in scores if score is not None]
  return np.min(measured, axis=0) if measured else None


def _line(
  runs: Sequence[sweep_results.Run],
  settings: Curve,
  x: method_comparison.Measure,
  y: method_comparison.Measure,
) -> Line:
  """A curve's points, that of the base model first; of the runs with both scores."""
  measured = [
    sweep_results.having(sweep_results.having(same, x.name), y.name)
    for same in settings
  ]
  points = [[method_comparison.base_samples(runs, m) for m in (x, y)]]
  points += [
    [sweep_results.samples_over_seeds(same, m.name) for m in (x, y)]
    for same in measured
  ]
  return [(a, b) for a, b in points if a is not None and b is not None]


def _read_off(
  lines: Sequence[Line], bounds: Sequence[method_comparison.Samples]
) -> dict[str, Any]:
  """The mean over domains of the lowest y of each line where x is at most its bound.

  {} if a line or a bound was not measured.
  """
  lowest, trained = [], []
  for line, bound in zip(lines, bounds):
    if len(line) < 2 or bound is None:
      return {}
    lowest.append(intervals.lowest_on_line(line, bound))
    trained.append(intervals.lowest_on_line(line[1:], bound))
  cell: dict[str, Any] = _described(lowest)
  if not cell:
    return {"text": "not reached"}
  notes = []
  reached = float(np.isfinite(np.mean(lowest, axis=0)[1:]).mean())
  if reached < 1:
    notes.append(f"reached in {100 * reached:.0f} % of resamples")
  if any(not own[0] <= whole[0] for own, whole in zip(trained, lowest)):
    notes.append("on the line from the base model")
  return cell | ({"note": "; ".join(notes)} if notes else {})


def _described(parts: Sequence[method_comparison.Samples]) -> dict[str, Any]:
  mean = method_comparison.mean_over_domains(parts)
  return {} if mean is None else intervals.describe_samples(mean)


COSTS = {"seconds": "step_seconds", "memory": "host_peak_bytes"}
"""The cells of costs, and their names in a run's record."""


def _cost(
  domains: method_comparison.Domains, parts: Sequence[Curve], key: str
) -> dict[str, Any]:
  """A method's cost in multiples of SFT's: medians over runs, means over domains."""
  ratios = []
  for runs, part in zip(domains.values(), parts):
    own, sft = (
      [
        run["cost"][key]
        for same in settings
        for run in same
        if key in (run.get("cost") or {})
      ]
      for settings in (part, _sft(runs))
    )
    if not own or not sft:
      return {"text": "not measured"}
    ratios.append(statistics.median(own) / statistics.median(sft))
  return {"value": statistics.fmean(ratios)}
