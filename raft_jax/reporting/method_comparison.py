"""Comparison of methods on the same items: side by side, and at equal loss.

Side by side, each method has the learning rate and steps that validation chose, and is
compared with the base model and with SFT. At equal loss, every setting is compared with
the SFT that fits the domain equally well. All numbers have 95 % intervals over items
(`evaluation.intervals`). With several seeds, an item's score is its mean over the seeds
that measured it. With several domains, the numbers are means over the domains, for
settings that all domains have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax.evaluation import intervals
from raft_jax.reporting import sweep_results

Domains = Mapping[str, Sequence[sweep_results.Run]]
Samples = np.ndarray | None
"""float64 [S] as `intervals.resampled_means` returns it; None if not measured."""


class Measure(NamedTuple):
  """A score, its heading, and the number of digits shown."""

  name: str
  heading: str
  digits: int = 3


FIT = Measure("held_out_loss", "held-out loss")

GENERAL = (
  Measure("open_ended", "open-ended"),
  Measure("ifeval_prompt_strict", "IFEval"),
  Measure("ifeval_instruction_strict_but_no_comma", "IFEval but commas"),
  Measure("mmlu", "MMLU"),
)
"""Scores of general abilities, which have a retention."""

DRIFT = Measure("drift", "drift")
DOMAIN_DRIFT = Measure("domain_drift", "domain drift")
KEPT = Measure("mmlu_kept", "MMLU kept")
"""The right answers among the MMLU questions that the base model gets right."""

OF_DOMAIN = (
  FIT,
  Measure("rouge_l", "ROUGE-L"),
  Measure("choice", "choice"),
  Measure("choice_letter", "choice by letter"),
  Measure("d_acc", "D-Acc"),
)

BASE = "base model"
"""The label of the base model's row."""


class Row(NamedTuple):
  """A row of a table: label, number of seeds, and {value, low, high} by measure.

  A cell may have a `note` to its number, or a `text` in place of one.
  """

  label: str
  seeds: int
  cells: dict[str, dict[str, Any]]


def general(domains: Domains) -> list[Measure]:
  """`GENERAL`, and the tasks of lm-evaluation-harness where higher is better."""
  retained = {
    name
    for runs in domains.values()
    for run in runs
    for name in run["scores"].get("retention") or {}
    if name.startswith(sweep_results.TASK)
  }
  tasks = [
    Measure(name, name.removeprefix(sweep_results.TASK).replace("_", " "))
    for name in sorted(retained)
  ]
  return [*GENERAL, *tasks]


def forgetting(domains: Domains) -> list[Measure]:
  """The measures of forgetting."""
  return [DRIFT, DOMAIN_DRIFT, *general(domains), KEPT]


def measures(domains: Domains) -> list[Measure]:
  """All measures by which methods are compared."""
  return [*OF_DOMAIN, *forgetting(domains)]


def methods(domains: Domains) -> list[Row]:
  """The scores of the base model, and of each method at its chosen setting."""
  chosen = [sweep_results.chosen(runs) for runs in domains.values()]
  compared = measures(domains)
  base = {
    m.name: mean_over_domains([base_samples(runs, m) for runs in domains.values()])
    for m in compared
  }
  rows = [Row(BASE, 1, _cells(base))]
  for label in in_all(chosen):
    parts = [by_label[label] for by_label in chosen]
    scores = {
      m.name: mean_over_domains([_trained(runs, m) for runs in parts]) for m in compared
    }
    rows.append(Row(label, fewest_seeds(parts), _cells(scores)))
  return rows


def against_sft(domains: Domains) -> list[Row]:
  """Each method minus SFT, and its retention; all at their chosen settings.

  The cell `retained_<measure>` is 100 · method / base.
  """
  chosen = [sweep_results.chosen(runs) for runs in domains.values()]
  sft = [_first_sft(by_label) for by_label in chosen]
  rows = []
  for label in in_all(chosen):
    parts = [by_label[label] for by_label in chosen]
    differences = {
      m.name: mean_over_domains(
        [_difference(_trained(a, m), _trained(b, m)) for a, b in zip(parts, sft)]
      )
      for m in measures(domains)
    }
    retained = {
      f"retained_{m.name}": mean_over_domains(
        [
          _retention(_trained(a, m), base_samples(b, m))
          for a, b in zip(parts, domains.values())
        ]
      )
      for m in general(domains)
    }
    is_sft = all(a is b for a, b in zip(parts, sft))
    cells = _cells(retained if is_sft else differences | retained)
    if cells:
      rows.append(Row(label, fewest_seeds(parts), cells))
  return rows


