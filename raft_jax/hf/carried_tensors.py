"""Tensors that are never read: listed from the headers, and copied byte for byte.

A safetensors file is the length of its header (uint64, little-endian), the header as
JSON, and the bytes of all tensors without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

from raft_jax.hf import load as hf_load
from raft_jax.hf import model_source, wrappers
from raft_jax.runtime import interrupts

CHUNK = 1 << 24
"""Bytes that are held at a time."""


class Carried(NamedTuple):
  """One tensor in a file: its place there, and its type as the header writes it."""

  name: str
  file: pathlib.Path
  start: int
  size: int
  dtype: str
  shape: tuple[int, ...]


def find(folder: pathlib.Path, names: Set[str]) -> list[Carried]:
  """The tensors of these names, in order of files and names."""
  files = sorted(hf_load.weight_shards(folder)) if names else []
  return [
    tensor
    for file in files
    for tensor in _listed(folder / file)
    if tensor.name in names
  ]


def _listed(path: pathlib.Path) -> Iterator[Carried]:
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(length))
  header.pop("__metadata__", None)
  for name, entry in sorted(header.items()):
    first, stop = entry["data_offsets"]
    yield Carried(
      name, path, 8 + length + first, stop - first, entry["dtype"], (*entry["shape"],)
    )


def describe(source: str, parameters: int) -> str | None:
  """What is trained of a model with a text tower; None for a text model.

  Args:
    source: as for `model_source.resolve`.
    parameters: of the tower.
  """
  path = model_source.resolve(source, weights=False)
  wrapper = wrappers.find(hf_load.fields(path))
  if wrapper is None:
    return None
  others = "all others"
  if any(path.glob("*.safetensors")):
    floats = [
      t
      for t in find(path, wrappers.outside(hf_load.stored_tensors(path)))
      if t.dtype.startswith(("F", "BF"))
    ]
    others = f"{sum(math.prod(t.shape) for t in floats):,} others"
  return (
    f"text tower of {wrapper.architecture}: {parameters:,} parameters; {others} are "
    "carried through unchanged"
  )


def copy(
  path: pathlib.Path, tensors: Iterable[Carried], metadata: Mapping[str, str]
) -> None:
  """Writes a safetensors file with the same bytes, and compares them.

  Raises:
    OSError: a tensor on disk differs from what was written.
  """
  # The widest first, as the format's own writer does: each is then aligned.
  order = sorted(tensors, key=lambda t: (-t.size // max(math.prod(t.shape), 1), t.name))
  header: dict[str, Any] = {"__metadata__": dict(metadata)}
  end = 0
  for tensor in order:
    offsets = [end, end + tensor.size]
    shape = list(tensor.shape)
    header[tensor.name] = {
      "dtype": tensor.dtype,
      "shape": shape,
      "data_offsets": offsets,
    }
    end += tensor.size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as out:
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in order:
      for chunk in _chunks(tensor.file, tensor.start, tensor.size):
        out.write(chunk)
  start = 8 + len(text)
  for tensor in order:
    theirs = _chunks(tensor.file, tensor.start, tensor.size)
    ours = _chunks(path, start, tensor.size)
    if any(a != b for a, b in zip(theirs, ours, strict=True)):
      raise OSError(f"{path}: {tensor.name} on disk differs from what was written")
    start += tensor.size


def _chunks(path: pathlib.Path, start: int, size: int) -> Iterator[bytes]:
  with path.open("rb") as file:
    file.seek(start)
    while size:
      interrupts.check()
      chunk = file.read(min(size, CHUNK))
      if not chunk:
        raise OSError(f"{path}: ends before its header says")
      size -= len(chunk)
      yield chunk
