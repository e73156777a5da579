"""The method of refinement: rules of selection, and passes with scripted replies."""

import collections
import dataclasses
import json
import re

import numpy as np
import pytest

from raft_jax import errors
from raft_jax.curation import refined_folder, refinement, refinement_run
from raft_jax.data import training_set
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines
from raft_jax.generation import judging as judging_lib
from raft_jax.storage import journal, records
from tests.helpers import least_config

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
  local, gpus = False, 0
  prompt_limit = 1000

  def __init__(self, reply):
    self.reply = reply
    self.received = []

  def count_tokens(self, messages):
    return len(messages[-1].content)

  def generate(self, requests, at_once):
    for place, request in enumerate(requests):
      self.received.append(request)
      yield place, self.reply(request)


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
  assert scripts[1].received == scripts[2].received == []


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
  assert len(scripts[1].received) == 1


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
    return {r.messages[0].content: r.seed for r in scripts[0].received}

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
  assert len(scripts[2].received) == 3


@pytest.mark.parametrize(
  ("fusion", "judges", "named"),
  [
    ("{}", "[{engine: jax, max_new_tokens: 8}]", "refine.judges.0: "),
    (
      "{model: a/b}",
      "[{engine: encoder}, {engine: jax, model: a/b}]",
      "refine.judges.1: a/b",
    ),
    ("{model: a/b}", "[{engine: jax, model: a/c}]", None),
    ("{}", "[{engine: encoder}]", None),
    ("{rounds: 0}", "[{engine: jax}]", None),
  ],
)
def test_a_judge_of_its_own_answers_is_a_warning(
  tmp_path, capsys, fusion, judges, named
):
  config = least_config.least(
    tmp_path, f"refine.fusion={fusion}", f"refine.judges={judges}"
  )
  refinement_run.warn_of_own_judges(config.refine, config.model)
  said = capsys.readouterr().out
  assert said.startswith(f"warning: {named}") if named else not said


def test_without_sampling_a_round_is_not_asked_again(tmp_path):
  script = Script(lambda r: _says("fused"))
  with journal.open_journal(tmp_path / "journal.jsonl") as book:
    calls = calls_lib.Calls(book, 0)
    role = calls_lib.Role("fuse", script, 8, 0.0, 1.0, 2)
    for number in (1, 2):
      calls.ask(role, [(records.Message("user", "x"),)], round_number=number)
  assert len(script.received) == 1


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
  assert len(scripts[0].received) == 1


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
  assert len(scripts[2].received) == 0


def test_a_judge_that_can_is_held_to_its_form(tmp_path):
  seen = []
  with journal.open_journal(tmp_path / "journal.jsonl") as book:
    for form in (None, judging_lib.REPLY_SCHEMA):
      script = Script(lambda r: _says('{"score": 0.5}'))
      role = calls_lib.Role("judge", script, 8, 0.0, 1.0, 2, form)
      item = refinement.Item("q", "a", "b")
      assert refinement.language_judge(role)([item], calls_lib.Calls(book, 0)) == [0.5]
      seen += [request.reply_schema for request in script.received]
  # Two calls, for the form is part of what a verdict depends on.
  assert seen == [None, judging_lib.REPLY_SCHEMA]


def test_longest_prompts_go_first_in_batches_of_the_roles_size(tmp_path):
  questions = [_question(str(i), "wrong " * (i + 1)) for i in range(5)]
  _, scripts = _refine(
    tmp_path, questions, lambda r: _says("void"), lambda r: None, lambda r: None
  )
  lengths = [len(r.messages[0].content) for r in scripts[0].received]
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
  assert len(scripts[0].received) == 1
  assert [r.question.id for r in refined] == ["q", "twin"]


def test_the_call_of_a_tool_is_kept_as_it_is(tmp_path):
  call = records.ToolCall("f", '{"a": 1}')
  kept = dataclasses.replace(_question("b", ""), tool_calls=(call,))
  refined, scripts = _refine(
    tmp_path,
    [_question("a"), kept, _question("c")],
    lambda r: _says("A civil wrong."),
    lambda r: _says("fused"),
    lambda r: _says('{"score": 1}'),
  )
  assert [len(script.received) for script in scripts] == [2, 2, 2]
  assert [(r.answer, r.chosen, r.reason) for r in refined] == [
    ("fused", "fused", "accepted"),
    ("", "original", "rewrite_tool_call"),
    ("fused", "fused", "accepted"),
  ]
  again = refinement.reselect(
    refined[1], threshold=0.1, rounds=1, accept_at=0.1, judges=[0]
  )
  assert again == refined[1]


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
