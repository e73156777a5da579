"""The command synthesise: nothing lost or asked twice, and what training takes."""

import collections
import json
import pathlib
import signal
import subprocess
import sys

import pytest

from raft_jax import errors, synthesise
from raft_jax.curation import synthesis_run
from raft_jax.data import training_set
from raft_jax.generation import engines, jax_engine, sentence_encoder
from raft_jax.storage import question_files, sealed_folder
from tests.helpers import synthesise_driver

SEEDS = pathlib.Path(__file__).parents[1] / "configs/data/seeds.jsonl"


def _says(text, finish="stop"):
  return engines.Completion(text, finish, 1, 1)


# Whole runs, with a scripted model


def _script(monkeypatch, log):
  names = ((jax_engine, "load"), (engines, "identity"), (engines, "chat_tokenizer"))
  for module, name in (*names, (sentence_encoder, "load")):
    monkeypatch.setattr(module, name, getattr(module, name))
  synthesise_driver.script(log)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
  """A config and the log of its scripted model, in this process."""
  log = tmp_path / "log"
  _script(monkeypatch, log)
  return synthesise_driver.make_config(tmp_path / "out", SEEDS), log


def _read(run, name):
  path = pathlib.Path(run.output) / f"synthesised/{name}.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def _changed(run, **keys):
  return run.model_copy(update={"synthesise": run.synthesise.model_copy(update=keys)})


def test_every_draft_is_accounted_for(scripted):
  run, log = scripted
  synthesise.synthesise(run)
  kept, dropped = _read(run, "questions"), _read(run, "dropped")
  seeds, _ = synthesis_run.read_seeds(str(SEEDS))
  assert len(seeds) == 20
  drafts = [*(row["source"] for row in kept), *dropped]
  assert len({(*row["seeds"], row["round"]) for row in drafts}) == len(drafts) == 40
  summary = json.loads(
    (pathlib.Path(run.output) / "synthesised/summary.json").read_text()
  )
  reasons = collections.Counter(row["reason"] for row in dropped)
  assert summary["dropped"] == reasons
  assert (summary["seeds"], summary["drafts"]) == (20, 40)
  assert summary["kept"] == len(kept) > 5
  assert reasons.keys() >= {"too_long", "truncated", "not_nearest"}
  assert any(reason.startswith("answer_") for reason in reasons)
  answered = [row for row in dropped if row["reason"].startswith("answer_")]
  assert len(answered) + len(kept) == 20
  assert sum(summary["clusters"]) == 20 + reasons["not_nearest"]
  assert len(log.read_text().split()) == 40 + 20
  questions = question_files.read_questions(synthesis_run.questions(run))
  assert [(q.id, q.messages[0].content, q.answer) for q in questions] == [
    (row["id"], row["question"], row["answer"]) for row in kept
  ]
  for row in kept:
    assert len(row["question"].split()) <= 10
    assert len(row["answer"].split()) < 16


def test_no_draft_repeats_a_seed_or_another(tmp_path, monkeypatch):
  _script(monkeypatch, tmp_path / "log")
  path = tmp_path / "seeds.jsonl"
  path.write_text('{"question": "why rain?"}\n{"question": "Name the  tax."}\n')
  replies = iter(["WHY  rain?", "List music.", "list Music.", "Draft bread."])

  def reply(self, request):
    return _says(next(replies) if len(request.messages) > 1 else "Yes.")

  monkeypatch.setattr(synthesise_driver.Scripted, "_reply", reply)
  run = synthesise_driver.make_config(tmp_path / "out", path, drafts=4, keep=4)
  synthesise.synthesise(run)
  assert {row["question"] for row in _read(run, "questions")} == {
    "List music.",
    "Draft bread.",
  }
  repeated = {row["question"]: row for row in _read(run, "dropped")}
  assert {row["reason"] for row in repeated.values()} == {"duplicate"}
  assert repeated["WHY  rain?"]["of"]["seeds"] == []
  # Two seeds make two ordered pairs, which are shown twice.
  assert sorted(row["round"] for row in (*repeated.values(),)) == [0, 1]


def test_more_drafts_ask_only_for_the_new_ones(scripted, tmp_path):
  run, log = scripted
  synthesise.synthesise(run)
  before = log.read_text().split()
  book = pathlib.Path(run.output) / "synthesised/journal.jsonl"
  more = synthesise_driver.make_config(tmp_path / "more", SEEDS, drafts=44)
  (tmp_path / "more/synthesised").mkdir(parents=True)
  (tmp_path / "more/config").mkdir()
  (tmp_path / "more/synthesised/journal.jsonl").write_bytes(book.read_bytes())
  synthesise.synthesise(more)
  new = log.read_text().split()[len(before) :]
  assert 4 <= len(new) <= 4 + 20
  assert not {*before} & {*new}


def test_a_finished_folder_is_left_alone_and_a_damaged_one_rebuilt(scripted, capsys):
  run, log = scripted
  synthesise.synthesise(run)
  folder = pathlib.Path(run.output)
  before, logged = synthesise_driver.result(folder), log.read_text()
  synthesise.synthesise(run)
  assert "already complete" in capsys.readouterr().out
  for damage in ("questions.jsonl", "MANIFEST.json"):
    path = folder / "synthesised" / damage
    path.write_bytes(path.read_bytes()[:-20])
    assert sealed_folder.inputs(folder / "synthesised") is None
    synthesise.synthesise(run)
    assert synthesise_driver.result(folder) == before
  assert log.read_text() == logged


