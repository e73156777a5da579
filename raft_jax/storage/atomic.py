"""Atomic writes: a file is replaced completely, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from raft_jax import errors

TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path; the file written there then replaces `path` durably.

  A kill at any time leaves the old file or the complete new one.

  Raises:
    errors.UserError: the disk is full or unwritable (names the file and free space),
      or the body raised RuntimeError.
  """
  # Not the process id: containers that share a disk all have process 1.
  temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
  try:
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
  except (OSError, RuntimeError) as e:
    temporary.unlink(missing_ok=True)
    raise errors.UserError(_write_failure(path, e)) from e
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def _write_failure(path: pathlib.Path, e: Exception) -> str:
  free = shutil.disk_usage(path.parent).free
  return (
    f"{path}: cannot write: {e}; {free / 1e6:.0f} MB are free there: make room or "
    f"change `output`, then run the command again"
  )


def sync(path: pathlib.Path) -> None:
  """Waits until a file, or the entries of a folder, would survive a power failure."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
