"""A stage in a process of its own: how it ends decides what its caller sees."""

import signal
import subprocess
import sys

import pytest

from raft_jax import errors
from raft_jax.runtime import stage_process


@pytest.mark.parametrize(
  ("number", "ends"), [(signal.SIGKILL, errors.UserError), (signal.SIGTERM, SystemExit)]
)
def test_a_stage_that_is_killed_for_memory_ends_its_own_run_only(
  tmp_path, monkeypatch, number, ends
):
  kill = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number:d})"]
  started = subprocess.Popen
  monkeypatch.setattr(subprocess, "Popen", lambda command: started(kill))
  with pytest.raises(ends, match=r"train of one was killed by signal 9, perhaps|143"):
    stage_process.run("train", tmp_path / "one.yaml")
