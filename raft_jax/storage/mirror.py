"""A copy of a run's folder in an object store (S3, GCS, Azure), kept while it runs.

The run works on its local folder. A thread copies what has changed, so that another
machine can continue from the copy. An object store replaces single objects whole, and
nothing else of what a file system guarantees. So the copy is made in the order in which
the run itself writes: files that seal a folder are removed first and written last, and
the copy is at every instant a folder that a killed run could have left behind. An
object with the name of the machine that copies keeps a second one from doing the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.runtime import interrupts, progress
from raft_jax.storage import atomic, journal, sealed_folder

SCHEMES = ("s3://", "gs://", "az://", "file:///")

STATE = ".mirror.json"
"""In the store: who copies into it. In the folder: what was copied, and where."""

FETCHING = ".mirror.fetching"
"""In a folder that is being filled from a store; it holds no run of its own yet."""

SEALS = (sealed_folder.MANIFEST, sealed_folder.STEP_SEAL)
"""Files without which a folder is unfinished: of results, and of a checkpoint."""

EVERY_S = 30.0
"""Seconds between two copies."""

EXPIRES_S = 600.0
"""A machine that was not heard of for so long counts as lost."""

POLL_S = 2.0
"""Seconds between two looks at a machine that may be lost."""

Stat = tuple[int, int]
"""Size in bytes and time of the last change in ns."""


@contextlib.contextmanager
def kept(folder: pathlib.Path, url: str) -> Iterator[None]:
  """Keeps a copy of a folder in a store; first fills the folder if it is empty.

  At the end, also after an error or a signal, the copy is brought up to date.

  Args:
    url: of one of `SCHEMES`.

  Raises:
    errors.UserError: the store cannot be used, or its copy is of another folder.
    errors.TryAgainError: another machine copies into it now.
  """
  store = open_store(url)
  folder.mkdir(parents=True, exist_ok=True)
  with journal.locked(folder / ".mirror"):
    with _named_errors(url):
      claim = Claim.acquire(store, url, folder)
      try:
        has_run = _has_run(folder)
        known = read_known(folder, url) if has_run else pull(store, folder, url)
      except BaseException:
        with contextlib.suppress(Exception):
          claim.release()
        raise
    copier = _Copier(store, folder, url, claim, known)
    try:
      yield
    except BaseException:
      # The reason for the end matters more than the state of the copy.
      if fault := copier.finish():
        print(f"WARNING: {fault}", flush=True)
      raise
    if fault := copier.finish():
      raise errors.TryAgainError(fault)


def open_store(url: str) -> Any:
  """An obstore store, whose paths are relative to the URL.

  Credentials and endpoints come from the environment, as the cloud's own tools read it.
  """
  try:
    from obstore import store
  except ImportError as error:
    raise errors.UserError(
      f"mirror: {url} needs the extra `store`; run {errors.install('store')}"
    ) from error
  with _named_errors(url):
    if url.startswith("file:"):
      return store.from_url(url, mkdir=True)
    return store.from_url(url)


@contextlib.contextmanager
def _named_errors(url: str) -> Iterator[None]:
  """Turns the store's errors, with their many lines of detail, into one line."""
  from obstore import exceptions

  try:
    yield
  except (exceptions.BaseError, OSError, NotImplementedError) as error:
    raise errors.TryAgainError(
      f"mirror: {url}: {_reason(error)}; check the address, the credentials and the"
      " connection, then run the same command again"
    ) from error


def _reason(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:300]


# --- Who copies -----------------------------------------------------------------------


