"""Files of questions are read strictly, and each bad row is named."""

import functools
import json
import pathlib

import pyarrow
import pytest
from pyarrow import parquet

from raft_jax.storage import question_files, records
from tests.helpers import refusals

refused = functools.partial(refusals.refusal, question_files.read_questions)

GOOD = b'{"id": "a", "question": "What is a writ?", "answer": "An order."}'


def write(folder: pathlib.Path, *lines: bytes, name: str = "q.jsonl") -> pathlib.Path:
  path = folder / name
  path.write_bytes(b"\n".join(lines))
  return path


def test_reads_both_forms_in_order(tmp_path):
  path = write(
    tmp_path,
    GOOD,
    b'{"id": 7, "domain": "law", "source": "x", "tags": [1], "answer": "Yes.",'
    b' "messages": [{"role": "system", "content": "Be brief."},'
    b' {"role": "user", "content": "Is it?"}]}',
  )
  assert question_files.read_questions(path) == [
    records.Question(
      "a", "", (records.Message("user", "What is a writ?"),), "An order."
    ),
    records.Question(
      "7",
      "law",
      (records.Message("system", "Be brief."), records.Message("user", "Is it?")),
      "Yes.",
    ),
  ]


def test_reads_the_committed_questions(law):
  rows = [json.loads(line) for line in (law / "train.jsonl").open()]
  questions = question_files.read_questions(law / "train.jsonl")
  assert [q.id for q in questions] == [row["id"] for row in rows]
  assert [q.messages[-1].content for q in questions] == [r["question"] for r in rows]


def test_bom_crlf_blank_lines_and_missing_final_newline(tmp_path):
  path = tmp_path / "q.jsonl"
  second = GOOD.replace(b'"a"', b'"b"')
  path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \r\n" + second)
  assert [q.id for q in question_files.read_questions(path)] == ["a", "b"]


@pytest.mark.parametrize(
  "text",
  [
    "a\x00b",
    "שלום \u202eabc",
    "zero\u200bwidth",
    "e\u0301 \u00e9",
    " \n padded \t",
    "🙂",
  ],
)
def test_text_round_trips_byte_exact(tmp_path, text):
  line = json.dumps({"id": "a", "question": text, "answer": text}).encode()
  (question,) = question_files.read_questions(write(tmp_path, line))
  assert question.answer == text
  assert question.messages[0].content == text


def row(**values) -> bytes:
  whole = {"id": "b", "question": "Why?", "answer": "So."} | values
  return json.dumps({k: v for k, v in whole.items() if v is not ...}).encode()


def turns(*turns: object) -> bytes:
  return row(question=..., messages=list(turns))


USER = {"role": "user", "content": "Why?"}

