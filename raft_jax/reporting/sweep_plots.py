"""The figures of a comparison: fit over forgetting, curves of training, swept keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import markupsafe
import numpy as np
from matplotlib.axes import Axes

from raft_jax.reporting import (
  method_comparison,
  method_curves,
  run_folder,
  run_plots,
  sweep_results,
)

ABILITIES = (
  ("ifeval_prompt_strict", "IFEval, prompts, strict"),
  ("ifeval_instruction_strict_but_no_comma", "IFEval, except commas, strict"),
  ("mmlu", "MMLU"),
)


Draw = Callable[[Axes], None]


def drawings(runs: Sequence[sweep_results.Run]) -> dict[str, list[markupsafe.Markup]]:
  """The panels of each figure; only what was measured.

  Returns:
    "kept": a panel for each general ability, over the held-out loss; "looks": drift
    over the validation loss during training; "ratios": the ratio of the losses over the
    steps; "distances": how far tensors moved; "keys": measures over each key that the
    sweep varies.
  """
  panels: dict[str, list[Draw | None]] = {
    "kept": [_panel(runs, name, title) for name, title in ABILITIES],
    "looks": [_validations(runs)],
    "ratios": [_ratios(runs)],
    "distances": [_distances(runs)],
    "keys": [_over_key(swept_key) for swept_key in swept(runs)],
  }
  return {
    name: [run_plots.svg(panel) for panel in drawn if panel is not None]
    for name, drawn in panels.items()
  }


MOST_CURVES = 2 * len(run_plots.COLOURS)


FRONTIER_SIZE = (8.6, 4.6)
"""Inches."""


def frontier(domains: method_comparison.Domains) -> Draw | None:
  """Held-out loss over drift: a line for each method, from the base model on."""
  curves = method_curves.points(domains)
  if not curves:
    return None

  def draw(axes: Axes) -> None:
    markers, styles = "osD^vPX", ("-", "--", ":", "-.")
    for number, (label, points) in enumerate(curves.items()):
      rank, colour = divmod(number, len(run_plots.COLOURS))
      shade = run_plots.COLOURS[colour]
      axes.plot(*zip(*points[:2]), color=shade, linewidth=0.8, alpha=0.45)
      axes.plot(
        *zip(*points[1:]),
        color=shade,
        marker=markers[rank % len(markers)], linestyle=styles[rank % len(styles)],
        markersize=4.5, linewidth=1.2, label=label,
      )  # fmt: skip
    places = [place for points in curves.values() for place in points]
    base = places[0][1]
    axes.plot(0.0, base, "*", color=run_plots.INK, markersize=9, label="base model")
    limit = method_curves.DRIFT_LIMIT
    axes.axvline(limit, color=run_plots.INK, linewidth=1.0, linestyle=":")
    # What fits worse than the base model would leave little room for all others.
    fits = [(drift, loss) for drift, loss in places if loss <= base]
    widest, lowest = max(drift for drift, _ in fits), min(loss for _, loss in fits)
    axes.set_xlim(0.0, 1.05 * max(widest, limit))
    room = 0.05 * (base - lowest) or 0.1
    axes.set_ylim(lowest - room, base + room)
    axes.set_title("Held-out loss over drift, nats per token")
    axes.set_xlabel("drift from the base model (left is better)")
    axes.set_ylabel("held-out loss (lower is better)")
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))

  return draw


def _validations(runs: Sequence[sweep_results.Run]) -> Draw | None:
  """Drift over validation loss during training, of each setting's first run."""
  curves = [
    (label, [(loss, drift) for _, loss, drift in validations])
    for label, validations in _of_first(runs, "looks")
  ]
  if not curves:
    return None

  def draw(axes: Axes) -> None:
    _lines(axes, curves, marker="o")
    axes.set_title("Drift during training, nats per token")
    axes.set_xlabel("loss on validation questions, nats per token (left is better)")
    axes.set_ylim(bottom=0)

  return draw


def _ratios(runs: Sequence[sweep_results.Run]) -> Draw | None:
  """λ·L_KD/L_SFT of each setting's first run, as in Fig. 2a of the paper."""
  curves = _of_first(runs, "ratio")
  if not curves:
    return None

  def draw(axes: Axes) -> None:
    _lines(axes, curves)
    axes.axhline(1.0, color=run_plots.INK, linewidth=1.0, linestyle="--")
    axes.set_title("λ · L_KD / L_SFT")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)

  return draw


Curves = Sequence[tuple[str, Sequence[Any]]]


def _of_first(runs: Sequence[sweep_results.Run], name: str) -> Curves:
  """The logged points of each setting's first run, with the setting's label."""
  curves = [(label, same[0].get(name)) for label, same in sweep_results.settings(runs)]
  return [(label, points) for label, points in curves if points]


def _lines(axes: Axes, curves: Curves, marker: str | None = None) -> None:
  """Draws the first curves with a legend; after the last colour, lines are dotted."""
  for number, (label, points) in enumerate(curves[:MOST_CURVES]):
    axes.plot(
      *zip(*points),
      color=run_plots.COLOURS[number % len(run_plots.COLOURS)],
      linestyle="-" if number < len(run_plots.COLOURS) else ":",
      marker=marker, markersize=3.5, linewidth=1.2, label=label,
    )  # fmt: skip
  axes.legend(fontsize=7)


MEASURES = (
  ("held_out_loss", "Held-out loss, nats per token"),
  ("drift", "Drift from the base model, nats per token"),
  *ABILITIES,
  ("support_mass", "Teacher's probability in the top K"),
  ("step_seconds", "Seconds per step"),
)