class Claim:
  """The object that names the machine and folder that copy into a store."""

  def __init__(self, store: Any, writer: str):
    self._store, self._writer = store, writer
    self._tag: str | None = None

  @classmethod
  def acquire(cls, store: Any, url: str, folder: pathlib.Path) -> Claim:
    """Claims a store; waits for a machine that may be lost.

    Raises:
      errors.UserError: the folder has files, and another one was copied last.
      errors.TryAgainError: another machine is at work.
    """
    claim = cls(store, f"{socket.gethostname()}:{folder.resolve()}")
    while True:
      found = _read_claim(store)
      writer = found.writer or ("someone" if store_files(store) else None)
      if writer not in (None, claim._writer):
        if _has_run(folder):
          raise errors.UserError(
            f"mirror: {url} was last written by {writer}, not from {folder}; empty that"
            " folder to continue from the mirror, or choose another mirror"
          )
        _wait_for_silence(store, url, found)
      if claim._write(held=True, replaced=found.tag):
        return claim

  def renew(self) -> bool:
    """Shows that this machine is at work; False if another has taken its place."""
    return self._write(held=True, replaced=self._tag)

  def release(self) -> None:
    """Leaves the store to the next machine."""
    self._write(held=False, replaced=self._tag)

  def _write(self, *, held: bool, replaced: str | None) -> bool:
    """Writes the object if it is still the one that was read; whether it was."""
    import obstore
    from obstore import exceptions

    content = {"writer": self._writer, "held": held, "time": time.time()}
    text = json.dumps(content).encode()
    mode: Any = "create" if replaced is None else {"e_tag": replaced}
    try:
      result = obstore.put(self._store, STATE, text, mode=mode)
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
      return False
    except NotImplementedError:  # a folder in place of a store compares nothing
      result = obstore.put(self._store, STATE, text)
    self._tag = result["e_tag"]
    return True


class _Found(NamedTuple):
  """A claim as it stands in a store.

  Attributes:
    writer: None if there is no claim, or it cannot be read.
    held: whether the writer is at work.
    time: of its last sign, in seconds since 1970.
    tag: the version of the object; None if there is none.
  """

  writer: str | None
  held: bool
  time: float
  tag: str | None


def _read_claim(store: Any) -> _Found:
  import obstore

  try:
    found = obstore.get(store, STATE)
  except FileNotFoundError:
    return _Found(None, False, 0.0, None)
  tag = found.meta["e_tag"]
  try:
    content = json.loads(bytes(found.bytes()))
    return _Found(str(content["writer"]), content["held"], float(content["time"]), tag)
  except (ValueError, KeyError, TypeError):
    return _Found(None, False, 0.0, tag)


def _wait_for_silence(store: Any, url: str, found: _Found) -> None:
  """Waits until the writer of a claim counts as lost, if it is at work.

  Raises:
    errors.TryAgainError: it gave a sign.
  """
  age = time.time() - found.time
  if not found.held or age >= EXPIRES_S:
    return
  print(
    f"mirror: {found.writer} used {url} {progress.clock(age)} ago; waiting up to"
    f" {progress.clock(EXPIRES_S - age)} for a sign of it",
    flush=True,
  )
  while time.time() - found.time < EXPIRES_S:
    time.sleep(POLL_S)
    interrupts.check()
    if _read_claim(store).tag != found.tag:
      raise errors.TryAgainError(
        f"mirror: {url} is in use by {found.writer}; wait for it to end, or choose"
        " another mirror"
      )


# --- Copying --------------------------------------------------------------------------


class _Copier:
  """Copies a folder into a store every `EVERY_S`, and renews the claim, in threads."""

  def __init__(
    self,
    store: Any,
    folder: pathlib.Path,
    url: str,
    claim: Claim,
    known: Mapping[str, Stat],
  ):
    self._store, self._folder, self._url = store, folder, url
    self._claim, self._known = claim, dict(known)
    self._fault: str | None = None
    self._lost, self._ended = threading.Event(), threading.Event()
    self._threads = [
      threading.Thread(target=self._repeat, args=(work,), daemon=True)
      for work in (self._renew, self._copy)
    ]
    for thread in self._threads:
      thread.start()

  def _repeat(self, work: Callable[[], None]) -> None:
    while not self._ended.wait(EVERY_S):
      work()

  def _renew(self) -> None:
    with contextlib.suppress(Exception):  # the next copy names the reason
      if not self._claim.renew():
        self._lost.set()

  def _copy(self) -> None:
    """One copy; a part of it that failed is copied the next time."""
    earlier = self._fault
    try:
      if self._lost.is_set():
        raise OSError("another machine has taken over, so nothing more is copied")
      push(self._store, self._folder, self._known)
      write_known(self._folder, self._url, self._known)
      self._fault = None
    except Exception as error:  # of the store, the network, the disk
      self._fault = f"mirror: {self._url} is not up to date ({_reason(error)})"
      if earlier is None and not self._ended.is_set():
        print(f"WARNING: {self._fault}; copying goes on when it can", flush=True)

  def finish(self) -> str | None:
    """The last copy, of a folder at rest; the reason if it failed."""
    self._ended.set()
    for thread in self._threads:
      thread.join()
    self._renew()
    self._copy()
    if self._fault is not None:
      return f"{self._fault}; {self._folder} has everything"
    with contextlib.suppress(Exception):  # the claim then expires by itself
      self._claim.release()
    print(f"mirror: {self._url} holds the {len(self._known)} files of {self._folder}")
    return None


