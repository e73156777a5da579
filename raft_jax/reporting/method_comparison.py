"""Methods against each other on the same items: side by side, and at equal loss.

At the learning rates that validation chose, methods stand beside the base model and
against SFT; at equal loss every setting stands beside SFT that learned as much. All
numbers have 95 % intervals over items (`evaluation.intervals`); of several seeds each
item's mean counts, over those seeds that measured the score. Of several domains the
mean over domains is given, of settings that all of them have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax.evaluation import intervals
from raft_jax.reporting import sweep_results

Domains = Mapping[str, Sequence[sweep_results.Run]]
Samples = np.ndarray | None
"""float64 [S] as of `intervals.resampled_means`, or None where it was not measured."""


class Measure(NamedTuple):
  """A score, its heading and the digits it is shown with."""

  name: str
  words: str
  digits: int = 3


FIT = Measure("held_out_loss", "held-out loss")

GENERAL = (
  Measure("open_ended", "open-ended"),
  Measure("ifeval_prompt_strict", "IFEval"),
  Measure("ifeval_instruction_strict_but_no_comma", "IFEval but commas"),
  Measure("mmlu", "MMLU"),
)
"""Shares of general requests answered well: their retention is given."""

DRIFT = Measure("drift", "drift")

OF_DOMAIN = (FIT, Measure("rouge_l", "ROUGE-L"), Measure("d_acc", "D-Acc"))

BASE = "base model"
"""A row's label."""


class Row(NamedTuple):
  """A line of a table: name, seeds, and {value, low, high} by the cell's name."""

  label: str
  seeds: int
  cells: dict[str, dict[str, float]]


def general(domains: Domains) -> list[Measure]:
  """`GENERAL`, and the tasks of lm-evaluation-harness of which more is better."""
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


def kept(domains: Domains) -> list[Measure]:
  """What tells forgetting."""
  return [DRIFT, *general(domains)]


def measures(domains: Domains) -> list[Measure]:
  """All that methods are compared by."""
  return [*OF_DOMAIN, *kept(domains)]


def methods(domains: Domains) -> list[Row]:
  """The scores of the base model and of each method at its chosen learning rate."""
  picked = [sweep_results.chosen(runs) for runs in domains.values()]
  asked = measures(domains)
  base = {m.name: _mean([_base(runs, m) for runs in domains.values()]) for m in asked}
  rows = [Row(BASE, 1, _cells(base))]
  for label in _in_all(picked):
    parts = [found[label] for found in picked]
    scores = {m.name: _mean([_of(runs, m) for runs in parts]) for m in asked}
    rows.append(Row(label, _seeds(parts), _cells(scores)))
  return rows


def against_sft(domains: Domains) -> list[Row]:
  """Each method minus SFT, and its retention; both at their chosen learning rates.

  Cells of retention are named `retained_` and the measure: 100 · method / base.
  """
  picked = [sweep_results.chosen(runs) for runs in domains.values()]
  sft = [_first_sft(found) for found in picked]
  rows = []
  for label in _in_all(picked):
    parts = [found[label] for found in picked]
    differences = {
      m.name: _mean([_difference(_of(a, m), _of(b, m)) for a, b in zip(parts, sft)])
      for m in measures(domains)
    }
    retained = {
      f"retained_{m.name}": _mean(
        [_share(_of(a, m), _base(b, m)) for a, b in zip(parts, domains.values())]
      )
      for m in general(domains)
    }
    itself = all(a is b for a, b in zip(parts, sft))
    cells = _cells(retained if itself else differences | retained)
    if cells:
      rows.append(Row(label, _seeds(parts), cells))
  return rows


def _first_sft(found: Mapping[str, list[sweep_results.Run]]) -> list[sweep_results.Run]:
  sft = (runs for runs in found.values() if runs[0]["method"] == sweep_results.SFT)
  return next(sft, [])


