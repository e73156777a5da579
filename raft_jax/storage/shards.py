"""Refined records on disk: ArrayRecord shards in a sealed folder.

The ArrayRecord reader alone cannot be trusted: a truncated file may read as "0 records,
no error". The counts and digests in the manifest are therefore always checked.
"""

from __future__ import annotations

import array
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from array_record.python import array_record_module

from raft_jax import errors
from raft_jax.storage import atomic, sealed_folder

MANIFEST_VERSION = 1


class Spool(Sequence[bytes]):
  """Records in a temporary file, put in any order; memory holds 16 bytes of each."""

  def __init__(self, folder: str | os.PathLike[str], count: int):
    # The file has no name, so that a kill leaves nothing behind.
    self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    self._start = array.array("q", [0]) * count
    self._length = array.array("q", [-1]) * count

  def put(self, first: int, data: Iterable[bytes]) -> None:
    """Writes records `first`, `first` + 1, ...; each may be written once."""
    self._file.seek(0, os.SEEK_END)
    for i, record in enumerate(data, start=first):
      self._start[i], self._length[i] = self._file.tell(), len(record)
      self._file.write(record)

  def missing(self, i: int) -> bool:
    """Whether record i has not been written yet."""
    return self._length[i] < 0

  def __len__(self) -> int:
    return len(self._start)

  @overload
  def __getitem__(self, i: int) -> bytes: ...
  @overload
  def __getitem__(self, i: slice) -> list[bytes]: ...
  def __getitem__(self, i: int | slice) -> bytes | list[bytes]:
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(len(self)))]
    self._file.seek(self._start[i])
    return self._file.read(self._length[i])


class ShardFile(NamedTuple):
  name: str
  records: int
  sha256: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The content of a sealed folder of shards; `meta` is whatever its writer adds."""

  version: int
  records: int
  files: tuple[ShardFile, ...]
  meta: dict[str, Any]


def write_shards(
  folder: str | os.PathLike[str],
  data: Sequence[bytes],
  *,
  records_per_shard: int,
  meta: Mapping[str, Any],
) -> Manifest:
  """Writes records as ArrayRecord shards and seals the folder.

  The bytes on disk are a pure function of the arguments. A kill at any instant leaves
  either no manifest or a complete folder; the next call removes leftovers.

  Raises:
    ValueError: there is nothing to write, or `meta` is not JSON.
    errors.UserError: the disk is full or unwritable (names the file and free space).
  """
  if not data or records_per_shard < 1:
    raise ValueError("write_shards needs records and a positive records_per_shard")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # Readers refuse a folder without a manifest until the new one is there.
  sealed_folder.unseal(folder, "shard-*.array_record")
  starts = range(0, len(data), records_per_shard)
  files = tuple(
    _write_shard(
      folder / f"shard-{i:05d}-of-{len(starts):05d}.array_record",
      data[start : start + records_per_shard],
    )
    for i, start in enumerate(starts)
  )
  manifest = Manifest(MANIFEST_VERSION, len(data), files, dict(meta))
  tree = dataclasses.asdict(manifest) | {"files": [file._asdict() for file in files]}
  sealed_folder.seal(folder, tree)
  return manifest


def _write_shard(path: pathlib.Path, chunk: Sequence[bytes]) -> ShardFile:
  with atomic.replacing(path) as temporary:
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for record in chunk:
      writer.write(record)
    writer.close()  # the first call that reports a full disk
    if _read_records(temporary) != list(chunk):
      raise RuntimeError("reads back differently from what was written")
  return ShardFile(
    path.name, len(chunk), sealed_folder.sha256(path), path.stat().st_size
  )


_NAME = re.compile(r"shard-\d+-of-\d+\.array_record")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
  """The manifest of a folder of shards, after checking every shard against it.

  Raises:
    errors.UserError: there is no manifest (the stage has not finished), it is damaged,
      or a shard is missing or differs from it in size, sha256 or number of records.
  """
  path = pathlib.Path(folder) / sealed_folder.MANIFEST
  if not path.is_file():
    raise errors.UserError(
      f"{path}: no such file, so the refined data are incomplete; run "
      "`python -m raft_jax.refine` with this config (it continues where it stopped)"
    )
  manifest = _parse_manifest(path)
  for file in manifest.files:
    _check_shard(path.parent / file.name, file)
  return manifest


def _parse_manifest(path: pathlib.Path) -> Manifest:
  try:
    tree = sealed_folder.read_manifest(path.parent)
    files = tuple(ShardFile(**file) for file in tree.pop("files"))
    manifest = Manifest(files=files, **tree)
    if manifest.version != MANIFEST_VERSION:
      raise ValueError(f"version {manifest.version}, expected {MANIFEST_VERSION}")
    if not files or not isinstance(manifest.meta, dict):
      raise ValueError("it has no shards, or `meta` is not a JSON object")
    if manifest.records != sum(file.records for file in files):
      raise ValueError("its record counts do not add up")
    if not all(_NAME.fullmatch(file.name) for file in files):
      raise ValueError("a file is no shard")
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
    raise errors.UserError(f"{path}: damaged ({e}); {_REDO}") from e
  return manifest


_REDO = "run the refine stage again (it rewrites the shards without new model calls)"


def _check_shard(path: pathlib.Path, file: ShardFile) -> None:
  if not path.is_file():
    raise errors.UserError(f"{path}: missing, but named by the manifest; {_REDO}")
  checks: tuple[tuple[str, Any, Any], ...] = (
    ("bytes", file.bytes, path.stat().st_size),
    ("sha256", file.sha256, sealed_folder.sha256(path)),
  )
  for quantity, expected, actual in checks:
    if expected != actual:
      raise errors.UserError(
        f"{path}: damaged: expected {quantity} {expected}, got {actual}; {_REDO}"
      )
  _checked_records(path, file)


def _checked_records(path: pathlib.Path, file: ShardFile) -> list[bytes]:
  try:
    stored = _read_records(path)
  except RuntimeError as e:
    raise errors.UserError(f"{path}: damaged ({e}); {_REDO}") from e
  if len(stored) != file.records:
    raise errors.UserError(
      f"{path}: damaged: expected {file.records} records, got {len(stored)}; {_REDO}"
    )
  return stored


def read_shards(folder: str | os.PathLike[str]) -> list[bytes]:
  """All records of a sealed folder, in order. Raises as `read_manifest` does."""
  return list(iterate_shards(folder))


def iterate_shards(folder: str | os.PathLike[str]) -> Iterator[bytes]:
  """As `read_shards`, with one shard in memory at a time."""
  folder = pathlib.Path(folder)
  for file in read_manifest(folder).files:
    yield from _checked_records(folder / file.name, file)


def _read_records(path: pathlib.Path) -> list[bytes]:
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    count = reader.num_records()
    return list(reader.read_all()) if count else []
  finally:
    reader.close()
