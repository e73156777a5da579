"""Runs of a sweep side by side: one table, and domain fit against what was kept."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import numpy as np
from matplotlib.axes import Axes

from raft_jax import durable, errors, figures, pages, run_folder


class Column(NamedTuple):
  """A column of the table: its name, its heading and the digits it is shown with."""

  name: str
  words: str
  digits: int


COLUMNS = (
  Column("validation_loss", "validation loss", 3),
  Column("held_out_loss", "held-out loss", 3),
  Column("rouge_l", "ROUGE-L", 3),
  Column("similarity", "similarity", 3),
  Column("d_acc", "D-Acc", 3),
  Column("open_ended", "open-ended", 3),
  Column("open_ended_retention", "retention, %", 1),
  Column("ifeval_prompt_strict", "IFEval", 3),
  Column("ifeval_retention", "retention, %", 1),
  Column("mmlu", "MMLU", 3),
  Column("mmlu_retention", "retention, %", 1),
  Column("drift", "drift", 3),
  Column("sft_drift", "SFT at equal fit", 3),
  Column("weight_distance", "weight distance", 5),
  Column("support_mass", "mass in top K", 4),
  Column("step_seconds", "s a step", 2),
  Column("host_peak_gib", "host GiB", 2),
)

SEED = "train.seed"
"""Runs that differ in nothing else are shown as one row."""


def read(output: pathlib.Path) -> list[dict[str, Any]]:
  """The runs that `raft_jax.sweep` collected.

  Raises:
    errors.UserError: the file is damaged, or holds no run.
  """
  path = output / "sweep.json"
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not rows:
      raise ValueError("no run")
    for row in rows:
      _values(row)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.UserError(
      f"{path}: cannot be read ({error}); run `python -m raft_jax.sweep` again"
    ) from error
  return rows


def _values(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Column -> {value, low, high} of one run; {} where it was not measured."""
  result = row["scores"]
  retention = result.get("retention") or {}
  distance = (result.get("weight_distance") or {}).get("mean")
  cost = row.get("cost") or {}
  peak = cost.get("host_peak_bytes")
  return {
    **result["scores"]["trained"],
    "open_ended_retention": retention.get("open_ended") or {},
    "ifeval_retention": retention.get("ifeval_prompt_strict") or {},
    "mmlu_retention": retention.get("mmlu") or {},
    "drift": result.get("drift") or {},
    "weight_distance": {} if distance is None else {"value": distance},
    "support_mass": {"value": row["support_mass"]} if "support_mass" in row else {},
    "step_seconds": {"value": cost["step_seconds"]} if "step_seconds" in cost else {},
    "host_peak_gib": {} if peak is None else {"value": peak / 2**30},
  }


def settings(
  runs: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[Mapping[str, Any]]]]:
  """Label and runs of each setting; its runs differ in their seed only."""
  found: dict[str, list[Mapping[str, Any]]] = {}
  for run in runs:
    fixed = {key: value for key, value in run["set"].items() if key != SEED}
    found.setdefault(f"{run['group']} {json.dumps(fixed)}", []).append(run)
  labelled = []
  for same in found.values():
    label = same[0]["name"]
    if len(same) > 1:
      words = label.split("-")
      label = "-".join(word for word in words if not word.startswith("seed_"))
    labelled.append((label, same))
  return labelled


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows of label, number of seeds and cells; the base model's first."""
  base = runs[0]["scores"]["scores"]["base"]
  zero = {"value": 0.0}
  rows = [_row("base model", [{**base, "drift": zero, "weight_distance": zero}])]
  curve = sft_curve(runs)
  for label, same in settings(runs):
    row = _row(label, [_values(run) for run in same])
    at_fit = drift_at(curve, row["cells"]["held_out_loss"].get("value"))
    row["cells"]["sft_drift"] = {} if at_fit is None else {"value": at_fit}
    rows.append(row)
  return rows