class Swept(NamedTuple):
  """A measure over a key: points (value of the key, mean of the measure) by group."""

  key: str
  title: str
  curves: dict[str, list[tuple[float, float]]]


def swept(runs: Sequence[sweep_results.Run]) -> list[Swept]:
  """The measures over each key that has several numbers in the runs of one name."""
  groups: dict[str, list[sweep_results.Run]] = {}
  for run in runs:
    groups.setdefault(run["group"], []).append(run)
  keys: dict[str, list[str]] = {}
  for group, same in groups.items():
    for key in same[0]["set"]:
      values = [run["set"].get(key) for run in same]
      numbers = all(map(run_folder.is_number, values))
      if key != sweep_results.SEED and numbers and len(set(values)) > 1:
        keys.setdefault(key, []).append(group)
  swept_keys = []
  for key, names in keys.items():
    for measure, title in MEASURES:
      curves = {name: _means(groups[name], key, measure) for name in names}
      curves = {name: points for name, points in curves.items() if len(points) > 1}
      if curves:
        swept_keys.append(Swept(key, title, curves))
  return swept_keys


def _means(
  runs: Sequence[sweep_results.Run], key: str, measure: str
) -> list[tuple[float, float]]:
  """For each value of a key, in order, the mean over the runs with that value."""
  by_value: dict[float, list[float]] = {}
  for run in runs:
    score = sweep_results.values(run).get(measure)
    if score:
      by_value.setdefault(float(run["set"][key]), []).append(score["value"])
  return [(value, float(np.mean(scores))) for value, scores in sorted(by_value.items())]


def _over_key(swept_key: Swept) -> Draw:
  def draw(axes: Axes) -> None:
    for number, (group, points) in enumerate(swept_key.curves.items()):
      colour = run_plots.COLOURS[number % len(run_plots.COLOURS)]
      axes.plot(*zip(*points), color=colour, marker="o", markersize=4.5, label=group)
    places = sorted({x for points in swept_key.curves.values() for x, _ in points})
    if places[0] > 0 and places[-1] >= 8 * places[0]:
      axes.set_xscale("log")
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.minorticks_off()
    axes.set_title(swept_key.title)
    axes.set_xlabel(swept_key.key)
    if len(swept_key.curves) > 1:
      axes.legend(fontsize=8)

  return draw


def _panel(runs: Sequence[sweep_results.Run], name: str, title: str) -> Draw | None:
  """A general ability over the held-out loss; each name in the sweep has a line."""
  groups: dict[str, list[list[Point]]] = {}
  for _, same in sweep_results.settings(runs):
    points = [point for point in (_point(run, name) for run in same) if point]
    if points:
      groups.setdefault(same[0]["group"], []).append(points)
  if not groups:
    return None
  base = _base_point(runs, name)

  def draw(axes: Axes) -> None:
    x, y = base
    axes.scatter([x], [y], color=run_plots.INK, marker="*", s=60, label="base model")
    markers = "osD^vPX"
    for number, (group, places) in enumerate(groups.items()):
      colour = run_plots.COLOURS[number % len(run_plots.COLOURS)]
      means = sorted(tuple(np.mean(points, axis=0).tolist()) for points in places)
      axes.plot(
        *zip(*means),
        color=colour,
        marker=markers[number // len(run_plots.COLOURS) % len(markers)],
        markersize=4.5, linewidth=1.2, label=group,
      )  # fmt: skip
      for points in places:
        if len(points) > 1:
          axes.plot(*zip(*points), ".", color=colour, markersize=4, alpha=0.5)
    axes.set_title(title)
    axes.set_xlabel("held-out loss, nats per token (left is better)")
    axes.legend(fontsize=7)

  return draw


Point = tuple[float, float]


def _point(run: sweep_results.Run, name: str) -> Point | None:
  scores = sweep_results.values(run)
  if not scores.get(name):
    return None
  return scores["held_out_loss"]["value"], scores[name]["value"]


def _base_point(runs: Sequence[sweep_results.Run], name: str) -> Point:
  """The base model's scores, from a run that measured them."""
  having = next(run for run in runs if sweep_results.values(run).get(name))
  base = having["scores"]["scores"]["base"]
  return base["held_out_loss"]["value"], base[name]["value"]


def _distances(runs: Sequence[sweep_results.Run]) -> Draw | None:
  """A histogram of tensors by relative change, for each method's first run (Fig. 3)."""
  moved = {
    label: same[0]["weight_distances"]
    for label, same in sweep_results.chosen(runs).items()
    if same[0].get("weight_distances")
  }
  if not moved:
    return None

  def draw(axes: Axes) -> None:
    shown = list(moved.items())[:MOST_CURVES]
    together = np.concatenate([values for _, values in shown])
    edges = np.histogram_bin_edges(together, bins=40).tolist()
    for number, (label, values) in enumerate(shown):
      axes.hist(
        values, edges, histtype="step",
        color=run_plots.COLOURS[number % len(run_plots.COLOURS)],
        linestyle="-" if number < len(run_plots.COLOURS) else ":",
        linewidth=1.2, label=f"{label}, mean {np.mean(values):.2g}",
      )  # fmt: skip
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    axes.set_title("Tensors by relative change")
    axes.set_xlabel("‖θ − θ₀‖ / ‖θ₀‖")
    axes.legend(fontsize=7)

  return draw
