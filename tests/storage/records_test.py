"""Refined records keep their canonical JSON."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from raft_jax import errors
from raft_jax.storage import records

QUESTION = records.Question("a", "law", (records.Message("user", "Q"),), "y")
REFINED = records.Refined(
  question=QUESTION,
  rewrite="ỹ",
  similarity=0.1 + 0.2,
  rounds=(
    records.Round("one", (0.5, None), 0.5),
    records.Round("two", (None, None), None),
  ),
  answer="one",
  chosen="fused",
  reason="best_round",
)


def test_refined_golden_json():
  # Written by hand from the fields above: keys sorted, no spaces, UTF-8 kept.
  assert records.to_json(REFINED).decode() == (
    '{"answer":"one","chosen":"fused","question":{"answer":"y","domain":"law","id":"a",'
    '"messages":[{"content":"Q","role":"user"}]},"reason":"best_round",'
    '"rewrite":"ỹ","rounds":[{"mean":0.5,"scores":[0.5,null],"text":"one"},'
    '{"mean":null,"scores":[null,null],"text":"two"}],"similarity":0.30000000000000004}'
  )


SCORES = st.none() | st.floats(0, 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@hypothesis.given(
  st.builds(
    records.Refined,
    question=st.builds(
      records.Question,
      id=TEXTS,
      domain=TEXTS,
      messages=st.lists(st.builds(records.Message, TEXTS, TEXTS)).map(tuple),
      answer=TEXTS,
    ),
    rewrite=TEXTS,
    similarity=SCORES,
    rounds=st.lists(
      st.builds(
        records.Round, text=TEXTS, scores=st.lists(SCORES).map(tuple), mean=SCORES
      )
    ).map(tuple),
    answer=TEXTS,
    chosen=TEXTS,
    reason=TEXTS,
  )
)
def test_refined_round_trip(refined):
  data = records.to_json(refined)
  assert records.from_json(data) == refined
  assert records.to_json(records.from_json(data)) == data


def test_refined_refuses_nan_and_surrogates():
  with pytest.raises(ValueError):
    records.to_json(dataclasses.replace(REFINED, similarity=float("nan")))
  with pytest.raises(ValueError):
    records.to_json(dataclasses.replace(REFINED, rewrite="\ud800"))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"question": 3}', b"\xff"])
def test_refined_refuses_other_json(data):
  with pytest.raises(errors.UserError, match="not a refined record"):
    records.from_json(data)
