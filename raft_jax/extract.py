"""Stage 0: question/answer pairs from documents.

`extract` below is the whole method: documents are cut at sentence ends, a language
model writes pairs about each part, several judge them, what repeats is dropped, and the
rest is split by document. Calls go through `calls.Calls`, so a stopped run continues
where it was, and the files are a pure function of the documents and the journal.

Run it as `python -m raft_jax.extract --config FILE`.
"""

from __future__ import annotations

import collections
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.table

import raft_jax
from raft_jax import errors
from raft_jax.config import cli, run_lock, schema
from raft_jax.curation import documents, qa_pairs
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging, roles
from raft_jax.hf import chat
from raft_jax.runtime import interrupts, progress
from raft_jax.storage import journal, sealed_folder

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
"""Config keys that decide the result; a folder's second run may not change them."""

SPLITS = ("train", "validation", "test")


class Extracted(NamedTuple):
  """Pairs by split, and everything that was dropped on the way to them."""

  splits: dict[str, list[qa_pairs.Pair]]
  dropped: list[qa_pairs.Dropped]
  made: dict[str, int]  # chunks and pairs there were, dropped or not
  votes: list[dict[str, int]]  # of each judge


# The method


def extract(
  found: Sequence[documents.Document],
  *,
  writer: calls_lib.Role,
  judges: Sequence[calls_lib.Role],
  count_tokens: Callable[[str], int],
  settings: schema.Extract,
  calls: calls_lib.Calls,
) -> Extracted:
  """Pairs from documents; each document, chunk and pair is kept or dropped."""
  threshold = settings.near_duplicate
  kept, dropped = qa_pairs.unlike(found, lambda document: document.text, threshold)
  chunks, short = cut(kept, count_tokens, settings)
  asked, alike = qa_pairs.unlike(chunks, lambda chunk: chunk.text, threshold)
  written, unwritten = qa_pairs.write(asked, settings.pairs_per_chunk, writer, calls)
  usable, flawed = qa_pairs.sound(written)
  approved, disapproved, votes = qa_pairs.verify(usable, judges, calls)
  fresh, again = qa_pairs.unlike(
    approved, _both, threshold, key=lambda pair: pair.question
  )
  splits: dict[str, list[qa_pairs.Pair]] = {name: [] for name in SPLITS}
  shares = settings.shares.model_dump()
  for pair in fresh:
    splits[split_of(pair.chunk.document.id, shares, settings.seed)].append(pair)
  lost = [row for row in unwritten if row["what"] == "pair"]
  return Extracted(
    splits,
    [*dropped, *short, *alike, *unwritten, *flawed, *disapproved, *again],
    {"chunks": len(chunks) + len(short), "pairs": len(written) + len(lost)},
    votes,
  )


def split_of(document: str, shares: Mapping[str, float], seed: int) -> str:
  """The split of a document: a function of its id, the shares and the seed alone.

  Documents that come or go move no other from one split to another.
  """
  digest = hashlib.sha256(journal.canonical([seed, document]).encode()).digest()
  point = int.from_bytes(digest[:8]) / 2**64
  reached = 0.0
  for name, share in shares.items():
    reached += share
    if point < reached:
      return name
  return max(shares, key=lambda name: shares[name])  # a sum of shares just below 1


def cut(
  found: Sequence[documents.Document],
  count_tokens: Callable[[str], int],
  settings: schema.Extract,
) -> tuple[list[documents.Chunk], list[qa_pairs.Dropped]]:
  """Every document in chunks; those that are too short to ask about are dropped."""
  kept, dropped = [], []
  for document in progress.with_bar(found, "cut", unit="document"):
    for chunk in documents.cut(document, settings.chunk_tokens, count_tokens):
      tokens = count_tokens(chunk.text.strip())
      if tokens < settings.min_chunk_tokens:
        dropped.append(qa_pairs.drop(chunk, "too_short", tokens=tokens))
      else:
        kept.append(chunk)
  return kept, dropped


def _both(pair: qa_pairs.Pair) -> str:
  return f"{pair.question}\n{pair.answer}"


# The run


def fit(run: schema.Config) -> None:
  """Extracts `extract.documents` into `output/extracted`: splits, reasons, summary."""
  settings = check(run)
  run_lock.check_lock(run, "extract", IDENTITY_KEYS)
  folder = pathlib.Path(run.output) / "extracted"
  found, unusable = documents.read(
    settings.documents, text_field=settings.text_field, domain=settings.domain
  )
  documents.check(
    settings.documents,
    len(found),
    unusable,
    run.data.reject_threshold,
    run.data.unusable,
  )
  interrupts.check()
  tokenizer = engines.tokenizer(run.model.source, run.model.chat_template)
  inputs = _inputs(run, settings, found, unusable)
  # The mark of a run's folder.
  (folder.parent / "config").mkdir(parents=True, exist_ok=True)
  with journal.open_journal(folder / "journal.jsonl") as book:
    if sealed_folder.inputs(folder) == inputs:
      run_lock.lock_config(run, "extract", IDENTITY_KEYS)
      print(f"{folder}: already complete, nothing to do")
      return
    writer = _writer(run, settings)
    judges = [
      roles.judge("verify", stage, run.model, qa_pairs.VERDICT_SCHEMA)
      for stage in settings.judges
    ]
    # Not before: what was wrong with the input so far binds no later run.
    run_lock.lock_config(run, "extract", IDENTITY_KEYS)
    calls = calls_lib.Calls(book, settings.seed)
    with calls_lib.at_work(calls):
      extracted = extract(
        found,
        writer=writer,
        judges=judges,
        count_tokens=lambda said: len(chat.encode(tokenizer, said)),
        settings=settings,
        calls=calls,
      )
    dropped = [*unusable, *extracted.dropped]
    summary = summarise(len(found) + len(unusable), extracted, dropped, calls)
    _write(folder, extracted, dropped, summary, inputs)
  show(summary, folder)
  _refuse_nothing(summary, folder)


