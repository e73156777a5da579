"""The figures of a run's report: inline SVG in the colours of the page."""

from __future__ import annotations

import io
import itertools
import re
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import markupsafe
import matplotlib
import matplotlib.colors
import matplotlib.figure
import matplotlib.ticker
from matplotlib.axes import Axes

from raft_jax.reporting import run_folder
from raft_jax.runtime import interrupts

KD_POSITIONS = {
  "kd_at_0": "0",
  "kd_at_1_3": "1–3",
  "kd_at_4_15": "4–15",
  "kd_at_16_31": "16–31",
  "kd_at_32_up": "32 and later",
}

MAX_POINTS = 600
"""Longer curves are drawn as the means of this many bins."""

# Figures use these placeholder colours. `svg` replaces them by CSS variables of the
# page, so that one figure suits the light and the dark scheme.
INK, GRID = "#010203", "#040506"
COLOURS = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
LIGHT = {
  INK: "#1d2430",
  GRID: "#dfe3e8",
  **dict(zip(COLOURS, ("#2563b0", "#c2570c", "#17805b", "#a3358b", "#6b7280"))),
}
"""Placeholder -> colour of the light scheme, for pictures."""

Panel = Callable[[Axes], None]
"""Draws one panel."""

STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": GRID,
  "axes.grid": True,
  "axes.labelcolor": INK,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 11,
  "figure.constrained_layout.use": True,
  "font.family": "DejaVu Sans",
  "font.size": 9.5,
  "grid.color": GRID,
  "grid.linewidth": 0.6,
  "legend.frameon": False,
  "svg.fonttype": "path",
  "svg.hashsalt": "raft_jax",
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
}


def _thin(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
  """At most MAX_POINTS points: the means of bins of equal size."""
  size = -(-len(steps) // MAX_POINTS)
  starts = range(0, len(steps), max(1, size))
  return (
    [statistics.fmean(steps[i : i + size]) for i in starts],
    [statistics.fmean(values[i : i + size]) for i in starts],
  )


def _curve(axes: Axes, run: run_folder.Run, name: str, label: str, colour: str) -> bool:
  """Draws each step thinly and, if there are enough, the trailing mean of a tenth."""
  steps, values = run_folder.series(run, name)
  if not steps:
    return False
  window = len(values) // 10
  if window < 2:
    marker = "o" if len(steps) < 12 else ""
    axes.plot(
      steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5,
      label=label,
    )  # fmt: skip
    return True
  smooth = [
    statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))
  ]
  axes.plot(*_thin(steps, values), color=colour, linewidth=0.8, alpha=0.4)
  axes.plot(*_thin(steps, smooth), color=colour, linewidth=1.8, label=label)
  return True


def _panel(
  run: run_folder.Run,
  title: str,
  curves: Mapping[str, str],
  *,
  line_at: float | None = None,
  mark_at: float | None = None,
  bottom: float | None = None,
  log: bool = False,
) -> Panel | None:
  """A panel of curves over the training step, or None if none was measured.

  Args:
    curves: names of metrics and their labels.
    line_at: height of a dashed horizontal line.
    mark_at: step of a dotted vertical line.
  """
  measured = {
    name: label for name, label in curves.items() if run_folder.series(run, name)[0]
  }
  if not measured:
    return None

  def draw(axes: Axes) -> None:
    for colour, (name, label) in zip(COLOURS, measured.items(), strict=False):
      _curve(axes, run, name, label, colour)
    if line_at is not None:
      axes.axhline(line_at, color=INK, linewidth=1.0, linestyle="--")
    if mark_at is not None:
      axes.axvline(mark_at, color=INK, linewidth=1.0, linestyle=":")
    if log and all(
      value > 0 for name in measured for value in run_folder.series(run, name)[1]
    ):
      axes.set_yscale("log", subs=[])
      axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter("{x:g}")
    elif bottom is not None:
      axes.set_ylim(bottom=bottom)
    axes.set_title(title)
    axes.set_xlabel("step")
    if len(measured) > 1:
      axes.legend(fontsize=8.5)

  return draw


def _histogram(summary: Mapping[str, Any]) -> Panel | None:
  """Similarity of rewrites with their originals, and the acceptance threshold."""
  similarity = summary.get("similarity") or {}
  edges, counts = similarity.get("edges") or [], similarity.get("counts") or []
  threshold = summary.get("threshold")
  if not counts or len(edges) != len(counts) + 1:
    return None

  def draw(axes: Axes) -> None:
    widths = [high - low for low, high in itertools.pairwise(edges)]
    axes.bar(edges[:-1], counts, width=widths, align="edge", color=COLOURS[0])
    if run_folder.is_number(threshold):
      axes.axvline(threshold, color=INK, linewidth=1.2, linestyle="--")
      axes.annotate(
        f"threshold {threshold:g}", (threshold, 1), xycoords=("data", "axes fraction"),
        xytext=(-4, -4), textcoords="offset points", ha="right", va="top",
      )  # fmt: skip
    axes.set_xlabel("cosine of rewrite and original answer")
    axes.set_ylabel("rewrites")

  return draw


def _distances(scores: Mapping[str, Any]) -> Panel | None:
  """A histogram of how far the tensors moved from the base model's."""
  tensors = (scores.get("weight_distance") or {}).get("tensors") or {}
  moved = [value for value in tensors.values() if run_folder.is_number(value)]
  if not moved or max(moved) == 0:
    return None

  def draw(axes: Axes) -> None:
    percent = [100 * value for value in moved]
    axes.hist(percent, bins=30, color=COLOURS[0])
    axes.axvline(statistics.fmean(percent), color=INK, linewidth=1.2, linestyle="--")
    # Not "1e-3" at the end of the axis, where it would stand over the label.
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.set_xlabel("change of a tensor, ‖θ − θ₀‖ / ‖θ₀‖ in percent (dashed: mean)")
    axes.set_ylabel("tensors")

  return draw