@pytest.mark.slow  # the fast tests kill `refine`, whose journal this is
def test_killed_a_second_run_ends_alike_and_asks_nothing_twice(tmp_path):
  plan = [["tear", 12], ["replace before", 2], ["generate before", 3, signal.SIGTERM]]
  command = [
    sys.executable,
    "-m",
    "tests.helpers.synthesise_driver",
    str(tmp_path),
    str(SEEDS),
  ]
  done = subprocess.run(
    [*command, json.dumps(plan)], capture_output=True, text=True, check=True
  )
  verdicts = json.loads(done.stdout)
  assert [v["first"] for v in verdicts] == [-signal.SIGKILL] * 2 + [143]
  assert len({v["kept"] for v in verdicts}) == 3
  for verdict in verdicts:
    assert (verdict["second"], verdict["same"]) == (0, True), verdict
    assert (verdict["asked_again"], verdict["left_over"]) == (0, []), verdict


# What training takes, and what is refused


def _refused(work, run):
  with pytest.raises(errors.UserError) as refused:
    work(run)
  assert "\n" not in str(refused.value)
  return str(refused.value)


def test_replay_takes_the_finished_file_of_its_own_settings_only(scripted):
  run, _ = scripted
  assert "run `python -m raft_jax.synthesise`" in _refused(synthesis_run.questions, run)
  synthesise.synthesise(run)
  path = synthesis_run.questions(run)
  budget = run.data.model_copy(update={"max_answer_tokens": 99})
  assert synthesis_run.questions(run.model_copy(update={"data": budget})) == path
  message = _refused(synthesis_run.questions, _changed(run, seed=1))
  assert "synthesise.seed: 0 -> 1" in message
  pathlib.Path(path).write_text("")
  assert "no finished questions" in _refused(synthesis_run.questions, run)


def test_training_replays_what_was_written(scripted, tmp_path):
  run, _ = scripted
  synthesise.synthesise(run)
  domain = tmp_path / "domain.jsonl"
  domain.write_text('{"question": "What is a tort?", "answer": "A wrong."}\n')
  given = run.data.model_copy(update={"questions": str(domain), "answers": "original"})
  run = run.model_copy(update={"data": given})
  loaded = training_set.load(run, engines.chat_tokenizer("some/model"), distil=False)
  assert [row.prompt for row in loaded.rows] == [("What", "is", "a", "tort?")]
  # The scripted tokenizer's tokens are words, and 0 ends an answer.
  assert [(row.prompt, row.answer) for row in loaded.replayed] == [
    ((*row["question"].split(),), (*row["answer"].split(), 0))
    for row in _read(run, "questions")
  ]


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("", "holds 0 questions, and two are shown"),
    ('{"question": "a"}', "holds 1 questions"),
    ('{"question": "a"}\n{"prompt": "b"}', "seeds.jsonl:2: has no `question`"),
    ('{"question": "a"}\n{"question": " "}', "seeds.jsonl:2: `question` is empty"),
    ('{"question": "a"}\nb', "seeds.jsonl:2: is not valid JSON"),
    ('{"question": "a"}\n{"question": "a "}', "seeds.jsonl:2: repeats row 1"),
    (None, "seeds.jsonl: no such file"),
  ],
)
def test_bad_seeds_are_one_line_before_a_model_is_asked(
  scripted, tmp_path, content, words
):
  run, log = scripted
  path = tmp_path / "seeds.jsonl"
  if content is not None:
    path.write_text(content)
  assert words in _refused(synthesise.synthesise, _changed(run, seeds=str(path)))
  assert not log.exists()
  assert not pathlib.Path(run.output).exists()


def test_other_settings_in_one_folder_are_refused_but_batch_size_may_change(scripted):
  run, log = scripted
  synthesise.synthesise(run)
  logged = log.read_text()
  assert "synthesise.keep: 20 -> 9" in _refused(
    synthesise.synthesise, _changed(run, keep=9)
  )
  writer = run.synthesise.writer
  synthesise.synthesise(
    _changed(run, writer=writer.model_copy(update={"batch_size": 3}))
  )
  assert log.read_text() == logged
  other = _changed(run, writer=writer.model_copy(update={"model": "other"}))
  assert "the model to be trained must rehearse its own words" in _refused(
    synthesise.synthesise, other
  )
  nothing = run.model_copy(update={"synthesise": None})
  assert "synthesise: is required" in _refused(synthesise.synthesise, nothing)


def test_nothing_kept_is_said_and_leaves_its_reasons(scripted):
  run, _ = scripted
  budget = run.data.model_copy(update={"max_prompt_tokens": 1})
  run = run.model_copy(update={"data": budget})
  message = _refused(synthesise.synthesise, run)
  assert "no question was kept (" in message
  assert "too_long" in message
  assert len(_read(run, "dropped")) == 40
  assert sealed_folder.inputs(pathlib.Path(run.output) / "synthesised") is None