def _first_sft(
  by_label: Mapping[str, list[sweep_results.Run]],
) -> list[sweep_results.Run]:
  sft = (runs for runs in by_label.values() if runs[0]["method"] == sweep_results.SFT)
  return next(sft, [])


def at_equal_fit(domains: Domains) -> list[Row]:
  """Each setting beside the SFT that fits the domain equally well.

  For each measure, the base model and SFT at its learning rates form a line over the
  held-out loss. In every resample, the line is interpolated at the setting's held-out
  loss. Only runs that have the measure count. The cells of a measure are its own name,
  and with the prefixes `fit_` (held-out loss), `sft_` (SFT at equal loss) and `gap_`
  (setting minus SFT).
  """
  settings = [dict(sweep_results.settings(runs)) for runs in domains.values()]
  compared = forgetting(domains)
  rates = [sweep_results.sft_rates(runs) for runs in domains.values()]
  lines = {
    m.name: [_line(runs, sft, m) for runs, sft in zip(domains.values(), rates)]
    for m in compared
  }
  on_line = {run["name"] for sft in rates for same in sft for run in same}
  rows = []
  for label in in_all(settings):
    parts = [by_label[label] for by_label in settings]
    if any(runs[0]["name"] in on_line for runs in parts):
      continue
    samples: dict[str, Samples] = {}
    for m in compared:
      own = [_trained(runs, m) for runs in parts]
      fits = [_fit(runs, m) for runs in parts]
      sft = [_at_loss(line, fit) for line, fit in zip(lines[m.name], fits)]
      gaps = [_difference(score, at_loss) for score, at_loss in zip(own, sft)]
      for name, values in (("", own), ("fit_", fits), ("sft_", sft), ("gap_", gaps)):
        samples[name + m.name] = mean_over_domains(values)
    cells = _cells(samples)
    if cells:
      rows.append(Row(label, fewest_seeds(parts), cells))
  return rows


Line = list[tuple[np.ndarray, np.ndarray]]
"""Points of a line: (held-out loss [S], measure [S])."""


def _line(
  runs: Sequence[sweep_results.Run],
  sft: Sequence[Sequence[sweep_results.Run]],
  measure: Measure,
) -> Line:
  """The points of the base model and of SFT that have both scores."""
  points = [(base_samples(runs, FIT), base_samples(runs, measure))]
  points += [(_fit(same, measure), _trained(same, measure)) for same in sft]
  return [(x, y) for x, y in points if x is not None and y is not None]


def _at_loss(line: Line, fit: Samples) -> Samples:
  return (
    None if fit is None or len(line) < 2 else intervals.interpolate_samples(line, fit)
  )


def _trained(runs: Sequence[sweep_results.Run], measure: Measure) -> Samples:
  return sweep_results.samples(runs, measure.name)


def _fit(runs: Sequence[sweep_results.Run], measure: Measure) -> Samples:
  """The held-out loss of the runs that have another measure."""
  return _trained(sweep_results.having(runs, measure.name), FIT)


def base_samples(runs: Sequence[sweep_results.Run], measure: Measure) -> Samples:
  """The base model's score, from the first run that measured it."""
  first = sweep_results.having(runs, measure.name)[:1]
  return sweep_results.samples(first, measure.name, "base")


def _difference(score: Samples, reference: Samples) -> Samples:
  return None if score is None or reference is None else score - reference


def _retention(score: Samples, base: Samples) -> Samples:
  if score is None or base is None or base[0] == 0:
    return None
  with np.errstate(divide="ignore", invalid="ignore"):
    retention_S = 100.0 * score / base
  if not np.isfinite(retention_S).all():  # no interval if the base may score 0
    retention_S[1:] = np.nan
  return retention_S


def mean_over_domains(parts: Sequence[Samples]) -> Samples:
  """The mean over domains; None unless all of them have the score."""
  values = [part for part in parts if part is not None]
  return np.mean(values, axis=0) if values and len(values) == len(parts) else None


def _cells(scores: Mapping[str, Samples]) -> dict[str, dict[str, float]]:
  """{value, low, high} of the scores that were measured."""
  cells = {
    name: intervals.describe_samples(samples)
    for name, samples in scores.items()
    if samples is not None
  }
  return {name: cell for name, cell in cells.items() if cell}


def fewest_seeds(parts: Sequence[Sequence[sweep_results.Run]]) -> int:
  return min(len(runs) for runs in parts)


def in_all(domains: Sequence[Mapping[str, Any]]) -> list[str]:
  """The labels that all domains have, in the order of the first domain."""
  first, *others = domains
  return [label for label in first if all(label in other for other in others)]
