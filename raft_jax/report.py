"""Stage 5: one self-contained HTML page from the files of a run's output folder.

Reads only what the other stages wrote (`metrics.jsonl`, `refined/summary.json`,
`evaluation/scores.json`, `evaluation/samples.jsonl`, `config/*.yaml`), so it works
after a crash and for a run that is not finished: what is missing is said to be
missing. The total loss is never drawn: under the EMA balance it is about twice the
SFT loss by construction and shows no progress.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import itertools
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jinja2
import markupsafe
import matplotlib
import matplotlib.figure
import matplotlib.ticker
import yaml
from matplotlib.axes import Axes

from raft_jax import command_line, errors, records
from raft_jax import config as config_lib

SCORES = {
  "held_out_loss": ("Held-out loss, nats per token", -1),
  "rouge_l": ("ROUGE-L F1", 1),
  "similarity": ("Encoder similarity, cosine", 1),
  "answer_tokens": ("Tokens of an answer", 0),
  "ended": ("Share of answers that ended with EOS", 0),
}
"""Name of a score -> (words, +1 where higher is better, 0 where neither is)."""

KD_POSITIONS = {
  "kd_at_0": "0",
  "kd_at_1_3": "1–3",
  "kd_at_4_15": "4–15",
  "kd_at_16_31": "16–31",
  "kd_at_32_up": "32 and later",
}

MAX_POINTS = 600
"""A longer curve is drawn as the means of this many bins."""

# Colours stand in the drawings as these literals and become CSS variables of the page,
# so that one drawing suits the light and the dark scheme.
INK, GRID = "#010203", "#040506"
COLOURS = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
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


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run's folder holds; empty where a file is missing."""

  metrics: tuple[Mapping[str, Any], ...]
  summary: Mapping[str, Any]
  scores: Mapping[str, Any]
  samples: tuple[Mapping[str, Any], ...]
  configs: Mapping[str, str]
  damage: tuple[str, ...]
  """What could not be read, in words."""


def read(output: pathlib.Path) -> Run:
  """Everything under `output` that the page shows; damage is named, not fatal."""
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

  def whole(name: str) -> dict[str, Any]:
    path = output / name
    found = objects(path, [path.read_bytes()]) if path.exists() else []
    return found[0] if found else {}

  return Run(
    metrics=tuple(_last_of_each_step(lines("metrics.jsonl"))),
    summary=whole("refined/summary.json"),
    scores=whole("evaluation/scores.json"),
    samples=tuple(lines("evaluation/samples.jsonl")),
    configs={
      path.stem: path.read_text(encoding="utf-8", errors="replace")
      for path in sorted((output / "config").glob("*.yaml"))
    },
    damage=tuple(damage),
  )


def _last_of_each_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """A resumed run repeats the steps after its checkpoint; the later line counts."""
  by_step: dict[int, dict[str, Any]] = {
    row["step"]: row
    for row in rows
    if row.get("split", "train") == "train"
    and isinstance(row.get("step"), int)
    and isinstance(row.get("values"), dict)
  }
  for row in by_step.values():
    inside = row["values"].get("teacher_mass_in_support")
    if _is_number(inside):
      row["values"]["teacher_mass_outside_support"] = 1 - inside
  return [by_step[step] for step in sorted(by_step)]


def _is_number(value: object) -> TypeGuard[int | float]:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def number(value: Any, digits: int = 3) -> str:
  """For a reader; a dash for what is missing or not finite."""
  if not _is_number(value):
    return "–"
  if isinstance(value, int):
    text = f"{value:,}"
  elif value != 0 and not 0.5 * 10**-digits <= abs(value) < 1e6:
    text = f"{value:.1e}"
  else:
    text = f"{value:,.{digits}f}"
  return text.replace("-", "−")


def percent(value: Any) -> str:
  return f"{100 * value:.1f}\u00a0%" if _is_number(value) else "–"


def duration(seconds: Any) -> str:
  if not _is_number(seconds):
    return "–"
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def series(run: Run, name: str) -> tuple[list[int], list[float]]:
  """Steps and values of one metric, where it was measured and finite."""
  points = [(row["step"], row["values"].get(name)) for row in run.metrics]
  kept = [(step, float(value)) for step, value in points if _is_number(value)]
  return [step for step, _ in kept], [value for _, value in kept]


def setting(run: Run, *keys: str) -> Any:
  """A value of the resolved config, from the stage that trained if it is there."""
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


def score_rows(run: Run) -> list[dict[str, Any]]:
  """One row a score: base, trained, their paired difference and what it says.

  The verdict is "better" or "worse" only where the 95 % interval of the paired
  difference leaves out 0.
  """
  scores = run.scores.get("scores") or {}
  rows = []
  for name, (words, direction) in SCORES.items():
    base = (scores.get("base") or {}).get(name) or {}
    trained = (scores.get("trained") or {}).get(name) or {}
    paired = (run.scores.get("paired") or {}).get(name) or {}
    if not base and not trained:
      continue
    low, high = paired.get("low"), paired.get("high")
    if not (_is_number(low) and _is_number(high)):
      verdict = "not compared"
    elif low <= 0 <= high:
      verdict = "no clear change"
    elif direction == 0:
      verdict = "higher" if low > 0 else "lower"
    else:
      verdict = "better" if low * direction > 0 else "worse"
    rows.append(
      {
        "name": name,
        "words": words,
        "direction": {1: "higher is better, ", -1: "lower is better, "}.get(
          direction, ""
        ),
        "base": base,
        "trained": trained,
        "paired": paired,
        "verdict": verdict,
      }
    )
  return rows


