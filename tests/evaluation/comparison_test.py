"""Paired comparisons of two models, by hand."""

import numpy as np
import pytest

from raft_jax.evaluation import comparison, greedy_answers, intervals
from raft_jax.hf import chat


def test_difference_is_taken_item_by_item():
  losses = np.random.default_rng(2).normal(4.0, 3.0, 40)
  base = {"held_out_loss": intervals.ItemScores(losses)}
  trained = {"held_out_loss": intervals.ItemScores(losses - 0.25)}
  result = comparison.summarise(base, trained)
  paired = result["paired"]["held_out_loss"]
  # Every item fell by 0.25, so the difference is certain though the means are not.
  assert [paired[key] for key in ("difference", "low", "high")] == pytest.approx(
    [-0.25] * 3
  )
  score = result["scores"]["base"]["held_out_loss"]
  assert score["high"] - score["low"] > 1.0
  assert score["n"] == 40


def test_choices_of_an_earlier_evaluation_do_not_stay(tmp_path):
  compared = comparison.Comparison({}, {}, [], [{"id": "a"}], {})
  comparison.write(tmp_path, {}, compared)
  assert (tmp_path / "choice.jsonl").read_text() == '{"id": "a"}\n'
  comparison.write(tmp_path, {}, compared._replace(choices=[]))
  assert not (tmp_path / "choice.jsonl").exists()


def test_the_means_as_flat_names_for_trackers():
  base = {"rouge_l": intervals.ItemScores(np.array([0.25, 0.5]))}
  trained = {"rouge_l": intervals.ItemScores(np.array([0.5, 0.75]))}
  result = comparison.summarise(base, trained) | {
    "retention": {"rouge_l": {"value": 150.0}, "ifeval": {}},
    "drift": {"value": 0.125},
    "domain_drift": {"value": 0.25},
  }
  assert comparison.flat(result) == {
    "evaluation/base/rouge_l": 0.375,
    "evaluation/trained/rouge_l": 0.625,
    "evaluation/difference/rouge_l": 0.25,
    "evaluation/retention/rouge_l": 150.0,
    "evaluation/drift/mean": 0.125,
    "evaluation/drift/domain": 0.25,
  }


def test_what_is_kept_is_counted_where_the_base_model_is_right():
  def score(*passed):
    return {"mmlu": intervals.ItemScores(np.array(passed, float), share=True)}

  base, trained = score(1, 0, 1, 1), score(1, 1, 0, 1)
  prompts = [[1], [2], [3], [4]]
  digests = comparison.add_kept(base, trained, prompts)
  result = comparison.summarise(base, trained)
  assert result["scores"]["trained"]["mmlu_kept"]["value"] == pytest.approx(2 / 3)
  assert result["scores"]["trained"]["mmlu_kept"]["n"] == 3
  assert result["scores"]["base"]["mmlu_kept"]["value"] == 1.0
  # Two base models that are right on different questions are not compared.
  other = comparison.add_kept(score(1, 1, 1, 0), score(1, 1, 0, 1), prompts)
  assert digests.keys() == other.keys() == {"mmlu_kept"}
  assert digests != other
  wrong = score(0, 0, 0, 0)
  assert comparison.add_kept(wrong, score(1, 1, 1, 1), prompts) == {}
  assert "mmlu_kept" not in wrong


def test_answers_are_cut_to_the_tokens_of_the_shorter_one(smollm):
  tokenizer = chat.load(smollm)

  def answer(text):
    return greedy_answers.Answer(text, tokens=1, ended=True)

  base = [answer("It rains, and it snows, and it hails."), answer("Yes.")]
  trained = [answer("It rains."), answer("Yes, of course, it rains.")]
  cut, whole = comparison.at_same_length(base, trained, tokenizer=tokenizer)
  assert [whole[0], cut[1]] == ["It rains.", "Yes."]
  for pair in zip(cut, whole):
    assert len({len(chat.encode(tokenizer, text)) for text in pair}) == 1
  assert base[0].text.startswith(cut[0])
  assert trained[1].text.startswith(whole[1])
