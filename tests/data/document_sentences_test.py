"""Sentences of documents as rows, by hand."""

import numpy as np
import pytest

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import document_sentences
from raft_jax.hf import chat


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("One two. Three?", ["One two.", " Three?"]),
    ('He said "Go." Then\nleft!  ', ['He said "Go."', " Then\nleft!  "]),
    ("# Title\n\nFirst 3.5 m. Last", ["# Title", "\n\nFirst 3.5 m.", " Last"]),
    ("一。二！三", ["一。", "二！", "三"]),
    (" \n ", []),
  ],
)
def test_sentences_end_at_marks_and_empty_lines(text, expected):
  assert document_sentences.split(text) == expected


def test_the_last_sentence_and_others_are_chosen():
  rng = np.random.default_rng(0)
  draws = {tuple(document_sentences.choose(9, 5, rng)) for _ in range(20)}
  assert len(draws) > 1
  for drawn in draws:
    assert len(set(drawn)) == 5
    assert drawn[-1] == 8
    assert min(drawn) > 0
  assert document_sentences.choose(4, 5, rng) == [1, 2, 3]
  assert document_sentences.choose(2, 5, rng) == [1]
  assert document_sentences.choose(1, 5, rng) == []


def test_the_teacher_reads_what_stands_before(smollm):
  tokenizer = chat.load(smollm)
  sentences = ["The law is old.", " It is good.", " ."]
  one, two, three = (chat.encode(tokenizer, sentence) for sentence in sentences)
  assert len(three) == 1  # nothing to predict
  (row,) = document_sentences.encode(sentences, [1, 2], tokenizer, first_id=7)
  assert row.prompt == (two[0],)
  assert row.answer == tuple(two[1:])
  assert row.teacher == (*one, two[0])
  assert row.row_id == 7


def test_documents_are_read_cut_and_held_to_the_budgets(smollm, tmp_path):
  (tmp_path / "a.txt").write_text("Law is old. It is good. " * 30)
  (tmp_path / "b.txt").write_text("One sentence alone.")
  (tmp_path / "c.pdf").write_bytes(b"%PDF")
  tokenizer = chat.load(smollm)
  extract = schema.Extract(documents=str(tmp_path), chunk_tokens=32)
  data = schema.Data(questions="unread.jsonl")

  def load(seed=0, **budgets):
    return document_sentences.load(
      schema.Sentences(splits=2, seed=seed),
      extract,
      data.model_copy(update=budgets),
      tokenizer,
    )

  rows, set_aside = load()
  assert [reject.place.id for reject in set_aside] == ["c.pdf"]
  assert len(rows) >= 10
  assert max(len(row.teacher) for row in rows) <= 32
  assert [row.row_id for row in rows] == list(range(len(rows)))
  assert load() == (rows, set_aside)
  assert load(seed=1)[0] != rows
  limit = min(len(row.teacher) for row in rows)
  with pytest.raises(errors.UserError, match=r"a\.txt.*data\.max_teacher_tokens"):
    load(max_teacher_tokens=limit)
  fewer, more_aside = load(max_teacher_tokens=limit, too_long="skip")
  assert len(fewer) + len(more_aside) == len(rows) + 1
