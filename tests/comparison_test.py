"""Runs side by side, on collected scores whose table is worked out by hand."""

import json

import pytest

from raft_jax import comparison, config, errors, report


def _score(value: float) -> dict:
  return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}


def _run(name: str, method: str, loss: float, drift: float | None, **overrides) -> dict:
  return {
    "name": name,
    "group": name.split("-")[0],
    "method": method,
    "set": overrides,
    "config_digest": "00",
    "scores": {
      "scores": {
        "base": {"held_out_loss": _score(4.0), "mmlu": _score(0.3)},
        "trained": {"held_out_loss": _score(loss), "mmlu": _score(0.27)},
      },
      "retention": {"mmlu": {"value": 90.0}},
      "drift": {} if drift is None else _score(drift),
      "weight_distance": {"mean": 0.001},
    },
  }


RUNS = [
  _run("sft-learning_rate_1e-05", "sft", 3.5, 0.05, **{"train.learning_rate": 1e-5}),
  _run("sft-learning_rate_2e-05", "sft", 3.0, 0.15, **{"train.learning_rate": 2e-5}),
  _run("raft-seed_0", "raft", 3.2, 0.04, **{"train.seed": 0}),
  _run("raft-seed_1", "raft", 3.3, 0.08, **{"train.seed": 1}),
  _run("<far>", "opd", 2.9, None),
]


def _write(folder, runs=RUNS):
  (folder / "sweep.json").write_text(json.dumps(runs))
  return folder


def test_seeds_are_one_row_and_settings_are_many(tmp_path):
  rows = comparison.table(comparison.read(_write(tmp_path)))
  assert [(row["label"], row["seeds"]) for row in rows] == [
    ("base model", 1),
    ("sft-learning_rate_1e-05", 1),
    ("sft-learning_rate_2e-05", 1),
    ("raft", 2),
    ("<far>", 1),
  ]
  cells = rows[3]["cells"]
  assert cells["held_out_loss"] == pytest.approx(
    {"value": 3.25, "low": 3.2, "high": 3.3}
  )
  assert cells["drift"] == pytest.approx({"value": 0.06, "low": 0.04, "high": 0.08})
  assert cells["mmlu_retention"]["value"] == 90.0
  assert rows[0]["cells"]["drift"] == {"value": 0.0}
  assert rows[1]["cells"]["drift"] == _score(0.05)


def test_drift_is_read_off_the_sft_curve_at_equal_fit(tmp_path):
  rows = comparison.table(comparison.read(_write(tmp_path)))
  # 3.25 lies halfway between SFT's 3.0 (0.15) and 3.5 (0.05).
  assert rows[3]["cells"]["sft_drift"]["value"] == pytest.approx(0.10)
  assert rows[1]["cells"]["sft_drift"]["value"] == pytest.approx(0.05)
  assert rows[4]["cells"]["sft_drift"] == {}  # fits better than any SFT run
  # Between the base model (4.0, 0) and the first run.
  curve = comparison.sft_curve(RUNS)
  assert comparison.drift_at(curve, 3.9) == pytest.approx(0.01)
  assert comparison.drift_at(curve, 4.1) is None
  assert comparison.drift_at(curve, None) is None


def test_page_and_markdown_show_what_was_measured(tmp_path):
  folder = _write(tmp_path)
  run = config.Config.model_validate(
    {"model": {"source": "x"}, "data": {"questions": "x"}, "output": str(folder)}
  )
  report.main(run)
  page = (folder / "comparison.html").read_text()
  assert "&lt;far&gt;" in page
  assert "<far>" not in page
  assert page.count("<svg") == 2  # drift and MMLU; IFEval was not measured
  lines = (folder / "comparison.md").read_text().splitlines()
  assert lines[0] == (
    "| run | held-out loss | MMLU | retention, % | drift | SFT at equal fit |"
    " weight distance |"
  )
  assert lines[5].startswith("| raft (2 seeds) | 3.250 (3.200 to 3.300) |")
  assert "| – | – |" in lines[6]  # no drift, and none of SFT at that fit


@pytest.mark.parametrize("runs", [[], [{"name": "x"}], {}], ids=str)
def test_damaged_collections_are_named(tmp_path, runs):
  with pytest.raises(errors.UserError, match=r"sweep\.json: cannot be read"):
    comparison.read(_write(tmp_path, runs))
