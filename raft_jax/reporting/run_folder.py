"""Reads a run's output folder for its report; damaged files are named, not fatal."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import yaml


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of a run's folder; empty for files that are missing."""

  metrics: tuple[Mapping[str, Any], ...]
  summary: Mapping[str, Any]
  scores: Mapping[str, Any]
  samples: tuple[Mapping[str, Any], ...]
  configs: Mapping[str, str]
  damage: tuple[str, ...]
  """Messages about what could not be read."""


def read(output: pathlib.Path) -> Run:
  """Reads everything under `output` that the page shows."""
  damage: list[str] = []

  def objects(path: pathlib.Path, texts: Sequence[bytes]) -> list[dict[str, Any]]:
    rows, bad = [], 0
    for text in texts:
      try:
        row = json.loads(text)
      except ValueError:
        row = None
      if isinstance(row, dict):
        rows.append(row)
      else:
        bad += 1
    if bad:
      damage.append(f"{path.relative_to(output)}: {bad} unreadable record(s) left out.")
    return rows

  def lines(name: str) -> list[dict[str, Any]]:
    path = output / name
    text = path.read_bytes() if path.exists() else b""
    return objects(path, [line for line in text.split(b"\n") if line.strip()])

  def document(name: str) -> dict[str, Any]:
    path = output / name
    parsed = objects(path, [path.read_bytes()]) if path.exists() else []
    return parsed[0] if parsed else {}

  return Run(
    metrics=tuple(_last_of_each_step(lines("metrics.jsonl"))),
    summary=document("refined/summary.json"),
    scores=document("evaluation/scores.json"),
    samples=tuple(lines("evaluation/samples.jsonl")),
    configs={
      path.stem: path.read_text(encoding="utf-8", errors="replace")
      for path in sorted((output / "config").glob("*.yaml"))
    },
    damage=tuple(damage),
  )


def _last_of_each_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """One row a step: a resumed run logs steps again, and the later row counts."""
  by_step: dict[int, dict[str, Any]] = {
    row["step"]: row
    for row in rows
    if row.get("split", "train") == "train"
    and isinstance(row.get("step"), int)
    and isinstance(row.get("values"), dict)
  }
  for row in by_step.values():
    mass = row["values"].get("teacher_mass_in_support")
    if is_number(mass):
      row["values"]["teacher_mass_outside_support"] = 1 - mass
  return [by_step[step] for step in sorted(by_step)]


def is_number(value: object) -> TypeGuard[int | float]:
  """Whether a value is a finite number; booleans are not."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def series(run: Run, name: str) -> tuple[list[int], list[float]]:
  """Steps and values of one metric; leaves out what is missing or not finite."""
  points = [(row["step"], row["values"].get(name)) for row in run.metrics]
  kept = [(step, float(value)) for step, value in points if is_number(value)]
  return [step for step, _ in kept], [value for _, value in kept]


def setting(run: Run, *keys: str) -> Any:
  """A value of the resolved config, of `train` if there is one; None if not set."""
  for stage in ("train", *run.configs):
    try:
      node = yaml.safe_load(run.configs.get(stage, ""))
    except yaml.YAMLError:
      continue
    for key in keys:
      node = node.get(key) if isinstance(node, dict) else None
    if node is not None:
      return node
  return None
