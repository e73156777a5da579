"""Several processes as one: signs of them, agreement, and whole runs of two."""

import contextlib
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

import jax
import numpy as np
import pytest

from raft_jax import checkpoint, errors, evaluate, export, hf, hosts, model
from tests import mesh_steps, tiny_llama

ALONE = {"asked": None, "coordinator": None, "processes": None, "index": None}
SLURM = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://n1:5", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
  ("environment", "found"),
  [
    ({}, None),
    (SLURM, "Slurm"),
    ({**SLURM, "SLURM_NTASKS": "1"}, None),
    # A batch script before any `srun`, in an allocation of four tasks.
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
    (MPI, "Open MPI"),
    ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "w0,w1", "TPU_WORKER_ID": "0"}, "GKE"),
    ({"TPU_PROCESS_ADDRESSES": "w0:1,w1:1"}, "GKE"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "w0", "MEGASCALE_NUM_SLICES": "2"}, "GKE"),
    ({"JAX_COORDINATOR_ADDRESS": "n1:5"}, "JAX_COORDINATOR_ADDRESS"),
  ],
)
def test_several_processes_are_recognised_by_who_starts_them(environment, found):
  assert hosts.launcher(environment) == found


@pytest.mark.parametrize(
  ("environment", "given", "message"),
  [
    ({"JAX_COORDINATOR_ADDRESS": "n1"}, {}, "'n1' names no port"),
    ({}, {"coordinator": "n1:x"}, "'n1:x' names no port"),
    (
      {"JAX_COORDINATOR_ADDRESS": "n1:5", "JAX_PROCESS_ID": "first"},
      {},
      "JAX_PROCESS_ID: 'first' is not a number",
    ),
    (
      {"JAX_COORDINATOR_ADDRESS": "n1:5", "JAX_PROCESS_ID": "2"},
      {"processes": 2},
      r"could not join .*cluster\.index",
    ),
  ],
)
def test_what_is_missing_to_join_is_named(monkeypatch, environment, given, message):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(errors.UserError, match=message) as caught:
    hosts.join(**{**ALONE, **given}, heartbeat_s=1)
  assert "\n" not in str(caught.value)
  assert not jax.distributed.is_initialized()


def test_a_process_alone_joins_nobody_and_keeps_its_own_errors(monkeypatch):
  hosts.join(**ALONE, heartbeat_s=1)
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "n1:5")
  hosts.join(**{**ALONE, "asked": False}, heartbeat_s=1)
  assert hosts.leads()
  assert hosts.exchange("word") == ["word"]

  def fail():
    raise errors.UserError("mine")

  with pytest.raises(errors.UserError, match=r"^mine$"):
    hosts.together(fail)


