"""The folder of an export: it is replaced completely, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from raft_jax import errors
from raft_jax.storage import atomic


@contextlib.contextmanager
def replacing(target: pathlib.Path, need: int) -> Iterator[pathlib.Path]:
  """Yields a new folder beside the target, which replaces it once it is complete.

  Args:
    need: bytes that will be written.

  Raises:
    errors.UserError: there is less space on the disk.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  for leftover in target.parent.glob(f".{target.name}.tmp-*"):  # of a killed export
    shutil.rmtree(leftover, ignore_errors=True)
  free = shutil.disk_usage(target.parent).free
  if need > free:
    raise errors.UserError(
      f"{target}: the export needs {need:,} bytes and {free:,} are free; make room or "
      "choose another folder"
    )
  temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
  try:
    temporary.mkdir()
    yield temporary
    for path in (*temporary.rglob("*"), temporary):
      atomic.sync(path)
    _replace(target, temporary)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


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


def _replace(target: pathlib.Path, temporary: pathlib.Path) -> None:
  old = target.with_name(f".{target.name}.old-{os.getpid()}")
  if target.exists():
    target.rename(old)
  temporary.rename(target)
  shutil.rmtree(old, ignore_errors=True)
