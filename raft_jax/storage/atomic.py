"""Files that are written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from raft_jax import errors

TEMPORARY = ".tmp-"
"""How the name of an unfinished file begins."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a temporary path; the file written there becomes `path`, durably.

  A kill at any instant leaves the old file, or the new one whole.

  Raises:
    errors.UserError: the disk is full or unwritable (names the file and free space),
      or the body raised RuntimeError.
  """
  # No process id: those of containers that share a disk are all 1.
  temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
  try:
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
  except (OSError, RuntimeError) as e:
    temporary.unlink(missing_ok=True)
    raise errors.UserError(_write_failure(path, e)) from e


def _write_failure(path: pathlib.Path, e: Exception) -> str:
  free = shutil.disk_usage(path.parent).free
  return (
    f"{path}: cannot write: {e}; {free / 1e6:.0f} MB are free there: make room or "
    f"change `output`, then run the command again"
  )


def sync(path: pathlib.Path) -> None:
  """Waits until a file, or the names in a folder, would survive a power cut."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
