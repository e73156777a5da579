"""The command extract: nothing lost or asked twice, and bad input refused."""

import collections
import json
import pathlib
import random
import re
import signal
import subprocess
import sys

import pytest

from raft_jax import errors, extract
from raft_jax.config import cli
from raft_jax.curation import documents, extraction, qa_pairs
from raft_jax.generation import engines, jax_engine
from raft_jax.storage import journal, question_files
from tests.helpers import brute_force_duplicates, extract_driver


def _words(text):
  return len(text.split())


def _lines(*rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


# Whole runs, with a scripted model


def _write_corpus(folder, law):
  """WordNet law answers, several a document; one is a copy and one nearly so."""
  rows = [json.loads(line) for line in (law / "train.jsonl").read_text().splitlines()]
  texts = [" ".join(r["answer"] for r in rows[i : i + 9]) for i in range(0, 126, 9)]
  folder.mkdir()
  for i, text in enumerate(texts[:8]):
    (folder / f"{i}.txt").write_text(text)
  more = [{"id": f"row{i}", "text": text} for i, text in enumerate(texts[8:])]
  (folder / "rows.jsonl").write_bytes(_lines(*more))
  (folder / "picture.png").write_bytes(b"\x89PNG")
  (folder / "x copy.txt").write_text(texts[0].upper())
  (folder / "y nearly.txt").write_text(texts[1] + " It is so.")
  # Another document that repeats a passage of an earlier one.
  (folder / "z part.md").write_text(f"# Part\n\n{texts[2][:400]}\n\n# New\n\nOh, well.")
  return folder


def _script(monkeypatch, log):
  for module, name in (
    (jax_engine, "load"),
    (engines, "identity"),
    (engines, "chat_tokenizer"),
  ):
    monkeypatch.setattr(module, name, getattr(module, name))
  extract_driver.script(log)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, law):
  """The config and the documents of a finished run that no test changes."""
  folder = tmp_path_factory.mktemp("finished")
  documents_folder = _write_corpus(folder / "corpus", law)
  run = extract_driver.make_config(folder / "out", documents_folder)
  with pytest.MonkeyPatch.context() as monkeypatch:
    _script(monkeypatch, folder / "log")
    extract.extract(run)
  return run, documents.read(str(documents_folder))


@pytest.fixture
def corpus(tmp_path, law):
  return _write_corpus(tmp_path / "corpus", law)


@pytest.fixture
def scripted(tmp_path, corpus, monkeypatch):
  """A config and the log of its scripted model, in this process."""
  log = tmp_path / "log"
  _script(monkeypatch, log)
  for name in ("rows.jsonl", *(f"{i}.txt" for i in range(4, 8))):
    (corpus / name).unlink()
  return extract_driver.make_config(tmp_path / "out", corpus), log


def _read(run, name):
  path = pathlib.Path(run.output) / "extracted" / f"{name}.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_document_chunk_and_pair_is_accounted_for(finished):
  run, (usable, unusable) = finished
  assert len(unusable) == 1
  kept = {name: _read(run, name) for name in extraction.SPLITS}
  rows = [row for split in kept.values() for row in split]
  dropped = _read(run, "dropped")
  lost = {
    what: [row for row in dropped if row["what"] == what]
    for what in ("document", "chunk", "pair")
  }
  gone = {row["document"] for row in lost["document"]}
  assert gone == {"picture.png", "x copy.txt", "y nearly.txt"}
  chunks = {
    (document.id, chunk.number): chunk.text
    for document in usable
    if document.id not in gone
    for chunk in documents.cut(document, 40, _words)
  }
  pair_counts = collections.Counter()
  for row in rows:
    place = row["source"]["document"], row["source"]["chunk"]
    text = next(d.text for d in usable if d.id == place[0])
    assert text[row["source"]["start"] : row["source"]["end"]] == chunks[place]
    assert row["answer"] in chunks[place]
    pair_counts[place] += 1
  pair_counts.update((row["document"], row["chunk"]) for row in lost["pair"])
  chunkless = [(row["document"], row["chunk"]) for row in lost["chunk"]]
  assert len(set(chunkless)) == len(chunkless)
  assert not pair_counts.keys() & set(chunkless)
  assert pair_counts.keys() | set(chunkless) == chunks.keys()
  summary = json.loads(
    (pathlib.Path(run.output) / "extracted/summary.json").read_text()
  )
  assert summary["documents"] == len(usable) + 1
  assert summary["chunks"] == len(chunks)
  assert summary["pairs"] == len(rows) + len(lost["pair"]) == sum(pair_counts.values())
  assert summary["kept"] == len(rows) == sum(summary["splits"].values())
  for what, listed in lost.items():
    counts = collections.Counter(row["reason"] for row in listed)
    assert summary["dropped"][f"{what}s"] == counts
  reasons = {row["reason"] for row in dropped}
  assert reasons >= {"duplicate", "near_duplicate", "too_short", "no_pairs"}
  assert reasons >= {"not_json", "surplus", "undecided"}
  assert reasons & {f"not_{name}" for name in qa_pairs.CRITERIA}
  judged = [row for row in lost["pair"] if "verdicts" in row]
  assert {len(row["verdicts"]) for row in judged} == {2}


