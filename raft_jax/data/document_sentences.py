"""Sentences of documents as token rows: the teacher reads what stands before (DiSC).

DiSC, arXiv 2602.16093. The student reads a sentence alone, and learns to predict it as
the base model does that has read the document up to there. There are no questions and
no answers. The first token of a sentence is not predicted, so it is the row's prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from raft_jax.config import schema
from raft_jax.curation import documents
from raft_jax.data import token_rows
from raft_jax.hf import chat
from raft_jax.runtime import interrupts
from raft_jax.storage import rejects as rejects_lib

SENTENCE_END = re.compile(
  r"""(?<=[.!?…])(?=\s)|(?<=[.!?…]["'”’)\]])(?=\s)|(?<=[。！？])|(?=\n\s*\n)"""
)


def split(text: str) -> list[str]:
  """The sentences of a text, each with the space before it; joined, they are the text.

  A sentence ends after a full stop, question or exclamation mark that a space follows,
  and before an empty line. An abbreviation is taken for an end. Space at the end of the
  text belongs to its last sentence.
  """
  sentences: list[str] = []
  before = ""
  for piece in SENTENCE_END.split(text):
    before += piece
    if piece.strip():
      sentences.append(before)
      before = ""
  if sentences:
    sentences[-1] += before
  return sentences


def choose(count: int, splits: int, rng: np.random.Generator) -> list[int]:
  """The numbers of the sentences to learn, ascending: the last one, and others drawn.

  Args:
    count: of all sentences; the first has nothing before it and is never chosen.
    splits: the most sentences to choose.
  """
  if count < 2:
    return []
  others = np.arange(1, count - 1)
  drawn = rng.choice(others, min(splits - 1, len(others)), replace=False)
  return sorted([*drawn.tolist(), count - 1])


def encode(
  sentences: Sequence[str],
  chosen: Sequence[int],
  tokenizer: chat.ChatTokenizer,
  first_id: int,
) -> list[token_rows.Row]:
  """A row for each chosen sentence that has two tokens or more.

  The student's prompt is the sentence's first token, the teacher's context is all that
  stands before it and that token. Both begin with the tokens that the tokenizer puts
  before a text. Each sentence is encoded alone, so that both read the same tokens.

  Args:
    first_id: id of the first row.
  """
  ids = [chat.encode(tokenizer, sentence) for sentence in sentences]
  probe = chat.encode(tokenizer, "a")
  whole = chat.document_ids(tokenizer, "a")
  start = whole[: whole.index(probe[0])]
  rows: list[token_rows.Row] = []
  for number in chosen:
    if len(ids[number]) < 2:
      continue
    first, *rest = ids[number]
    before = [token for earlier in ids[:number] for token in earlier]
    rows.append(
      token_rows.Row(
        prompt=(*start, first),
        answer=tuple(rest),
        teacher=(*start, *before, first),
        row_id=first_id + len(rows),
      )
    )
  return rows


def load(
  settings: schema.Sentences,
  extract: schema.Extract,
  data: schema.Data,
  tokenizer: chat.ChatTokenizer,
) -> tuple[list[token_rows.Row], list[rejects_lib.Reject]]:
  """The rows of the documents that `extract` names, and what was set aside.

  A chunk of a document (`extract.chunk_tokens`) counts as a document.

  Raises:
    errors.UserError: there are no such documents, too many are unusable, or a row is
      over a budget of `data`.
  """
  texts, unusable = documents.read(
    extract.documents, text_field=extract.text_field, domain=extract.domain
  )
  documents.check(
    extract.documents, len(texts), unusable, data.reject_threshold, data.unusable
  )
  set_aside = [
    rejects_lib.Reject(rejects_lib.Place(row["document"]), row["detail"], row["reason"])
    for row in unusable
  ]
  rows: list[token_rows.Row] = []
  places: list[rejects_lib.Place] = []
  for number, text in enumerate(texts):
    interrupts.check()
    rng = np.random.default_rng([settings.seed, number])
    for chunk in documents.cut(
      text, extract.chunk_tokens, lambda part: len(chat.encode(tokenizer, part))
    ):
      sentences = split(chunk.text)
      chosen = choose(len(sentences), settings.splits, rng)
      made = encode(sentences, chosen, tokenizer, first_id=len(rows))
      rows += made
      places += [rejects_lib.Place(text.id)] * len(made)
  limits = token_rows.budgets(data)
  fitting = [row for row in rows if token_rows.fits(row, limits)]
  over = [row for row in rows if not token_rows.fits(row, limits)]
  kept, too_long = token_rows.choose(
    token_rows.Tokenised(fitting, over, {}), data, places
  )
  return kept, [*set_aside, *too_long]
