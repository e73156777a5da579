"""A run compared with plain SFT, on files as `train` and `evaluate` write them."""

import json

import pytest

from raft_jax import errors
from raft_jax.reporting import run_page, sft_comparison
from tests.helpers import file_trees

ITEMS = 40
BASE_LOSS = 2.5


def _fill(output, method, *, loss, drift, items="a" * 64):
  """An evaluated run whose items all have nearly the same scores."""
  spread = [0.1 if i % 2 else -0.1 for i in range(ITEMS)]

  def item_scores(base, trained):
    of_base = None if base is None else [base + s for s in spread]
    of_trained = [trained + (s if base is not None else 0.0) for s in spread]
    return {"items": items, "weights": None, "base": of_base, "trained": of_trained}

  def score(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": ITEMS}

  files = {
    "config/train.yaml": f"method: {method}\n",
    "metrics.jsonl": "".join(
      json.dumps({"step": s, "split": "train", "values": {"step_seconds": 5.0}}) + "\n"
      for s in range(1, 13)
    ),
    "evaluation/scores.json": json.dumps(
      {
        "scores": {
          "base": {"held_out_loss": score(BASE_LOSS)},
          "trained": {"held_out_loss": score(loss)},
        },
        "retention": {},
        "drift": score(drift),
        "weight_distance": {"mean": 0.01, "tensors": {}},
      }
    ),
    "evaluation/items.json": json.dumps(
      {
        "held_out_loss": item_scores(BASE_LOSS, loss),
        "drift": item_scores(None, drift),
      }
    ),
  }
  return file_trees.write(output, files)


def test_drift_of_sft_is_read_at_the_loss_of_the_run(tmp_path):
  run = _fill(tmp_path / "raft", "raft", loss=2.1, drift=0.05)
  sft = _fill(tmp_path / "sft", "sft", loss=1.9, drift=0.3)
  compared = sft_comparison.compare(run, sft)
  row = compared.drift_at_equal_loss
  # The line from the base model (2.5, 0) to SFT (1.9, 0.3), at 2.1.
  assert row.sft["value"] == pytest.approx(0.2)
  assert row.gap["value"] == pytest.approx(0.05 - 0.2)
  assert compared.loss == pytest.approx(1.9)
  page = run_page.write(run, sft=sft).read_text()
  text = " ".join(page.replace("<b>", "").replace("</b>", "").split())
  assert "Plain SFT drifts 0.200 nats per token where it fits the test" in text
  assert (
    "held-out loss of 1.900 and a drift of 0.300, and trained in 1 min 00 s" in text
  )
  assert "Beside plain SFT" in text
  assert "Plain SFT" not in run_page.write(run).read_text()


def test_sft_that_fits_worse_has_no_drift_at_equal_loss(tmp_path):
  run = _fill(tmp_path / "raft", "raft", loss=2.1, drift=0.05)
  sft = _fill(tmp_path / "sft", "sft", loss=2.3, drift=0.3)
  assert sft_comparison.compare(run, sft).drift_at_equal_loss is None
  assert "never fits the test questions as well" in run_page.write(
    run, sft=sft
  ).read_text().replace("\n", " ")


def test_runs_that_cannot_be_compared_are_named(tmp_path):
  run = _fill(tmp_path / "raft", "raft", loss=2.1, drift=0.05)
  lora = _fill(tmp_path / "lora", "lora", loss=1.9, drift=0.3)
  other = _fill(tmp_path / "other", "sft", loss=1.9, drift=0.3, items="b" * 64)
  for folder, words in (
    (tmp_path / "none", "none holds no scores"),
    (lora, "lora is a run of method 'lora'; name a run of method: sft"),
    (other, "measured held_out_loss on different items"),
  ):
    with pytest.raises(errors.UserError, match=words):
      sft_comparison.compare(run, folder)
  assert sft_comparison.compare(tmp_path / "none", other) is None
