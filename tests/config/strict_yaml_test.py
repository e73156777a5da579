"""Strict YAML by itself: plain values, places and faults of any tree."""

import pytest

from raft_jax.config import strict_yaml


def read(text: str) -> tuple[object, strict_yaml.Draft]:
  draft = strict_yaml.Draft()
  return draft.read(text, "", lambda line: f"f:{line}"), draft


def test_plain_values_and_their_places():
  tree, draft = read("a:\n  b: [1, 1e-5,\n    no]\nc: ~\n")
  assert tree == {"a": {"b": [1, 1e-5, "no"]}, "c": None}
  assert draft.problems == []
  assert draft.places["a.b"] == "f:2"
  assert draft.place(["a", "b", 2], "?") == "f:3"
  assert draft.place(["c", "d"], "?") == "f:4"  # the closest parent
  assert draft.place(["x"], "?") == "?"


def test_every_fault_of_a_file_is_kept():
  tree, draft = read("a: 1\nb: !x 2\na: .5e999\n")
  assert tree == {"a": None, "b": None}
  assert [(p.where, p.key) for p in draft.problems] == [
    ("f:2", "b"),  # the tag
    ("f:3", "a"),  # given twice
    ("f:3", "a"),  # and not finite
  ]
  assert draft.unread == {"a", "b"}


def test_overrides_reach_into_sections_and_lists():
  draft = strict_yaml.Draft()
  draft.tree, _ = read("a: [{b: 1}]")
  draft.override("a.0.b", "2")
  draft.override("c.d", "[x]")
  draft.override("e", "")
  assert draft.tree == {"a": [{"b": 2}], "c": {"d": ["x"]}, "e": None}
  assert {draft.places[key] for key in ("a.0.b", "c", "e")} == {"command line"}
  draft.override("a.7.b", "2")
  (problem,) = draft.problems
  assert (problem.where, problem.key) == ("command line", "a.7.b")


@pytest.mark.parametrize(
  "value", ["no", "010", "1e-5", "12:30", "~", "", "a\x85b", " x", 10, 1e-9, True, None]
)
def test_dump_reads_back(value):
  tree, draft = read(strict_yaml.dump({"key": value, "list": [value]}))
  assert draft.problems == []
  assert tree == {"key": value, "list": [value]}
  assert type(tree["key"]) is type(value)
