"""Durable, append-only record of finished calls, keyed by content.

A refinement makes thousands of slow calls to language models, and the journal is why
none is repeated. Each finished call is one JSON line:

  {"crc32": "89abcdef", "key": "<sha256 of what the result depends on>", "value": {}}

The lines of a micro-batch are written together, with one fsync, while the next batch is
in progress; a kill loses at most these two. A power failure may tear the last line:
`open_journal` drops it and logs a warning. A damaged line anywhere else means that the
file was edited or the disk is failing. That is an error, because it would be hidden if
results were silently dropped.

Results stay on disk, so that memory does not grow with the journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import pathlib
import shutil
import socket
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import filelock

from raft_jax import errors
from raft_jax.storage import atomic

_LOG = logging.getLogger(__name__)


def canonical(value: Any) -> str:
  """JSON with sorted keys, without spaces and in ASCII: equal values give equal bytes.

  Raises ValueError for NaN and infinity, which JSON does not have.
  """
  return json.dumps(
    value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
  )


def content_key(**parts: Any) -> str:
  """sha256 of the canonical JSON of `parts`, on which a call's result depends.

  Two calls with the same parts are one call, whichever rows they belong to.
  """
  return hashlib.sha256(canonical(parts).encode()).hexdigest()


def seed_from(key: str) -> int:
  """31-bit seed from a content key, so that a resumed run samples the same reply."""
  return int(key[:8], 16) & 0x7FFFFFFF


class Finished(Mapping[str, Any]):
  """The values of finished calls by key, read from their files on access.

  The position of each line is in an SQLite table of this process, which spills to disk
  and ends with the process. The journal itself consists of the lines alone.
  """

  def __init__(self) -> None:
    self._files: list[BinaryIO] = []
    self._table = sqlite3.connect("", isolation_level=None)
    self._table.executescript(
      "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode ="
      " EXCLUSIVE; CREATE TABLE call (key TEXT PRIMARY KEY, file INT, start INT,"
      " role TEXT) WITHOUT ROWID;"
    )

  def add_file(self, file: BinaryIO, starts: Iterable[tuple[str, int]]) -> None:
    """Adds the calls of a file; keys that are known keep their values."""
    self._files.append(file)
    self.add(len(self._files) - 1, starts)

  def add(self, file: int, starts: Iterable[tuple[str, int]]) -> None:
    """Adds calls of file number `file`, each as its key and the start of its line."""
    rows = ((key, file, start) for key, start in starts)
    self._table.execute("BEGIN")
    self._table.executemany(
      "INSERT OR IGNORE INTO call (key, file, start) VALUES (?, ?, ?)", rows
    )
    self._table.execute("COMMIT")

  def use(self, role: str, keys: Iterable[str]) -> None:
    """Notes the role that needed these calls first; unknown keys are ignored."""
    self._table.execute("BEGIN")
    self._table.executemany(
      "UPDATE call SET role = ? WHERE key = ? AND role IS NULL",
      ((role, key) for key in keys),
    )
    self._table.execute("COMMIT")

  def used(self) -> Iterator[tuple[str, Any]]:
    """Role and value of every call that a role needed, in the order of the files."""
    query = (
      "SELECT role, file, start FROM call WHERE role NOT NULL ORDER BY file, start"
    )
    for role, file, start in self._table.execute(query):
      yield role, self._read(file, start)

  def __getitem__(self, key: str) -> Any:
    place = self._place(key)
    if place is None:
      raise KeyError(key)
    return self._read(*place)

  def __contains__(self, key: object) -> bool:
    return self._place(key) is not None

  def __len__(self) -> int:
    return int(self._table.execute("SELECT count(*) FROM call").fetchone()[0])

  def __iter__(self) -> Iterator[str]:
    for row in self._table.execute("SELECT key FROM call ORDER BY file, start"):
      yield row[0]

  def _place(self, key: object) -> tuple[int, int] | None:
    query = "SELECT file, start FROM call WHERE key = ?"
    return self._table.execute(query, (key,)).fetchone()

  def _read(self, file: int, start: int) -> Any:
    self._files[file].seek(start)
    return json.loads(self._files[file].readline().decode())["value"]

  def close(self) -> None:
    self._table.close()


class Journal:
  """Finished calls on disk. `open_journal` makes one.

  Attributes:
    path: the JSONL file.
    calls: every finished call, old and new.
    dropped: number of torn lines that were dropped on opening (0 or 1).
  """

  def __init__(
    self, path: pathlib.Path, file: io.FileIO, calls: Finished, dropped: int
  ):
    self.path = path
    self.calls = calls
    self.dropped = dropped
    self._file = file

  def append(self, finished: Mapping[str, Any]) -> None:
    """Writes one micro-batch of results and waits until they are on disk.

    Raises UserError if the disk is full or the file cannot be written; earlier results
    stay readable.
    """
    lines = {key: _line(key, value) for key, value in finished.items()}
    ends = itertools.accumulate(map(len, lines.values()), initial=self._file.tell())
    try:
      unwritten = memoryview(b"".join(lines.values()))
      while unwritten:
        unwritten = unwritten[self._file.write(unwritten) :]
      os.fsync(self._file.fileno())
    except OSError as error:
      free = shutil.disk_usage(self.path.parent).free
      raise errors.UserError(
        f"{self.path}: cannot write: {error.strerror} ({free:,} bytes free); make room "
        "and run the same command again, finished calls are kept"
      ) from error
    self.calls.add(0, zip(lines, ends))


@contextlib.contextmanager
def open_journal(
  path: str | os.PathLike[str], *, others: Sequence[pathlib.Path] = ()
) -> Iterator[Journal]:
  """Opens the journal at `path`, creates it if absent, and locks it.

  Args:
    others: journals whose calls count as finished too. They are only read; calls that
      another process adds to them meanwhile may be missed.

  Raises:
    TryAgainError: another process holds the lock; names its pid and host.
    UserError: a line before the last is damaged; names file:line.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as open_files:
    open_files.enter_context(locked(path))
    # Unbuffered, since the rest of a failed write must not be flushed on close.
    file = open_files.enter_context(open(path, "ab", buffering=0))
    calls = open_files.enter_context(contextlib.closing(Finished()))
    lines = Lines(path)
    calls.add_file(open_files.enter_context(open(path, "rb")), lines)
    if lines.torn:
      _LOG.warning(
        "%s:%d: dropped 1 torn line; its call is made again", path, lines.torn
      )
      file.truncate(lines.intact_bytes)
      file.seek(lines.intact_bytes)
      os.fsync(file.fileno())
    atomic.sync(path.parent)
    for other in others:
      calls.add_file(open_files.enter_context(open(other, "rb")), Lines(other))
    yield Journal(path, file, calls, int(bool(lines.torn)))


