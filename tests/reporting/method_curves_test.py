"""Methods as curves on hand-made scores, whose numbers are worked out by hand."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from raft_jax import sweep
from raft_jax.reporting import method_curves, sweep_page, sweep_plots, sweep_results
from tests.helpers import sweep_rows

QUESTIONS, PROMPTS = 20, 10


def _run(group, rate, loss, drift, *, seed=0, method=None, **more) -> dict:
  """A run whose items all have the same score, so that intervals are over seeds alone.

  Its held-out loss is 1 below its validation loss.
  """
  items = {
    "validation_loss": _items(4.0, loss, QUESTIONS),
    "held_out_loss": _items(3.0, loss - 1.0, QUESTIONS),
    "drift": _items(None, drift, PROMPTS),
  }
  scores = {
    model: {
      name: {"value": items[name][model][0]}
      for name in ("validation_loss", "held_out_loss")
    }
    for model in ("base", "trained")
  }
  overrides = {"train.learning_rate": rate, "train.seed": seed}
  run = sweep_rows.run(
    f"{group}-learning_rate_{rate}-seed_{seed}",
    method or group,
    base=scores["base"],
    trained=scores["trained"],
    drift={"value": drift},
    overrides=overrides,
    items=items,
  )
  return run | more


def _items(base, trained, count) -> dict:
  base = None if base is None else [base] * count
  return {"items": f"{count}", "base": base, "trained": [trained] * count} | {
    "weights": None
  }


SFT = [
  _run("sft", 1e-5, 3.5, 0.04),
  _run("sft", 2e-5, 3.1, 0.15, seed=0),
  _run("sft", 2e-5, 3.1, 0.25, seed=1),
]
RAFT = [_run("raft", 5e-5, 3.0, 0.10), _run("raft", 2e-5, 3.3, 0.06)]


def _headlines(*runs, **domains):
  rows = method_curves.headlines(domains or {"law": [*SFT, *runs]})
  return {row.label: row.cells for row in rows}


def test_drift_is_read_off_the_curve_at_the_lowest_loss_of_sft():
  cells = _headlines(*RAFT, _run("opd", 2e-5, 3.2, 0.02))
  # SFT's lowest is 3.1, two thirds of the way from RAFT's 3.3 (0.06) to 3.0 (0.10).
  drift = 0.06 + 0.04 * 2 / 3
  assert cells["raft"]["drift_at_best"] == pytest.approx(
    {"value": drift, "low": drift, "high": drift}
  )
  assert cells["raft"]["settings"] == {"value": 2}
  assert cells["opd"]["drift_at_best"] == {"text": "not reached"}
  assert cells["opd"]["best_fit"]["value"] == pytest.approx(3.2)


def test_held_out_loss_is_read_off_the_curve_at_the_drift_limit():
  cells = _headlines(*RAFT)
  # From 0.04 (2.5) to the mean of both seeds at 0.2 (2.1): 0.05 is a sixteenth.
  assert cells["sft"]["loss_at_limit"]["value"] == pytest.approx(2.5 - 0.4 / 16)
  assert "note" not in cells["sft"]["loss_at_limit"]
  # From the base model (3.0) to 0.06 (2.3): 0.05 is five sixths.
  at_limit = cells["raft"]["loss_at_limit"]
  assert at_limit["value"] == pytest.approx(3.0 - 0.7 * 5 / 6)
  assert at_limit["note"] == "on the line from the base model"


def test_intervals_are_over_seeds_too():
  drift = _headlines()["sft"]["drift_at_best"]
  # Two draws of the seeds 0.15 and 0.25 have the mean 0.15 or 0.25 in a quarter each.
  assert drift == pytest.approx({"value": 0.2, "low": 0.15, "high": 0.25})


def test_a_loss_that_some_resamples_do_not_reach_is_said_so():
  seeds = [
    _run("raft", 5e-5, loss, 0.1, seed=seed) for seed, loss in enumerate((3.0, 3.2))
  ]
  cell = _headlines(*seeds)["raft"]["drift_at_best"]
  assert cell["value"] == pytest.approx(0.1)
  # In a quarter of the resamples both draws are the second seed, whose loss is 3.2.
  assert cell["note"].startswith("reached in 75 % of resamples")


def test_a_curve_that_turns_back_has_its_least_drift():
  overfit = [_run("raft", 1e-5, 3.0, 0.1), _run("raft", 1e-4, 3.4, 0.3)]
  cell = _headlines(*overfit)["raft"]["drift_at_best"]
  # 3.1 is nine tenths of the way from the base model (4.0) to 3.0, and reached again
  # between 0.1 and 0.3.
  assert cell["value"] == pytest.approx(0.09)


def test_held_out_losses_take_the_place_of_validation_losses():
  runs = json.loads(json.dumps([*SFT, *RAFT]))
  for run in runs:
    del run["items"]["validation_loss"]
  assert method_curves.fit_measure({"law": [*SFT, *RAFT]}).name == "validation_loss"
  assert method_curves.fit_measure({"law": runs}).name == "held_out_loss"
  assert _headlines(law=runs)["raft"]["drift_at_best"]["value"] == pytest.approx(
    _headlines(*RAFT)["raft"]["drift_at_best"]["value"]
  )
  without_sft = _headlines(law=runs[3:])["raft"]
  assert "drift_at_best" not in without_sft
  assert "loss_at_limit" in without_sft


def test_costs_are_multiples_of_sft():
  costs = [{"step_seconds": 2.0, "host_peak_bytes": 4}, {"step_seconds": 4.0}]
  sft = [run | {"cost": cost} for run, cost in zip(SFT, costs)]
  raft = RAFT[0] | {"cost": {"step_seconds": 6.0}}
  cells = _headlines(law=[*sft, raft])
  assert cells["raft"]["seconds"] == {"value": 2.0}  # 6 s beside a median of 3 s
  assert cells["raft"]["memory"] == {"text": "not measured"}
  assert cells["sft"]["memory"] == {"value": 1.0}


def test_domains_are_averaged_and_each_must_reach_the_loss():
  web = [*SFT, _run("raft", 2e-5, 3.1, 0.04)]
  cells = _headlines(law=[*SFT, *RAFT], web=web)
  drift = 0.06 + 0.04 * 2 / 3
  assert cells["raft"]["drift_at_best"]["value"] == pytest.approx((drift + 0.04) / 2)
  short = [*SFT, _run("raft", 2e-5, 3.2, 0.04)]
  cells = _headlines(law=[*SFT, *RAFT], web=short)
  assert cells["raft"]["drift_at_best"] == {"text": "not reached"}


def test_rates_and_steps_are_one_method_and_other_keys_are_others():
  runs = []
  for k in (64, 512):
    for steps in (75, 375):
      run = _run("raft", 1e-5, 3.0, 0.1)
      keys = {"distill.top_k": k, "train.max_steps": steps}
      name = f"raft-top_k_{k}-max_steps_{steps}-learning_rate_1e-05-seed_0"
      runs.append(run | {"name": name, "set": run["set"] | keys})
  methods = sweep_results.methods([*SFT, *runs])
  assert {label: len(settings) for label, settings in methods.items()} == {
    "sft": 2,
    "raft-top_k_64": 2,
    "raft-top_k_512": 2,
  }


def test_methods_of_one_name_are_told_apart():
  one = [_run("raft", 1e-5, 3.0, 0.1), _run("raft", 2e-5, 3.0, 0.1)]
  other = _run("raft", 5e-5, 3.0, 0.1)
  other["set"] |= {"balance.mode": "fixed"}
  methods = sweep_results.methods([*one, other])
  assert {label: len(settings) for label, settings in methods.items()} == {
    "raft": 2,
    "raft-learning_rate_5e-05": 1,
  }


def test_a_seed_without_drift_does_not_count():
  extra = json.loads(json.dumps(_run("sft", 2e-5, 2.0, 0.0, seed=2)))
  del extra["items"]["drift"]
  extra["scores"]["drift"] = {}
  assert _headlines(extra)["sft"] == _headlines()["sft"]


def test_the_frontier_joins_the_means_in_the_order_of_drift():
  curves = method_curves.points({"law": [*SFT, *RAFT]})
  assert curves["raft"] == [(0.0, 3.0), (0.06, 2.3), (0.1, 2.0)]
  assert curves["sft"] == [(0.0, 3.0), (0.04, 2.5), (0.2, pytest.approx(2.1))]
  # Settings that only one domain has are left out of the mean.
  web = [_run("sft", 1e-5, 3.3, 0.06), RAFT[0]]
  assert method_curves.points({"law": [*SFT, *RAFT], "web": web}) == {
    "sft": [(0.0, 3.0), (0.05, pytest.approx(2.4))],
    "raft": [(0.0, 3.0), (0.1, 2.0)],
  }
  axes = Figure().subplots()
  sweep_plots.frontier({"law": [*SFT, *RAFT]})(axes)
  lines = {
    line.get_label(): np.stack(line.get_data(), axis=-1).tolist() for line in axes.lines
  }
  assert lines["raft"] == [[0.06, 2.3], [0.1, 2.0]]
  assert lines["base model"] == [[0.0, 3.0]]
  assert sweep_plots.frontier({"law": [run | NO_DRIFT for run in RAFT]}) is None


NO_DRIFT = {"scores": RAFT[0]["scores"] | {"drift": {}}}


def test_the_page_has_the_frontier_as_pictures_and_tables(tmp_path):
  (tmp_path / "sweep.json").write_text(json.dumps([*SFT, *RAFT]))
  page = sweep_page.write(tmp_path).read_text()
  assert "drift at SFT&#39;s lowest validation loss" in page
  assert 'aria-label="Held-out loss over drift' in page
  text = (tmp_path / "comparison.md").read_text()
  assert text.startswith("![held-out loss over drift](frontier.png)")
  row = next(line for line in text.splitlines() if line.startswith("| raft | 2 |"))
  assert "; on the line from the base model |" in row
  assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
  drawing = (tmp_path / "frontier.svg").read_text()
  assert 'xmlns="http://www.w3.org/2000/svg"' in drawing
  assert "#2563b0" in drawing
  assert "var(--" not in drawing


def test_a_terminal_shows_the_curves(monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "80")
  sweep.show_curves("law", [*SFT, _run("opd", 2e-5, 3.2, 0.02)])
  shown = capsys.readouterr().out
  assert max(map(len, shown.splitlines())) <= 80
  assert "not reached" in " ".join(shown.split())
  sweep.show_curves("law", [run | NO_DRIFT for run in RAFT])
  assert capsys.readouterr().out == ""
