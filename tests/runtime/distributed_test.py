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

from raft_jax import errors, evaluate, export
from raft_jax.hf import load as hf_load
from raft_jax.models import transformer
from raft_jax.runtime import distributed
from raft_jax.training import checkpoint
from tests.helpers import mesh_steps, simulated_devices, tiny_llama

ALONE = {"wanted": None, "coordinator": None, "processes": None, "index": None}
SLURM = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://n1:5", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
  ("environment", "launcher"),
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
def test_several_processes_are_recognised_by_who_starts_them(environment, launcher):
  assert distributed.launcher(environment) == launcher


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
    distributed.join(**{**ALONE, **given}, heartbeat_s=1)
  assert "\n" not in str(caught.value)
  assert not jax.distributed.is_initialized()


def test_a_process_alone_joins_nobody_and_keeps_its_own_errors(monkeypatch):
  distributed.join(**ALONE, heartbeat_s=1)
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "n1:5")
  distributed.join(**{**ALONE, "wanted": False}, heartbeat_s=1)
  assert distributed.is_primary()
  assert distributed.gather_texts("word") == ["word"]

  def fail():
    raise errors.UserError("mine")

  with pytest.raises(errors.UserError, match=r"^mine$"):
    distributed.run_on_all(fail)


def test_a_fault_of_one_process_waits_until_all_can_hear_of_it(monkeypatch):
  alone = distributed.DeferredErrors()

  def fail():
    raise OSError(28, "No space left on device", "metrics.jsonl")

  with pytest.raises(OSError, match="metrics"):
    alone.keep(fail)

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    distributed, "gather_texts", lambda text: ['["n0", "", false]', text]
  )
  monkeypatch.setattr(socket, "gethostname", lambda: "n1")
  done = []
  several = distributed.DeferredErrors()
  several.raise_on_all()
  several.keep(lambda: done.append(1))
  several.keep(fail)
  several.keep(lambda: done.append(2))  # after a hole, a log says nothing
  with pytest.raises(errors.UserError, match=r"process 1 on n1: .*No space left"):
    several.raise_on_all()
  assert done == [1]

  def busy():
    raise errors.TryAgainError("in use")

  with pytest.raises(errors.TryAgainError, match="in use"):
    distributed.run_on_all(busy)