def at_equal_fit(domains: Domains) -> list[Row]:
  """Each setting beside SFT that fits the domain as well.

  SFT's rates and the base model are a line of each measure over the held-out loss; it
  is read off at the setting's own held-out loss, in every resample anew. Both are of
  the runs that have the measure. Cells: the measure; `fit_`, `sft_` and `gap_` with it:
  held-out loss, SFT drift at equal loss, setting minus SFT.
  """
  named = [dict(sweep_results.settings(runs)) for runs in domains.values()]
  asked = kept(domains)
  rates = [sweep_results.sft_rates(runs) for runs in domains.values()]
  lines = {
    m.name: [_line(runs, sft, m) for runs, sft in zip(domains.values(), rates)]
    for m in asked
  }
  on_line = {run["name"] for sft in rates for same in sft for run in same}
  rows = []
  for label in _in_all(named):
    parts = [found[label] for found in named]
    if any(runs[0]["name"] in on_line for runs in parts):
      continue
    found: dict[str, Samples] = {}
    for m in asked:
      own = [_of(runs, m) for runs in parts]
      fits = [_fit(runs, m) for runs in parts]
      sft = [_read_off(line, fit) for line, fit in zip(lines[m.name], fits)]
      gaps = [_difference(one, other) for one, other in zip(own, sft)]
      for name, samples in (("", own), ("fit_", fits), ("sft_", sft), ("gap_", gaps)):
        found[name + m.name] = _mean(samples)
    cells = _cells(found)
    if cells:
      rows.append(Row(label, _seeds(parts), cells))
  return rows


Line = list[tuple[np.ndarray, np.ndarray]]
"""Points (held-out loss [S], measure [S])."""


def _line(
  runs: Sequence[sweep_results.Run],
  sft: Sequence[Sequence[sweep_results.Run]],
  measure: Measure,
) -> Line:
  """The base model and SFT's learning rates, where both scores were measured."""
  found = [(_base(runs, FIT), _base(runs, measure))]
  found += [(_fit(same, measure), _of(same, measure)) for same in sft]
  return [(fit, kept) for fit, kept in found if fit is not None and kept is not None]


def _read_off(line: Line, fit: Samples) -> Samples:
  return (
    None if fit is None or len(line) < 2 else intervals.interpolate_samples(line, fit)
  )


def _of(
  runs: Sequence[sweep_results.Run], measure: Measure, who: str = "trained"
) -> Samples:
  return sweep_results.samples(runs, measure.name, who)


def _fit(runs: Sequence[sweep_results.Run], measure: Measure) -> Samples:
  """The held-out loss of those runs that have another measure."""
  return _of(sweep_results.having(runs, measure.name), FIT)


def _base(runs: Sequence[sweep_results.Run], measure: Measure) -> Samples:
  """Of the base model, which stands beside the first run that measured it."""
  return _of(sweep_results.having(runs, measure.name)[:1], measure, "base")


def _difference(one: Samples, other: Samples) -> Samples:
  return None if one is None or other is None else one - other


def _share(one: Samples, base: Samples) -> Samples:
  if one is None or base is None or base[0] == 0:
    return None
  with np.errstate(divide="ignore", invalid="ignore"):
    share_S = 100.0 * one / base
  if not np.isfinite(share_S).all():  # of a base that may score 0 there is no interval
    share_S[1:] = np.nan
  return share_S


def _mean(parts: Sequence[Samples]) -> Samples:
  """Over domains; None unless every one has it."""
  found = [part for part in parts if part is not None]
  return np.mean(found, axis=0) if found and len(found) == len(parts) else None


def _cells(scores: Mapping[str, Samples]) -> dict[str, dict[str, float]]:
  """{value, low, high} of what was measured."""
  found = {
    name: intervals.describe_samples(samples)
    for name, samples in scores.items()
    if samples is not None
  }
  return {name: cell for name, cell in found.items() if cell}


def _seeds(parts: Sequence[Sequence[sweep_results.Run]]) -> int:
  return min(len(runs) for runs in parts)


def _in_all(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """The labels that every domain has, in the order of the first."""
  first, *others = found
  return [label for label in first if all(label in other for other in others)]
