"""The folder of a refinement: what decides its content, its summary, and its seal."""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.curation import refinement
from raft_jax.generation import calls as calls_lib
from raft_jax.runtime import interrupts
from raft_jax.storage import journal, records, sealed_folder, shards

FOLDER = "refined"
"""Name of the folder in a run's output."""

LAYOUT_KEYS = ("data.format", "data.columns", "data.turns")
"""Keys that decide which questions the rows of a file are."""

IDENTITY_KEYS = (
  "model.source",
  "model.chat_template",
  "model.dtype",
  "data.questions",
  *LAYOUT_KEYS,
  "refine.prompt",
  "refine.encoder",
  "refine.similarity_threshold",
  "refine.seed",
  *(
    f"refine.{part}.{key}"
    for part, section in (
      ("rewriter", schema.Engine),
      ("fusion", schema.Fusion),
      ("judges.*", schema.Judge),
    )
    for key in section.model_fields
    if key not in schema.PLACEMENT
  ),
)
"""Config keys that decide the refined records. A second run into the same folder may
not change them."""

SELECTION_KEYS = (
  "refine.similarity_threshold",
  "refine.fusion.rounds",
  "refine.fusion.accept_at",
  "refine.judges",
)
"""The `IDENTITY_KEYS` that `--select-only` may change, since it generates no text."""

WriteReport = Callable[[Iterable[records.Refined], Mapping[str, Any]], None]
"""Writes the report page from the records, read once, and the summary."""


def question_bytes(question: records.Question) -> bytes:
  """The part of a question that enters the digest of all questions."""
  extras = question.extras()
  messages = records.keyed(question.messages)
  parts = [question.id, question.domain, messages, question.answer]
  return journal.canonical([*parts, *([extras] if extras else [])]).encode()


def call_costs(calls: calls_lib.Calls) -> dict[str, Any]:
  """The calls, seconds and tokens of these results, for summary.json."""
  by_role = calls.costs()
  truncated = calls.totals("truncated")["truncated"].get("encode", 0)
  return {
    **by_role,
    "encoder_truncated": int(truncated),
    "unused_calls": len(calls.book.calls) - sum(by_role["calls"].values()),
  }


def summarise(
  refined: Iterable[records.Refined], threshold: float, costs: Mapping[str, Any]
) -> dict[str, Any]:
  """The content of summary.json; `accepted` counts rewrites that passed the filter."""
  total = passed = abstained = 0
  bins: collections.Counter[int] = collections.Counter()
  rounds: collections.Counter[str] = collections.Counter()
  reasons: collections.Counter[str] = collections.Counter()
  chosen: collections.Counter[str] = collections.Counter()
  for record in refined:
    interrupts.check()
    total += 1
    reasons[record.reason] += 1
    chosen[record.chosen] += 1
    passed += refinement.passes(record.similarity, threshold)
    if record.similarity is not None:
      bins[min(math.floor(record.similarity * 20), 19)] += 1
    if record.rounds:
      rounds[str(len(record.rounds))] += 1
    abstained += sum(result.scores.count(None) for result in record.rounds)
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
    **costs,
  }


def finish(
  folder: pathlib.Path,
  spool: shards.Spool,
  *,
  model_source: str,
  settings: schema.Refine,
  costs: Mapping[str, Any],
  meta: Mapping[str, Any],
  write_report: WriteReport,
) -> Mapping[str, Any]:
  """Writes summary and report, then the shards, and last the manifest that seals them.

  Args:
    spool: every refined record as JSON.
    costs: entries of the summary about calls.
    meta: entries of the manifest that identify the inputs.

  Returns:
    The summary.
  """
  summary = summarise(
    map(records.from_json, spool), settings.similarity_threshold, costs
  )
  sealed_folder.write_summary(folder, summary)
  write_report(map(records.from_json, spool), summary)
  identity = {"model": model_source, "refine": settings.model_dump(mode="json")}
  counted = ("questions", "accepted", "reasons", "chosen")
  shards.write_shards(
    folder,
    spool,
    records_per_shard=settings.records_per_shard,
    meta={
      **meta,
      "config": config_load.digest(identity),
      "counts": {key: summary[key] for key in counted},
    },
  )
  return summary


def sealed_inputs(folder: pathlib.Path) -> str | None:
  """The digest of the inputs of a finished folder; None if unfinished or damaged."""
  if not (folder / sealed_folder.SUMMARY).exists():
    return None
  try:
    return shards.read_manifest(folder).meta.get("inputs")
  except errors.UserError:
    return None  # the journal rebuilds it