# (bad line, what its message must say)
BAD_ROWS = {
  "torn json": (b'{"id": "b", "question": ', "not valid JSON: Expecting value"),
  "not an object": (b'["a"]', "is a JSON list, not an object"),
  "nan": (b'{"question": NaN, "answer": "x"}', "NaN is not a JSON number"),
  "deep": (b"[" * 100_000, "not valid JSON"),
  "twice": (b'{"answer": "x", "answer": "y"}', "has the key 'answer' twice"),
  "bad utf-8": (b'{"question": "\xff", "answer": "x"}', "is not UTF-8 (byte 15"),
  "no question": (row(question=...), "has no `question` (or `messages`)"),
  "no answer": (row(answer=...), "has no `answer`"),
  "misspelt": (row(answer=..., anwser="x"), "has no `answer`; rename 'anwser'"),
  "null answer": (row(answer=None), "has no `answer`"),
  "both": (row(messages=[USER]), "has both `question` and `messages`"),
  "empty question": (row(question=""), "`question` is empty"),
  "blank answer": (row(answer=" \t\n\u00a0"), "`answer` is empty"),
  "zero width answer": (row(answer="\u200b\ufeff"), "`answer` is empty"),
  "number answer": (row(answer=3), "`answer` is int, not text"),
  "list question": (row(question=["x"]), "`question` is list, not text"),
  "bool id": (row(id=True), "`id` is bool, not text"),
  "surrogate": (b'{"question": "\\ud83d", "answer": "x"}', "surrogate"),
  "surrogate key": (b'{"question": "x", "answe\\ud800": "x"}', "has no `answer`"),
  "no turns": (turns(), "`messages` is not a non-empty list"),
  "turn is text": (turns("x"), "`messages[0]` is not an object"),
  "unknown role": (
    turns({"role": "human", "content": "x"}),
    "`messages[0].role` is 'human', not one of system, user, assistant",
  ),
  "empty turn": (turns({**USER, "content": ""}), "`messages[0].content` is empty"),
  "no content": (turns({"role": "user"}), "`messages[0].content` is NoneType"),
  "late system": (
    turns(USER, {"role": "system", "content": "x"}),
    "`messages[1]` is a system turn; only the first",
  ),
  "ends with assistant": (
    turns(USER, {"role": "assistant", "content": "So."}),
    "does not end with a user turn; the reply is `answer`",
  ),
  "tool call": (turns({**USER, "tool_calls": [1]}), "`messages[0]` has 'tool_calls'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_rejected_with_line_and_reason(tmp_path, name):
  line, says = BAD_ROWS[name]
  path = write(tmp_path, GOOD, b"", line)
  message = refused(path, rejects_path=tmp_path / "out/rejects.jsonl")
  assert message.startswith(f"{path}:3: ")
  assert says in message
  assert "1 of 2 rows" in message
  assert "data.reject_threshold" in message
  (reject,) = map(json.loads, (tmp_path / "out/rejects.jsonl").open())
  assert reject["line"] == 3
  assert says in reject["reason"]
  assert reject["text"] == line.decode("utf-8", "replace").strip()[:500]
  # Below the threshold the same row is only set aside.
  kept = question_files.read_questions(path, reject_threshold=0.5)
  assert [q.id for q in kept] == ["a"]


def test_threshold_is_a_share_and_inclusive(tmp_path):
  lines = [GOOD.replace(b'"a"', b'"%d"' % i) for i in range(99)]
  path = write(tmp_path, *lines, b"{")
  assert len(question_files.read_questions(path, reject_threshold=0.01)) == 99
  assert ":100: " in refused(path, reject_threshold=0.0099)


def test_old_rejects_file_is_removed(tmp_path):
  rejects = tmp_path / "rejects.jsonl"
  rejects.write_text("old")
  question_files.read_questions(write(tmp_path, GOOD), rejects_path=rejects)
  assert not rejects.exists()


def test_no_usable_row_is_refused_at_any_threshold(tmp_path):
  assert "1 of 1 rows" in refused(write(tmp_path, b"{"), reject_threshold=1.0)


def test_missing_empty_and_foreign_files(tmp_path):
  assert "no such file" in refused(tmp_path / "none.jsonl")
  assert "is a folder" in refused(tmp_path)
  assert "holds no rows" in refused(write(tmp_path, b"", b"\r"))
  assert "holds no rows" in refused(write(tmp_path, b"\xef\xbb\xbf"))
  assert "'.txt'" in refused(write(tmp_path, GOOD, name="q.txt"))
  utf16 = write(tmp_path, GOOD.decode().encode("utf-16"))
  assert f"{utf16}:1: is UTF-16; save the file as UTF-8" in refused(utf16)
  bad = write(tmp_path, b"PAR1 but not really", name="q.parquet")
  assert f"{bad}: not a readable Parquet file" in refused(bad)


def test_duplicate_ids_name_the_first_five(tmp_path):
  lines = [GOOD] + [GOOD.replace(b"order", b"%d" % i) for i in range(7)]
  message = refused(write(tmp_path, *lines))
  assert (
    "q.jsonl:2: duplicate id: 'a' on line 2 has the id of line 1, 'a' on line 3 has"
    in message
  )
  assert "line 6 has the id of line 1 and 2 more; give every row its own id" in message


def test_missing_ids_come_from_content(tmp_path):
  bare = [b'{"question": "Q1", "answer": "A"}', b'{"question": "Q2", "answer": "A"}']
  forward = question_files.read_questions(write(tmp_path, *bare))
  backward = question_files.read_questions(write(tmp_path, *bare[::-1], name="r.jsonl"))
  assert [q.id for q in forward] == [q.id for q in backward][::-1]
  assert len({q.id for q in forward}) == 2
  assert "duplicate id" in refused(write(tmp_path, *bare, bare[0]))


def test_limit_stops_reading(tmp_path):
  lines = [GOOD.replace(b'"a"', b'"%d"' % i) for i in range(3)]
  path = write(tmp_path, *lines, b"{ never read")
  assert len(question_files.read_questions(path, limit=3)) == 3


def test_parquet_reads_like_jsonl(tmp_path, law):
  rows = [json.loads(line) for line in (law / "test.jsonl").open()]
  rows[0] = dict.fromkeys(rows[0]) | {"answer": "x", "messages": [USER]}
  path = tmp_path / "q.parquet"
  parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
  lines = [json.dumps(r).encode() for r in rows]
  jsonl = write(tmp_path, *lines)
  assert question_files.read_questions(path) == question_files.read_questions(jsonl)
  rows[20]["answer"] = " "
  parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
  assert f"{path}:21: row {rows[20]['id']!r}: `answer` is empty" in refused(path)


def test_parquet_with_two_columns_of_a_name(tmp_path):
  path = tmp_path / "q.parquet"
  columns = [pyarrow.array([word]) for word in ("a?", "b?", "c")]
  table = pyarrow.Table.from_arrays(columns, ["question", "question", "answer"])
  parquet.write_table(table, path)
  assert f"{path}: two columns are named 'question'" in refused(path)


def test_parquet_rows_are_counted_across_its_batches(tmp_path):
  # pyarrow hands out 65,536 rows at a time.
  answers = ["a"] * 70_000
  answers[69_999] = ""
  table = pyarrow.table({"question": ["q"] * 70_000, "answer": answers})
  parquet.write_table(table, tmp_path / "q.parquet")
  assert "q.parquet:70000: `answer`" in refused(
    tmp_path / "q.parquet", reject_threshold=0
  )


def test_parquet_with_bad_utf8(tmp_path):
  answers = pyarrow.array([b"fine", b"\xff"]).cast(pyarrow.string(), safe=False)
  table = pyarrow.table({"question": ["a", "b"], "answer": answers})
  parquet.write_table(table, tmp_path / "q.parquet")
  assert "q.parquet:2: is not UTF-8" in refused(tmp_path / "q.parquet")
