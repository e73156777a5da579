"""Runs of a sweep side by side: one table, and domain fit against what was kept."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import numpy as np
from matplotlib.axes import Axes

from raft_jax import durable, errors, figures, pages


class Column(NamedTuple):
  """A column of the table: its name, its heading and the digits it is shown with."""

  name: str
  words: str
  digits: int


COLUMNS = (
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
    "step_seconds": {"value": cost["step_seconds"]} if "step_seconds" in cost else {},
    "host_peak_gib": {} if peak is None else {"value": peak / 2**30},
  }


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows of label, number of seeds and cells; the base model's first."""
  settings: dict[str, list[Mapping[str, Any]]] = {}
  for run in runs:
    fixed = {key: value for key, value in run["set"].items() if key != SEED}
    settings.setdefault(f"{run['group']} {json.dumps(fixed)}", []).append(run)
  base = runs[0]["scores"]["scores"]["base"]
  zero = {"value": 0.0}
  rows = [_row("base model", [{**base, "drift": zero, "weight_distance": zero}])]
  curve = sft_curve(runs)
  for same in settings.values():
    label = same[0]["name"]
    if len(same) > 1:
      words = label.split("-")
      label = "-".join(word for word in words if not word.startswith("seed_"))
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


def drawings(runs: Sequence[Mapping[str, Any]]) -> list[markupsafe.Markup]:
  """One panel a general measure, over the held-out loss; only what was measured."""
  panels = [_panel(runs, name, title) for name, title in PANELS]
  return [figures.svg(panel) for panel in panels if panel is not None]


def _panel(
  runs: Sequence[Mapping[str, Any]], name: str, title: str
) -> Callable[[Axes], None] | None:
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
    sources=[{**run, "set": json.dumps(run["set"], indent=2)} for run in runs],
  )
  path = output / "comparison.html"
  pages.write(path, page)
  with durable.replacing(output / "comparison.md") as temporary:
    temporary.write_text(markdown(rows), encoding="utf-8")
  return path
