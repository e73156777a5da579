"""Runs side by side, on collected scores whose table is worked out by hand."""

import json

import pytest
from matplotlib.figure import Figure

from raft_jax import errors, report
from raft_jax.config import schema
from raft_jax.reporting import sweep_page, sweep_plots, sweep_results
from tests.helpers import sweep_rows


def _score(value: float) -> dict:
  return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}


def _run(name: str, method: str, loss: float, drift: float | None, **overrides) -> dict:
  return sweep_rows.run(
    name,
    method,
    base={"held_out_loss": _score(4.0), "mmlu": _score(0.3)},
    trained={"held_out_loss": _score(loss), "mmlu": _score(0.27)},
    drift={} if drift is None else _score(drift),
    overrides=overrides,
    retention={"mmlu": {"value": 90.0}},
  )


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


def _read(folder):
  return sweep_results.read(_write(folder))[folder.name]


def test_seeds_are_one_row_and_settings_are_many(tmp_path):
  rows = sweep_page.table(_read(tmp_path))
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
  rows = sweep_page.table(_read(tmp_path))
  # 3.25 lies halfway between SFT's 3.0 (0.15) and 3.5 (0.05).
  assert rows[3]["cells"]["sft_drift"]["value"] == pytest.approx(0.10)
  assert rows[1]["cells"]["sft_drift"]["value"] == pytest.approx(0.05)
  assert rows[4]["cells"]["sft_drift"] == {}  # fits better than any SFT run
  # Between the base model (4.0, 0) and the first run.
  curve = sweep_page.sft_curve(RUNS)
  assert sweep_page.drift_at(curve, 3.9) == pytest.approx(0.01)
  assert sweep_page.drift_at(curve, 4.1) is None
  assert sweep_page.drift_at(curve, None) is None


def test_page_and_markdown_show_what_was_measured(tmp_path):
  folder = _write(tmp_path)
  run = schema.Config.model_validate(
    {"model": {"source": "x"}, "data": {"questions": "x"}, "output": str(folder)}
  )
  report.main(run)
  page = (folder / "comparison.html").read_text()
  assert "&lt;far&gt;" in page
  assert "<far>" not in page
  # The frontier; over the loss MMLU (IFEval was not measured); over the learning rate
  # loss, drift and MMLU; no ratio of losses.
  assert page.count("<svg") == 5
  assert "Balance of the two losses" not in page
  lines = (folder / "comparison.md").read_text().splitlines()
  assert lines[2].endswith(": All settings")
  assert lines[4] == (
    "| run | held-out loss | MMLU | retention, % | drift | SFT drift at equal loss |"
    " weight distance |"
  )
  assert lines[9].startswith("| raft (2 seeds) | 3.250 (3.200 to 3.300) |")
  assert "| – | – |" in lines[10]  # no drift, and none of SFT at that fit


def test_settings_of_one_group_are_told_apart_and_a_group_of_rates_is_one():
  wide = [
    _run(f"raft-top_k_{k}-seed_{seed}", "raft", 3.0, 0.1, **keys)
    for k in (64, 128)
    for seed in (0, 1)
    for keys in [{"distill.top_k": k, "train.seed": seed}]
  ]
  groups = sweep_results.chosen([*RUNS[:2], *wide])
  assert list(groups) == ["sft", "raft-top_k_64", "raft-top_k_128"]
  assert [len(same) for same in groups.values()] == [1, 2, 2]


def test_measures_are_averaged_over_seeds_at_each_value_of_a_key():
  k = "distill.top_k"
  runs = [
    _run("sft-1", "sft", 3.5, 0.05, **{"train.learning_rate": 1e-5}),
    _run("k-64-seed_0", "raft", 3.0, None, **{k: 64, "train.seed": 0}),
    _run("k-64-seed_1", "raft", 3.2, None, **{k: 64, "train.seed": 1}),
    _run("k-4096", "raft", 2.0, None, **{k: 4096, "train.seed": 0}),
    _run("mode-a", "raft", 2.0, None, **{"balance.mode": "ema"}),
    _run("mode-b", "raft", 2.1, None, **{"balance.mode": "fixed"}),
    _run("replay", "replay", 2.1, None, replay={"share": 0.2}),
  ]
  for run, mass in zip(runs, (None, 0.9, 0.7, 0.99)):
    run |= {} if mass is None else {"support_mass": mass}
  plots = {(one.key, one.title): one.curves for one in sweep_plots.swept(runs)}
  assert {key for key, _ in plots} == {k}  # one value, a seed or a word is no sweep
  loss = plots[k, "Held-out loss, nats per token"]
  assert loss == {"k": [(64.0, pytest.approx(3.1)), (4096.0, 2.0)]}
  mass = plots[k, "Teacher's probability in the top K"]
  assert mass == {"k": [(64.0, pytest.approx(0.8)), (4096.0, 0.99)]}
  assert (k, "Drift from the base model, nats per token") not in plots


def test_ratios_of_the_losses_are_drawn_once_a_setting(tmp_path):
  seeds = [
    _run(f"raft-seed_{seed}", "raft", 3.0, None, **{"train.seed": seed})
    | {"ratio": [[1, 0.9], [2, 1.1]]}
    for seed in (0, 1)
  ]
  fixed = _run("fixed", "raft", 3.0, None) | {"ratio": [[1, 0.5], [2, 0.1]]}
  drawn = sweep_plots.drawings([*seeds, fixed, RUNS[0]])
  assert len(drawn["ratios"]) == 1
  assert drawn["ratios"][0].count("stroke-width: 1.2") == 2 * 2  # and in the legend
  assert sweep_plots.drawings(RUNS)["ratios"] == []


def test_what_was_seen_while_runs_trained_is_drawn_as_drift_over_loss(monkeypatch):
  shown = []
  monkeypatch.setattr(
    sweep_plots.run_plots, "svg", lambda draw: shown.append(_drawn(draw)) or ""
  )
  looked = RUNS[0] | {"looks": [[10, 3.8, 0.02], [20, 3.5, 0.05]]}
  assert sweep_plots.drawings([looked, *RUNS[1:]])["looks"] == [""]
  assert [("sft-learning_rate_1e-05", [3.8, 3.5], [0.02, 0.05])] in shown
  assert sweep_plots.drawings(RUNS)["looks"] == []


def _drawn(draw):
  """Label and points of each line of a panel."""
  axes = Figure().subplots()
  draw(axes)
  return [
    (line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in axes.lines
  ]


@pytest.mark.parametrize("runs", [[], [{"name": "x"}], {}], ids=str)
def test_damaged_collections_are_named(tmp_path, runs):
  with pytest.raises(errors.UserError, match=r"sweep\.json: cannot be read"):
    sweep_results.read(_write(tmp_path, runs))