def check(run: schema.Config) -> schema.Extract:
  """The section `extract`, without which there is nothing to do."""
  if run.extract is None:
    raise errors.UserError(
      "extract: is required for this stage: add `extract: {documents: FOLDER}`"
    )
  return run.extract


def _writer(run: schema.Config, settings: schema.Extract) -> calls_lib.Role:
  stage = settings.writer
  writer = roles.role(
    "write",
    stage,
    run.model,
    temperature=stage.temperature,
    top_p=stage.top_p,
    reply_schema=roles.form(stage, qa_pairs.reply_schema(settings.pairs_per_chunk)),
  )
  limit = writer.generator.prompt_limit
  if limit is not None and settings.chunk_tokens + stage.max_new_tokens >= limit:
    raise errors.UserError(
      f"extract: chunk_tokens={settings.chunk_tokens} and writer.max_new_tokens="
      f"{stage.max_new_tokens} exceed the {limit} tokens that "
      f"{stage.model or run.model.source} holds; lower one"
    )
  return writer


def _inputs(
  run: schema.Config,
  settings: schema.Extract,
  found: Sequence[documents.Document],
  unusable: Sequence[qa_pairs.Dropped],
) -> str:
  """Digest of all that the files depend on."""
  stages: list[schema.ModelEndpoint] = [settings.writer, *settings.judges]
  local = [stage for stage in stages if stage.engine != "openai"]
  models = {run.model.source, *(stage.model or run.model.source for stage in local)}
  return journal.content_key(
    version=raft_jax.__version__,
    documents=found,
    unusable=unusable,
    settings=settings.model_dump(mode="json"),
    dtype=run.model.dtype,
    chat_template=run.model.chat_template,
    prompts=[judging.template(name).template for name in ("write", "verify")],
    models=sorted(engines.identity(source) for source in models),
  )


# What is written


def summarise(
  read: int,
  extracted: Extracted,
  dropped: Iterable[qa_pairs.Dropped],
  calls: calls_lib.Calls,
) -> dict[str, Any]:
  """The content of summary.json: what there was, what was kept, why not the rest."""
  reasons: dict[str, collections.Counter[str]] = collections.defaultdict(
    collections.Counter
  )
  for row in dropped:
    reasons[row["what"]][row["reason"]] += 1
  counts = {name: len(rows) for name, rows in extracted.splits.items()}
  return {
    "documents": read,
    **extracted.made,
    "kept": sum(counts.values()),
    "splits": counts,
    "documents_by_split": {
      name: len({pair.chunk.document.id for pair in rows})
      for name, rows in extracted.splits.items()
    },
    "dropped": {
      f"{what}s": dict(reasons[what].most_common())
      for what in ("document", "chunk", "pair")
    },
    "judges": extracted.votes,
    **calls.costs(),
  }


def row_of(pair: qa_pairs.Pair) -> dict[str, Any]:
  """A pair as `question_files.read_questions` takes it, with where it came from."""
  said = {"question": pair.question, "answer": pair.answer}
  start, length = pair.chunk.start, len(pair.chunk.text)
  document, domain = pair.chunk.document.id, pair.chunk.document.domain
  return {
    "id": journal.content_key(document=document, **said)[:16],
    **({"domain": domain} if domain else {}),
    **said,
    "source": {**pair.chunk.place(), "start": start, "end": start + length},
  }


def _write(
  folder: pathlib.Path,
  extracted: Extracted,
  dropped: Sequence[qa_pairs.Dropped],
  summary: Mapping[str, Any],
  inputs: str,
) -> None:
  """Writes the splits, and seals them if there is anything in them."""
  rows = {
    name: [row_of(pair) for pair in kept] for name, kept in extracted.splits.items()
  }
  seal = {"inputs": inputs, "kept": summary["splits"]} if summary["kept"] else None
  sealed_folder.write(folder, {**rows, "dropped": dropped}, summary, seal)


def show(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Prints the summary as a table, and what is worth a second look."""
  table = rich.table.Table(title="extraction", show_header=False)
  for name in ("documents", "chunks", "pairs", "kept"):
    table.add_row(name, f"{summary[name]:,}")
  parts = {
    "splits": summary["splits"],
    **{f"{what} dropped": why for what, why in summary["dropped"].items()},
    **{f"judge {i}": votes for i, votes in enumerate(summary["judges"], start=1)},
    "seconds": summary["seconds"],
    "tokens": summary["tokens"],
  }
  for name, counts in parts.items():
    table.add_row(name, progress.amounts(counts) or "none")
  rich.console.Console().print(table)
  empty = [name for name, count in summary["splits"].items() if not count]
  if empty and summary["kept"]:
    print(f"no pair in {', '.join(empty)}: these shares want more documents")
  print(f"written to {folder}; the reason for everything dropped is in dropped.jsonl")


def _refuse_nothing(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  if summary["kept"]:
    return
  counts = collections.Counter(
    {
      f"{what} {reason}": count
      for what, reasons in summary["dropped"].items()
      for reason, count in reasons.items()
    }
  )
  often = ", ".join(f"{count} {name}" for name, count in counts.most_common(3))
  raise errors.UserError(
    f"extract: no pair was kept ({often}); see {folder / 'dropped.jsonl'}, and change "
    "the documents, the writer or the judges"
  )


def main() -> None:
  cli.run(
    "extract",
    fit,
    "Write, judge and split question/answer pairs from documents.",
    without_data=True,
  )


if __name__ == "__main__":
  main()