def test_no_document_and_no_near_duplicate_is_in_two_splits(finished):
  run, _ = finished
  rows = [(name, row) for name in extraction.SPLITS for row in _read(run, name)]
  where = collections.defaultdict(set)
  for name, row in rows:
    where[row["source"]["document"]].add(name)
  assert {len(names) for names in where.values()} == {1}
  assert {name for name, _ in rows} == set(extraction.SPLITS)
  texts = [f"{row['question']}\n{row['answer']}" for _, row in rows]
  assert brute_force_duplicates.find(texts, 0.8) == [None] * len(rows)
  chunks = {(r["source"]["document"], r["source"]["chunk"]) for _, r in rows}
  for name in extraction.SPLITS:
    path = pathlib.Path(run.output) / f"extracted/{name}.jsonl"
    given = [(r["id"], r["question"], r["answer"]) for r in _read(run, name)]
    # As the next stage reads them.
    assert given == [
      (q.id, q.messages[0].content, q.answer)
      for q in question_files.read_questions(path)
    ]
  assert len({row["id"] for _, row in rows}) == len(rows) > len(chunks) / 2


def test_more_documents_move_none_and_ask_only_about_themselves(scripted, corpus):
  run, log = scripted
  extract.extract(run)

  def splits():
    return {
      row["source"]["document"]: name
      for name in extraction.SPLITS
      for row in _read(run, name)
    }

  before, logged = splits(), log.read_text().split()
  (corpus / "0 first.txt").write_text("A bond is a debt. A lien is a right to keep it.")
  extract.extract(run)
  after, again = splits(), log.read_text().split()[len(logged) :]
  assert {name: after[name] for name in before} == before
  # One chunk, and two judges for each of at most two pairs.
  assert 1 <= len(again) <= 1 + 2 * 2


def test_a_finished_folder_is_left_alone_and_a_damaged_one_rebuilt(scripted, capsys):
  run, log = scripted
  extract.extract(run)
  folder = pathlib.Path(run.output)
  before, logged = extract_driver.result(folder), log.read_text()
  extract.extract(run)
  assert "already complete" in capsys.readouterr().out
  for damage in ("train.jsonl", "dropped.jsonl", "MANIFEST.json"):
    path = folder / "extracted" / damage
    path.write_bytes(path.read_bytes()[:-20])
    extract.extract(run)
    assert extract_driver.result(folder) == before
  assert log.read_text() == logged


def test_windows_line_ends_and_marks_change_no_question(scripted, corpus):
  run, log = scripted
  extract.extract(run)
  before, logged = extract_driver.result(pathlib.Path(run.output)), log.read_text()
  for path in (*corpus.glob("*.txt"), *corpus.glob("*.md"), *corpus.glob("*.jsonl")):
    text = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)
  extract.extract(run)
  assert log.read_text() == logged
  assert extract_driver.result(pathlib.Path(run.output)) == before


@pytest.mark.slow  # the fast tests kill `refine`, whose journal this is
def test_killed_anywhere_a_second_run_ends_alike_and_asks_nothing_twice(
  tmp_path, corpus
):
  dice = random.Random(0)
  last = {"fsync before": 24, "fsync after": 24, "tear": 18, "generate before": 18}
  last |= {"replace before": 6, "replace after": 6}
  plan = [[kind, n] for kind in last for n in dice.sample(range(1, last[kind]), 2)]
  plan += [["generate before", 2, signal.SIGTERM]]
  for name in ("rows.jsonl", *(f"{i}.txt" for i in range(3, 8))):
    (corpus / name).unlink()
  root = tmp_path / "matrix"
  root.mkdir()
  command = [
    sys.executable,
    "-m",
    "tests.helpers.extract_driver",
    str(root),
    str(corpus),
  ]
  done = subprocess.run(
    [*command, json.dumps(plan)], capture_output=True, text=True, check=True
  )
  verdicts = json.loads(done.stdout)
  killed = [v for v in verdicts if v["first"] == -signal.SIGKILL]
  assert len(killed) == len(plan) - 1, [v for v in verdicts if v not in killed]
  assert len({v["kept"] for v in killed}) >= 6
  # A signal ends the run after its micro-batch: two of four calls are kept.
  assert (verdicts[-1]["first"], verdicts[-1]["kept"]) == (143, 8)
  for verdict in verdicts:
    assert verdict["second"] == 0, verdict
    assert verdict["same"], verdict
    assert verdict["asked_again"] == 0, verdict
    assert verdict["left_over"] == [], verdict


