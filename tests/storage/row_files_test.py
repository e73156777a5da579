"""Every kind of file gives the same questions, and each broken one says what to do."""

import csv
import functools
import gzip
import io
import json
import random

import pyarrow
import pytest
from pyarrow import parquet

from raft_jax.storage import delimited, question_files, row_files, row_layout
from tests.helpers import refusals

refused = functools.partial(refusals.refusal, question_files.read)

ROWS = [
  {"id": "1", "question": "Why?", "answer": "So."},
  {"id": "2", "question": "A, b\tand c?", "answer": 'He said "no".'},
  {"id": "3", "question": "Two\nlines?", "answer": "CR\r\nLF, \u2028 and ünïcödé 🙂"},
  {"id": "007", "question": " padded ", "answer": "3.50"},
]


def csv_text(rows, delimiter=",", **options) -> str:
  """As Python's own writer has it, with CRLF line ends."""
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, [*rows[0]], delimiter=delimiter, **options)
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def parquet_bytes(rows) -> bytes:
  sink = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
  return sink.getvalue()


WRITERS = {
  ".jsonl": lambda rows: "".join(json.dumps(r) + "\n" for r in rows).encode(),
  ".json": lambda rows: json.dumps(rows).encode(),
  ".JSON": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
  ".csv": lambda rows: csv_text(rows).encode(),
  ".Csv": lambda rows: csv_text(rows, quoting=csv.QUOTE_ALL).encode("utf-8-sig"),
  ".tsv": lambda rows: csv_text(rows, "\t", lineterminator="\n").encode(),
  ".parquet": parquet_bytes,
}


def zstd(data: bytes) -> bytes:
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(data)
  return sink.getvalue().to_pybytes()


