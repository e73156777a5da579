"""Which tensors a model's files hold, and which rows of our leaves are in each.

A leaf of experts is stacked over layers and experts, [L, E, ...]. Its part of one layer
is read and written as one array, though files have a tensor for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax.hf import family_row

Index = tuple[Any, ...]
"""A slice for every axis; the first may be an array of row numbers."""


class Stored(NamedTuple):
  """One tensor in a file: its shape, how to read a block of it, and its type there."""

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]
  dtype: str = "F32"


class Piece(NamedTuple):
  """One tensor that a file should hold: its name there, and where it is in our tree.

  Or the tensors of all experts of a layer, which are stacked on axis 0.

  Attributes:
    name: in the file; of experts, `{}` stands for the expert's number.
    paths: of the leaf, like ("layers/q",); of several where the tensor is fused.
    layer: its row of the stacked leaves, which is the layer's number if every layer has
      the parameter; None: it is the whole leaf.
    rows: of each leaf in the tensor.
    shape: of the tensor in the file, or of the stack of the experts' tensors.
    form: how one tensor stores the parameters of all experts; else None.
    groups: of a fused tensor: its rows are that many groups, each with the same share
      of every leaf's rows.
  """

  name: str
  paths: tuple[str, ...]
  layer: int | None
  rows: tuple[int, ...]
  shape: tuple[int, ...]
  form: family_row.Form | None = None
  groups: int = 1

  @property
  def of_experts(self) -> bool:
    """Whether it stands for one tensor of each expert."""
    return "{}" in self.name

  def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor in the files."""
    if not self.of_experts:
      yield self.name, self.shape
      return
    for expert in range(self.shape[0]):
      yield self.name.format(expert), self.shape[1:]


def file_names(family: family_row.Family, *, in_gguf: bool) -> dict[str, str]:
  """Path in the tree -> name in GGUF files or in Hugging Face's."""
  return {
    path: name.gguf if in_gguf else name.hf for path, name in family.names.items()
  }


def forms(family: family_row.Family) -> dict[str, family_row.Form]:
  """Path in the tree -> form of its tensor, if it holds all experts of a layer."""
  return {path: name.form for path, name in family.names.items() if name.form}


def pieces(
  leaves: Mapping[str, Any],
  names: Mapping[str, str],
  *,
  forms: Mapping[str, family_row.Form] | None = None,
  layers_of: Callable[[str], Sequence[int]] | None = None,
  groups: Mapping[str, int] | None = None,
) -> list[Piece]:
  """The tensors of a whole model, leaf by leaf and in order of layers.

  Args:
    leaves: path -> array, or anything with its shape.
    names: from `file_names`.
    forms: from the function of this name.
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
    form = (forms or {}).get(paths[0])
    rows = tuple(shape[0] for shape in shapes)
    shape = (sum(rows), *shapes[0][1:])
    if form is not None:
      shape = (shapes[0][0], len(paths) * shapes[0][1], *shapes[0][2:])
      shape = (shape[0], *shape[:0:-1]) if form.transposed else shape
    count = (groups or {}).get(paths[0], 1)
    for row, layer in enumerate(layers):
      numbered = name.replace("{}", str(layer), 1)
      index = row if stacked else None
      result.append(Piece(numbered, paths, index, rows, shape, form, count))
  return result


def whole(stored: Mapping[str, Stored], piece: Piece) -> Stored:
  """The tensor of a piece; of experts, the stack of their tensors."""
  if not piece.of_experts:
    return stored[piece.name]
  tensors = [stored[name] for name, _ in piece.tensors()]

  def read(index: Index) -> np.ndarray:
    # Only the experts that are asked for: other hosts read theirs.
    asked = range(*index[0].indices(len(tensors)))
    return np.stack([tensors[expert].read(index[1:]) for expert in asked])

  return Stored(piece.shape, read, tensors[0].dtype)


def constants(family: family_row.Family, layers: int) -> dict[str, float]:
  """The tensors of a model that hold the same number in every one, by name."""
  return {
    name.format(layer): number
    for name, number in family.constants.items()
    for layer in range(layers)
  }


def part(tensor: Stored, piece: Piece, path: str) -> Stored:
  """The rows of one leaf in a tensor, which is all of them unless it is fused."""
  if piece.form is not None:
    return _experts_part(tensor, piece, piece.form, path)
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


def _experts_part(
  tensor: Stored, piece: Piece, form: family_row.Form, path: str
) -> Stored:
  """One parameter of all experts, [E, out] or [E, out, in], in a tensor that fuses."""
  place, fused = piece.paths.index(path), len(piece.paths)
  shape = tensor.shape
  shape = (shape[0], *shape[:0:-1]) if form.transposed else shape
  count = shape[1] // fused

  def read(index: Index) -> np.ndarray:
    first, stop, _ = index[1].indices(count)
    outputs = slice(place * count + first, place * count + stop)
    if form.alternating:
      outputs = slice(fused * first, fused * stop)
    theirs = (index[0], outputs, *index[2:])
    theirs = (theirs[0], *theirs[:0:-1]) if form.transposed else theirs
    block = tensor.read(theirs)
    block = block.swapaxes(1, 2) if form.transposed else block
    return block[:, place::fused] if form.alternating else block

  return Stored((shape[0], count, *shape[2:]), read)


def joined(parts: Sequence[np.ndarray], piece: Piece) -> np.ndarray:
  """The tensor of a piece, from the part of each of its leaves."""
  if piece.form is None:
    return joined_rows(parts, piece.groups)
  if piece.form.alternating:
    tensor = np.stack(parts, axis=2)
    tensor = tensor.reshape(len(tensor), -1, *tensor.shape[3:])
  else:
    tensor = np.concatenate(parts, axis=1)
  return tensor.swapaxes(1, 2) if piece.form.transposed else tensor


def joined_rows(parts: Sequence[np.ndarray], groups: int) -> np.ndarray:
  """A tensor from the rows of its leaves; `groups` as in `Piece`."""
  if len(parts) == 1:
    return parts[0]
  grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
  return np.concatenate(grouped, axis=1).reshape(-1, *parts[0].shape[1:])
