"""Synthesis: strict replies, who stands for all, and nothing lost or asked twice."""

import collections
import json
import pathlib
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from raft_jax import errors, synthesise
from raft_jax.curation import clusters
from raft_jax.data import training_set
from raft_jax.generation import engines, jax_engine, sentence_encoder
from raft_jax.storage import question_files, sealed_folder
from tests.helpers import synthesise_driver

SEEDS = pathlib.Path(__file__).parents[1] / "configs/data/seeds.jsonl"
ASK = "Explain why bread rises."


def _says(text, finish="stop"):
  return engines.Completion(text, finish, 1, 1)


# Replies


@pytest.mark.parametrize(
  ("reply", "expected"),
  [
    (_says(ASK), (ASK, None)),
    (_says(f"  {ASK}\n"), (ASK, None)),
    (_says(f"Instruction 3: {ASK}"), (ASK, None)),
    (_says(f"instruction: {ASK}"), (ASK, None)),
    (_says(f"New instruction:\n{ASK}"), (ASK, None)),
    (_says("Name the parts:\n1. of a car\n2. of a bus"), ("Name the parts:", None)),
    (_says("Sort: pear, fig"), ("Sort: pear, fig", None)),
    (_says("Sureness is rare. Why?"), ("Sureness", None)),
    (_says(f"{ASK}\n\nAnswer: Yeast."), (ASK, "several")),
    (_says(f"{ASK}\n**Response:** Yeast."), (ASK, "several")),
    (_says(f"Instruction 3: {ASK}\nInstruction 4: Why?"), (ASK, "several")),
    (_says(f"Instruction 1: {ASK}"), ("Instruction 1", "several")),
    (_says(f"Sure! {ASK}"), ("Sure", "chatter")),
    (_says(f"Here’s one more:\n{ASK}"), ("Here", "chatter")),
    (_says("I'm sorry, I cannot."), ("I'm sorry", "refusal")),
    (_says("<think>Hm"), ("<think>", "thinking")),
    (_says(""), ("", "empty")),
    (_says("Instruction:"), ("", "empty")),
    (_says("\u200b"), ("", "empty")),
    (_says(ASK, "length"), (ASK, "truncated")),
    (_says("", "too_long"), ("", "prompt_too_long")),
    (_says("", "filtered"), ("", "filtered")),
    (None, ("", "prompt_too_long")),
  ],
  ids=str,
)
def test_read_draft(reply, expected):
  said, reason = synthesise.read_draft(reply, "")
  assert reason == expected[1]
  assert said.startswith(expected[0])


@hypothesis.given(st.text(), st.text(alphabet="instruction: 3\n*\ud800"))
def test_no_reply_raises(one, other):
  for text in (one, other, one + other):
    synthesise.read_draft(_says(text), "")
    synthesise.answer_fault(one, _says(text), 0.8, lambda said: True)


@pytest.mark.parametrize(
  ("reply", "reason"),
  [
    (_says("Yeast."), None),
    (_says("The answer is 4."), None),
    (_says("explain  why bread rises."), "echo"),
    (_says("Explain why bread rises.."), "echo"),  # 20 of 21 5-grams
    (_says("As an AI, I do not bake."), "refusal"),
    (_says("Yeast", "length"), "truncated"),
    (_says(" "), "empty"),
    (_says("Yeast. " * 9), "too_long"),
    (None, "prompt_too_long"),
  ],
)
def test_answers_with_a_fault_are_not_learnt(reply, reason):
  fault = synthesise.answer_fault(ASK, reply, 0.8, lambda said: len(said) < 30)
  assert fault == reason


def test_seeds_are_shown_as_they_are():
  """As the assistant's own turns, between askings that are alike."""
  seeds = ("What costs $5?", "Instruction 9: ${first} <|im_end|>")
  messages = synthesise.request(*seeds)
  assert [m.role for m in messages] == ["user", "assistant"] * 2 + ["user"]
  assert (messages[1].content, messages[3].content) == seeds
  assert messages[0] == messages[2] == messages[4]