# Bad input


def _refused(run):
  with pytest.raises(errors.UserError) as refused:
    extract.extract(run)
  assert "\n" not in str(refused.value)
  return str(refused.value)


@pytest.mark.parametrize(
  ("files", "words"),
  [
    ({}, "holds no documents; give text in .txt"),
    ({".hidden.txt": b"x"}, "holds no documents"),
    ({"a.pdf": b"x"}, "a.pdf: .pdf is none of"),
    ({"a.txt": b"\xff", "b.txt": b"Good."}, "a.txt: is not UTF-8 .byte 1.; 1 of 2"),
    ({"a.txt": b"\xff", "b.txt": b"\0"}, "2 of 2 documents are unusable .also b.txt"),
  ],
)
def test_bad_folders_are_one_line_before_a_model_is_asked(
  scripted, tmp_path, files, words
):
  run, log = scripted
  folder = tmp_path / "bad"
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_bytes(content)
  bad = extract_driver.make_config(tmp_path / "out", folder)
  assert re.search(words, _refused(bad))
  assert not log.exists()
  extract.extract(run)  # what was refused binds no later run
  assert any(_read(run, name) for name in extraction.SPLITS)


def test_bad_paths_and_sections_are_one_line(scripted, tmp_path):
  run, log = scripted
  (tmp_path / "a.docx").write_bytes(b"PK")
  for name, words in (("gone", "no such file or folder"), ("a.docx", "'.docx'")):
    bad = extract_driver.make_config(tmp_path / "out", tmp_path / name)
    assert words in _refused(bad)
  assert "extract: is required" in _refused(run.model_copy(update={"extract": None}))
  section = run.extract.model_copy(update={"chunk_tokens": 9_000})
  assert "exceed the 10000 tokens that some/model holds" in _refused(
    run.model_copy(update={"extract": section})
  )
  assert not log.exists()


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("shares", "{train: 0.8, test: 0.1}", "extract.shares: sum to 0.95, not to 1"),
    ("min_chunk_tokens", "600", "must not exceed extract.chunk_tokens=512"),
    ("judges", "[{}, {}]", "extract.judges.1: is the same judge again"),
    ("judges", "[]", "extract.judges: must not be empty"),
    ("judges", "[{engine: encoder}]", "extract.judges.0.engine"),
    ("writer", "{base_url: x}", "extract.writer.base_url: is read with engine: openai"),
    ("near_duplicate", "0.0", "extract.near_duplicate"),
    ("document", "x", "did you mean `extract.documents`"),
  ],
)
def test_sections_that_cannot_be_meant_are_refused(tmp_path, key, value, words, capsys):
  path = tmp_path / "run.yaml"
  path.write_text(
    f"model: {{source: m}}\ndata: {{questions: later.jsonl}}\noutput: {tmp_path}/out\n"
    f"extract: {{documents: docs, {key}: {value}}}\n"
  )
  with pytest.raises(SystemExit) as stopped:
    cli.run("extract", extract.extract, "", ["--config", str(path)], without_data=True)
  assert stopped.value.code == 2
  assert words in capsys.readouterr().err


def test_no_pair_at_all_is_said_and_leaves_its_reasons(scripted, tmp_path):
  run, _ = scripted
  only = tmp_path / "only"
  only.mkdir()
  (only / "short.txt").write_text("A tort.")
  run = extract_driver.make_config(tmp_path / "out", only)
  assert "no pair was kept (1 chunks too_short)" in _refused(run)
  (row,) = _read(run, "dropped")
  assert (row["document"], row["reason"], row["tokens"]) == (
    "short.txt",
    "too_short",
    2,
  )
  assert not (tmp_path / "out/extracted/MANIFEST.json").exists()


def test_other_settings_in_one_folder_are_refused_but_batch_size_may_change(scripted):
  run, log = scripted
  extract.extract(run)
  logged = log.read_text()

  def changed(**keys):
    return run.model_copy(update={"extract": run.extract.model_copy(update=keys)})

  assert "extract.seed: 0 -> 1" in _refused(changed(seed=1))
  extract.extract(
    changed(writer=run.extract.writer.model_copy(update={"batch_size": 3}))
  )
  assert log.read_text() == logged


def test_second_process_on_one_folder_is_told_who_works_there(scripted):
  run, _ = scripted
  extract.extract(run)
  book = pathlib.Path(run.output) / "extracted/journal.jsonl"
  with journal.locked(book):
    assert "in use by pid" in _refused(run)
