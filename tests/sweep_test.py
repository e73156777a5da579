"""A sweep of tiny runs through the real stages: made, resumed, collected."""

import json
import pathlib
import subprocess
import sys

import pytest

from raft_jax import errors, sweep
from raft_jax.config import load as config_load
from raft_jax.config import sweep_runs
from raft_jax.reporting import sweep_collection
from tests.helpers import sweep_rows, tiny_run

SWEEP = """
sweep:
  stages: [refine, train, evaluate]
  runs:
    - {name: fused, set: {method: fused_sft}, over: {train.seed: [0, 1]}}
    - {name: sft, set: {method: sft, train.learning_rate: 1.0e+30, train.clip: null}}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory, smollm, law) -> pathlib.Path:
  """A run's file with a sweep of three runs."""
  folder = tmp_path_factory.mktemp("sweep")
  source = str(tiny_run.save_model(folder / "model", smollm))
  path = folder / "run.yaml"
  tiny_run.write_config(
    path,
    source,
    folder / "runs",
    questions=str(law / "train.jsonl"),
    test=str(law / "test.jsonl"),
    limit="4",
    max_prompt_tokens="96",
    max_answer_tokens="96",
  )
  path.write_text(
    path.read_text().replace("encoder:", "rewriter: {max_new_tokens: 4}, encoder:")
    + "train: {max_steps: 2, batch_size: 2}\nrollout: {max_new_tokens: 4}\n"
    + "distill: {top_k: 8}\n"
    + SWEEP
  )
  return path


def test_every_run_is_named_and_set(file):
  base = config_load.load(file)
  runs = sweep_runs.expand(base)
  assert [run.name for run in runs] == [
    "fused-seed_0",
    "fused-seed_1",
    "sft",
  ]
  assert [run.group for run in runs] == ["fused", "fused", "sft"]
  assert (runs[1].config.method, runs[1].config.train.seed) == ("fused_sft", 1)
  assert runs[2].config.train.learning_rate == 1e30
  output = pathlib.Path(base.output)
  assert {pathlib.Path(run.config.output).parent for run in runs} == {output}
  assert runs[0].config.evaluate.journal == str(output / "evaluation.jsonl")
  own = sweep_runs.expand(config_load.load(file, ["evaluate.journal=mine.jsonl"]))
  assert own[0].config.evaluate.journal == "mine.jsonl"


def test_what_cannot_run_is_named_before_anything_runs(file):
  def expand(*overrides: str):
    return sweep_runs.expand(config_load.load(file, overrides))

  with pytest.raises(errors.UserError, match=r"'x'.*train\.sed.*train\.seed"):
    expand('sweep.runs=[{"name": "x", "set": {"train.sed": 1}}]')
  with pytest.raises(errors.UserError, match="two runs are named 'x'"):
    expand('sweep.runs=[{"name": "x"}, {"name": "x"}]')
  for key, value in (("evaluate.limit", 2), ("data.test", '"other.jsonl"')):
    with pytest.raises(errors.UserError, match=rf"'x': {key}: .*on the same items"):
      expand(f'sweep.runs=[{{"name": "x", "set": {{"{key}": {value}}}}}]')
  expand('sweep.runs=[{"name": "x", "set": {"evaluate.ifeval.items": null}}]')
  with pytest.raises(errors.UserError, match="no run is named"):
    expand("sweep.runs=[]")
  with pytest.raises(errors.UserError, match=r"sweep\.only: 9"):
    sweep.main(config_load.load(file, ["sweep.only=9"]))
  for key, value in (("refine.encoder", "nowhere"), ("data.max_prompt_tokens", "1")):
    with pytest.raises(errors.UserError, match=key):
      sweep.main(config_load.load(file, [f"{key}={value}", "output=absent"]))
  assert not pathlib.Path("absent").exists()


def _sweep(file, *overrides: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "raft_jax.sweep", "--config", str(file), *overrides]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_sweep_is_run_resumed_and_collected(file):
  output = pathlib.Path(config_load.load(file).output)
  one = _sweep(file, "sweep.only=2")
  assert one.returncode == 0, one.stderr
  assert [row["name"] for row in json.loads((output / "sweep.json").read_text())] == [
    "fused-seed_1"
  ]
  journal = (output / "evaluation.jsonl").read_bytes()

  whole = _sweep(file)
  assert whole.returncode == 2
  assert "run 2 of 3, fused-seed_1: finished before" in whole.stdout
  # One run diverged: it is named, and the others are done all the same.
  assert "1 of 3 runs failed: sft" in whole.stderr
  rows = {row["name"]: row for row in json.loads((output / "sweep.json").read_text())}
  assert list(rows) == ["fused-seed_0", "fused-seed_1"]
  assert rows["fused-seed_0"]["set"] == {"method": "fused_sft", "train.seed": 0}
  for row in rows.values():
    assert row["cost"]["step_seconds"] > 0
    assert 0.1 < row["cost"]["host_peak_bytes"] / 2**30 < 20  # jax alone takes a tenth
  # Both learn from refined answers, which were made once.
  assert len(list(output.glob("refined-*/refined"))) == 1
  # The base model was measured by the first run only: one line a batch of two kinds.
  base = [row["scores"]["scores"]["base"] for row in rows.values()]
  assert all(scores == base[0] for scores in base)
  assert (output / "evaluation.jsonl").read_bytes().startswith(journal)

  again = _sweep(file, "sweep.only=1")
  assert "run 1 of 1, fused-seed_0: finished before" in again.stdout
  assert "not finished with these settings: sft" in again.stdout

  # Scores of other settings than the file has now are not collected.
  changed = config_load.load(file, ["train.learning_rate=0.5", "sweep.stages=[refine]"])
  assert (
    sweep_collection.collect(sweep_runs.expand(changed), changed.sweep.stages) == []
  )


def test_its_table_fits_a_terminal(monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "80")
  score = {"value": 1.0, "low": 0.5, "high": 1.5}
  names = [*sweep.SHOWN, *(f"other_{i}" for i in range(9))]
  scores = dict.fromkeys(names, score)
  runs = [
    sweep_rows.run(name, "sft", base=scores, trained=s, drift=score, overrides={})
    for name, s in (("sft-learning_rate_1e-05", scores), ("bare", {}))
  ]
  sweep.show(runs)
  shown = capsys.readouterr().out
  assert max(map(len, shown.splitlines())) <= 80
  assert "other" not in shown
  assert shown.count("0.500–1.500") == 2 * len(sweep.SHOWN) + 2
  # A long name is folded, not cut.
  assert "…" not in shown