def warnings(run: Run) -> list[str]:
  """What a careful reader of the curves would stop at, with its number.

  The limits are rules of thumb, set between runs on a 135M model that answered in
  sane English and runs that collapsed.
  """
  found = list(run.damage)
  tail = slice(-max(1, len(run.metrics) // 5), None)

  def mean(name: str, part: slice = tail) -> float | None:
    values = series(run, name)[1][part]
    return statistics.fmean(values) if values else None

  start, end = mean("rollout_length", slice(0, 3)), mean("rollout_length")
  if start and end is not None and end < start / 2:
    found.append(
      f"Rollouts shrank from {number(start, 1)} to {number(end, 1)} tokens; read the"
      " sample answers."
    )
  first, overall = mean("kd_at_0"), mean("loss_kd")
  if first and overall and first > 3 * overall:
    found.append(
      f"Rollout position 0 carries {number(first, 2)} nats, the mean position"
      f" {number(overall, 2)}: teacher and student disagree on how an answer starts"
      " (distill.teacher_context)."
    )
  ratio = mean("kd_ratio")
  ema = setting(run, "balance", "mode") in (None, "ema")
  if ratio is not None and ema and not 0.5 <= ratio <= 2:
    found.append(
      f"λ·L_KD / L_SFT is {number(ratio, 2)} at the end; it should be near 1."
    )
  for name, limit, words in (
    ("rollout_leaked", 0.05, "of the last rollouts quote the teacher's prompt."),
    ("rollout_repeated_4gram", 0.5, "of the last rollouts' 4-grams are repetitions."),
    ("rollout_empty", 0.05, "of the last rollouts are empty."),
  ):
    share = mean(name)
    if share is not None and share > limit:
      found.append(f"{percent(share)} {words}")
  lost = len(run.metrics) - len(series(run, "loss_sft")[0])
  if lost:
    found.append(f"{lost} step(s) have no finite SFT loss.")
  return found


def _phases(run: Run) -> list[tuple[str, Any, str]]:
  """(phase, seconds, remark) rows of the time table."""
  rows: list[tuple[str, Any, str]] = []
  tokens = run.summary.get("tokens") or {}
  for role, seconds in (run.summary.get("seconds") or {}).items():
    remark = f"{number(tokens[role])} tokens" if role in tokens else ""
    rows.append((f"refine: {role}", seconds, remark))
  seconds_N = series(run, "step_seconds")[1]
  if seconds_N:
    median = duration(statistics.median(seconds_N))
    rows.append(("train", sum(seconds_N), f"{len(seconds_N)} steps, median {median}"))
  for phase in ("rollout", "teacher", "update"):
    rate_N = series(run, f"{phase}_tokens_per_s")[1]
    if rate_N:
      median = number(statistics.median(rate_N), 0)
      rows.append((f"train: {phase}", None, f"median {median} tokens/s"))
  for who, seconds in (run.scores.get("seconds") or {}).items():
    rows.append((f"evaluate: {who}", seconds, ""))
  return rows


def _bars(counts: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """Rows of a small bar table: label, count, share of all, width in percent."""
  items = {k: v for k, v in (counts or {}).items() if _is_number(v)}
  total, largest = sum(items.values()), max(items.values(), default=0)
  return [
    {
      "label": label.replace("_", " "),
      "count": count,
      "share": count / total if total else None,
      "width": round(100 * count / largest, 1) if largest else 0,
    }
    for label, count in items.items()
  ]


def _thin(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
  """At most MAX_POINTS points: the means of bins of equal count."""
  size = -(-len(steps) // MAX_POINTS)
  starts = range(0, len(steps), max(1, size))
  return (
    [statistics.fmean(steps[i : i + size]) for i in starts],
    [statistics.fmean(values[i : i + size]) for i in starts],
  )


def _curve(axes: Axes, run: Run, name: str, label: str, colour: str) -> bool:
  """Each step thinly, and where there are enough the trailing mean of a tenth."""
  steps, values = series(run, name)
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
  run: Run, title: str, curves: Mapping[str, str], *, line_at: float | None = None,
  bottom: float | None = None, log: bool = False,
) -> Callable[[Axes], None] | None:  # fmt: skip
  """A panel of curves over the training step, or None if none was measured."""
  measured = {name: label for name, label in curves.items() if series(run, name)[0]}
  if not measured:
    return None

  def draw(axes: Axes) -> None:
    for colour, (name, label) in zip(COLOURS, measured.items(), strict=False):
      _curve(axes, run, name, label, colour)
    if line_at is not None:
      axes.axhline(line_at, color=INK, linewidth=1.0, linestyle="--")
    if log and all(value > 0 for name in measured for value in series(run, name)[1]):
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


def _histogram(summary: Mapping[str, Any]) -> Callable[[Axes], None] | None:
  """Similarity of rewrite and original, with the threshold that splits them."""
  similarity = summary.get("similarity") or {}
  edges, counts = similarity.get("edges") or [], similarity.get("counts") or []
  threshold = summary.get("threshold")
  if not counts or len(edges) != len(counts) + 1:
    return None

  def draw(axes: Axes) -> None:
    widths = [high - low for low, high in itertools.pairwise(edges)]
    axes.bar(edges[:-1], counts, width=widths, align="edge", color=COLOURS[0])
    if _is_number(threshold):
      axes.axvline(threshold, color=INK, linewidth=1.2, linestyle="--")
      axes.annotate(
        f"threshold {threshold:g}", (threshold, 1), xycoords=("data", "axes fraction"),
        xytext=(-4, -4), textcoords="offset points", ha="right", va="top",
      )  # fmt: skip
    axes.set_xlabel("cosine of rewrite and original answer")
    axes.set_ylabel("rewrites")

  return draw


def _svg(draw: Callable[[Axes], None]) -> markupsafe.Markup:
  """One panel as inline SVG in the page's colours."""
  with matplotlib.rc_context(STYLE):
    # A Figure of its own, not pyplot: no display and no global state.
    figure = matplotlib.figure.Figure(figsize=(4.9, 2.7))
    draw(figure.add_subplot())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text)
  names = {INK: "ink", GRID: "grid"} | {c: f"c{i + 1}" for i, c in enumerate(COLOURS)}
  for colour, name in names.items():
    text = text.replace(colour, f"var(--{name})")
  return markupsafe.Markup(text)


def figures(run: Run) -> dict[str, list[markupsafe.Markup]]:
  """Name -> inline SVG of each panel that was measured."""
  norms = {"grad_norm": "whole step", "grad_norm_sft": "SFT", "grad_norm_kd": "KD"}
  shares = {
    "rollout_ended": "ended with EOS",
    "rollout_repeated_4gram": "repeated 4-grams",
    "rollout_leaked": "leaked phrase",
    "rollout_empty": "empty",
  }
  outside = {
    "student_mass_outside_support": "student",
    "teacher_mass_outside_support": "teacher",
  }
  panels = {
    "losses": [
      _panel(run, "SFT loss, nats per token", {"loss_sft": "L_SFT"}),
      _panel(run, "Distillation loss, nats", {"loss_kd": "L_KD"}, bottom=0),
      _panel(run, "Weight λ", {"kd_weight": "λ"}, bottom=0),
      _panel(run, "λ · L_KD / L_SFT", {"kd_ratio": "ratio"}, line_at=1, bottom=0),
    ],
    "gradients": [
      _panel(run, "Gradient norms", norms, log=True),
      _panel(run, "Cosine of the two", {"grad_cosine": "cosine"}, line_at=0),
    ],
    "rollouts": [
      _panel(run, "Length, tokens", {"rollout_length": "length"}, bottom=0),
      _panel(run, "Shares", shares, bottom=0),
      _panel(run, "KL by position in the rollout, nats", KD_POSITIONS, bottom=0),
      _panel(run, "Probability outside the top-K", outside, bottom=0),
    ],
    "similarity": [_histogram(run.summary)],
  }
  return {
    name: [_svg(panel) for panel in row if panel is not None]
    for name, row in panels.items()
  }


def render(run: Run, title: str) -> str:
  """The page as one HTML string that loads nothing from elsewhere."""
  environment = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"number": number, "percent": percent, "duration": duration}
  template = importlib.resources.files("raft_jax") / "report_template.html"
  configs: dict[str, list[str]] = {}
  for stage, text in run.configs.items():
    configs.setdefault(text, []).append(stage)
  source = str(setting(run, "model", "source") or "")
  return environment.from_string(template.read_text(encoding="utf-8")).render(
    title=title,
    run=run,
    model=source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf") or "The model",
    method=setting(run, "method") or "unknown",
    encoder=setting(run, "refine", "encoder") or "the sentence encoder",
    warnings=warnings(run),
    figures=figures(run),
    scores=score_rows(run),
    counts={
      key: _bars(run.summary.get(key)) for key in ("rounds", "reasons", "chosen")
    },
    phases=_phases(run),
    configs=[(", ".join(stages), text) for text, stages in configs.items()],
  )


def write(output: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` into a run's output folder and returns its path."""
  page = render(read(output), title=output.name)
  path = output / "report.html"
  with records.replacing(path) as temporary:
    # A lone surrogate, possible in JSON, is not encodable: show it as "?".
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
  return path


def main(config: config_lib.Config) -> None:
  """Writes the report of the run whose output folder the config names."""
  output = pathlib.Path(config.output)
  if not (output / "config").is_dir():
    raise errors.UserError(
      f"output: {output} holds no run of raft_jax, so there is nothing to report; run"
      " `python -m raft_jax.train` with this config first"
    )
  print(f"report: {write(output)}")


if __name__ == "__main__":
  command_line.run("report", main, "Draw a run as one self-contained HTML page.")