class Lines:
  """Iterates once over key and start of each intact line of a journal.

  Attributes:
    intact_bytes: total length of the intact lines, after the iteration.
    torn: number of the last line if it is torn, else 0; after the iteration.

  Raises UserError for a damaged line before the last.
  """

  def __init__(self, path: pathlib.Path):
    self.path, self.intact_bytes, self.torn = path, 0, 0

  def __iter__(self) -> Iterator[tuple[str, int]]:
    with open(self.path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if self.torn:
          raise errors.UserError(
            f"{self.path}:{self.torn}: damaged line; delete that line (its call is "
            "made again) or the file (all calls are)"
          )
        call = _parse(line)
        if call is None:
          self.torn = number
          continue
        yield call[0], self.intact_bytes
        self.intact_bytes += len(line)


def _line(key: str, value: Any) -> bytes:
  body = canonical({"key": key, "value": value})
  return f'{{"crc32":"{_crc32(body)}",{body[1:]}\n'.encode()


def _parse(line: bytes) -> tuple[str, Any] | None:
  """Key and value of an intact line with the right checksum; else None."""
  if not line.endswith(b"\n"):
    return None
  try:
    record = json.loads(line)
    call = {"key": record["key"], "value": record["value"]}
    intact = record["crc32"] == _crc32(canonical(call))
  except (ValueError, KeyError, TypeError):
    return None
  return (call["key"], call["value"]) if intact else None


def _crc32(body: str) -> str:
  return f"{zlib.crc32(body.encode()):08x}"


def holder(path: pathlib.Path) -> pathlib.Path:
  """The file with the name of the process that holds `path`.lock."""
  return path.with_name(path.name + ".holder")


@contextlib.contextmanager
def locked(path: pathlib.Path, *, waits: bool = False) -> Iterator[None]:
  """Holds `path`.lock, which one process at a time can do.

  Args:
    waits: whether to wait for a process that holds the lock, after printing its name.

  Raises:
    TryAgainError: another process holds the lock; names it.
  """
  # The holder's name is in a file of its own, since some versions of filelock truncate
  # the lock file on every attempt to take it.
  lock_path = path.with_name(path.name + ".lock")
  holder_path = holder(path)
  lock = filelock.FileLock(lock_path, timeout=0)
  try:
    lock.acquire()
  except filelock.Timeout as error:
    name = "another process"
    with contextlib.suppress(OSError):
      name = holder_path.read_text() or name
    if not waits:
      raise errors.TryAgainError(
        f"{path}: in use by {name}; wait for it to end, or use another output folder"
      ) from error
    print(f"{path}: in use by {name}; waiting", flush=True)
    lock.acquire(timeout=-1)
  try:
    holder_path.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
    yield
  finally:
    holder_path.unlink(missing_ok=True)
    lock.release()
