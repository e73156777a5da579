"""Which tensors a model's files hold, and which rows of our leaves are in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    layer: its row of the stacked leaves, which is the layer's number if every layer has
      the parameter; None: it is the whole leaf.
    rows: of each leaf in the tensor.
    shape: of the tensor in the file.
    groups: of a fused tensor: its rows are that many groups, each with the same share
      of every leaf's rows.
  """

  name: str
  paths: tuple[str, ...]
  layer: int | None
  rows: tuple[int, ...]
  shape: tuple[int, ...]
  groups: int = 1


def file_names(family: families.Family, *, in_gguf: bool) -> dict[str, str]:
  """Path in the tree -> name in GGUF files or in Hugging Face's."""
  return {
    path: name.gguf if in_gguf else name.hf for path, name in family.names.items()
  }


def pieces(
  leaves: Mapping[str, Any],
  names: Mapping[str, str],
  layers_of: Callable[[str], Sequence[int]] | None = None,
  groups: Mapping[str, int] | None = None,
) -> list[Piece]:
  """The tensors of a whole model, leaf by leaf and in order of layers.

  Args:
    leaves: path -> array, or anything with its shape.
    names: from `file_names`.
    layers_of: parameter of a layer -> numbers of the layers that have it, such as
      `hybrid.layers_of` of a config; None: every layer has every parameter.
    groups: path -> groups of the tensor's rows, where it is not 1.
  """

  def numbers(path: str) -> tuple[int | None, ...]:
    if "{}" not in names[path]:
      return (None,)
    rows = range(leaves[path].shape[0])
    return tuple(layers_of(path.removeprefix("layers/")) if layers_of else rows)

  # Layers of another kind may give the same name to another parameter.
  def key(path: str) -> tuple[str, tuple[int | None, ...]]:
    return names[path], numbers(path)

  fused: dict[Any, tuple[str, ...]] = {key(path): () for path in leaves}
  for path in names:  # in order of the table, which is that of the rows
    if path in leaves:
      fused[key(path)] += (path,)
  result = []
  for (name, layers), paths in fused.items():
    stacked = "{}" in name
    shapes = [tuple(leaves[path].shape)[stacked:] for path in paths]
    rows = tuple(shape[0] for shape in shapes)
    shape = (sum(rows), *shapes[0][1:])
    count = (groups or {}).get(paths[0], 1)
    result += [
      Piece(name.format(layer), paths, row if stacked else None, rows, shape, count)
      for row, layer in enumerate(layers)
    ]
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
  count = piece.rows[place]
  start, share, group = (
    rows // piece.groups for rows in (sum(piece.rows[:place]), count, sum(piece.rows))
  )

  def read(index: Index) -> np.ndarray:
    first, stop, step = index[0].indices(count)
    if piece.groups == 1:
      return tensor.read((slice(start + first, start + stop, step), *index[1:]))
    number, row = np.divmod(np.arange(first, stop, step), share)
    rows = number * group + start + row
    block = tensor.read((slice(int(rows.min()), int(rows.max()) + 1), *index[1:]))
    return block[rows - rows.min()]

  return Stored((count, *tensor.shape[1:]), read)


def joined(parts: Sequence[np.ndarray], groups: int) -> np.ndarray:
  """A tensor from the rows of its leaves; `groups` as in `Piece`."""
  if len(parts) == 1:
    return parts[0]
  grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
  return np.concatenate(grouped, axis=1).reshape(-1, *parts[0].shape[1:])
