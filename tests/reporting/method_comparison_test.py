"""Methods against SFT on hand-made items, worked out by hand."""

import json

import numpy as np
import pytest

from raft_jax import errors
from raft_jax.reporting import (
  method_comparison,
  sweep_page,
  sweep_results,
)
from tests.helpers import sweep_rows

QUESTIONS, PROMPTS = 40, 30
RNG = np.random.default_rng(0)
HARD = RNG.normal(0.0, 0.5, QUESTIONS)  # how hard each question is
FAR = RNG.exponential(1.0, PROMPTS)  # how easily each prompt drifts
FAR /= FAR.mean()


def _items(values, base, items: str) -> dict:
  base, trained = (
    None if scores is None else [float(score) for score in scores]
    for scores in (base, values)
  )
  return {"items": items, "base": base, "trained": trained, "weights": None}


def _run(
  name, method, loss, drift, *, passed=0.5, validation=None, **overrides
) -> dict:
  passes = (np.arange(20) < 20 * passed).astype(float)
  score = {"value": loss, "low": loss, "high": loss, "n": QUESTIONS}
  trained = {"held_out_loss": score}
  if validation is not None:
    trained["validation_loss"] = {**score, "value": validation}
  return sweep_rows.run(
    name,
    method,
    base={
      "held_out_loss": {**score, "value": 4.0},
      "ifeval_prompt_strict": {"value": 0.8, "low": 0.6, "high": 0.9, "n": 20},
    },
    trained={
      **trained,
      "ifeval_prompt_strict": {"value": passed, "low": 0.0, "high": 1.0, "n": 20},
    },
    drift={"value": drift, "low": drift, "high": drift, "n": PROMPTS},
    overrides=overrides,
    items={
      "held_out_loss": _items(loss + HARD, 4.0 + HARD, "questions"),
      "drift": _items(drift * FAR, None, "prompts"),
      "ifeval_prompt_strict": _items(passes, np.arange(20) < 16, "orders"),
    },
  )


def _rate(rate: float, seed: int = 0) -> dict:
  return {"train.learning_rate": rate, "train.seed": seed}


RUNS = [
  _run("sft-low", "sft", 3.5, 0.05, passed=0.7, validation=3.6, **_rate(1e-5)),
  _run("sft-high-seed_0", "sft", 3.0, 0.15, validation=3.1, **_rate(2e-5)),
  _run("sft-high-seed_1", "sft", 3.0, 0.25, validation=3.1, **_rate(2e-5, 1)),
  _run("raft-low", "raft", 3.25, 0.06, passed=0.8, validation=3.3, **_rate(2e-5)),
  _run("raft-high", "raft", 2.9, 0.1, passed=0.6, validation=3.0, **_rate(5e-5)),
]


def test_each_method_stands_at_the_rate_that_validation_chose():
  rows = method_comparison.methods({"law": RUNS})
  assert [(row.label, row.seeds) for row in rows] == [
    ("base model", 1),
    ("sft", 2),
    ("raft", 1),
  ]
  base, sft, raft = (row.cells for row in rows)
  assert base["drift"] == {"value": 0.0, "low": 0.0, "high": 0.0}
  assert sft["drift"]["value"] == pytest.approx(0.2)  # the mean of two seeds
  assert raft["held_out_loss"]["value"] == pytest.approx(2.9 + HARD.mean())
  assert "mmlu" not in raft


def test_methods_are_compared_with_sft_item_by_item():
  (sft, raft) = method_comparison.against_sft({"law": RUNS})
  loss = raft.cells["held_out_loss"]
  # All questions are 0.1 better, hard or not: the difference is certain.
  assert [loss[k] for k in ("value", "low", "high")] == pytest.approx([-0.1] * 3)
  assert raft.cells["ifeval_prompt_strict"]["value"] == pytest.approx(0.1)
  kept = raft.cells["retained_ifeval_prompt_strict"]
  assert kept["value"] == pytest.approx(100 * 0.6 / 0.8)
  assert kept["low"] < kept["value"] < kept["high"]
  assert set(sft.cells) == {"retained_ifeval_prompt_strict"}


def test_at_equal_fit_the_line_through_sft_is_read_off():
  low, high = method_comparison.at_equal_fit({"law": RUNS})
  # 3.25 lies halfway between SFT's 3.5 (drift 0.05, passed 0.7) and 3.0 (0.2, 0.5).
  cells = low.cells
  assert low.label == "raft-low"
  assert cells["sft_drift"]["value"] == pytest.approx(0.125)
  assert cells["gap_drift"]["value"] == pytest.approx(0.06 - 0.125)
  # Every prompt's share of the gap is the same, and no loss of the questions matters.
  far = cells["gap_drift"]["high"] / cells["drift"]["low"]
  assert far == pytest.approx((0.06 - 0.125) / 0.06)
  assert cells["sft_ifeval_prompt_strict"]["value"] == pytest.approx(0.6)
  assert cells["gap_ifeval_prompt_strict"]["value"] == pytest.approx(0.2)
  # A better fit than any run of SFT has no place on the line.
  assert high.label == "raft-high"
  assert "gap_drift" not in high.cells


def test_tasks_of_the_harness_are_compared_where_more_is_better():
  runs = json.loads(json.dumps(RUNS))
  for run in runs:
    run["items"]["task_quiz_acc"] = run["items"]["ifeval_prompt_strict"]
    run["items"]["task_books_bits_per_byte"] = run["items"]["drift"]
    run["scores"]["retention"] = {"task_quiz_acc": {}}
  (low, _) = method_comparison.at_equal_fit({"law": runs})
  assert low.cells["gap_task_quiz_acc"] == low.cells["gap_ifeval_prompt_strict"]
  assert "gap_task_books_bits_per_byte" not in low.cells
  equal = sweep_page.tables({"law": runs})[-1]
  assert "quiz acc" in [column.heading for column in equal.columns]