SIZE = (4.9, 2.7)
"""Inches, of a panel."""

Size = tuple[float, float]


def svg(draw: Panel, size: Size = SIZE) -> markupsafe.Markup:
  """One panel as inline SVG in the colours of the page."""
  text = _svg(draw, size, transparent=True)
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text)
  names = {INK: "ink", GRID: "grid"} | {c: f"c{i + 1}" for i, c in enumerate(COLOURS)}
  for colour, name in names.items():
    text = text.replace(colour, f"var(--{name})")
  return markupsafe.Markup(text)


def svg_file(draw: Panel, size: Size = SIZE) -> str:
  """One panel as an SVG file in the colours of the light page."""
  text = _svg(draw, size, facecolor="white")
  for colour, shown in LIGHT.items():
    text = text.replace(colour, shown)
  return text


def _svg(draw: Panel, size: Size, **background: Any) -> str:
  """One panel as SVG with placeholders for its colours."""
  interrupts.check()
  with matplotlib.rc_context(STYLE):
    figure = _figure(draw, size)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, **background)
  return buffer.getvalue()


def png(draw: Panel, size: Size = SIZE) -> bytes:
  """One panel as a PNG in the colours of the light page."""
  interrupts.check()
  with matplotlib.rc_context(STYLE):
    figure = _figure(draw, size)
    for artist in figure.findobj():
      for kind in ("color", "facecolor", "edgecolor"):
        read = getattr(artist, f"get_{kind}", None)
        colour: Any = read() if read is not None else None
        if matplotlib.colors.is_color_like(colour):
          shown = LIGHT.get(matplotlib.colors.to_hex(colour))
          if shown is not None:
            alpha = matplotlib.colors.to_rgba(colour)[3]
            getattr(artist, f"set_{kind}")((shown, alpha))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
  return buffer.getvalue()


def _figure(draw: Panel, size: Size) -> matplotlib.figure.Figure:
  # Not pyplot, which has global state and may need a display.
  figure = matplotlib.figure.Figure(figsize=size)
  draw(figure.add_subplot())
  return figure


ROLLOUT_SHARES = {
  "rollout_ended": "ended with EOS",
  "rollout_repeated_4gram": "repeated 4-grams",
  "rollout_leaked": "leaked phrase",
  "rollout_empty": "empty",
}
GRADIENT_NORMS = {
  "grad_norm": "whole step",
  "grad_norm_sft": "SFT",
  "grad_norm_kd": "KD",
}
MASS_OUTSIDE = {
  "student_mass_outside_support": "student",
  "teacher_mass_outside_support": "teacher",
}


def figures(run: run_folder.Run) -> dict[str, list[markupsafe.Markup]]:
  """The inline SVG of each panel that was measured, by the name of its figure."""
  return {name: [svg(panel) for panel in row] for name, row in _panels(run).items()}


def pictures(run: run_folder.Run) -> dict[str, bytes]:
  """The same panels as PNG files, by names such as `losses-1`."""
  return {
    f"{name}-{number}": png(panel)
    for name, row in _panels(run).items()
    for number, panel in enumerate(row, 1)
  }


def _panels(run: run_folder.Run) -> dict[str, list[Panel]]:
  panels: dict[str, list[Panel | None]] = {
    "validation": _validation(run),
    "losses": [
      _panel(run, "SFT loss, nats per token", {"loss_sft": "L_SFT"}),
      _panel(run, "Distillation loss, nats", {"loss_kd": "L_KD"}, bottom=0),
      _panel(run, "Weight λ", {"kd_weight": "λ"}, bottom=0),
      _panel(run, "λ · L_KD / L_SFT", {"kd_ratio": "ratio"}, line_at=1, bottom=0),
    ],
    "gradients": [
      _panel(run, "Gradient norms", GRADIENT_NORMS, log=True),
      _panel(run, "Cosine of both gradients", {"grad_cosine": "cosine"}, line_at=0),
    ],
    "rollouts": [
      _panel(run, "Length, tokens", {"rollout_length": "length"}, bottom=0),
      _panel(run, "Shares", ROLLOUT_SHARES, bottom=0),
      _panel(run, "KL by position in the rollout, nats", KD_POSITIONS, bottom=0),
      _panel(run, "Probability outside the top K", MASS_OUTSIDE, bottom=0),
    ],
    "similarity": [_histogram(run.summary)],
    "distance": [_distances(run.scores)],
  }
  return {
    name: [panel for panel in row if panel is not None] for name, row in panels.items()
  }


def _validation(run: run_folder.Run) -> list[Panel | None]:
  """Loss, drift and IFEval during training, with the best step and the drift limit."""
  best = run_folder.series(run, "validation_best")[1][-1:]
  best_step = best[0] if best else None
  limit = run_folder.setting(run, "validation", "max_drift")
  loss, drift = "Validation loss, nats per token", "Drift, nats per token"
  share = "IFEval, share of instructions"
  return [
    _panel(run, loss, {"validation_loss": "loss"}, mark_at=best_step),
    _panel(
      run,
      drift,
      {"validation_drift": "drift"},
      line_at=limit if run_folder.is_number(limit) else None,
      mark_at=best_step,
      bottom=0,
    ),
    _panel(run, share, {"validation_ifeval": "share"}, mark_at=best_step, bottom=0),
  ]
