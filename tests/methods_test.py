"""The table of methods."""

import pytest

from raft_jax import errors, methods, records


def test_each_method_says_what_it_reads_and_whether_it_distills():
  said = {
    name: (method.refined, method.distills) for name, method in methods.METHODS.items()
  }
  assert said == {
    "sft": (False, False),
    "fused_sft": (True, False),
    "raft": (True, True),
  }
  assert methods.get("raft") is methods.METHODS["raft"]


def test_methods_on_refined_records_learn_the_chosen_answer():
  question = records.Question(
    "q1", "law", (records.Message("user", "What is a tort?"),), "the original"
  )
  refined = records.Refined(
    question, "the rewrite", 0.9, (), "the fused answer", "fused", "accepted"
  )
  for method in methods.METHODS.values():
    assert method.answer(refined) == "the fused answer"


@pytest.mark.parametrize(
  ("name", "hint"),
  [
    ("rfat", "did you mean 'raft'?"),
    ("fused-sft", "did you mean 'fused_sft'?"),
    ("SFT!", "known: sft, fused_sft, raft"),
    ("", "known: sft, fused_sft, raft"),
  ],
)
def test_an_unknown_method_is_named_with_the_nearest(name, hint):
  with pytest.raises(errors.UserError) as caught:
    methods.get(name)
  assert str(caught.value) == f"method: unknown method {name!r}; {hint}"
