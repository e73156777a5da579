"""Durable, append-only record of finished calls, keyed by content.

A refinement asks language models thousands of slow questions; the journal is why none
is asked twice. One JSON line per finished call:

  {"crc32": "89abcdef", "key": "<sha256 of what the result depends on>", "value": {}}

Lines are written a micro-batch at a time with one fsync, while the next one is being
made: a kill loses at most these two. A power cut may tear the last line: `open_journal`
drops it and says so. A damaged line anywhere else means the file was edited or the disk
is failing: that is an error, because silently dropping paid-for results would hide it.

Results stay on the disk; memory holds none but those being read, however long a journal
becomes.

`Calls` below makes language-model and encoder calls through it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import filelock

from raft_jax import encode, engines, errors, progress, records

_LOG = logging.getLogger(__name__)

PAIRS_PER_BATCH = 128
"""Encoder calls made durable together."""


def canonical(value: Any) -> str:
  """JSON with sorted keys, no spaces and ASCII only: equal values, equal bytes.

  Raises ValueError for NaN and infinity, which JSON does not have.
  """
  return json.dumps(
    value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
  )


def content_key(**parts: Any) -> str:
  """sha256 of the canonical JSON of `parts`: all that a call's result depends on.

  Two calls with the same parts are one call, whichever rows they belong to.
  """
  return hashlib.sha256(canonical(parts).encode()).hexdigest()


def seed_from(key: str) -> int:
  """31-bit seed taken from a content key, so that a resumed run samples alike."""
  return int(key[:8], 16) & 0x7FFFFFFF


class Finished(Mapping[str, Any]):
  """Value by key of finished calls, read from their files when asked for.

  Where each line stands is kept in an SQLite table of this process, which spills to
  the disk and is gone with it: the journal itself is the lines alone.
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
    """Takes in the calls of a file of lines; keys that are known keep their value."""
    self._files.append(file)
    self.add(len(self._files) - 1, starts)

  def add(self, file: int, starts: Iterable[tuple[str, int]]) -> None:
    rows = ((key, file, start) for key, start in starts)
    self._table.execute("BEGIN")
    self._table.executemany(
      "INSERT OR IGNORE INTO call (key, file, start) VALUES (?, ?, ?)", rows
    )
    self._table.execute("COMMIT")

  def use(self, role: str, keys: Iterable[str]) -> None:
    """Notes the role that needed these calls first; unknown keys are passed over."""
    self._table.execute("BEGIN")
    self._table.executemany(
      "UPDATE call SET role = ? WHERE key = ? AND role IS NULL",
      ((role, key) for key in keys),
    )
    self._table.execute("COMMIT")

  def used(self) -> Iterator[tuple[str, Any]]:
    """Role and value of the calls that a role needed, in the order of the files."""
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
  """Finished calls on disk. Made by `open_journal`.

  Attributes:
    path: the JSONL file.
    calls: every finished call, old and new.
    dropped: number of torn lines dropped when opening (0 or 1).
  """

  def __init__(
    self, path: pathlib.Path, file: io.FileIO, calls: Finished, dropped: int
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
  """The journal at `path`, made if absent, locked while the context lasts.

  Args:
    others: journals whose calls count as finished, too; they are only read, and what
      another process is adding to one may be missed.

  Raises UserError when another process holds it (naming its pid and host), or when a
  line before the last is damaged (naming file:line).
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as open_files:
    open_files.enter_context(locked(path))
    # Unbuffered: what a failed write leaves behind must not be flushed on close.
    file = open_files.enter_context(open(path, "ab", buffering=0))
    calls = open_files.enter_context(contextlib.closing(Finished()))
    lines = Lines(path)
    calls.add_file(open_files.enter_context(open(path, "rb")), lines)
    if lines.torn:
      _LOG.warning(
        "%s:%d: dropped 1 torn line; its call is made again", path, lines.torn
      )
      file.truncate(lines.whole_bytes)
      file.seek(lines.whole_bytes)
      os.fsync(file.fileno())
    _sync_folder(path.parent)
    for other in others:
      calls.add_file(open_files.enter_context(open(other, "rb")), Lines(other))
    yield Journal(path, file, calls, int(bool(lines.torn)))


class Lines:
  """Key and start of each whole line of a journal; iterate once, then see the rest.

  Attributes:
    whole_bytes: length of the whole lines.
    torn: number of the last line if it is torn, else 0.

  Raises UserError for a damaged line before the last.
  """

  def __init__(self, path: pathlib.Path):
    self.path, self.whole_bytes, self.torn = path, 0, 0

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
        yield call[0], self.whole_bytes
        self.whole_bytes += len(line)


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
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds `path`.lock, for one process at a time.

  Raises:
    UserError: another process holds it; it is named.
  """
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


# Calls through the journal


_SHORTEN = (
  "lower max_new_tokens, shorten the row, or set data.too_long=skip to keep its "
  "original answer"
)


class Role(NamedTuple):
  """A language model and how it samples in one part of the refinement."""

  name: str
  generator: engines.Generator
  max_new_tokens: int
  temperature: float
  top_p: float
  batch_size: int
  reply_schema: Mapping[str, Any] | None = None


def too_long(role: Role, name: str, count: int) -> errors.UserError:
  """What is wrong with the row `name`, whose prompt has `count` tokens."""
  return errors.UserError(
    f"question {name}: the {role.name} prompt has {count} tokens and max_new_tokens is "
    f"{role.max_new_tokens}, but the model holds {role.generator.prompt_limit} in all; "
    f"{_SHORTEN}"
  )


class Stopped(SystemExit):
  """A signal asked the run to end; all finished calls are in the journal."""


class OtherModel(Exception):
  """A call wants a model in memory while another one is at work there."""


@dataclasses.dataclass
class Calls:
  """Makes calls through the journal: finished ones are read, new ones made and kept.

  Attributes:
    book: the open journal.
    seed: of the run; with a call's content it makes that call's own seed.
    one_model: raise OtherModel where a call wants to put another model in memory than
      the first that was wanted since `model` was None.
    model: identity of that first model.
    title: stands before the name of each pass where progress is shown.
    signals: filled by `listening` when the run is asked to end.
  """

  book: Journal
  seed: int
  one_model: bool = False
  model: str | None = None
  title: str = ""
  signals: list[int] = dataclasses.field(default_factory=list)

  def ask(
    self,
    role: Role,
    prompts: Sequence[tuple[records.Message, ...]],
    *,
    round_number: int = 0,
    names: Sequence[str] | None = None,
  ) -> list[engines.Completion | None]:
    """One reply a prompt, without its thinking; None where the prompt is too long for
    the model.

    With `names` of the rows, a prompt that is too long raises UserError instead: before
    anything is generated, if the engine's limit is known here.
    """
    sampling: dict[str, Any] = {
      "max_new_tokens": role.max_new_tokens,
      "temperature": role.temperature,
      "top_p": role.top_p,
    }
    if role.reply_schema is not None:
      sampling["reply_schema"] = role.reply_schema
    shared = {
      "role": role.name,
      # Without sampling every round's reply is the same reply.
      "round": round_number if role.temperature > 0 else 0,
      "model": role.generator.identity,
      "seed": self.seed,
      **sampling,
    }
    keys = [content_key(messages=prompt, **shared) for prompt in prompts]

    def generate(rows: Sequence[int]) -> list[dict[str, Any]]:
      requests = [
        engines.Request(prompts[i], seed=seed_from(keys[i]), **sampling) for i in rows
      ]
      replies = role.generator.generate(requests)
      return [engines.without_thinking(reply)._asdict() for reply in replies]

    tokens = {i: role.generator.count_tokens(prompts[i]) for i in self._missing(keys)}
    limit = math.inf
    if role.generator.prompt_limit is not None:
      limit = role.generator.prompt_limit - role.max_new_tokens
    for i, count in tokens.items():
      if count > limit and names is not None:
        raise too_long(role, names[i], count)
    if tokens and self.one_model and role.generator.local:
      self.model = self.model or role.generator.identity
      if self.model != role.generator.identity:
        raise OtherModel
    # Longest first: memory runs out at once or not at all.
    fitting = sorted(
      (i for i in tokens if tokens[i] <= limit), key=lambda i: -tokens[i]
    )
    title = f"{role.name}, round {round_number}" if round_number else role.name
    done = len(set(keys)) - len(tokens)
    self._make(role.name, title, keys, done, fitting, role.batch_size, generate)
    values = [self.book.calls.get(key) for key in keys]
    for i, value in enumerate(values):
      if value and value["finish_reason"] == "too_long" and names is not None:
        raise errors.UserError(
          f"question {names[i]}: the server finds the {role.name} prompt and "
          f"max_new_tokens={role.max_new_tokens} too long; {_SHORTEN}"
        )
    return [value and _completion(value) for value in values]

  def cosines(
    self, role: str, encoder: encode.Encoder, pairs: Sequence[tuple[str, str]]
  ) -> list[float | None]:
    """Cosine of each pair's embeddings; None where it is undefined."""
    keys = [content_key(encoder=encoder.identity, texts=pair) for pair in pairs]

    def compare(rows: Sequence[int]) -> list[dict[str, Any]]:
      left, right = zip(*(pairs[i] for i in rows))
      cosines = encode.cosine(encoder(left), encoder(right)).tolist()
      cut = zip(encoder.truncated(left), encoder.truncated(right))
      return [
        {"cosine": None if math.isnan(c) else c, "truncated": any(either)}
        for c, either in zip(cosines, cut)
      ]

    missing = self._missing(keys)
    done = len(set(keys)) - len(missing)
    self._make(role, role, keys, done, missing, PAIRS_PER_BATCH, compare)
    return [self.book.calls[key]["cosine"] for key in keys]

  def _missing(self, keys: Sequence[str]) -> list[int]:
    """The first row of each key that the journal lacks."""
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
      first.setdefault(key, i)
    return [i for key, i in first.items() if key not in self.book.calls]

  def _make(
    self,
    role: str,
    title: str,
    keys: Sequence[str],
    done: int,
    rows: Sequence[int],
    batch_size: int,
    work: Callable[[Sequence[int]], list[dict[str, Any]]],
  ) -> None:
    """Does `work` on micro-batches of rows; each is durable before the next begins."""
    if not keys:
      return
    title = self.title + title
    print(f"{title}: {done} calls done, {len(rows)} to do", flush=True)
    bar = progress.Progress(title, len(rows), unit="call") if rows else None

    def timed(batch: Sequence[int]) -> dict[str, Any]:
      began = time.monotonic()
      values = work(batch)
      seconds = round((time.monotonic() - began) / len(batch), 6)
      return {
        keys[i]: {**value, "seconds": seconds}
        for i, value in zip(batch, values, strict=True)
      }

    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    made = 0
    try:
      # In a thread of its own, so that a signal is heard while the model computes, and
      # that it computes while the last replies are written.
      with concurrent.futures.ThreadPoolExecutor(1) as worker:
        running = worker.submit(timed, batches[0]) if batches else None
        for following in [*batches[1:], None]:
          if running is None:
            break
          finished = self._wait(running)
          running = None
          if following is not None and not self.signals:
            running = worker.submit(timed, following)
          self.book.append(finished)
          made += len(finished)
          if bar is not None:
            bar.advance(made)
          if self.signals and running is None:
            raise Stopped(128 + self.signals[0])
    finally:
      if bar is not None:
        bar.close()
    self.book.calls.use(role, keys)

  def _wait(self, running: concurrent.futures.Future[dict[str, Any]]) -> dict[str, Any]:
    while not running.done():
      # Waking up is what lets Python handle a signal that another thread got.
      concurrent.futures.wait([running], timeout=0.2)
    try:
      return running.result()
    except Exception as error:
      # Ctrl-C reaches an engine's own processes too, and they end at once.
      if self.signals:
        raise Stopped(128 + self.signals[0]) from error
      raise

  def totals(self, *fields: str) -> dict[str, dict[str, float]]:
    """Sums by field and role over the calls that this run needed; "calls" counts them.

    Integers stay integers.
    """
    sums: dict[str, dict[str, float]] = {field: {} for field in ("calls", *fields)}
    for role, value in self.book.calls.used():
      for field in fields:
        if field in value:
          sums[field][role] = sums[field].get(role, 0) + value[field]
      sums["calls"][role] = sums["calls"].get(role, 0) + 1
    return sums


def _completion(value: Mapping[str, Any]) -> engines.Completion:
  """From a journalled call; one of an earlier version may lack the later fields."""
  fields = (field for field in engines.Completion._fields if field in value)
  return engines.Completion(**{field: value[field] for field in fields})


@contextlib.contextmanager
def at_work(calls: Calls) -> Iterator[None]:
  """Where a stage makes its calls: a signal ends it after a micro-batch and says how to
  go on, and in the end no model is left in memory."""
  try:
    with listening(calls.signals):
      yield
  except Stopped:
    kept = f"{len(calls.book.calls)} calls are kept"
    print(f"stopped: {kept}; run the same command again to continue", file=sys.stderr)
    raise
  finally:
    engines.release()


@contextlib.contextmanager
def listening(signals: list[int]) -> Iterator[None]:
  """Notes the first SIGINT or SIGTERM in `signals`; a second one ends the process."""
  watched = (signal.SIGINT, signal.SIGTERM)

  def note(number: int, frame: Any) -> None:
    signals.append(number)
    for each in watched:
      signal.signal(each, signal.SIG_DFL)
    print(
      "stopping after this micro-batch (again: at once)", file=sys.stderr, flush=True
    )

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {each: signal.signal(each, note) for each in watched}
  try:
    yield
  finally:
    for each, handler in before.items():
      signal.signal(each, handler)