PACKERS = {"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".zst": zstd}
PACKED = [
  (suffix, packer)
  for suffix in WRITERS
  for packer in PACKERS
  if suffix != ".parquet" or not packer
]


@pytest.mark.parametrize(("suffix", "packer"), PACKED)
def test_every_file_and_compression_gives_the_same_questions(tmp_path, suffix, packer):
  first = tmp_path / "first.jsonl"
  first.write_bytes(WRITERS[".jsonl"](ROWS))
  path = tmp_path / f"q{suffix}{packer}"
  path.write_bytes(PACKERS[packer](WRITERS[suffix](ROWS)))
  assert question_files.read_questions(path) == question_files.read_questions(first)


@pytest.mark.parametrize(("suffix", "packer"), PACKED)
def test_ids_from_content_are_the_same_everywhere(tmp_path, suffix, packer):
  bare = [{k: v for k, v in row.items() if k != "id"} for row in ROWS]
  path = tmp_path / f"q{suffix}{packer}"
  path.write_bytes(PACKERS[packer](WRITERS[suffix](bare)))
  lines = tmp_path / "first.jsonl"
  lines.write_bytes(WRITERS[".jsonl"](bare))
  ids = [q.id for q in question_files.read_questions(path)]
  assert ids == [q.id for q in question_files.read_questions(lines)]
  assert len({*ids}) == len(bare)


def test_two_members_of_an_archive_are_one_file(tmp_path):
  halves = [WRITERS[".jsonl"](part) for part in (ROWS[:2], ROWS[2:])]
  for suffix, pack in PACKERS.items():
    if suffix:
      path = tmp_path / f"q.jsonl{suffix}"
      path.write_bytes(b"".join(map(pack, halves)))
      ids = [q.id for q in question_files.read_questions(path)]
      assert ids == [row["id"] for row in ROWS]


@pytest.mark.parametrize("seed", range(20))
def test_csv_is_what_pythons_writer_wrote(seed):
  dice = random.Random(seed)
  words = ['"', '""', ",", "\t", "\n", "\r\n", "a", " ", "é", "\u2028", ""]
  rows = [
    ["".join(dice.choices(words, k=dice.randint(1, 6))) + "." for _ in range(3)]
    for _ in range(30)
  ]
  for delimiter in ",\t":
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    lines = enumerate(io.BytesIO(text.getvalue().encode()), 1)
    found = list(delimited.records(lines, delimiter))
    assert [record.fields for record in found] == rows
    assert {record.fault for record in found} == {None}
    ends = [0]
    for row in rows:
      ends.append(ends[-1] + 1 + sum(field.count("\n") for field in row))
    assert [record.line for record in found] == [end + 1 for end in ends[:-1]]


def test_a_csv_row_is_named_by_the_line_where_it_begins(tmp_path):
  path = tmp_path / "q.csv"
  path.write_bytes(b'question,answer\n"a\nb\nc",x\n\nd,\n')
  read = question_files.read(path, unusable="skip")
  assert [place.line for place in read.places.values()] == [2]
  (reject,) = read.rejects
  assert (reject.place.line, reject.reason) == (6, "has no `answer`")


def test_cells_of_csv_are_text_whatever_they_look_like(tmp_path):
  path = tmp_path / "q.csv"
  path.write_text("id,question,answer\n007,1e3,3.50\n8,true,null\n")
  found = question_files.read_questions(path)
  assert [(q.id, q.messages[0].content, q.answer) for q in found] == [
    ("007", "1e3", "3.50"),
    ("8", "true", "null"),
  ]


def test_quotes_inside_a_tsv_field_are_text(tmp_path):
  path = tmp_path / "q.tsv"
  path.write_text('question\tanswer\nHow long?\ta 5" pipe\n')
  assert question_files.read_questions(path)[0].answer == 'a 5" pipe'


def test_an_unnamed_index_column_is_ignored(tmp_path):
  path = tmp_path / "q.csv"
  path.write_text(",question,answer,\n0,Why?,So.,\n")
  assert question_files.read_questions(path)[0].answer == "So."


HEAD = b"question,answer\n"
LONG = b'question,answer\na,"' + b"x" * 3_000_000 + b"\n"

# name -> (file name, bytes, what the message says)
BROKEN = {
  "semicolons": (
    "q.csv",
    b"question;answer\na;b\n",
    "q.csv:1: its columns are separat",
  ),
  "tabs": (
    "q.csv",
    b"question\tanswer\na\tb\n",
    "by tabs, not by commas; name it .tsv",
  ),
  "bars": ("q.csv", b"question|answer\na|b\n", "separated by bars, not by commas"),
  "commas": (
    "q.tsv",
    b"question,answer\na,b\n",
    "by commas, not by tabs; name it .csv",
  ),
  "no header": (
    "q.csv",
    b"What is a writ?,An order.\nWhy?,So.\n",
    "q.csv:1: the first line must name the columns, and its names ('What is a writ?', "
    "'An order.') fit no format",
  ),
  "stray quote": (
    "q.csv",
    HEAD + b'What?,An "order" of it\n',
    "q.csv:2: has a stray quote in field 2; quote the whole field",
  ),
  "text after a quote": (
    "q.csv",
    HEAD + b'a,b\n"Why" not?,So.\n',
    "q.csv:3: field 1 begins with a quote, and ' not?,So.' follows the closing one",
  ),
  "open quote": (
    "q.csv",
    HEAD + b'a,b\nc,"d\ne,f\n',
    "q.csv:3: a quote is opened here",
  ),
  "open quote, huge": ("q.csv", LONG, "q.csv:2: a quote is opened here and never clos"),
  "too many fields": (
    "q.csv",
    HEAD + b"Why, then?,So.\n",
    "q.csv:2: has 3 fields, and the first line names 2",
  ),
  "too few fields": ("q.csv", HEAD + b"Why?\n", "q.csv:2: has 1 fields, and the first"),
  "header twice": (
    "q.csv",
    b"question,question,answer\na,b,c\n",
    "q.csv:1: two columns are named 'question'",
  ),
  "utf-16 csv": ("q.csv", "question,answer\n".encode("utf-16"), "q.csv:1: is UTF-16"),
  "utf-16 without mark": (
    "q.csv",
    "question,answer\n".encode("utf-16-le"),
    "q.csv:1: holds a NUL character; take it out (is it UTF-16?)",
  ),
  "latin 1": (
    "q.csv",
    HEAD + "Café?,Oui.\n".encode("cp1252"),
    "q.csv:2: is not UTF-8; save the file as UTF-8",
  ),
  "nul": ("q.csv", HEAD + b"a\0,b\n", "q.csv:2: holds a NUL character"),
  "old mac": ("q.csv", b"question,answer\ra,b\r", "q.csv:1: lines end with CR alone"),
  "header only": ("q.csv", HEAD, "q.csv: holds no rows"),
  "empty csv": ("q.csv", b"", "q.csv: holds no rows"),
  "blank lines": ("q.tsv", b"\n\r\n\n", "q.tsv: holds no rows"),
  "workbook": ("q.csv", b"PK\x03\x04....", "is a zip archive or a workbook"),
  "jsonl in .json": (
    "q.json",
    b'{"question": "a"}\n{"question": "b"}\n',
    "q.json: is one row a line, not a list of rows; name it .jsonl",
  ),
  "one object": (
    "q.json",
    b'{"question": "a", "answer": "b"}',
    "q.json: is one object, not a list of rows; put [ ] around it",
  ),
  "one conversation": (
    "q.json",
    b'{"messages": [{"role": "user", "content": "a"}]}',
    "q.json: is one object",
  ),
  "list under a key": (
    "q.json",
    b'{"version": 1, "data": [{"question": "a"}]}',
    "whose rows are the list under 'data'; write that list alone",
  ),
  "columns": (
    "q.json",
    b'{"question": {"0": "a"}, "answer": {"0": "b"}}',
    "is one object of columns, not a list of rows; write a row an object (pandas: orie",
  ),
  "torn list": (
    "q.json",
    b'[{"question": "a",\n"answer": "b"},\n{"question": ',
    "q.json:3: is not valid JSON: Expecting value at column 14, in row 2 of the list",
  ),
  "no comma": (
    "q.json",
    b'[{"question": "a", "answer": "b"} {"question": "c"}]',
    "q.json:1: is not valid JSON: Expecting ',' or ']' at column 35, in row 1",
  ),
  "trailing comma": ("q.json", b'[{"question": "a", "answer": "b"},]', "in row 2"),
  "two lists": ("q.json", b'[{"question": "a", "answer": "b"}]\n[]', "q.json:2: more"),
  "deep json": ("q.json", b"[" * 100_000, "q.json: is not valid JSON: is nested too"),
  "latin json": ("q.json", b'[{"question": "\xe9"}]', "q.json: is not UTF-8 (byte 16)"),
  "a number": ("q.json", b"3", "q.json: is a JSON int, not a list of rows"),
  "row is a list": ("q.json", b"[[1]]", "q.json:1: is a JSON list, not an object"),
  "key twice": (
    "q.json",
    b'[{"answer": "a", "answer": "b"}, {"question": "x", "answer": "y"}]',
    "q.json:1: has the key 'answer' twice",
  ),
  "nan": (
    "q.json",
    b'[{"question": NaN, "answer": "b"}]',
    "q.json:1: is not valid JSON: NaN is not a JSON number",
  ),
  "list in .jsonl": (
    "q.jsonl",
    b'[\n{"question": "a", "answer": "b"}\n]\n',
    "q.jsonl:1: begins a list of rows, which is JSON; name the file .json",
  ),
  "list on one line": ("q.jsonl", b'[{"question": "a"}]', "name the file .json"),
  "packed parquet": (
    "q.parquet.gz",
    gzip.compress(b"PAR1"),
    "q.parquet.gz: a Parquet file compresses its own columns and is not read",
  ),
  "plain .gz": (
    "q.jsonl.gz",
    b'{"question": "a"}',
    "the .gz archive is torn or damage",
  ),
  "plain .zst": ("q.csv.zst", HEAD, "the .zst archive is torn or damaged"),
  "other suffix": ("q.txt.gz", b"", "unknown file type '.gz'"),
  "arrow": ("q.jsonl", b"ARROW1\0\0", "is an Arrow file; write it as Parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_what_to_do(tmp_path, name):
  file, content, says = BROKEN[name]
  path = tmp_path / file
  path.write_bytes(content)
  message = refused(path)
  assert message.startswith(str(path))
  assert says in message


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_torn_archive_is_refused_wherever_it_is_torn(tmp_path, suffix, keep):
  dice = random.Random(0)
  rows = [{**ROWS[0], "id": f"{dice.random()}"} for _ in range(2_000)]
  whole = PACKERS[suffix](WRITERS[".jsonl"](rows))
  path = tmp_path / f"q.jsonl{suffix}"
  path.write_bytes(whole[: int(len(whole) * keep)])
  assert f"the {suffix} archive is torn or damaged" in refused(path)


def test_a_huge_field_is_read(tmp_path):
  path = tmp_path / "q.csv"
  long = "line, with a comma\n" * 100_000
  path.write_text(csv_text([{"question": "Why?", "answer": long}]), newline="")
  assert question_files.read_questions(path)[0].answer == long


def test_lists_in_csv_are_refused_with_the_formats_that_hold_them(tmp_path):
  path = tmp_path / "q.csv"
  messages = json.dumps([{"role": "user", "content": "a"}])
  path.write_text(csv_text([{"messages": messages, "answer": "b"}]), newline="")
  assert "a CSV or TSV file cannot hold lists: use JSONL or Parquet" in refused(path)


def test_numbers_in_parquet_are_refused_by_name(tmp_path):
  path = tmp_path / "q.parquet"
  parquet.write_table(pyarrow.table({"question": ["a"], "answer": [3.5]}), path)
  assert f"{path}:1: `answer` is float, not text" in refused(path)


def test_a_column_map_reads_columns_of_parquet(tmp_path):
  path = tmp_path / "q.parquet"
  table = pyarrow.table({"q": ["a"], "a": ["b"], "score": [1]})
  parquet.write_table(table, path)
  layout = row_layout.Layout(columns={"question": "q", "answer": "a"})
  assert question_files.read_questions(path, layout=layout)[0].answer == "b"


def test_units_of_places():
  lines = [row_files.unit(f"q{suffix}") for suffix in (".csv", ".jsonl.gz", ".TSV")]
  assert lines == ["line"] * 3
  assert {row_files.unit(name) for name in ("q.json", "q.parquet", "hub://a/b")} == {
    "row"
  }
