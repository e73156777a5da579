"""The runs that the shipped sweeps plan."""

import pathlib

import pytest

from raft_jax.config import load as config_load
from raft_jax.config import methods, schema, sweep_runs
from raft_jax.generation import sentence_encoder


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("reproduce", 33),
    ("top_k", 7),
    ("ablations", 19),
    ("methods", 29),
    ("long", 3),
    ("factors", 17),
    ("rivals", 140),
  ],
)
def test_the_shipped_sweeps_are_what_their_headers_say(name, count):
  path = pathlib.Path("configs/sweeps") / f"{name}.yaml"
  assert f"# {count} runs of" in path.read_text(encoding="utf-8")
  base = config_load.load(path)
  assert len(sweep_runs.expand(base)) == count
  if "evaluate" in base.sweep.stages:  # where there is no hub
    assert sentence_encoder.find(base.refine.encoder).is_dir()


@pytest.mark.parametrize("name", ["raft_paper", "raft_tuned"])
def test_the_presets_are_runs_of_the_reproduction(name):
  preset = config_load.load(pathlib.Path("configs") / f"{name}.yaml")
  runs = sweep_runs.expand(config_load.load("configs/sweeps/reproduce.yaml"))
  group = {"raft_paper": "raft", "raft_tuned": "raft_original"}[name]
  run = next(run.config for run in runs if run.group == group)
  # What is measured and kept on the way is no setting of a method, nor is where the
  # calls are kept, and IFEval's items come from outside.
  apart = {
    "refine": ("journal",),
    "train": ("checkpoint_every", "gradient_stats_every"),
  }
  for section in schema.Config.model_fields.keys() - {"output", "sweep", "evaluate"}:
    ours, theirs = getattr(preset, section), getattr(run, section)
    if section in apart:
      same = {key: getattr(ours, key) for key in apart[section]}
      theirs = theirs.model_copy(update=same)
    assert ours == theirs, section


def test_runs_of_a_sweep_have_its_folder_as_their_group_in_trackers(tmp_path):
  path = tmp_path / "sweep.yaml"
  questions = tmp_path / "q.jsonl"
  questions.write_text('{"question": "a", "answer": "b"}\n')
  path.write_text(
    f"""
model: {{source: "{tmp_path}"}}
data: {{questions: "{questions}"}}
output: "{tmp_path / "week7"}"
sweep: {{runs: [{{name: sft, set: {{method: sft}}, over: {{train.seed: [0, 1]}}}}]}}
"""
  )

  def groups(*overrides):
    runs = sweep_runs.expand(config_load.load(path, overrides))
    return {run.config.train.tracker_group for run in runs}

  named = "train.trackers=[wandb]"
  assert groups() == {None}  # nothing changes for a sweep without trackers
  assert groups(named) == {"week7"}
  assert groups(named, "train.tracker_group=mine") == {"mine"}


def test_the_rivals_are_all_methods_at_four_rates():
  runs = sweep_runs.expand(config_load.load("configs/sweeps/rivals.yaml"))
  left_out = {"opd_pure", "opd_recover", "ssr", "disc"}
  assert {run.config.method for run in runs} == set(methods.METHODS) - left_out
  rates: dict[tuple[str, int], set[float]] = {}
  for run in runs:
    key = (run.group, run.config.train.seed)
    rates.setdefault(key, set()).add(run.config.train.learning_rate)
  assert set(map(len, rates.values())) == {4}
  tuned = config_load.load("configs/raft_tuned.yaml")
  for run in runs:
    if run.group == "raft_tuned":
      for section in ("distill", "balance", "rollout"):
        assert getattr(run.config, section) == getattr(tuned, section)
