"""The comparison of the runs of a sweep, or of several domains' sweeps."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import numpy as np

from raft_jax.evaluation import intervals
from raft_jax.reporting import (
  html_page,
  method_comparison,
  method_curves,
  run_plots,
  sweep_plots,
  sweep_results,
)
from raft_jax.storage import atomic


class Column(NamedTuple):
  """A column of a table: its name, its heading, and the number of digits shown."""

  name: str
  heading: str
  digits: int


SCORES = (
  Column("validation_loss", "validation loss", 3),
  Column("held_out_loss", "held-out loss", 3),
  Column("rouge_l", "ROUGE-L", 3),
  Column("similarity", "similarity", 3),
  Column("choice", "choice", 3),
  Column("choice_letter", "choice by letter", 3),
  Column("d_acc", "D-Acc", 3),
  Column("open_ended", "open-ended", 3),
  Column("open_ended_retention", "retention, %", 1),
  Column("ifeval_prompt_strict", "IFEval", 3),
  Column("ifeval_retention", "retention, %", 1),
  Column("mmlu", "MMLU", 3),
  Column("mmlu_retention", "retention, %", 1),
  Column("mmlu_kept", "MMLU kept", 3),
  Column("drift", "drift", 3),
  Column("domain_drift", "domain drift", 3),
  Column("sft_drift", "SFT drift at equal loss", 3),
  Column("weight_distance", "weight distance", 5),
)
"""The scores of a setting."""

COSTS = (
  Column("support_mass", "mass in top K", 4),
  Column("step_seconds", "seconds per step", 2),
  Column("host_peak_gib", "host GiB", 2),
)
"""The costs of training a setting, and the probability mass that was distilled."""


def table(runs: Sequence[sweep_results.Run]) -> list[dict[str, Any]]:
  """Rows of label, number of seeds and cells; the base model's row comes first."""
  base = runs[0]["scores"]["scores"]["base"]
  zero = {"value": 0.0}
  unmoved = dict.fromkeys(("drift", "domain_drift", "weight_distance"), zero)
  rows = [_row(method_comparison.BASE, [{**base, **unmoved}])]
  curve = sft_curve(runs)
  for label, same in sweep_results.settings(runs):
    row = _row(label, [sweep_results.values(run) for run in same])
    at_fit = drift_at(curve, row["cells"]["held_out_loss"].get("value"))
    row["cells"]["sft_drift"] = {} if at_fit is None else {"value": at_fit}
    rows.append(row)
  return rows


def _row(label: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  cells = {}
  for column in (*SCORES, *COSTS):
    scores = [run[column.name] for run in runs if run.get(column.name)]
    values = [score["value"] for score in scores]
    if len(runs) == 1 and scores:
      cells[column.name] = scores[0]
    elif len(values) == 1:  # an interval over items, where others are ranges of seeds
      cells[column.name] = {"value": values[0]}
    elif values:
      cells[column.name] = {
        "value": float(np.mean(values)),
        "low": min(values),
        "high": max(values),
      }
    else:
      cells[column.name] = {}
  return {"label": label, "seeds": len(runs), "cells": cells}


def sft_curve(runs: Sequence[sweep_results.Run]) -> list[tuple[float, float]]:
  """(held-out loss, drift) of the base model and SFT's learning rates, by loss."""
  loss = runs[0]["scores"]["scores"]["base"]["held_out_loss"]["value"]
  places = [sweep_results.place(same) for same in sweep_results.sft_rates(runs)]
  points = [(fit, drift) for fit, drift in places if drift is not None]
  return sorted([(loss, 0.0), *points])


def drift_at(curve: Sequence[tuple[float, float]], loss: float | None) -> float | None:
  """The drift of the curve at a loss, interpolated; None outside of the curve."""
  if loss is None or len(curve) < 2:
    return None
  points = [(np.array([x]), np.array([y])) for x, y in curve]
  drift = float(intervals.interpolate_samples(points, np.array([loss]))[0])
  return None if np.isnan(drift) else drift


def measured(
  columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]
) -> list[Column]:
  """The columns in which a row other than the base model's has a value."""
  trained = [row["cells"] for row in rows if row["label"] != method_comparison.BASE]
  return [c for c in columns if any(cells.get(c.name) for cells in trained)]


class Table(NamedTuple):
  """Rows with cells {value, low, high} by column; `kind` selects the note below it."""

  kind: str
  title: str
  columns: list[Column]
  rows: Sequence[Mapping[str, Any]]


def curve_columns(domains: method_comparison.Domains) -> list[Column]:
  """The columns of methods as curves; the first four fit into a terminal."""
  loss = method_curves.fit_measure(domains).heading
  limit = method_curves.DRIFT_LIMIT
  return [
    Column("settings", "settings", 0),
    Column("best_fit", f"lowest {loss}", 3),
    Column("drift_at_best", f"drift at SFT's lowest {loss}", 3),
    Column("loss_at_limit", f"held-out loss at drift ≤ {limit:g}", 3),
    Column("seconds", "seconds a step, × SFT", 2),
    Column("memory", "peak memory, × SFT", 2),
  ]


