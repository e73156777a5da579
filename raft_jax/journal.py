"""Durable, append-only record of finished calls, keyed by content.

A refinement asks language models thousands of slow questions; the journal is why none
is asked twice. One JSON line per finished call:

  {"crc32": "89abcdef", "key": "<sha256 of what the result depends on>", "value": {}}

Lines are written a micro-batch at a time with one fsync, so a kill loses at most the
micro-batch in flight. A power cut may tear the last line: `open_journal` drops it and
says so. A damaged line anywhere else means the file was edited or the disk is failing:
that is an error, because silently dropping paid-for results would hide it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import filelock

from raft_jax import errors

_LOG = logging.getLogger(__name__)


def canonical(value: Any) -> str:
  """JSON with sorted keys, no spaces and ASCII only: equal values, equal bytes.

  Raises ValueError for NaN and infinity, which JSON does not have.
  """
  return json.dumps(
    value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
  )


def key(**parts: Any) -> str:
  """sha256 of the canonical JSON of `parts`: all that a call's result depends on.

  Two calls with the same parts are one call, whichever rows they belong to.
  """
  return hashlib.sha256(canonical(parts).encode()).hexdigest()


def seed(content_key: str) -> int:
  """31-bit seed taken from a content key, so that a resumed run samples alike."""
  return int(content_key[:8], 16) & 0x7FFFFFFF


class Journal:
  """Finished calls, in memory and on disk. Made by `open_journal`.

  Attributes:
    path: the JSONL file.
    calls: value by key, of every finished call, old and new.
    dropped: number of torn lines dropped when opening (0 or 1).
  """

  def __init__(
    self, path: pathlib.Path, file: io.FileIO, calls: dict[str, Any], dropped: int
  ):
    self.path = path
    self.calls = calls
    self.dropped = dropped
    self._file = file

  def append(self, finished: Mapping[str, Any]) -> None:
    """Write one micro-batch of results and wait until they are on the disk.

    Raises UserError when the disk is full or the file cannot be written; what was
    written before stays readable.
    """
    lines = b"".join(_line(key, value) for key, value in finished.items())
    try:
      unwritten = memoryview(lines)
      while unwritten:
        unwritten = unwritten[self._file.write(unwritten) :]
      os.fsync(self._file.fileno())
    except OSError as error:
      free = shutil.disk_usage(self.path.parent).free
      raise errors.UserError(
        f"{self.path}: cannot write: {error.strerror} ({free:,} bytes free); make room "
        "and run the same command again, finished calls are kept"
      ) from error
    self.calls.update(finished)


@contextlib.contextmanager
def open_journal(path: str | os.PathLike[str]) -> Iterator[Journal]:
  """The journal at `path`, made if absent, locked while the context lasts.

  Raises UserError when another process holds it (naming its pid and host), or when a
  line before the last is damaged (naming file:line).
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _locked(path):
    calls, good_bytes, dropped = _read(path)
    # Unbuffered: what a failed write leaves behind must not be flushed on close.
    with open(path, "ab", buffering=0) as file:
      if file.tell() != good_bytes:
        file.truncate(good_bytes)
        os.fsync(file.fileno())
      _sync_folder(path.parent)
      yield Journal(path, file, calls, dropped)


def _read(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
  """All whole calls, the bytes they take, and how many torn lines follow (0 or 1)."""
  calls: dict[str, Any] = {}
  good_bytes = 0
  lines: list[bytes] = []
  if path.exists():
    with open(path, "rb") as file:
      lines = file.readlines()
  for number, line in enumerate(lines, start=1):
    call = _parse(line)
    if call is None:
      if number < len(lines):
        raise errors.UserError(
          f"{path}:{number}: damaged line; delete that line (its call is made again) "
          "or the file (all calls are)"
        )
      _LOG.warning("%s:%d: dropped 1 torn line; its call is made again", path, number)
      return calls, good_bytes, 1
    calls[call[0]] = call[1]
    good_bytes += len(line)
  return calls, good_bytes, 0


def _line(key: str, value: Any) -> bytes:
  body = canonical({"key": key, "value": value})
  return f'{{"crc32":"{_crc32(body)}",{body[1:]}\n'.encode()


def _parse(line: bytes) -> tuple[str, Any] | None:
  """Key and value of a whole line with the right checksum, else None."""
  if not line.endswith(b"\n"):
    return None
  try:
    record = json.loads(line)
    call = {"key": record["key"], "value": record["value"]}
    whole = record["crc32"] == _crc32(canonical(call))
  except (ValueError, KeyError, TypeError):
    return None
  return (call["key"], call["value"]) if whole else None


def _crc32(body: str) -> str:
  return f"{zlib.crc32(body.encode()):08x}"


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  # The holder's name has a file of its own: some versions of filelock empty the lock
  # file on every attempt to take it.
  lock_path = path.with_name(path.name + ".lock")
  holder_path = path.with_name(path.name + ".holder")
  lock = filelock.FileLock(lock_path, timeout=0)
  try:
    lock.acquire()
  except filelock.Timeout as error:
    holder = "another process"
    with contextlib.suppress(OSError):
      holder = holder_path.read_text() or holder
    raise errors.UserError(
      f"{path}: in use by {holder}; wait for it to end, or use another output folder"
    ) from error
  try:
    holder_path.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
    yield
  finally:
    holder_path.unlink(missing_ok=True)
    lock.release()


def _sync_folder(folder: pathlib.Path) -> None:
  """Make the file's name itself survive a power cut."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
