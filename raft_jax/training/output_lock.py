"""The lock on a run's output folder, held by one process for all."""

from __future__ import annotations

import contextlib
import pathlib
import time

from raft_jax import errors
from raft_jax.runtime import distributed
from raft_jax.storage import journal

VISIBLE_WITHIN_S = 10.0
"""A network file system may show one host late what another has just written."""


def lock(
  output: pathlib.Path, stack: contextlib.ExitStack, *, is_primary: bool
) -> None:
  """Locks the output folder until the stack closes; call it in all processes.

  Args:
    is_primary: whether this process takes the lock, for all of them.

  Raises:
    errors.UserError: another run holds the lock, or a process sees another folder.
  """
  path = output / ".train"

  def acquire() -> None:
    if is_primary:
      stack.enter_context(journal.locked(path))

  def check_shared() -> None:
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not _has_text(journal.holder(path), holder):
      if time.monotonic() > deadline:
        raise errors.UserError(
          f"output: {output} holds nothing of what process 0 wrote there; choose a "
          "folder on a file system that all processes share"
        )
      time.sleep(0.2)

  distributed.run_on_all(acquire)
  own = journal.holder(path).read_text() if is_primary else ""
  holder = distributed.gather_texts(own)[0]
  distributed.run_on_all(check_shared)


def _has_text(path: pathlib.Path, text: str) -> bool:
  with contextlib.suppress(OSError):
    return path.read_text() == text
  return False
