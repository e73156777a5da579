"""A panel's verdicts: what is shown, what is read, and what a majority makes of it."""

import itertools
import json

import pytest

from raft_jax.evaluation import judged_accuracy
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging
from raft_jax.storage import journal


class Judge:
  """A scripted judge: the reply to the candidate that a prompt holds."""

  local = False
  prompt_limit = 10_000

  def __init__(self, name, replies):
    self.identity, self.replies, self.received = name, replies, []

  def count_tokens(self, messages):
    return len(messages[-1].content)

  def generate(self, requests, at_once):
    for place, request in enumerate(requests):
      self.received.append(request)
      asked = str(request.messages)
      said = next(said for key, said in self.replies.items() if key in asked)
      yield place, engines.Completion(said, "stop", 1, 1)


def _role(name, replies):
  return calls_lib.Role(
    "vote", Judge(name, replies), 8, 0.0, 1.0, 2, judged_accuracy.REPLY_SCHEMA
  )


YES, NO, PROSE = json.dumps({"good": True}), json.dumps({"good": False}), "Good!"


@pytest.mark.parametrize("template", ["correct", "open_ended"])
def test_each_judge_votes_or_abstains_and_nothing_is_asked_twice(tmp_path, template):
  items = [
    judged_accuracy.Item("Q?", "R.", text)
    for text in ('The "good" ONE!', "TWO!", "", ' {"good" : 1}')
  ]
  roles = [
    _role("a", {"ONE!": YES, "TWO!": NO}),
    _role("b", {"ONE!": PROSE, "TWO!": NO}),
    _role("c", {"ONE!": YES, "TWO!": '{"good": "yes"}'}),
  ]
  with journal.open_journal(tmp_path / "journal.jsonl") as book:
    calls = calls_lib.Calls(book, 0)
    actual = judged_accuracy.votes(template, items, roles, calls)
    assert actual == [
      [True, None, True],
      [False, False, None],
      [False] * 3,
      [False] * 3,
    ]
    # An empty answer and one with a verdict in it were shown to nobody.
    counts = [len(role.generator.received) for role in roles]
    assert counts == [2, 2, 2]
    assert judged_accuracy.votes(template, items, roles, calls) == actual
    assert [len(role.generator.received) for role in roles] == counts


def test_all_patterns_of_three_votes():
  """Right by at least two yes, undecided where neither has two, by hand."""
  right = {
    (True, True, True), (True, True, False), (True, False, True), (False, True, True),
    (True, True, None), (True, None, True), (None, True, True),
  }  # fmt: skip
  undecided = {
    (None, None, None),
    *itertools.permutations((True, None, None)),
    *itertools.permutations((False, None, None)),
    *itertools.permutations((True, False, None)),
  }
  patterns = list(itertools.product((True, False, None), repeat=3))
  assert len(patterns) == 27
  actual = judged_accuracy.scores("d_acc", patterns)
  assert actual["d_acc"].values_N.tolist() == [float(p in right) for p in patterns]
  assert actual["d_acc_undecided"].values_N.tolist() == [
    float(p in undecided) for p in patterns
  ]
  assert actual["d_acc"].share
  # Two judges need both, and one alone decides.
  assert judging.majority([True, False]) is None
  assert judged_accuracy.scores("x", [[True], [None]])["x"].values_N.tolist() == [
    1.0,
    0.0,
  ]
