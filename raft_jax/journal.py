"""Durable, append-only record of finished calls, keyed by content.

A refinement asks language models thousands of slow questions; the journal is why none
is asked twice. One JSON line per finished call:

  {"crc32": "89abcdef", "key": "<sha256 of what the result depends on>", "value": {}}

Lines are written a micro-batch at a time with one fsync, so a kill loses at most the
micro-batch in flight. A power cut may tear the last line: `open_journal` drops it and
says so. A damaged line anywhere else means the file was edited or the disk is failing:
that is an error, because silently dropping paid-for results would hide it.

`Calls` below makes language-model and encoder calls through it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import shutil
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import filelock

from raft_jax import encode, engines, errors, progress, records

_LOG = logging.getLogger(__name__)

PAIRS_PER_BATCH = 32
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
  with locked(path):
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


class Stopped(SystemExit):
  """A signal asked the run to end; all finished calls are in the journal."""


@dataclasses.dataclass
class Calls:
  """Makes calls through the journal: finished ones are read, new ones made and kept.

  Attributes:
    book: the open journal.
    seed: of the run; with a call's content it makes that call's own seed.
    used: role by key, of every call that this run needed.
    signals: filled by `listening` when the run is asked to end.
  """

  book: Journal
  seed: int
  used: dict[str, str] = dataclasses.field(default_factory=dict)
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
    keys = [
      content_key(
        role=role.name,
        # Without sampling every round's reply is the same reply.
        round=round_number if role.temperature > 0 else 0,
        messages=prompt,
        model=role.generator.identity,
        seed=self.seed,
        **sampling,
      )
      for prompt in prompts
    ]

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
        raise errors.UserError(
          f"question {names[i]}: the {role.name} prompt has {count} tokens and "
          f"max_new_tokens is {role.max_new_tokens}, but the model holds "
          f"{role.generator.prompt_limit} in all; {_SHORTEN}"
        )
    # Longest first: memory runs out at once or not at all.
    fitting = sorted(
      (i for i in tokens if tokens[i] <= limit), key=lambda i: -tokens[i]
    )
    title = f"{role.name}, round {round_number}" if round_number else role.name
    self._make(role.name, title, keys, fitting, role.batch_size, generate)
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

    self._make(role, role, keys, self._missing(keys), PAIRS_PER_BATCH, compare)
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
    rows: Sequence[int],
    batch_size: int,
    work: Callable[[Sequence[int]], list[dict[str, Any]]],
  ) -> None:
    """Does `work` on micro-batches of rows; each is durable before the next begins."""
    for key in keys:
      self.used.setdefault(key, role)
    if not keys:
      return
    done = sum(key in self.book.calls for key in set(keys))
    print(f"{title}: {done} calls done, {len(rows)} to do", flush=True)
    bar = progress.Progress(title, len(rows), unit="call") if rows else None
    try:
      # In a thread of its own, so that a signal is heard while the model computes.
      with concurrent.futures.ThreadPoolExecutor(1) as worker:
        for start in range(0, len(rows), batch_size):
          batch = rows[start : start + batch_size]
          began = time.monotonic()
          future = worker.submit(work, batch)
          while not future.done():
            # Waking up is what lets Python handle a signal that another thread got.
            concurrent.futures.wait([future], timeout=0.2)
          try:
            values = future.result()
          except Exception as error:
            # Ctrl-C reaches an engine's own processes too, and they end at once.
            if self.signals:
              raise Stopped(128 + self.signals[0]) from error
            raise
          seconds = round((time.monotonic() - began) / len(batch), 6)
          self.book.append(
            {
              keys[i]: {**value, "seconds": seconds}
              for i, value in zip(batch, values, strict=True)
            }
          )
          if bar is not None:
            bar.advance(start + len(batch))
          if self.signals:
            raise Stopped(128 + self.signals[0])
    finally:
      if bar is not None:
        bar.close()

  def totals(self, field: str) -> dict[str, float]:
    """Sum by role of one field of the values used; integers stay integers."""
    sums: dict[str, float] = {}
    for key, role in self.used.items():
      if field in self.book.calls.get(key, {}):
        sums[role] = sums.get(role, 0) + self.book.calls[key][field]
    return sums


def _completion(value: Mapping[str, Any]) -> engines.Completion:
  """From a journalled call; one of an earlier version may lack the later fields."""
  fields = (field for field in engines.Completion._fields if field in value)
  return engines.Completion(**{field: value[field] for field in fields})


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