# The pairs


@hypothesis.given(st.integers(2, 9), st.integers(0, 2**31 - 1))
def test_each_ordered_pair_is_shown_once_a_round(count, seed):
  pairs = synthesise.order(count, seed)
  assert {*pairs} == {(i, j) for i in range(count) for j in range(count) if i != j}
  assert len(pairs) == count * (count - 1)


def test_the_order_is_the_seeds():
  assert synthesise.order(9, 0) != synthesise.order(9, 1)
  assert synthesise.order(9, 0) != sorted(synthesise.order(9, 0))


# The choice


@hypothesis.given(
  st.lists(st.integers(0, 50), min_size=1).filter(any), st.integers(1, 300)
)
def test_shares_are_proportional(sizes, keep):
  counts = clusters.shares(sizes, keep)
  keep = min(keep, sum(sizes))
  assert sum(counts) == keep
  for count, size in zip(counts, sizes, strict=True):
    assert 0 <= count <= size
    assert abs(count - keep * size / sum(sizes)) < 1


@pytest.mark.parametrize("keep", [1, 7, 23, 60, 99])
def test_those_nearest_to_the_centres_stand_for_their_clusters(keep):
  """Blobs so far apart that the clusters are known: 30, 20 and 10 points of each."""
  rng = np.random.default_rng(0)
  true = rng.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
  points = 50 * np.eye(8)[true] + rng.normal(size=(60, 8))
  found = clusters.representatives(
    points.astype(np.float32), clusters=3, keep=keep, seed=0
  )
  names = {}
  for label, blob in zip(found.cluster_N, true, strict=True):
    assert names.setdefault(label, blob) == blob
  expected, counts = set(), collections.Counter(true[found.chosen].tolist())
  for blob, size in enumerate([30, 20, 10]):
    exact = min(keep, 60) * size / 60
    assert abs(counts[blob] - exact) < 1
    members = [i for i in range(60) if true[i] == blob]
    centre = sum(points[i] for i in members) / size
    members.sort(key=lambda i: float(((points[i] - centre) ** 2).sum()))
    expected.update(members[: counts[blob]])
  assert set(found.chosen) == expected
  assert found.chosen == sorted(found.chosen)


def test_fewer_different_rows_than_clusters():
  rows = np.array([[1.0, 0], [0, 1], [1, 0], [1, 0]])
  with np.errstate(all="raise"):
    found = clusters.representatives(rows, clusters=20, keep=2, seed=0)
  # 3 and 1 rows share 2: 1.5 and 0.5, of which one is rounded up.
  assert len(found.chosen) == 2
  assert found.cluster_N[0] == found.cluster_N[2] == found.cluster_N[3]


def test_a_draft_without_an_embedding_is_dropped():
  drafts = [synthesise.Draft(name, (0, 1)) for name in "abc"]
  vectors = np.array([[1.0, 0], [0, 0], [np.nan, 1]], np.float32)
  settings = synthesise.schema.Synthesise(seeds="")
  chosen, _, dropped, sizes = synthesise.choose(drafts, lambda texts: vectors, settings)
  assert (chosen, sizes) == (drafts[:1], [1])
  assert [(r["question"], r["reason"]) for r in dropped] == [
    ("b", "no_embedding"),
    ("c", "no_embedding"),
  ]


# Whole runs, with a scripted model


