"""The folder of an export: it is replaced completely, or not at all."""

from __future__ import annotations

import contextlib
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator

import filelock

from raft_jax import errors
from raft_jax.storage import atomic

LOCK = ".lock"
"""In a folder that is being written: held by the process that writes it."""


@contextlib.contextmanager
def replacing(
  target: pathlib.Path,
  need: int,
  *,
  overwrite: bool,
  ours: Callable[[pathlib.Path], bool],
) -> Iterator[pathlib.Path]:
  """Yields a new folder beside the target, which replaces it once it is complete.

  What killed exports left is cleared away first: an unfinished folder is deleted, and
  an earlier export that was moved aside gets its name again.

  Args:
    need: bytes that will be written.
    overwrite, ours: as for `check_target`.

  Raises:
    errors.UserError: as `check_target`, or there is less space on the disk.
    errors.TryAgainError: another process writes this export.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  _clear_leftovers(target)
  check_target(target, overwrite, ours)
  free = shutil.disk_usage(target.parent).free
  if need > free:
    raise errors.UserError(
      f"{target}: the export needs {need:,} bytes and {free:,} are free; make room or "
      "choose another folder"
    )
  # Not the process id: containers that share a disk all have process 1.
  token = secrets.token_hex(6)
  temporary = _hidden(target, "tmp", token)
  temporary.mkdir()
  lock = filelock.FileLock(temporary / LOCK)
  try:
    with lock:
      yield temporary
      (temporary / LOCK).unlink(missing_ok=True)
      for path in (*temporary.rglob("*"), temporary):
        atomic.sync(path)
      _replace(target, temporary, _hidden(target, "old", token))
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _hidden(target: pathlib.Path, kind: str, token: str) -> pathlib.Path:
  return target.with_name(f".{target.name}.{kind}-{token}")


def _clear_leftovers(target: pathlib.Path) -> None:
  for unfinished in target.parent.glob(_hidden(target, "tmp", "*").name):
    try:
      with filelock.FileLock(unfinished / LOCK, timeout=0):
        shutil.rmtree(unfinished, ignore_errors=True)
    except filelock.Timeout as e:
      raise errors.TryAgainError(
        f"{target}: another process exports into it; wait for its end or choose "
        "another folder"
      ) from e
  for old in target.parent.glob(_hidden(target, "old", "*").name):
    if target.exists():
      shutil.rmtree(old, ignore_errors=True)
    else:  # killed before the new folder got its name
      old.rename(target)


def check_target(
  target: pathlib.Path, overwrite: bool, ours: Callable[[pathlib.Path], bool]
) -> None:
  """Raises UserError if a folder must not be replaced; `ours` tells earlier exports."""
  if target.is_symlink() or (target.exists() and not target.is_dir()):
    raise errors.UserError(f"{target}: exists and is not a folder; choose another name")
  if not target.exists() or not any(target.iterdir()):
    return
  if not ours(target):
    raise errors.UserError(
      f"{target}: not empty, and not an earlier export; choose another folder"
    )
  if not overwrite:
    raise errors.UserError(
      f"{target}: holds an earlier export; overwrite it explicitly or choose another "
      "folder"
    )


def _replace(target: pathlib.Path, temporary: pathlib.Path, old: pathlib.Path) -> None:
  if target.exists():
    target.rename(old)
  temporary.rename(target)
  atomic.sync(target.parent)
  shutil.rmtree(old, ignore_errors=True)
