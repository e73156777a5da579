"""Which tensors a model's files hold, and which rows of our leaves are in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from raft_jax.hf import families

Index = tuple[Any, ...]
"""A slice for every axis; the first may be an array of row numbers."""


class Stored(NamedTuple):
  """One tensor in a file: its shape, how to read a block of it, and its type there."""

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]
  dtype: str = "F32"


class Piece(NamedTuple):
  """One tensor that a file should hold: its name there, and where it is in our tree.

  Attributes:
    name: in the file.
    paths: of the leaf, like ("layers/q",); of several where the tensor is fused.
    layer: its row of the stacked leaves; None: it is the whole leaf.
    rows: of each leaf in the tensor.
    shape: of the tensor in the file.
  """

  name: str
  paths: tuple[str, ...]
  layer: int | None
  rows: tuple[int, ...]
  shape: tuple[int, ...]


def file_names(family: families.Family, *, in_gguf: bool) -> dict[str, str]:
  """Path in the tree -> name in GGUF files or in Hugging Face's."""
  return {
    path: name.gguf if in_gguf else name.hf for path, name in family.names.items()
  }


def pieces(leaves: Mapping[str, Any], names: Mapping[str, str]) -> list[Piece]:
  """The tensors of a whole model, leaf by leaf and in order of layers.

  Args:
    leaves: path -> array, or anything with its shape.
    names: from `file_names`.
  """
  groups: dict[str, tuple[str, ...]] = {names[path]: () for path in leaves}
  for path, name in names.items():  # in order of the table, which is that of the rows
    if path in leaves:
      groups[name] += (path,)
  result = []
  for name, paths in groups.items():
    stacked = "{}" in name
    shapes = [tuple(leaves[path].shape)[stacked:] for path in paths]
    rows = tuple(shape[0] for shape in shapes)
    shape = (sum(rows), *shapes[0][1:])
    layers = range(leaves[paths[0]].shape[0]) if stacked else (None,)
    result += [Piece(name.format(i), paths, i, rows, shape) for i in layers]
  return result


def constants(family: families.Family, layers: int) -> dict[str, float]:
  """The tensors of a model that hold the same number in every one, by name."""
  return {
    name.format(layer): number
    for name, number in family.constants.items()
    for layer in range(layers)
  }


def part(tensor: Stored, piece: Piece, path: str) -> Stored:
  """The rows of one leaf in a tensor, which is all of them unless it is fused."""
  if len(piece.paths) == 1:
    return tensor
  place = piece.paths.index(path)
  start, count = sum(piece.rows[:place]), piece.rows[place]

  def read(index: Index) -> np.ndarray:
    first, stop, step = index[0].indices(count)
    return tensor.read((slice(start + first, start + stop, step), *index[1:]))

  return Stored((count, *tensor.shape[1:]), read)
