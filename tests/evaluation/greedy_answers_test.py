"""Greedy answers that cannot be written."""

import pytest

from raft_jax import errors
from raft_jax.evaluation import greedy_answers, scoring
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.storage import journal
from tests.helpers import tiny_run


def test_logits_that_are_not_finite_end_the_evaluation(tmp_path, smollm):
  source = str(tiny_run.save_overflowing_model(tmp_path / "model", smollm))
  config = hf_load.load_config(source)
  model = scoring.eval_model(
    hf_load.load_params(source, config),
    config,
    chat.load(smollm),
    scoring.Settings(batch_size=2, dtype="float32", unroll=1),
    None,
  )
  path = tmp_path / "answers.jsonl"
  with (
    journal.open_journal(path) as log,
    pytest.raises(errors.UserError, match="ifeval: the model's logits are not finite"),
  ):
    greedy_answers.generate(model, [[1, 2]], log, max_new_tokens=3, name="ifeval")
  assert "ids" not in path.read_text()