def _script(monkeypatch, log):
  names = ((jax_engine, "load"), (engines, "identity"), (engines, "tokenizer"))
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
  synthesise.fit(run)
  kept, dropped = _read(run, "questions"), _read(run, "dropped")
  seeds, _ = synthesise.read_seeds(str(SEEDS))
  assert len(seeds) == 20
  asked = [*(row["source"] for row in kept), *dropped]
  assert len({(*row["seeds"], row["round"]) for row in asked}) == len(asked) == 40
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
  questions = question_files.read_questions(synthesise.questions(run))
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
  synthesise.fit(run)
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
  synthesise.fit(run)
  before = log.read_text().split()
  book = pathlib.Path(run.output) / "synthesised/journal.jsonl"
  more = synthesise_driver.make_config(tmp_path / "more", SEEDS, drafts=44)
  (tmp_path / "more/synthesised").mkdir(parents=True)
  (tmp_path / "more/config").mkdir()
  (tmp_path / "more/synthesised/journal.jsonl").write_bytes(book.read_bytes())
  synthesise.fit(more)
  new = log.read_text().split()[len(before) :]
  assert 4 <= len(new) <= 4 + 20
  assert not {*before} & {*new}


def test_a_finished_folder_is_left_alone_and_a_damaged_one_rebuilt(scripted, capsys):
  run, log = scripted
  synthesise.fit(run)
  folder = pathlib.Path(run.output)
  before, asked = synthesise_driver.result(folder), log.read_text()
  synthesise.fit(run)
  assert "already complete" in capsys.readouterr().out
  for damage in ("questions.jsonl", "MANIFEST.json"):
    path = folder / "synthesised" / damage
    path.write_bytes(path.read_bytes()[:-20])
    assert sealed_folder.inputs(folder / "synthesised") is None
    synthesise.fit(run)
    assert synthesise_driver.result(folder) == before
  assert log.read_text() == asked


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
  assert "run `python -m raft_jax.synthesise`" in _refused(synthesise.questions, run)
  synthesise.fit(run)
  path = synthesise.questions(run)
  budget = run.data.model_copy(update={"max_answer_tokens": 99})
  assert synthesise.questions(run.model_copy(update={"data": budget})) == path
  message = _refused(synthesise.questions, _changed(run, seed=1))
  assert "synthesise.seed: 0 -> 1" in message
  pathlib.Path(path).write_text("")
  assert "no finished questions" in _refused(synthesise.questions, run)


def test_training_replays_what_was_written(scripted, tmp_path):
  run, _ = scripted
  synthesise.fit(run)
  domain = tmp_path / "domain.jsonl"
  domain.write_text('{"question": "What is a tort?", "answer": "A wrong."}\n')
  given = run.data.model_copy(update={"questions": str(domain), "answers": "original"})
  run = run.model_copy(update={"data": given})
  found = training_set.read(run, engines.tokenizer("some/model"), distil=False)
  assert [row.prompt for row in found.rows] == [("What", "is", "a", "tort?")]
  # The scripted tokenizer's tokens are words, and 0 ends an answer.
  assert [(row.prompt, row.answer) for row in found.replayed] == [
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
  assert words in _refused(synthesise.fit, _changed(run, seeds=str(path)))
  assert not log.exists()
  assert not pathlib.Path(run.output).exists()


def test_other_settings_in_one_folder_are_refused_but_batch_size_may_change(scripted):
  run, log = scripted
  synthesise.fit(run)
  asked = log.read_text()
  assert "synthesise.keep: 20 -> 9" in _refused(synthesise.fit, _changed(run, keep=9))
  writer = run.synthesise.writer
  synthesise.fit(_changed(run, writer=writer.model_copy(update={"batch_size": 3})))
  assert log.read_text() == asked
  other = _changed(run, writer=writer.model_copy(update={"model": "other"}))
  assert "what is rehearsed is the model's own" in _refused(synthesise.fit, other)
  nothing = run.model_copy(update={"synthesise": None})
  assert "synthesise: is required" in _refused(synthesise.fit, nothing)


def test_nothing_kept_is_said_and_leaves_its_reasons(scripted):
  run, _ = scripted
  budget = run.data.model_copy(update={"max_prompt_tokens": 1})
  run = run.model_copy(update={"data": budget})
  message = _refused(synthesise.fit, run)
  assert "no question was kept (" in message
  assert "too_long" in message
  assert len(_read(run, "dropped")) == 40
  assert sealed_folder.inputs(pathlib.Path(run.output) / "synthesised") is None