def tables(domains: method_comparison.Domains) -> list[Table]:
  """Methods as curves, side by side, against SFT, at equal loss; what was measured."""
  where = "" if len(domains) == 1 else f", mean of {len(domains)} domains"
  scores = [Column(*measure) for measure in method_comparison.measures(domains)]
  retained = [
    Column(f"retained_{m.name}", f"{m.heading} retained, %", 1)
    for m in method_comparison.general(domains)
  ]
  compared = [
    (
      "curves",
      "Methods as curves",
      curve_columns(domains),
      method_curves.headlines(domains),
    ),
    ("methods", "Methods", scores, method_comparison.methods(domains)),
    (
      "against",
      "Against SFT",
      [*scores, *retained],
      method_comparison.against_sft(domains),
    ),
  ]
  equal = method_comparison.at_equal_fit(domains)
  for m in method_comparison.forgetting(
    domains
  ):  # a table each, as one table would be too wide
    columns = [
      Column(
        f"fit_{m.name}", method_comparison.FIT.heading, method_comparison.FIT.digits
      ),
      Column(m.name, m.heading, m.digits),
      Column(f"sft_{m.name}", f"SFT's {m.heading}", m.digits),
      Column(f"gap_{m.name}", "gap", m.digits),
    ]
    own = [row for row in equal if m.name in row.cells]
    compared.append(("equal", f"At equal loss: {m.heading}", columns, own))
  shown = []
  for kind, title, columns, table_rows in compared:
    rows = [row._asdict() for row in table_rows]
    if with_values := measured(columns, rows):
      shown.append(Table(kind, f"{title}{where}", with_values, rows))
  return shown


def all_settings(runs: Sequence[sweep_results.Run]) -> list[Table]:
  """The scores and the costs of all settings of a sweep."""
  rows = table(runs)
  both = [
    Table("every", "All settings", measured(SCORES, rows), rows),
    Table("costs", "Cost of a training step", measured(COSTS, rows), rows[1:]),
  ]
  return [one for one in both if one.columns]


def markdown(one: Table) -> str:
  """A table as Markdown."""
  heads = ["run", *(column.heading for column in one.columns)]
  lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * len(one.columns) + "|"]
  for row in one.rows:
    cells = []
    for column in one.columns:
      cells.append(cell_text(row["cells"].get(column.name) or {}, column.digits))
    label = row["label"] + (f" ({row['seeds']} seeds)" if row["seeds"] > 1 else "")
    lines.append("| " + " | ".join([label, *cells]) + " |")
  return "\n".join(lines) + "\n"


def cell_text(score: Mapping[str, Any], digits: int) -> str:
  """A cell as Markdown: a text, or a number with its interval and a note."""
  if "text" in score:
    return str(score["text"])
  shown = html_page.number(score.get("value"), digits)
  if "low" in score:
    low, high = (html_page.number(score[end], digits) for end in ("low", "high"))
    shown += f" ({low} to {high})"
  return f"{shown}; {score['note']}" if "note" in score else shown


def _part(name: str, runs: Sequence[sweep_results.Run]) -> dict[str, Any]:
  """The part of the page for one domain."""
  # The label of a row links to the config of its first run.
  labelled = [*sweep_results.chosen(runs).items(), *sweep_results.settings(runs)]
  return {
    "name": name,
    "tables": [*tables({name: runs}), *all_settings(runs)],
    "frontier": _drawn(sweep_plots.frontier({name: runs})),
    "figures": sweep_plots.drawings(runs),
    "anchors": {label: f"{name}/{same[0]['name']}" for label, same in labelled},
    "sources": [
      {
        **run,
        "anchor": f"{name}/{run['name']}",
        "set": json.dumps(run["set"], indent=2),
      }
      for run in runs
    ],
  }


def _drawn(frontier: sweep_plots.Draw | None) -> list[markupsafe.Markup]:
  """The frontier as inline SVG; empty if no drift was measured."""
  size = sweep_plots.FRONTIER_SIZE
  return [] if frontier is None else [run_plots.svg(frontier, size)]


def write(output: pathlib.Path) -> pathlib.Path:
  """Writes the comparison and its frontier; returns the page's path.

  They are `comparison.html`, `comparison.md`, `frontier.png` and `frontier.svg`.
  """
  domains = sweep_results.read(output)
  together = tables(domains) if len(domains) > 1 else []
  frontier = sweep_plots.frontier(domains)
  parts = [_part(name, runs) for name, runs in domains.items()]
  page = html_page.template("comparison.html").render(
    title=output.name,
    together=together,
    frontier=_drawn(frontier) if together else [],
    parts=parts,
    runs=sum(map(len, domains.values())),
    most_curves=sweep_plots.MOST_CURVES,
  )
  path = output / "comparison.html"
  html_page.write(path, page)
  if frontier is not None:
    size = sweep_plots.FRONTIER_SIZE
    with atomic.replacing(output / "frontier.png") as temporary:
      temporary.write_bytes(run_plots.png(frontier, size))
    with atomic.replacing(output / "frontier.svg") as temporary:
      temporary.write_text(run_plots.svg_file(frontier, size), encoding="utf-8")
  sections = [("", together), *((part["name"], part["tables"]) for part in parts)]
  lines = [
    "\n".join([f"### {name + ': ' if name else ''}{one.title}", "", markdown(one)])
    for name, shown in sections
    for one in shown
  ]
  if frontier is not None:
    lines.insert(0, "![held-out loss over drift](frontier.png)\n")
  with atomic.replacing(output / "comparison.md") as temporary:
    temporary.write_text("\n".join(lines), encoding="utf-8")
  return path