def _row(label: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  cells = {}
  for column in COLUMNS:
    scores = [run[column.name] for run in runs if run.get(column.name)]
    values = [score["value"] for score in scores]
    if len(values) == 1:
      cells[column.name] = scores[0]
    elif values:
      cells[column.name] = {
        "value": float(np.mean(values)),
        "low": min(values),
        "high": max(values),
      }
    else:
      cells[column.name] = {}
  return {"label": label, "seeds": len(runs), "cells": cells}


def sft_curve(runs: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
  """(held-out loss, drift) of the base model and all runs of method sft, by loss."""
  loss = runs[0]["scores"]["scores"]["base"]["held_out_loss"]["value"]
  points = [(loss, 0.0)]
  for run in runs:
    values = _values(run)
    if run["method"] == "sft" and values["drift"]:
      points.append((values["held_out_loss"]["value"], values["drift"]["value"]))
  return sorted(points)


def drift_at(curve: Sequence[tuple[float, float]], loss: float | None) -> float | None:
  """Linear interpolation; None outside the curve, or where there is none."""
  if loss is None or len(curve) < 2 or not curve[0][0] <= loss <= curve[-1][0]:
    return None
  losses, drifts = zip(*curve)
  return float(np.interp(loss, losses, drifts))


PANELS = (
  ("drift", "Drift from the base model, nats per token"),
  ("ifeval_prompt_strict", "IFEval, prompts, strict"),
  ("mmlu", "MMLU"),
)


Draw = Callable[[Axes], None]


def drawings(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[markupsafe.Markup]]:
  """The panels of each figure; only what was measured.

  Returns:
    "kept": one panel a general measure, over the held-out loss; "ratios": the loss
    ratio over the steps; "keys": measures over each key that the sweep repeats a run
    over.
  """
  panels: dict[str, list[Draw | None]] = {
    "kept": [_panel(runs, name, title) for name, title in PANELS],
    "ratios": [_ratios(runs)],
    "keys": [_over_key(found) for found in swept(runs)],
  }
  return {
    name: [figures.svg(panel) for panel in drawn if panel is not None]
    for name, drawn in panels.items()
  }


MOST_CURVES = 2 * len(figures.COLOURS)


def _ratios(runs: Sequence[Mapping[str, Any]]) -> Draw | None:
  """λ·L_KD/L_SFT of each setting's first run, as in Fig. 2a of the paper."""
  curves = [
    (label, same[0]["ratio"]) for label, same in settings(runs) if same[0].get("ratio")
  ]
  if not curves:
    return None

  def draw(axes: Axes) -> None:
    for number, (label, points) in enumerate(curves[:MOST_CURVES]):
      axes.plot(
        *zip(*points),
        color=figures.COLOURS[number % len(figures.COLOURS)],
        linestyle="-" if number < len(figures.COLOURS) else ":",
        linewidth=1.2, label=label,
      )  # fmt: skip
    axes.axhline(1.0, color=figures.INK, linewidth=1.0, linestyle="--")
    axes.set_title("λ · L_KD / L_SFT")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)

  return draw


MEASURES = (
  ("held_out_loss", "Held-out loss, nats per token"),
  *PANELS,
  ("support_mass", "Teacher's probability in the top K"),
  ("step_seconds", "Seconds a step"),
)


class Swept(NamedTuple):
  """A measure over a key: points of its value and the measure's mean, by group."""

  key: str
  title: str
  curves: dict[str, list[tuple[float, float]]]


def swept(runs: Sequence[Mapping[str, Any]]) -> list[Swept]:
  """Measures over each key that takes several numbers in runs of one name."""
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for run in runs:
    groups.setdefault(run["group"], []).append(run)
  keys: dict[str, list[str]] = {}
  for group, same in groups.items():
    for key in same[0]["set"]:
      values = [run["set"].get(key) for run in same]
      numbers = all(map(run_folder.is_number, values))
      if key != SEED and numbers and len(set(values)) > 1:
        keys.setdefault(key, []).append(group)
  found = []
  for key, names in keys.items():
    for measure, title in MEASURES:
      curves = {name: _means(groups[name], key, measure) for name in names}
      curves = {name: points for name, points in curves.items() if len(points) > 1}
      if curves:
        found.append(Swept(key, title, curves))
  return found


def _means(
  runs: Sequence[Mapping[str, Any]], key: str, measure: str
) -> list[tuple[float, float]]:
  """The mean of the runs that have each value of a key, in the order of the values."""
  by_value: dict[float, list[float]] = {}
  for run in runs:
    score = _values(run).get(measure)
    if score:
      by_value.setdefault(float(run["set"][key]), []).append(score["value"])
  return [(value, float(np.mean(scores))) for value, scores in sorted(by_value.items())]


def _over_key(found: Swept) -> Draw:
  def draw(axes: Axes) -> None:
    for number, (group, points) in enumerate(found.curves.items()):
      colour = figures.COLOURS[number % len(figures.COLOURS)]
      axes.plot(*zip(*points), color=colour, marker="o", markersize=4.5, label=group)
    places = sorted({x for points in found.curves.values() for x, _ in points})
    if places[0] > 0 and places[-1] >= 8 * places[0]:
      axes.set_xscale("log")
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.minorticks_off()
    axes.set_title(found.title)
    axes.set_xlabel(found.key)
    if len(found.curves) > 1:
      axes.legend(fontsize=8)

  return draw


def _panel(runs: Sequence[Mapping[str, Any]], name: str, title: str) -> Draw | None:
  groups: dict[str, list[tuple[float, float]]] = {}
  for run in runs:
    values = _values(run)
    if values.get(name):
      point = values["held_out_loss"]["value"], values[name]["value"]
      groups.setdefault(run["group"], []).append(point)
  if not groups:
    return None
  base = runs[0]["scores"]["scores"]["base"]
  origin = 0.0 if name == "drift" else base[name]["value"]

  def draw(axes: Axes) -> None:
    axes.scatter(
      [base["held_out_loss"]["value"]], [origin], color=figures.INK, marker="*", s=60,
      label="base model",
    )  # fmt: skip
    markers = "osD^vPX"
    for number, (group, points) in enumerate(groups.items()):
      axes.plot(
        *zip(*sorted(points)),
        color=figures.COLOURS[number % len(figures.COLOURS)],
        marker=markers[number // len(figures.COLOURS) % len(markers)],
        markersize=4.5, linewidth=1.2, label=group,
      )  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("held-out loss, nats per token (left is better)")
    axes.legend(fontsize=8)

  return draw


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table for a README; columns that no run has are left out."""
  columns = measured(rows)
  heads = ["run", *(column.words for column in columns)]
  lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * len(columns) + "|"]
  for row in rows:
    cells = []
    for column in columns:
      score = row["cells"][column.name]
      text = pages.number(score.get("value"), column.digits)
      if "low" in score:
        low, high = (pages.number(score[end], column.digits) for end in ("low", "high"))
        text += f" ({low} to {high})"
      cells.append(text)
    label = row["label"] + (f" ({row['seeds']} seeds)" if row["seeds"] > 1 else "")
    lines.append("| " + " | ".join([label, *cells]) + " |")
  return "\n".join(lines) + "\n"


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
  """The columns in which some run has a value."""
  return [c for c in COLUMNS if any(row["cells"][c.name] for row in rows[1:])]


def write(output: pathlib.Path) -> pathlib.Path:
  """Writes `comparison.html` and `comparison.md`; returns the page's path."""
  runs = read(output)
  rows = table(runs)
  page = pages.template("comparison.html").render(
    title=output.name,
    runs=len(runs),
    rows=rows,
    columns=measured(rows),
    figures=drawings(runs),
    most_curves=MOST_CURVES,
    sources=[{**run, "set": json.dumps(run["set"], indent=2)} for run in runs],
  )
  path = output / "comparison.html"
  pages.write(path, page)
  with durable.replacing(output / "comparison.md") as temporary:
    temporary.write_text(markdown(rows), encoding="utf-8")
  return path
