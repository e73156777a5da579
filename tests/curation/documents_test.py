"""Documents: read strictly, and cut at sentence ends."""

import gzip
import json
import re

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pytest
from pyarrow import parquet

from raft_jax import errors
from raft_jax.curation import documents


def _words(text):
  return len(text.split())


# Cutting


PIECES = st.sampled_from(
  [
    *("a", "Bc", ".", "! ", "? ", " ", "\n", "\n\n", "\r\n", "é", "😀", "。", "\u2028"),
    *("# ", "- ", "```\n", "|", "Dr. ", "👩\u200d👩\u200d👧", "\u0301", '"', ")", "\0"),
  ]
)


@hypothesis.given(
  st.lists(PIECES, max_size=60).map("".join), st.integers(4, 40), st.booleans()
)
@hypothesis.settings(deadline=None)
def test_chunks_hold_the_document_and_no_more_than_they_may(text, most, markdown):
  chunks = documents.cut(
    documents.Document("d", "", text, markdown), most, lambda t: len(t.encode())
  )
  assert "".join(chunk.text for chunk in chunks) == text
  assert all(len(chunk.text.encode()) <= most for chunk in chunks)
  assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
  for chunk in chunks:
    assert text[chunk.start :].startswith(chunk.text)


@hypothesis.given(
  st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(9, 25)
)
@hypothesis.settings(deadline=None)
def test_chunks_end_where_sentences_end_and_are_as_long_as_may_be(lengths, most):
  sentences = [" ".join(["Word"] + ["word"] * (n - 1)) + "." for n in lengths]
  # Greedy, by hand: a chunk takes sentences while they fit.
  expected, used = [[]], 0
  for sentence, length in zip(sentences, lengths, strict=True):
    if used + length > most:
      expected.append([])
      used = 0
    expected[-1].append(sentence)
    used += length
  document = documents.Document("d", "", " ".join(sentences))
  chunks = documents.cut(document, most, _words)
  assert [c.text.strip() for c in chunks] == [" ".join(part) for part in expected]


def test_a_markdown_heading_begins_a_chunk():
  text = "# One\n\nFirst of all. Second of all.\n\n# Two\n\nThird of all.\n"
  (one, two) = documents.cut(documents.Document("d", "", text, True), 12, _words)
  assert two.text.startswith("# Two")
  assert one.text.startswith("# One")


# Reading


def _lines(*rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_every_kind_of_document_is_read_in_order(tmp_path):
  (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfA tort.\r\nA wrong.\rEnd.\n")
  (tmp_path / "a.MD").write_text("# Law")
  (tmp_path / "rows.jsonl").write_bytes(
    b"\xef\xbb\xbf" + _lines({"id": 7, "text": "seven"}, {"text": "é\r\n"})
  )
  (tmp_path / "sub").mkdir()
  table = pyarrow.table({"text": ["p"], "domain": ["trade"], "other": [1]})
  parquet.write_table(table, tmp_path / "sub/t.parquet")
  (tmp_path / "sub/u.csv").write_text('id,text\n8,"a, b"\n')
  with gzip.open(tmp_path / "sub/v.json.gz", "wt") as file:
    json.dump([{"id": "nine", "text": "9"}], file)
  (tmp_path / ".git").mkdir()
  (tmp_path / ".git/config.txt").write_text("hidden")
  (tmp_path / "picture.png").write_bytes(b"\x89PNG")
  parsed, unusable = documents.read(str(tmp_path), domain="law")
  # printf 'é\n' | sha256sum | cut -c1-16, and the same of p
  assert parsed == [
    documents.Document("a.MD", "law", "# Law", True),
    documents.Document("b.txt", "law", "A tort.\nA wrong.\nEnd.\n"),
    documents.Document("7", "law", "seven"),
    documents.Document("edd3a863872a0423", "law", "é\n"),
    documents.Document("148de9c5a7a44d19", "trade", "p"),
    documents.Document("8", "law", "a, b"),
    documents.Document("nine", "law", "9"),
  ]
  assert [(row["document"], row["reason"]) for row in unusable] == [
    ("picture.png", "file_type")
  ]


@pytest.mark.parametrize(
  ("name", "content", "reason", "detail"),
  [
    ("x.txt", b"\xff\xfea\0", "encoding", "is UTF-16"),
    ("x.txt", b"caf\xe9 is latin-1", "encoding", r"is not UTF-8 \(byte 4\)"),
    ("x.md", b"a\0b", "binary", "NUL"),
    ("x.txt", b" \n", "empty", "is empty"),
    ("x.pdf", b"%PDF", "file_type", "none of .txt"),
    ("x.jsonl", b"{\n", "bad_row", "is not valid JSON"),
    ("x.jsonl", b'{"body": "b"}', "bad_row", "has no `text`; see extract.text_field"),
    ("x.jsonl", b'{"text": 3}', "bad_row", "`text` is int, not text"),
    ("x.jsonl", b'{"text": "\\ud800"}', "bad_row", "surrogate"),
    ("x.jsonl", b'{"text": " "}', "bad_row", "`text` is empty"),
    ("x.jsonl", b'["text"]', "bad_row", "is a JSON list"),
    ("x.jsonl", b'{"text": "\xff"}', "bad_row", "is not UTF-8"),
    ("x.jsonl", b"\xff\xfe{", "unreadable", "is UTF-16"),
    ("x.parquet", b"PAR1", "unreadable", "not a readable Parquet"),
    ("x.csv", b"title\nx\n", "bad_row", "has no `text`; see extract.text_field"),
    ("x.jsonl.gz", b"\x1f\x8b", "unreadable", "x.jsonl.gz"),
  ],
)
def test_what_is_no_document_is_listed_with_its_reason(
  tmp_path, name, content, reason, detail
):
  (tmp_path / name).write_bytes(content)
  (tmp_path / "good.txt").write_text("A tort is a civil wrong.")
  parsed, (row,) = documents.read(str(tmp_path))
  assert [document.id for document in parsed] == ["good.txt"]
  assert (row["what"], row["reason"]) == ("document", reason)
  assert re.search(detail, row["detail"])
  assert row["document"].split(":")[0] == name


def test_a_row_may_stand_twice_but_an_id_may_not_stand_for_two_texts(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(_lines({"text": "one"}, {"text": "one"}, {"id": "x", "text": "y"}))
  parsed, (row,) = documents.read(str(path))
  assert len(parsed) == 2
  assert (row["reason"], row["document"]) == ("duplicate", "rows.jsonl:2")
  path.write_bytes(_lines({"id": "x", "text": "one"}, {"id": "x", "text": "two"}))
  with pytest.raises(errors.UserError, match=r"'x' stands .* rows.jsonl:1 and .*:2"):
    documents.read(str(path))
