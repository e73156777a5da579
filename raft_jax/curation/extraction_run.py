"""Extraction from a folder of documents into a sealed folder of pairs."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import raft_jax
from raft_jax import errors
from raft_jax.config import schema
from raft_jax.curation import documents, extraction, qa_pairs, stage_run
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging, ray_workers, roles
from raft_jax.hf import chat
from raft_jax.runtime import interrupts
from raft_jax.storage import journal, sealed_folder

FOLDER = "extracted"
"""Name of the folder in a run's output."""

IDENTITY_KEYS = (
  "model.source",
  "model.chat_template",
  "model.dtype",
  *(
    f"extract.{key}"
    for key in schema.Extract.model_fields
    if key not in ("writer", "judges")
  ),
  *(
    f"extract.{part}.{key}"
    for part, section in (("writer", schema.Writer), ("judges.*", schema.VerdictJudge))
    for key in section.model_fields
    if key not in schema.PLACEMENT
  ),
)
"""Config keys that decide the pairs. A second run into the same folder may not change
them."""


def extract(config: schema.Config, ray: int | None = None) -> Mapping[str, Any] | None:
  """Writes `output/extracted`: the splits, what was dropped and why, and a summary.

  The files are a pure function of the documents and the journal.

  Args:
    ray: as for `stage_run.calling`.

  Returns:
    The summary; None if the folder was complete before.
  """
  settings, model = check(config.extract), config.model
  judging_roles = {f"extract.judges.{i}": j for i, j in enumerate(settings.judges)}
  ray_workers.check(ray, {"extract.writer": settings.writer, **judging_roles})
  run = stage_run.begin(config, "extract", IDENTITY_KEYS, FOLDER)
  texts, unusable = documents.read(
    settings.documents, text_field=settings.text_field, domain=settings.domain
  )
  documents.check(
    settings.documents,
    len(texts),
    unusable,
    config.data.reject_threshold,
    config.data.unusable,
  )
  interrupts.check()
  tokenizer = engines.chat_tokenizer(model.source, model.chat_template)
  inputs = _inputs(texts, unusable, settings, model)
  stage_run.make_folder(run)
  with journal.open_journal(run.folder / "journal.jsonl") as book:
    if stage_run.is_complete(run, inputs, sealed_folder.inputs(run.folder)):
      return None
    writer = _writer(settings, model)
    judges = [
      roles.judge("verify", judge, model, qa_pairs.VERDICT_SCHEMA)
      for judge in settings.judges
    ]
    with stage_run.calling(run, book, settings.seed, ray) as calls:
      extracted = extraction.extract(
        texts,
        writer=writer,
        judges=judges,
        count_tokens=lambda text: len(chat.encode(tokenizer, text)),
        settings=settings,
        calls=calls,
      )
    dropped = [*unusable, *extracted.dropped]
    summary = summarise(len(texts) + len(unusable), extracted, dropped, calls)
    _write(run.folder, extracted, dropped, summary, inputs)
  return summary


def check(settings: schema.Extract | None) -> schema.Extract:
  """The section `extract`, which this stage needs."""
  if settings is None:
    raise errors.UserError(
      "extract: is required for this stage: add `extract: {documents: FOLDER}`"
    )
  return settings


def _writer(settings: schema.Extract, model: schema.Model) -> calls_lib.Role:
  endpoint = settings.writer
  writer = roles.role(
    "write",
    endpoint,
    model,
    temperature=endpoint.temperature,
    top_p=endpoint.top_p,
    reply_schema=roles.enforced_schema(
      endpoint, qa_pairs.reply_schema(settings.pairs_per_chunk)
    ),
  )
  limit = writer.generator.prompt_limit
  if limit is not None and settings.chunk_tokens + endpoint.max_new_tokens >= limit:
    raise errors.UserError(
      f"extract: chunk_tokens={settings.chunk_tokens} and writer.max_new_tokens="
      f"{endpoint.max_new_tokens} exceed the {limit} tokens that "
      f"{endpoint.model or model.source} holds; lower one"
    )
  return writer


def _inputs(
  texts: Sequence[documents.Document],
  unusable: Sequence[qa_pairs.Dropped],
  settings: schema.Extract,
  model: schema.Model,
) -> str:
  """Digest of everything that the files depend on."""
  return journal.content_key(
    version=raft_jax.__version__,
    documents=texts,
    unusable=unusable,
    settings=settings.model_dump(mode="json"),
    dtype=model.dtype,
    chat_template=model.chat_template,
    prompts=[judging.template(name).template for name in ("write", "verify")],
    models=roles.local_identities([settings.writer, *settings.judges], model),
  )


def summarise(
  documents_read: int,
  extracted: extraction.Extracted,
  dropped: Iterable[qa_pairs.Dropped],
  calls: calls_lib.Calls,
) -> dict[str, Any]:
  """The content of summary.json: what was read, what was kept, and why not the rest."""
  reasons: dict[str, collections.Counter[str]] = collections.defaultdict(
    collections.Counter
  )
  for row in dropped:
    reasons[row["what"]][row["reason"]] += 1
  counts = {name: len(pairs) for name, pairs in extracted.splits.items()}
  return {
    "documents": documents_read,
    **extracted.made,
    "kept": sum(counts.values()),
    "splits": counts,
    "documents_by_split": {
      name: len({pair.chunk.document.id for pair in pairs})
      for name, pairs in extracted.splits.items()
    },
    "dropped": {
      f"{what}s": dict(reasons[what].most_common())
      for what in ("document", "chunk", "pair")
    },
    "judges": extracted.votes,
    **calls.costs(),
  }


def row_of(pair: qa_pairs.Pair) -> dict[str, Any]:
  """A pair as `question_files.read_questions` takes it, with its source."""
  texts = {"question": pair.question, "answer": pair.answer}
  start, length = pair.chunk.start, len(pair.chunk.text)
  document, domain = pair.chunk.document.id, pair.chunk.document.domain
  return {
    "id": journal.content_key(document=document, **texts)[:16],
    **({"domain": domain} if domain else {}),
    **texts,
    "source": {**pair.chunk.place(), "start": start, "end": start + length},
  }


def _write(
  folder: pathlib.Path,
  extracted: extraction.Extracted,
  dropped: Sequence[qa_pairs.Dropped],
  summary: Mapping[str, Any],
  inputs: str,
) -> None:
  """Writes the files, and seals the folder if any pair was kept."""
  rows = {
    name: [row_of(pair) for pair in pairs] for name, pairs in extracted.splits.items()
  }
  manifest = {"inputs": inputs, "kept": summary["splits"]} if summary["kept"] else None
  sealed_folder.write(folder, {**rows, "dropped": dropped}, summary, manifest)
