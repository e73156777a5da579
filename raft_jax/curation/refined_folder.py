"""What a refinement writes: summary, report, shards, and the manifest last of all."""

from __future__ import annotations

import collections
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import rich.console
import rich.table

from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.curation import refinement
from raft_jax.generation import calls as calls_lib
from raft_jax.reporting import refine_page
from raft_jax.storage import atomic, records, shards


def costs(calls: calls_lib.Calls) -> dict[str, Any]:
  """What the calls of this result cost, for summary.json."""
  totals = calls.totals("seconds", "completion_tokens", "thinking_tokens", "truncated")
  used = int(sum(totals["calls"].values()))
  return {
    "calls": totals["calls"],
    "seconds": {k: round(v, 3) for k, v in totals["seconds"].items()},
    "tokens": totals["completion_tokens"],
    "thinking_tokens": totals["thinking_tokens"],
    "encoder_truncated": int(totals["truncated"].get("encode", 0)),
    "unused_calls": len(calls.book.calls) - used,
  }


def summarise(
  refined: Iterable[records.Refined], threshold: float, made: Mapping[str, Any]
) -> dict[str, Any]:
  """The content of summary.json; `accepted` counts rewrites that passed the filter."""
  total = passed = abstained = 0
  bins: collections.Counter[int] = collections.Counter()
  rounds: collections.Counter[str] = collections.Counter()
  reasons: collections.Counter[str] = collections.Counter()
  chosen: collections.Counter[str] = collections.Counter()
  for record in refined:
    total += 1
    reasons[record.reason] += 1
    chosen[record.chosen] += 1
    passed += refinement.passes(record.similarity, threshold)
    if record.similarity is not None:
      bins[min(math.floor(record.similarity * 20), 19)] += 1
    if record.rounds:
      rounds[str(len(record.rounds))] += 1
    abstained += sum(past.scores.count(None) for past in record.rounds)
  lowest = min([0, *bins])
  return {
    "questions": total,
    "accepted": passed,
    "accept_rate": passed / total,
    "threshold": threshold,
    "similarity": {
      "edges": [twentieth / 20 for twentieth in range(lowest, 21)],
      "counts": [bins[twentieth] for twentieth in range(lowest, 20)],
    },
    "rounds": dict(sorted(rounds.items())),
    "reasons": dict(reasons.most_common()),
    "chosen": dict(chosen.most_common()),
    "judge_failures": abstained,
    **made,
  }


def seal(
  run: schema.Config,
  folder: pathlib.Path,
  spool: shards.Spool,
  made: Mapping[str, Any],
  meta: Mapping[str, Any],
) -> None:
  """Summary and report, then shards, and the manifest that seals all of them last."""
  summary = summarise(
    map(records.from_json, spool), run.refine.similarity_threshold, made
  )
  with atomic.replacing(folder / "summary.json") as temporary:
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
  page = folder / "refine_report.html"
  refine_page.write(
    page,
    map(records.from_json, spool),
    summary,
    judges=[each.model or each.engine for each in run.refine.judges],
    accept_at=run.refine.fusion.accept_at,
    title=pathlib.Path(run.output).name,
  )
  settings = {"model": run.model.source, "refine": run.refine.model_dump(mode="json")}
  shards.write_shards(
    folder,
    spool,
    records_per_shard=run.refine.records_per_shard,
    meta={
      **meta,
      "config": config_load.digest(settings),
      "counts": {k: summary[k] for k in ("questions", "accepted", "reasons", "chosen")},
    },
  )
  show(summary)
  print(f"report: {page}")


def show(summary: Mapping[str, Any]) -> None:
  """Prints the summary as a table, and what is worth a second look."""
  table = rich.table.Table(title="refinement", show_header=False)
  table.add_row("questions", str(summary["questions"]))
  table.add_row(
    f"rewrites with cosine >= {summary['threshold']:g}",
    f"{summary['accepted']} ({summary['accept_rate']:.0%})",
  )
  for name in ("chosen", "reasons", "rounds", "seconds", "tokens", "thinking_tokens"):
    values = summary.get(name, {})
    parts = [f"{key} {round(value, 1):,}" for key, value in values.items()]
    if any(values.values()):
      title = {"rounds": "rounds taken", "thinking_tokens": "tokens of thinking"}
      table.add_row(title.get(name, name), ", ".join(parts))
  table.add_row("judge abstentions", str(summary["judge_failures"]))
  rich.console.Console().print(table)
  if summary.get("encoder_truncated"):
    print(
      f"{summary['encoder_truncated']} texts were longer than the encoder reads: "
      "their cosine is of a part"
    )
  if summary.get("unused_calls"):
    print(
      f"{summary['unused_calls']} journalled calls belong to rows or settings that are "
      "gone, or to other runs"
    )