def test_choices_are_compared_as_scores_of_the_domain():
  runs = json.loads(json.dumps(RUNS))
  for run in runs:
    right = np.arange(QUESTIONS) < (36 if run["method"] == "raft" else 24)
    run["items"]["choice"] = _items(right, np.arange(QUESTIONS) < 10, "choices")
  raft = method_comparison.against_sft({"law": runs})[-1]
  assert raft.cells["choice"]["value"] == pytest.approx(0.3)
  assert 0.1 < raft.cells["choice"]["low"] < 0.3 < raft.cells["choice"]["high"] < 0.5
  assert "retained_choice" not in raft.cells
  headings = [[c.heading for c in t.columns] for t in sweep_page.tables({"law": runs})]
  assert any("choice" in columns for columns in headings)


def test_domains_are_averaged_where_all_have_a_setting():
  other = [
    _run("sft-low", "sft", 3.5, 0.05, **_rate(1e-5)),
    _run("raft-low", "raft", 3.75, 0.075, **_rate(2e-5)),
  ]
  rows = method_comparison.at_equal_fit({"law": RUNS, "web": other})
  assert [row.label for row in rows] == ["raft-low"]
  # In the other domain SFT has 0.025 there, RAFT 0.05 more; in law it has 0.065 less.
  assert rows[0].cells["gap_drift"]["value"] == pytest.approx((0.05 - 0.065) / 2)
  alone = method_comparison.against_sft({"law": RUNS, "web": RUNS[:3]})
  assert [row.label for row in alone] == ["sft"]


def test_runs_on_other_items_are_not_compared(tmp_path):
  other = json.loads(json.dumps(RUNS))
  other[2]["items"]["drift"]["items"] = "other prompts"
  (tmp_path / "sweep.json").write_text(json.dumps(other))
  with pytest.raises(
    errors.UserError, match="sft-low and sft-high-seed_1 measured drift on different"
  ):
    sweep_results.read(tmp_path)


def test_the_line_of_sft_is_its_learning_rates_alone():
  anchored = _run("l2sp", "sft", 3.25, 0.01, anchor="{}", **_rate(2e-5))
  broken = _run("sft-broken", "sft", 3.3, 2.0, **_rate(1e-3))
  *raft, other, far = method_comparison.at_equal_fit({"law": [*RUNS, anchored, broken]})
  assert raft == method_comparison.at_equal_fit({"law": RUNS})
  assert (other.label, far.label) == ("l2sp", "sft-broken")
  # Halfway between 0.05 and the mean of 0.15 and 0.25.
  assert other.cells["gap_drift"]["value"] == pytest.approx(0.01 - 0.125)


def test_seeds_of_another_key_are_settings():
  runs = [
    _run(
      f"raft-seed_{a}-seed_{b}", "raft", 3.0, 0.1, **{"refine.seed": a} | _rate(1, b)
    )
    for a in (0, 1)
    for b in (0, 1)
  ]
  labels = [(label, len(same)) for label, same in sweep_results.settings(runs)]
  assert labels == [("raft-seed_0", 2), ("raft-seed_1", 2)]


def test_a_base_model_that_may_score_nothing_has_no_interval_of_what_is_kept():
  runs = json.loads(json.dumps(RUNS))
  for run in runs:
    run["items"]["ifeval_prompt_strict"]["base"] = [1.0] + [0.0] * 19
  (sft, *_) = method_comparison.against_sft({"law": runs})
  assert sft.cells["retained_ifeval_prompt_strict"] == {"value": 1000.0}


def test_a_score_that_one_seed_lacks_is_that_of_the_others():
  runs = json.loads(json.dumps(RUNS))
  again = _run("raft-low-seed_1", "raft", 3.35, 0.1, passed=0.8, **_rate(2e-5, 1))
  del again["items"]["ifeval_prompt_strict"]
  (row, _) = method_comparison.at_equal_fit({"law": [*runs, again]})
  assert row.seeds == 2
  assert row.cells["fit_drift"]["value"] == pytest.approx(3.3 + HARD.mean())
  assert row.cells["drift"]["value"] == pytest.approx(0.08)
  # And stands beside SFT at the held-out loss of those others alone.
  assert row.cells["fit_ifeval_prompt_strict"]["value"] == pytest.approx(
    3.25 + HARD.mean()
  )
  assert row.cells["gap_ifeval_prompt_strict"]["value"] == pytest.approx(0.2)


def test_a_folder_of_domains_is_one_comparison(tmp_path):
  for domain in ("law", "web"):
    (tmp_path / domain).mkdir()
    (tmp_path / domain / "sweep.json").write_text(json.dumps(RUNS))
  assert sweep_results.exist(tmp_path)
  assert not sweep_results.exist(tmp_path / "law" / "none")
  page = sweep_page.write(tmp_path).read_text()
  for heading in (
    "<h2>law</h2>",
    "<h2>web</h2>",
    "At equal loss: drift, mean of 2 domains",
    "At equal loss: IFEval, mean of 2 domains",
  ):
    assert heading in page
  # Labels lead to the config of a run.
  assert 'href="#law/raft-low"' in page
  assert 'id="law/raft-low"' in page
  lines = (tmp_path / "comparison.md").read_text().splitlines()
  assert "### Methods as curves, mean of 2 domains" in lines
  assert "### web: All settings" in lines