def test_the_stages_for_one_process_refuse_to_be_one_of_several(monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  for stage, main in (("evaluate", evaluate.main), ("export", export.main)):
    with pytest.raises(errors.UserError, match=f"{stage} runs in one process, and Slu"):
      main(None)


def test_the_process_that_differs_from_the_most_is_named():
  facts = [(f"n{i}", {"seed": 1, "data": "d"}) for i in range(3)]
  assert hosts.difference(facts) is None
  facts[0] = ("n0", {"seed": 2, "data": "d"})
  assert str(hosts.difference(facts)).startswith(
    "seed: 2 in process 0 on n0, but 1 in process 1 on n1; "
  )
  facts[0] = ("n0", {"seed": 1})
  assert str(hosts.difference(facts)).startswith("data: null in process 0 on n0, but ")
  # Of two, the first is right.
  assert "2 in process 1 on n1, but 1 in process 0" in str(
    hosts.difference([("n0", {"seed": 1}), ("n1", {"seed": 2})])
  )


def test_the_facts_name_every_version_and_the_code():
  facts = hosts.versions()
  assert facts["version of jax"] == jax.__version__
  assert re.fullmatch("[0-9a-f]{64}", facts["sha256 of raft_jax"])


def start(*commands: list[str], devices: int):
  """One process, or several that find each other, each on so many devices."""
  with contextlib.closing(socket.socket()) as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  several = {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(len(commands)),
  }
  return [
    subprocess.Popen(
      [sys.executable, "-m", *command],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parents[1],
      env={
        **os.environ,
        **(several if len(commands) > 1 else {}),
        # Compiling is most of the time; what is partitioned does not change.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      },
    )
    for index, command in enumerate(commands)
  ]


def ended(started) -> list[tuple[int, str, str]]:
  """Exit status, output and errors of each."""
  texts = [process.communicate(timeout=600) for process in started]
  return [(process.returncode, *both) for process, both in zip(started, texts)]


def said(out: str) -> str:
  """Without the lines in which gloo counts its connections."""
  lines = out.splitlines(keepends=True)
  return "".join(line for line in lines if not line.startswith("[Gloo]"))


def test_two_processes_share_words_faults_and_rows():
  found = ended(start(["tests.host_talk"], ["tests.host_talk"], devices=2))
  assert [status for status, *_ in found] == [0, 0], found
  first, second = (json.loads(said(out)) for _, out, _ in found)
  host = socket.gethostname()
  assert [first.pop("leads"), second.pop("leads")] == [True, False]
  assert [first.pop("both"), second.pop("both")] == ["result 0", "result 1"]
  # Two rows a process, one a device.
  assert first.pop("own rows") == [[[0, 1]], [[2, 3]]]
  assert second.pop("own rows") == [[[4, 5]], [[6, 7]]]
  assert first == second
  assert first["words"] == ["", "né"]
  assert first["second"] == f"process 1 on {host}: 1 will not"
  assert first["all alike"] == f"process 0 on {host}: 0 will not"
  assert first["same"] == "no fault, but None"
  assert first["seed"].startswith(f"seed: 1 in process 1 on {host}, but 0 in process 0")
  assert first["all rows"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


# --- Whole runs -----------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_of_eight(tmp_path):
  """Rollouts token for token, losses, and parameters (see `sharding_test`)."""
  arrived = {}
  for processes in (1, 2):
    path = tmp_path / f"{processes}.npz"
    command = ["tests.mesh_steps", str(path), "all"]
    found = ended(start(*[command] * processes, devices=8 // processes))
    assert [status for status, *_ in found] == [0] * processes, found
    with np.load(path) as file:
      arrived[processes] = dict(file)
  one, two = arrived[1], arrived[2]
  assert one.keys() == two.keys()
  for name, value in one.items():
    kind, rest = name.removeprefix("all: ").split(" ", 1)
    if kind in ("rollout", "shards", "start"):
      np.testing.assert_array_equal(two[name], value, name)
    elif kind == "values":
      np.testing.assert_allclose(two[name], value, rtol=1e-5, err_msg=name)
    else:
      moved = np.linalg.norm(value - one[f"start {rest}"])
      assert np.linalg.norm(two[name] - value) < 1e-2 * moved, name
  assert sum(name.startswith("all: rollout") for name in one) == 2 * mesh_steps.STEPS


STEPS = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_folder):
  """Two tokens more than the tokenizer has, so that every axis divides by 8."""
  folder = tmp_path_factory.mktemp("model") / "tiny"
  tiny_llama.save(folder, tied=True, max_position_embeddings=512)
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  return folder


def write_config(folder: pathlib.Path, source: pathlib.Path) -> list[str]:
  """The command of a run into `folder`/run, on questions of capital letters."""
  rows = [
    {
      "question": "ABCDEFGH"[: 1 + i % 8],
      "answer": "HGFEDCBA"[: 1 + i % 5] * (1 + i % 3),
    }
    for i in range(40)
  ]
  folder.mkdir(exist_ok=True)
  (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (folder / "c.yaml").write_text(
    f"""
model: {{source: "{source}"}}
data: {{questions: "{folder}/q.jsonl", answers: original, buckets: 1}}
train: {{batch_size: 8, max_steps: {STEPS}, epochs: 9, learning_rate: 1.0e-4,
  checkpoint_every: 4, measure_every: 0}}
rollout: {{max_new_tokens: 6}}
distill: {{top_k: 16}}
cluster: {{heartbeat_s: 10}}
output: "{folder}/run"
"""
  )
  return ["raft_jax.train", "--config", str(folder / "c.yaml")]


def logged(folder: pathlib.Path) -> list[tuple[int, dict[str, float]]]:
  path = folder / "run" / "metrics.jsonl"
  rows = path.read_text().splitlines() if path.exists() else []
  return [(row["step"], row["values"]) for row in map(json.loads, rows)]


def wait_for_step(started, folder: pathlib.Path, step: int) -> None:
  """Until the log holds a step; all processes must be running meanwhile."""
  deadline = time.monotonic() + 400
  while not logged(folder) or logged(folder)[-1][0] < step:
    for process in started:
      assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.02)


def trained(folder: pathlib.Path, source: pathlib.Path):
  shapes = model.shapes(hf.load_config(str(source)))
  return checkpoint.restore_params(folder / "run", shapes, {})


@pytest.mark.slow
def test_a_run_survives_its_processes_and_ends_as_one_that_never_stopped(
  tmp_path, source
):
  """SIGTERM to one of two, SIGKILL of one, then 4 devices, then 1."""
  whole, folder = tmp_path / "whole", tmp_path / "moved"
  [(status, out, err)] = ended(start(write_config(whole, source), devices=8))
  assert status == 0, out + err
  command = write_config(folder, source)

  two = start(command, command, devices=4)
  wait_for_step(two, folder, 2)
  two[1].send_signal(signal.SIGTERM)
  found = ended(two)
  assert [status for status, *_ in found] == [75, 75], found
  saved = trained(folder, source)[1]
  assert 2 < saved < STEPS
  assert f"stopped and saved after step {saved} of {STEPS}" in found[0][1]
  assert said(found[1][1]) == ""  # one of them speaks

  two = start(command, command, devices=4)
  wait_for_step(two, folder, saved + 2)
  two[1].kill()
  killed = time.monotonic()
  [(status, out, err), _] = ended(two)
  assert status not in (0, 2, 75), out + err
  assert time.monotonic() - killed < 60
  assert f"resuming after step {saved} of {STEPS}" in out

  four = start(command, devices=4)
  wait_for_step(four, folder, saved + 3)
  four[0].send_signal(signal.SIGTERM)
  [(status, out, err)] = ended(four)
  assert status == 75, out + err
  [(status, out, err)] = ended(start(command, devices=1))
  assert status == 0, out + err

  assert [step for step, _ in logged(folder)] == list(range(1, STEPS + 1))
  for (_, ours), (step, theirs) in zip(logged(folder), logged(whole)):
    assert ours["rollout_length"] == theirs["rollout_length"], step
    for name in ("loss_sft", "loss_kd", "kd_weight", "grad_norm"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (step, name)
  start_params = hf.load_params(str(source), hf.load_config(str(source)))
  jax.tree.map(
    lambda ours, theirs, first: np.testing.assert_array_less(
      np.linalg.norm(ours - theirs), 1e-2 * np.linalg.norm(theirs - first)
    ),
    trained(folder, source)[0],
    trained(whole, source)[0],
    start_params,
  )


@pytest.mark.slow
def test_processes_that_were_started_differently_say_so_and_end(tmp_path, source):
  command = write_config(tmp_path, source)
  for other, said_of_it in [
    (["distill.top_k=17"], "distill.top_k: 17 in process 1 on .* but 16 in process 0"),
    (["data.questions=none"], "process 1 on .*data.questions.*none"),
  ]:
    found = ended(start(command, [*command, *other], devices=1))
    for status, _, err in found:
      assert status == 2, err
      assert re.search(f"error: {said_of_it}", err), err
