"""Whole stages that get signals, and that are started from odd shells."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from raft_jax.runtime import interrupts
from tests.helpers import interrupted_runs

STAGES = interrupted_runs.STAGES


@pytest.mark.parametrize("terminated", [os.EX_TEMPFAIL, 143])
def test_a_safe_point_raises_only_where_a_signal_came(terminated):
  with (
    pytest.raises(SystemExit) as stopped,
    interrupts.listening(terminated=terminated),
  ):
    work_that_gets_a_signal()
  assert stopped.value.code == terminated
  interrupts.check()  # forgotten since


def work_that_gets_a_signal():
  interrupts.check()
  os.kill(os.getpid(), signal.SIGTERM)
  deadline = time.monotonic() + 20
  while not interrupts.received:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  with interrupts.deferred():
    interrupts.check()
  interrupts.check()
  raise AssertionError


def test_an_ignored_signal_stays_ignored_and_handlers_come_back():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  terminate = signal.getsignal(signal.SIGTERM)
  try:
    with interrupts.listening(), interrupts.listening():
      assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
      assert signal.getsignal(signal.SIGTERM) is not terminate
    assert signal.getsignal(signal.SIGTERM) is terminate
  finally:
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("interrupted")
  interrupted_runs.prepare(folder)
  for stage in STAGES:
    interrupted_runs.whole(folder, stage)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_anywhere_a_stage_ends_by_its_rule(root, stage, blow):
  """Few instants; `python -m tests.helpers.interrupted_runs STAGE 100` has many."""
  outcomes = interrupted_runs.measure(root, stage, 5, blow, rerun=2)
  assert [outcome for outcome in outcomes if outcome.fault] == []


JAX = {
  "JAX_ENABLE_X64": "1",
  "JAX_DEBUG_NANS": "1",
  "JAX_NUMPY_RANK_PROMOTION": "raise",
  "JAX_NUMPY_DTYPE_PROMOTION": "strict",
  "JAX_DISABLE_JIT": "1",
  "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
  "JAX_DEFAULT_DTYPE_BITS": "32",
  "JAX_TRANSFER_GUARD": "disallow",
  "JAX_CHECK_TRACER_LEAKS": "1",
  "JAX_THREEFRY_PARTITIONABLE": "0",
  "JAX_DEFAULT_PRNG_IMPL": "rbg",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_settings_of_jax_change_no_result(root, stage):
  done, same = started(root, stage, "jax", JAX)
  assert done.returncode == 0, done.stderr
  assert same
  lines = done.stderr.splitlines()
  (line,) = [line for line in lines if "would change this command" in line]
  for name, value in JAX.items():
    assert f"{name}={value}" in line


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
  "shell",
  [
    # JAX_LOG_COMPILES writes lines of its own, and changes nothing else.
    {"PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "2", "JAX_LOG_COMPILES": "1"},
    {
      **{"PYTHONIOENCODING": "latin-1", "PYTHONWARNINGS": "error", "TERM": ""},
      **{"HOME": "/proc/nowhere", "TMPDIR": "/nowhere", "COLUMNS": "1"},
    },
    {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
  ],
)
def test_other_things_of_a_shell_change_no_result(root, stage, shell):
  done, same = started(root, stage, "shell", shell)
  assert done.returncode == 0, done.stderr
  assert same
  assert "Traceback" not in done.stderr


def started(
  root: pathlib.Path, stage: str, name: str, shell: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], bool]:
  """A stage from a shell, and whether its result is that of a usual one."""
  output = interrupted_runs.started_from(root, stage, name)
  done = subprocess.run(
    interrupted_runs.command(root, stage, output),
    capture_output=True,
    encoding="utf-8",
    errors="replace",
    check=False,
    env={**interrupted_runs.environment(root), **shell},
  )
  if done.returncode:
    return done, False
  usual = interrupted_runs.result(root / stage / "whole", stage)
  return done, interrupted_runs.result(output, stage) == usual
