"""Synthesis: strict replies, the pairs of seeds, and drafts without embeddings."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from raft_jax.config import schema
from raft_jax.curation import synthesis
from raft_jax.generation import engines

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
  said, reason = synthesis.read_draft(reply, "")
  assert reason == expected[1]
  assert said.startswith(expected[0])


@hypothesis.given(st.text(), st.text(alphabet="instruction: 3\n*\ud800"))
def test_no_reply_raises(one, other):
  for text in (one, other, one + other):
    synthesis.read_draft(_says(text), "")
    synthesis.answer_fault(one, _says(text), 0.8, lambda said: True)


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
  fault = synthesis.answer_fault(ASK, reply, 0.8, lambda said: len(said) < 30)
  assert fault == reason


def test_seeds_are_shown_as_they_are():
  """As the assistant's own turns, between askings that are alike."""
  seeds = ("What costs $5?", "Instruction 9: ${first} <|im_end|>")
  messages = synthesis.request(*seeds)
  assert [m.role for m in messages] == ["user", "assistant"] * 2 + ["user"]
  assert (messages[1].content, messages[3].content) == seeds
  assert messages[0] == messages[2] == messages[4]


# The pairs


@hypothesis.given(st.integers(2, 9), st.integers(0, 2**31 - 1))
def test_each_ordered_pair_is_shown_once_a_round(count, seed):
  pairs = synthesis.shuffled_pairs(count, seed)
  assert {*pairs} == {(i, j) for i in range(count) for j in range(count) if i != j}
  assert len(pairs) == count * (count - 1)


def test_the_order_is_the_seeds():
  assert synthesis.shuffled_pairs(9, 0) != synthesis.shuffled_pairs(9, 1)
  assert synthesis.shuffled_pairs(9, 0) != sorted(synthesis.shuffled_pairs(9, 0))


def test_a_draft_without_an_embedding_is_dropped():
  drafts = [synthesis.Draft(name, (0, 1)) for name in "abc"]
  vectors = np.array([[1.0, 0], [0, 0], [np.nan, 1]], np.float32)
  settings = schema.Synthesise(seeds="")
  chosen = synthesis.choose(drafts, lambda texts: vectors, settings)
  assert (chosen.drafts, chosen.cluster_sizes) == (drafts[:1], [1])
  assert [(r["question"], r["reason"]) for r in chosen.dropped] == [
    ("b", "no_embedding"),
    ("c", "no_embedding"),
  ]
