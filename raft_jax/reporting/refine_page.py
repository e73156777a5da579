"""The report of a refinement, as one self-contained HTML page.

Its charts are HTML bars, because the environment that refines with vLLM has no plotting
library.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raft_jax.reporting import html_page
from raft_jax.storage import records

EXAMPLES = 4
"""Examples shown for each reason."""

SCORES_KEPT = 20_000
"""The agreement of judges is computed from this many fused answers, the first ones."""


@dataclasses.dataclass(frozen=True)
class Pair:
  """The agreement of two judges on the answers that both scored.

  Attributes:
    n: number of these answers.
    correlation: Pearson's; None if a judge always gave the same score.
    difference: mean of the first judge's score minus the second's.
    same_side: share of answers that both or neither would accept.
  """

  judges: str
  n: int
  correlation: float | None
  difference: float
  same_side: float


def agreement(
  names: Sequence[str],
  scores: Sequence[tuple[float | None, ...]],
  accept_at: float,
) -> list[Pair]:
  """The agreement of every two judges, over the answers that both scored.

  Args:
    names: of the judges.
    scores: a tuple for each answer, with a score for each judge; None: abstained.
    accept_at: a judge would accept answers with this score or more.
  """
  pairs = []
  for i, j in itertools.combinations(range(len(names)), 2):
    both = [(s[i], s[j]) for s in scores]
    given = [(a, b) for a, b in both if a is not None and b is not None]
    if not given:
      continue
    left, right = zip(*given)
    constant = min(left) == max(left) or min(right) == max(right)
    same = sum((a >= accept_at) == (b >= accept_at) for a, b in given)
    pairs.append(
      Pair(
        f"{names[i]} and {names[j]}",
        len(given),
        None if len(given) < 2 or constant else statistics.correlation(left, right),
        statistics.fmean(a - b for a, b in given),
        same / len(given),
      )
    )
  return pairs


def write(
  path: pathlib.Path,
  refined: Iterable[records.Refined],
  summary: Mapping[str, Any],
  *,
  judges: Sequence[str],
  accept_at: float,
  title: str,
) -> None:
  """Writes the page.

  Args:
    refined: all records; they are read once.
    summary: as `refined_folder.summarise` returns it.
    judges: names of the judges, in the order of the scores.
    accept_at: the mean score that ends a question's rounds.
  """
  names = _distinct(judges)
  examples: dict[str, list[records.Refined]] = collections.defaultdict(list)
  scores: list[tuple[float | None, ...]] = []
  tenths = [collections.Counter[str]() for _ in names]
  for record in refined:
    if len(examples[record.reason]) < EXAMPLES:
      examples[record.reason].append(record)
    for past in record.rounds:
      if not past.scores:
        continue
      if len(scores) < SCORES_KEPT:
        scores.append(past.scores)
      for counts, score in zip(tenths, past.scores, strict=True):
        counts[_tenth(score)] += 1
  bins = [*(_tenth(i / 10) for i in range(10)), _tenth(None)]
  html_page.write(
    path,
    html_page.template("refine_report.html").render(
      title=title,
      summary=summary,
      accept_at=accept_at,
      similarity=_histogram(summary),
      judges=[
        (name, html_page.bars({label: counts[label] for label in bins}))
        for name, counts in zip(names, tenths, strict=True)
      ],
      agreement=agreement(names, scores, accept_at),
      counts={
        key: html_page.bars(summary.get(key)) for key in ("rounds", "reasons", "chosen")
      },
      costs=_costs(summary),
      examples=[
        (reason, summary["reasons"][reason], examples[reason])
        for reason in summary["reasons"]
      ],
      names=names,
    ),
  )


def _distinct(judges: Sequence[str]) -> list[str]:
  """Short names, numbered if two judges are the same model."""
  counts: collections.Counter[str] = collections.Counter()
  names = []
  for judge in judges:
    counts[judge] += 1
    short = judge.rstrip("/").rsplit("/", 1)[-1]
    names.append(f"{short} {counts[judge]}" if judges.count(judge) > 1 else short)
  return names


def _tenth(score: float | None) -> str:
  if score is None:
    return "abstained"
  low = min(math.floor(score * 10 + 1e-9), 9) / 10
  return f"{low:.1f} to {low + 0.1:.1f}"


def _histogram(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Bars of the cosine; each says whether its rewrites passed the filter."""
  edges, counts = summary["similarity"]["edges"], summary["similarity"]["counts"]
  labels = [f"{low:.2f} to {high:.2f}" for low, high in itertools.pairwise(edges)]
  rows = html_page.bars(dict(zip(labels, counts)))
  for row, (low, high) in zip(rows, itertools.pairwise(edges), strict=True):
    row["passed"] = low >= summary["threshold"]
    row["holds_threshold"] = low < summary["threshold"] < high
  return rows


def _costs(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """A row for each role: calls, seconds, tokens, thinking tokens, tokens per second."""
  rows = []
  for role, calls in summary.get("calls", {}).items():
    seconds = summary["seconds"].get(role)
    tokens = summary["tokens"].get(role)
    rows.append(
      {
        "role": role,
        "calls": calls,
        "seconds": seconds,
        "tokens": tokens,
        "thinking": summary["thinking_tokens"].get(role),
        "rate": tokens / seconds if tokens and seconds else None,
      }
    )
  return rows
