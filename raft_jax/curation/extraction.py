"""The method of stage 0: question/answer pairs from documents.

Documents are cut at sentence ends, a language model writes pairs about each chunk,
several judge them, near duplicates are dropped, and the rest is split by document.
Calls go through `calls.Calls`: what the journal holds is not requested again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from raft_jax.config import schema
from raft_jax.curation import documents, qa_pairs
from raft_jax.generation import calls as calls_lib
from raft_jax.runtime import progress
from raft_jax.storage import journal

SPLITS = ("train", "validation", "test")


class Extracted(NamedTuple):
  """The pairs of each split, and everything that was dropped.

  Attributes:
    made: how many chunks and pairs there were, dropped or not.
    votes: how each judge voted.
  """

  splits: dict[str, list[qa_pairs.Pair]]
  dropped: list[qa_pairs.Dropped]
  made: dict[str, int]
  votes: list[dict[str, int]]


def extract(
  texts: Sequence[documents.Document],
  *,
  writer: calls_lib.Role,
  judges: Sequence[calls_lib.Role],
  count_tokens: Callable[[str], int],
  settings: schema.Extract,
  calls: calls_lib.Calls,
) -> Extracted:
  """Writes pairs about documents; each document, chunk and pair is kept or dropped."""
  threshold = settings.near_duplicate
  kept, repeated_documents = qa_pairs.drop_repeats(
    texts, lambda document: document.text, threshold
  )
  chunks, short = cut(kept, count_tokens, settings)
  passages, repeated_chunks = qa_pairs.drop_repeats(
    chunks, lambda chunk: chunk.text, threshold
  )
  written, unwritten = qa_pairs.write(passages, settings.pairs_per_chunk, writer, calls)
  usable, flawed = qa_pairs.drop_flawed(written)
  approved, disapproved, votes = qa_pairs.verify(usable, judges, calls)
  pairs, repeated_pairs = qa_pairs.drop_repeats(
    approved, _text, threshold, key=lambda pair: pair.question
  )
  splits: dict[str, list[qa_pairs.Pair]] = {name: [] for name in SPLITS}
  shares = settings.shares.model_dump()
  for pair in pairs:
    splits[split_of(pair.chunk.document.id, shares, settings.seed)].append(pair)
  malformed = [row for row in unwritten if row["what"] == "pair"]
  return Extracted(
    splits=splits,
    dropped=[
      *repeated_documents,
      *short,
      *repeated_chunks,
      *unwritten,
      *flawed,
      *disapproved,
      *repeated_pairs,
    ],
    made={
      "chunks": len(chunks) + len(short),
      "pairs": len(written) + len(malformed),
    },
    votes=votes,
  )


def split_of(document_id: str, shares: Mapping[str, float], seed: int) -> str:
  """The split of a document, which depends on its id, the shares and the seed alone.

  Adding or removing documents therefore moves no other document.
  """
  digest = hashlib.sha256(journal.canonical([seed, document_id]).encode()).digest()
  point = int.from_bytes(digest[:8]) / 2**64
  cumulative = 0.0
  for name, share in shares.items():
    cumulative += share
    if point < cumulative:
      return name
  return max(shares, key=lambda name: shares[name])  # the shares sum to just below 1


def cut(
  texts: Sequence[documents.Document],
  count_tokens: Callable[[str], int],
  settings: schema.Extract,
) -> tuple[list[documents.Chunk], list[qa_pairs.Dropped]]:
  """Cuts every document into chunks, and drops those that are too short for a pair."""
  kept, dropped = [], []
  for document in progress.with_bar(texts, "cut", unit="document"):
    for chunk in documents.cut(document, settings.chunk_tokens, count_tokens):
      tokens = count_tokens(chunk.text.strip())
      if tokens < settings.min_chunk_tokens:
        dropped.append(qa_pairs.drop(chunk, "too_short", tokens=tokens))
      else:
        kept.append(chunk)
  return kept, dropped


def _text(pair: qa_pairs.Pair) -> str:
  return f"{pair.question}\n{pair.answer}"