def push(store: Any, folder: pathlib.Path, held: dict[str, Stat]) -> None:
  """Copies what has changed into a store.

  Args:
    held: what the store holds: path in the folder -> its `Stat` when it was copied;
      kept up to date.
  """
  import obstore

  present = _files(folder)
  changed = [path for path, stat in present.items() if held.get(path) != stat]
  gone = held.keys() - present.keys()
  stale = gone | {path for path in changed if _is_seal(path) and path in held}
  for path in sorted(stale, key=lambda path: not _is_seal(path)):
    with contextlib.suppress(FileNotFoundError):
      obstore.delete(store, path)
    del held[path]
  for path in sorted(changed, key=_is_seal):
    try:
      obstore.put(store, path, folder / path)
    except FileNotFoundError:
      continue  # deleted since
    size = obstore.head(store, path)["size"]
    if size < present[path][0]:
      raise OSError(f"{path}: the store has {size} of {present[path][0]} bytes")
    held[path] = present[path]  # of before the copy: a later change is copied again


def pull(store: Any, folder: pathlib.Path, url: str) -> dict[str, Stat]:
  """Fills an empty folder from a store; leaves out unfinished checkpoints."""
  import obstore

  present = set(store_files(store))
  paths = [path for path in present if not _unfinished(path, present)]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / FETCHING).touch()
  bar = progress.Progress(f"mirror: {url}", len(paths), unit="file") if paths else None
  paths.sort(key=lambda path: (_is_seal(path), path))
  for done, path in enumerate(paths, start=1):
    interrupts.check()
    if any(part in ("..", "") for part in path.split("/")):
      raise errors.UserError(f"mirror: {url}: holds {path!r}, which is no file's name")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(target) as temporary, temporary.open("wb") as file:
      for chunk in obstore.get(store, path).stream(min_chunk_size=8 * 2**20):
        file.write(chunk)
    if bar is not None:
      bar.advance(done)
  if bar is not None:
    bar.close()
  known = _files(folder)
  write_known(folder, url, known)
  (folder / FETCHING).unlink()
  return known


def _has_run(folder: pathlib.Path) -> bool:
  """Whether a folder has files of a run, and not a part of those of a store."""
  return bool(_files(folder)) and not (folder / FETCHING).exists()


def store_files(store: Any) -> list[str]:
  """The paths of all objects but the claim."""
  import obstore

  return [
    found["path"]
    for batch in obstore.list(store)
    for found in batch
    if found["path"] != STATE
  ]


def _files(folder: pathlib.Path) -> dict[str, Stat]:
  """The folder's files, without locks and what is being written."""
  found = {}
  for place, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not _is_transient(name)]
    for name in names:
      if _is_transient(name):
        continue
      path = pathlib.Path(place, name)
      with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        key = path.relative_to(folder).as_posix()
        found[key] = (stat.st_size, stat.st_mtime_ns)
  return found


def _is_transient(name: str) -> bool:
  return (
    name in (STATE, FETCHING)
    or name.startswith(atomic.TEMPORARY)
    or name.endswith((".lock", ".holder"))
    or ".orbax-checkpoint-tmp" in name
  )


def _is_seal(path: str) -> bool:
  return path.rsplit("/", 1)[-1] in SEALS


_STEP = re.compile(
  rf"((?:.*/)?(?:{sealed_folder.CHECKPOINTS}|{sealed_folder.BEST})/\d+)/"
)


def _unfinished(path: str, present: set[str]) -> bool:
  """Whether a path lies in a checkpoint, `checkpoints/STEP`, that has no seal."""
  step = _STEP.match(path)
  return step is not None and f"{step[1]}/{sealed_folder.STEP_SEAL}" not in present


def read_known(folder: pathlib.Path, url: str) -> dict[str, Stat]:
  """What was copied from a folder to a URL; {} if that is not known."""
  try:
    state = json.loads((folder / STATE).read_bytes())
    if state["url"] != url:
      return {}
    return {path: (size, time_ns) for path, (size, time_ns) in state["files"].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}


def write_known(folder: pathlib.Path, url: str, known: Mapping[str, Stat]) -> None:
  with atomic.replacing(folder / STATE) as temporary:
    temporary.write_text(json.dumps({"url": url, "files": known}))