def test_the_stages_for_one_process_refuse_to_be_one_of_several(monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  for stage, main in (("evaluate", evaluate.main), ("export", export.main)):
    with pytest.raises(errors.UserError, match=f"{stage} runs in one process, and Slu"):
      main(None)


def test_the_process_that_differs_from_the_most_is_named():
  facts = [(f"n{i}", {"seed": 1, "data": "d"}) for i in range(3)]
  assert distributed.difference(facts) is None
  facts[0] = ("n0", {"seed": 2, "data": "d"})
  assert str(distributed.difference(facts)).startswith(
    "seed: 2 in process 0 on n0, but 1 in process 1 on n1; "
  )
  facts[0] = ("n0", {"seed": 1})
  assert str(distributed.difference(facts)).startswith(
    "data: null in process 0 on n0, but "
  )
  # Of two, the first is right.
  assert "2 in process 1 on n1, but 1 in process 0" in str(
    distributed.difference([("n0", {"seed": 1}), ("n1", {"seed": 2})])
  )


def test_the_facts_name_every_version_and_the_code():
  facts = distributed.versions()
  assert facts["version of jax"] == jax.__version__
  assert re.fullmatch("[0-9a-f]{64}", facts["sha256 of raft_jax"])


@pytest.fixture(autouse=True)
def nothing_stays():
  """Ends what a failed test left running."""
  yield
  while STARTED:
    STARTED.pop().kill()


STARTED: list[subprocess.Popen] = []


def start(*commands: list[str], devices: int):
  """One process, or several that find each other, each on so many devices."""
  with contextlib.closing(socket.socket()) as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  several = {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(len(commands)),
  }
  STARTED[:] = [
    subprocess.Popen(
      [sys.executable, "-m", *command],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parents[2],
      env={
        **os.environ,
        **(several if len(commands) > 1 else {}),
        # Compiling is most of the time; what is partitioned does not change.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": simulated_devices.flags(devices),
      },
    )
    for index, command in enumerate(commands)
  ]
  return list(STARTED)


def ended(started) -> list[tuple[int, str, str]]:
  """Exit status, output and errors of each."""
  texts = [process.communicate(timeout=600) for process in started]
  return [(process.returncode, *both) for process, both in zip(started, texts)]


def said(out: str) -> str:
  """Without the lines, perhaps torn in two, in which gloo counts its connections."""
  lines = out.splitlines(keepends=True)
  return "".join(
    line for line in lines if not line.startswith("[Gloo]") and "peer ranks" not in line
  )


def test_two_processes_share_words_faults_and_rows():
  results = ended(
    start(["tests.helpers.host_talk"], ["tests.helpers.host_talk"], devices=2)
  )
  assert [status for status, *_ in results] == [0, 0], results
  first, second = (json.loads(said(out)) for _, out, _ in results)
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
  """Rollouts token for token, losses, gradients, parameters (see `sharding_test`)."""
  arrived = {}
  for processes in (1, 2):
    path = tmp_path / f"{processes}.npz"
    command = ["tests.helpers.mesh_steps", str(path), "all"]
    results = ended(start(*[command] * processes, devices=8 // processes))
    assert [status for status, *_ in results] == [0] * processes, results
    with np.load(path) as file:
      arrived[processes] = dict(file)
  one, two = arrived[1], arrived[2]
  assert one.keys() == two.keys()
  for name, value in one.items():
    kind, rest = name.removeprefix("all: ").split(" ", 1)
    if kind == "first":
      error = np.linalg.norm(two[name] - value)
      assert error <= 1e-5 * np.linalg.norm(value), name
    elif kind != "params" and kind != "values":
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
  checkpoint_every: 4, gradient_stats_every: 0}}
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
  shapes = transformer.shapes(hf_load.load_config(str(source)))
  return checkpoint.restore_params(folder / "run", shapes, {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
  """A run on eight devices of one process that nothing stopped."""
  folder = tmp_path_factory.mktemp("whole")
  [(status, out, err)] = ended(start(write_config(folder, source), devices=8))
  assert status == 0, out + err
  return folder


def assert_same_run(folder: pathlib.Path, whole: pathlib.Path, source: pathlib.Path):
  """Every step once, on the same rows with the same keys, values within rounding."""
  assert [step for step, _ in logged(folder)] == list(range(1, STEPS + 1))
  for (_, ours), (step, theirs) in zip(logged(folder), logged(whole)):
    assert ours["rollout_length"] == theirs["rollout_length"], step
    for name in ("loss_sft", "loss_kd", "kd_weight", "grad_norm"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (step, name)
  first = hf_load.load_params(str(source), hf_load.load_config(str(source)))
  (ours, step), (theirs, _) = trained(folder, source), trained(whole, source)
  assert step == STEPS
  jax.tree.map(
    lambda x, y, start: np.testing.assert_array_less(
      np.linalg.norm(x - y), 1e-2 * np.linalg.norm(y - start)
    ),
    *(ours, theirs, first),
  )


@pytest.mark.slow
def test_two_processes_stop_as_one_and_are_started_again_when_one_is_lost(
  tmp_path, source, whole
):
  command = write_config(tmp_path, source)
  two = start(command, command, devices=4)
  wait_for_step(two, tmp_path, 2)
  two[1].send_signal(signal.SIGTERM)
  results = ended(two)
  assert [status for status, *_ in results] == [75, 75], results
  saved = trained(tmp_path, source)[1]
  assert 2 < saved < STEPS
  assert f"stopped and saved after step {saved} of {STEPS}" in results[0][1]
  assert said(results[1][1]) == ""  # one of them speaks

  python = script(
    tmp_path / "python",
    f'echo $$ > "{tmp_path}/pid-$JAX_PROCESS_ID"',
    f'exec "{sys.executable}" "$@"',
  )
  launcher = subprocess.Popen(
    [str(LAUNCH / "local_multiprocess.sh"), "train", "2", *command[1:]],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={
      **os.environ,
      **{"PYTHON": python, "PAUSE": "0", "JAX_PLATFORMS": "cpu"},
      "XLA_FLAGS": simulated_devices.flags(4),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
  )
  STARTED.append(launcher)
  wait_for_step([launcher], tmp_path, saved + 2)
  os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
  [(status, out, err)] = ended([launcher])
  assert status == 0, out + err
  assert "ended with status 137; starting again" in err
  assert out.count(f"of {STEPS}\n") == 2  # resumed twice
  assert_same_run(tmp_path, whole, source)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices(tmp_path, source, whole):
  """8 devices, then 4, then 1."""
  command = write_config(tmp_path, source)
  for devices, until in ((8, 3), (4, 7)):
    one = start(command, devices=devices)
    wait_for_step(one, tmp_path, until)
    one[0].send_signal(signal.SIGTERM)
    [(status, out, err)] = ended(one)
    assert status == 75, out + err
  [(status, out, err)] = ended(start(command, devices=1))
  assert status == 0, out + err
  assert_same_run(tmp_path, whole, source)


@pytest.mark.slow
def test_processes_that_were_started_differently_say_so_and_end(tmp_path, source):
  command = write_config(tmp_path, source)
  for other, said_of_it in [
    (["distill.top_k=17"], "distill.top_k: 17 in process 1 on .* but 16 in process 0"),
    (["data.max_prompt_tokens=1"], "process 1 on .*: row .* is too long"),
  ]:
    results = ended(start(command, [*command, *other], devices=1))
    for status, _, err in results:
      assert status == 2, err
      assert re.search(f"error: {said_of_it}", err), err


@pytest.mark.slow
@pytest.mark.parametrize(
  "overrides", [["method=das"], ["method=sdpo", "data.max_teacher_tokens=256"]]
)
def test_what_methods_do_beside_the_steps_is_the_same_in_two_processes(
  tmp_path, source, overrides
):
  """Importance of units, a row at a time; texts scored between rollout and teacher."""
  logs = []
  for processes in (1, 2):
    folder = tmp_path / str(processes)
    command = [*write_config(folder, source), *overrides, "train.max_steps=2"]
    results = ended(start(*[command] * processes, devices=2 // processes))
    assert [status for status, *_ in results] == [0] * processes, results
    logs.append(logged(folder))
  one, two = logs
  assert len(one) == len(two) == 2
  for (_, theirs), (step, ours) in zip(one, two):
    for name in theirs.keys() & {"loss_sft", "loss_kd", "grad_norm", "reward"}:
      assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (step, name)


# --- The launchers --------------------------------------------------------------------

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


def script(path: pathlib.Path, *lines: str) -> str:
  path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
  path.chmod(0o755)
  return str(path)


def launch(*command: str, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    command,
    check=False,
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, "PAUSE": "0", **environment},
  )


@pytest.mark.parametrize(
  ("statuses", "restarts", "final", "runs"),
  [
    ([75, 134, 137, 143, 0], "9", 0, 5),
    ([75, 2, 0], "9", 2, 2),
    ([1, 0], "9", 1, 1),
    ([130, 0], "9", 130, 1),
    ([75, 75, 75, 0], "2", 75, 3),
  ],
)
def test_what_a_rerun_mends_is_run_again(tmp_path, statuses, restarts, final, runs):
  log = tmp_path / "log"
  fake = script(
    tmp_path / "fake",
    f'echo "$1" >> {log}',
    f"set -- {' '.join(map(str, statuses))}",
    f"shift $(($(wc -l < {log}) - 1))",
    "exit $1",
  )
  done = launch(
    *(str(LAUNCH / "again.sh"), fake, "two words"),
    RESTARTS=restarts,
  )
  assert done.returncode == final
  assert log.read_text() == "two words\n" * runs


def test_a_stopped_loop_passes_the_signal_on_and_ends(tmp_path):
  ready, stopped = tmp_path / "ready", tmp_path / "stopped"
  os.mkfifo(ready)
  fake = script(
    tmp_path / "fake", "trap 'exit 75' TERM", f"echo > {ready}", "while :; do :; done"
  )
  loop = subprocess.Popen(
    [str(LAUNCH / "again.sh"), fake], env={**os.environ, "ON_STOP": f"touch {stopped}"}
  )
  ready.read_text()  # until the command runs
  loop.terminate()
  assert loop.wait(timeout=60) == 75
  assert stopped.exists()


def test_a_signal_may_have_a_way_of_its_own(tmp_path):
  """As under Slurm, whose srun kills its tasks on the SIGTERM that it gets.

  The child ends while the signal is still handled: how it ended must not be lost.
  """
  names = ("ready", "told", "gone", "stopped")
  ready, told, gone, stopped = (tmp_path / name for name in names)
  os.mkfifo(ready)
  fake = script(
    tmp_path / "srun",
    "trap 'exit 137' TERM",
    f"trap 'touch {gone}' EXIT",
    f"echo > {ready}",
    f"while [ ! -e {told} ]; do :; done",
    "exit 75",
  )
  tell = script(
    tmp_path / "scancel",
    f"touch {told}",
    f"while [ ! -e {gone} ]; do :; done",
    "sleep 0.3",  # from its last command to its end
  )
  loop = subprocess.Popen(
    [str(LAUNCH / "again.sh"), fake],
    env={**os.environ, "PASS_ON": tell, "ON_STOP": f"touch {stopped}"},
  )
  ready.read_text()
  loop.terminate()
  assert loop.wait(timeout=60) == 75
  assert stopped.exists()


def test_a_signal_between_two_runs_ends_the_loop(tmp_path):
  log, stopped = tmp_path / "log", tmp_path / "stopped"
  fake = script(tmp_path / "fake", f"echo run >> {log}", "exit 75")
  loop = subprocess.Popen(
    [str(LAUNCH / "again.sh"), fake],
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "PAUSE": "300", "ON_STOP": f"touch {stopped}"},
  )
  assert loop.stderr is not None
  assert "starting again" in loop.stderr.readline()
  loop.terminate()
  assert loop.wait(timeout=60) == 75
  assert stopped.exists()
  assert log.read_text() == "run\n"


@pytest.mark.parametrize(
  ("visible", "lines"),
  [("4,GPU-7,9", ["0 4", "1 GPU-7"]), ("4", ["0 4", "1 4"]), ("", ["0 ", "1 "])],
)
def test_the_gpus_that_one_may_use_are_dealt_out(tmp_path, visible, lines):
  log = tmp_path / "log"
  say = f'echo "$JAX_PROCESS_ID $CUDA_VISIBLE_DEVICES" >> {log}'
  done = launch(
    *(str(LAUNCH / "local_multiprocess.sh"), "train", "2", "--config", "c"),
    PYTHON=script(tmp_path / "python", say),
    CUDA_VISIBLE_DEVICES=visible,
  )
  assert done.returncode == 0, done.stderr
  assert sorted(log.read_text().splitlines()) == lines


def test_processes_of_one_machine_get_their_numbers_and_one_status(tmp_path):
  log = tmp_path / "log"
  fake = script(
    tmp_path / "python",
    f'echo "$JAX_NUM_PROCESSES $JAX_PROCESS_ID $*" >> {log}',
    # The first is killed, which the second takes for damage; then all is well.
    f"[ $(wc -l < {log}) -gt 2 ] && exit 0",
    '[ "$JAX_PROCESS_ID" = 0 ] && kill -9 $$',
    "exit 2",
  )
  done = launch(
    *(str(LAUNCH / "local_multiprocess.sh"), "train", "2", "--config", "a b"),
    PYTHON=fake,
  )
  assert done.returncode == 0, done.stderr
  assert sorted(log.read_text().splitlines()) == [
    *["2 0 -m raft_jax.train --config a b"] * 2,
    *["2 1 -m raft_jax.train --config a b"] * 2,
  ]


def test_workers_of_one_machine_refine_and_then_one_merges(tmp_path):
  log = tmp_path / "log"
  fake = script(tmp_path / "python", f'echo "$*" >> {log}')
  command = [str(LAUNCH / "local_multiprocess.sh"), "refine", "2", "--config", "c"]
  assert launch(*command, PYTHON=fake).returncode == 0
  first, second, last = log.read_text().splitlines()
  assert sorted([first, second]) == [
    "-m raft_jax.refine --config c --num-workers 2 --worker 0",
    "-m raft_jax.refine --config c --num-workers 2 --worker 1",
  ]
  assert last == "-m raft_jax.refine --config c"
  assert launch(*command[:1], "evaluate", "2").returncode == 2
