"""Runs a command of this package in a process of its own."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

from raft_jax import errors
from raft_jax.runtime import interrupts

INTERRUPTED = (75, 130, 143)
"""Exit codes of a command that was stopped and can be continued."""


def run(stage: str, file: pathlib.Path) -> int:
  """Runs a stage with a config file; no other run then shares the process' memory.

  Signals are passed on to the process.

  Returns:
    The peak host memory of the process, in bytes.

  Raises:
    UserError: the stage failed or was killed.
    interrupts.Stopped: the stage was stopped by a signal.
  """
  command = [sys.executable, "-m", f"raft_jax.{stage}", "--config", str(file)]
  process = subprocess.Popen(command)
  with interrupts.passing_on(process.pid):
    _, status, usage = os.wait4(process.pid, 0)
  process.returncode = code = os.waitstatus_to_exitcode(status)
  if code in INTERRUPTED or -code in (signal.SIGINT, signal.SIGTERM):
    raise interrupts.Stopped(code if code > 0 else 128 - code)
  if code < 0:
    raise errors.UserError(
      f"{stage} of {file.stem} was killed by signal {-code}"
      + (", perhaps because memory ran out" if -code == signal.SIGKILL else "")
    )
  if code:
    raise errors.UserError(f"{stage} of {file.stem} failed with exit code {code}")
  # Linux counts in KiB, macOS in bytes.
  return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
