"""Loading of models from Hugging Face folders, the hub and GGUF files.

Weights are read from safetensors or GGUF only: a pickle is never opened, and a
repository's code never runs. Headers, names and shapes are checked before any tensor is
read; then tensors are read one at a time. Only `load_config` and `load_params` import
jax.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from raft_jax import errors
from raft_jax.hf import (
  decoder_config,
  family_row,
  gguf_config,
  gguf_file,
  model_source,
  mxfp4,
  tensor_layout,
  weight_files,
  wrappers,
)
from raft_jax.runtime import interrupts

if TYPE_CHECKING:
  import jax

  from raft_jax.models import transformer

DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
STRIP_BYTES = 1 << 24
"""Bytes of a tensor that are read, converted and checked at a time."""


# --- Config ---------------------------------------------------------------------------


def load_config(source: str, *, weights: bool = True) -> transformer.DecoderConfig:
  """The decoder's config, from config.json or GGUF metadata.

  Args:
    source, weights: as for `model_source.resolve`.

  Raises:
    UserError: the family or a feature of it is not supported; the message names it.
  """
  path = model_source.resolve(source, weights=weights)
  content = fields(path)
  if _ties_by_file(path, content):
    heads = ("lm_head.weight", "language_model.lm_head.weight")
    has_head = any(name in stored_tensors(path) for name in heads)
    content = {**content, "tie_word_embeddings": not has_head}
  return decoder_config.decoder_config(content, _config_place(path))


def _ties_by_file(path: pathlib.Path, content: family_row.Fields) -> bool:
  """Whether only the files tell if the head of a text tower is the embedding.

  The default in the config's class has changed between versions of transformers, which
  takes the head of a file if it has one.
  """
  return (
    wrappers.find(content) is not None
    and content.get("tie_word_embeddings") is None
    and any(path.glob("*.safetensors"))
  )


def family(source: str) -> family_row.Family:
  """The family of the source's model."""
  path = model_source.resolve(source, weights=False)
  return decoder_config.find_family(fields(path), _config_place(path))


def _config_place(path: pathlib.Path) -> str:
  return str(path / "config.json" if path.is_dir() else path)


def fields(path: pathlib.Path) -> family_row.Fields:
  """The unchecked config of the model at a path from `model_source.resolve`."""
  if path.is_file():
    return gguf_config.config_fields(path)
  if not (path / "config.json").is_file():
    inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".gguf")
    which = f" ({', '.join(inside)} in it)" if inside else ""
    raise errors.UserError(
      f"{path}: no config.json; name a Hugging Face model folder or a .gguf file{which}"
    )
  return read_json(path / "config.json")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object of a file. Raises UserError if there is none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{path}: not readable as JSON ({error}); fetch the file again"
    ) from error
  if not isinstance(value, dict):
    raise errors.UserError(f"{path}: not a JSON object; fetch the file again")
  return value


# --- Weights --------------------------------------------------------------------------


def load_params(
  source: str,
  config: transformer.DecoderConfig,
  *,
  dtype: str = "float32",
  shardings: Any = None,
  form: str | None = None,
) -> transformer.Params:
  """The model's parameters, as the tree `quantised_base.shapes(config, form)`.

  Loading is strict: each tensor of the checkpoint is used once, none is missing, shapes
  agree, and all values are finite. A `lm_head.weight` beside tied embeddings must equal
  the embedding. Only the blocks that this host's devices need are read, in strips. A
  layer's tensor goes directly to its row of the stacked leaf on the devices, so the
  host holds at most one tensor of the embedding's size or two of a layer's. A tensor
  that is quantised goes to the devices in float32 first, by itself.

  Args:
    source: as for `model_source.resolve`.
    config: from `load_config`.
    dtype: of the parameters, "float32" or "bfloat16".
    shardings: tree of `jax.sharding.NamedSharding`, one for each parameter; None: the
      default device.
    form: of quantised kernels ("int8" or "nf4"); None: there are none.

  Raises:
    UserError: the checkpoint is damaged, a pickle, or does not fit; tensors are named.
  """
  import jax
  from flax import traverse_util

  from raft_jax.models import quantised, quantised_base

  path = model_source.resolve(source)
  stored, pieces, leaves = _matched(path, config)
  places = traverse_util.flatten_dict(shardings or {}, sep="/")
  axes = quantised_base.kernel_axes(config) if form else {}
  quantise = jax.jit(quantised.quantise, static_argnames=("form", "axes"))

  def load_leaf(name: str, shape: tuple[int, ...]) -> Any:
    parts = [piece for piece in pieces if name in piece.paths]
    place = places.get(name)
    if parts[0].layer is None:
      return load_tensor(parts[0], name, shape, place, dtype)
    rows = (
      functools.partial(load_row, part, name, shape[1:], _of_layer(place))
      for part in parts
    )
    return _stacked(rows, len(parts), place)

  def load_row(
    piece: tensor_layout.Piece, name: str, shape: tuple[int, ...], place: Any
  ) -> Any:
    kernel = name.removeprefix("layers/")
    if kernel not in axes:
      return load_tensor(piece, name, shape, place, dtype)
    exact = load_tensor(piece, name, shape, place, "float32")
    return quantise(exact, form=form, axes=axes[kernel])

  def load_tensor(
    piece: tensor_layout.Piece, name: str, shape: tuple[int, ...], place: Any, kind: str
  ) -> jax.Array:
    interrupts.check()
    tensor = tensor_layout.part(tensor_layout.whole(stored, piece), piece, name)
    shown = f"{path}: {piece.name.replace('{}', '*')}"  # of all experts
    return _placed(tensor, shape, place, DTYPES[kind], shown)

  loaded = {name: load_leaf(name, leaf.shape) for name, leaf in leaves.items()}
  return traverse_util.unflatten_dict(loaded, sep="/")


def _placed(
  tensor: tensor_layout.Stored,
  shape: tuple[int, ...],
  place: Any,
  dtype: np.dtype,
  shown: str,
) -> jax.Array:
  """A tensor on its devices, each of which reads its own block."""
  import jax

  def block(index: tensor_layout.Index | None) -> np.ndarray:
    return _read_block(tensor, index or (slice(None),) * len(shape), dtype, shown)

  if place is None:
    return jax.device_put(block(None))
  return jax.make_array_from_callback(shape, place, block)


def _of_layer(place: Any) -> Any:
  """The sharding of one row of a leaf that is stacked on axis 0.

  Of a quantised kernel it is that of the row before it is quantised.
  """
  import jax

  from raft_jax.models import quantised

  if place is None:
    return None
  if quantised.is_quantised(place):
    place = place.codes
    return jax.sharding.NamedSharding(place.mesh, jax.P(*place.spec[1:3]))
  return jax.sharding.NamedSharding(place.mesh, jax.P(*place.spec[1:]))


def _stacked(rows: Iterable[Callable[[], Any]], count: int, place: Any) -> Any:
  """Stacks the trees that `count` functions return, without a second copy of them."""
  import jax
  import jax.numpy as jnp

  # Of functions of the module, so that leaves of one shape share a program.
  fill = jax.jit(_filled, donate_argnums=0, out_shardings=place)

  def empty(leaf: jax.Array, where: Any = None) -> jax.Array:
    return jnp.zeros((count, *leaf.shape), leaf.dtype, device=where)

  stack = None
  for layer, read in enumerate(rows):
    row = read()
    if stack is None:
      stack = jax.tree.map(empty, row, *(() if place is None else (place,)))
    # Wait for each row before reading the next, so that jax can free it meanwhile.
    stack = jax.block_until_ready(fill(stack, row, np.int32(layer)))
  return stack


def _filled(stack: Any, row: Any, layer: np.int32) -> Any:
  """The stack with a row in its place."""
  import jax

  return jax.tree.map(
    lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, layer, 0),
    stack,
    row,
  )


def check_params(source: str, config: transformer.DecoderConfig) -> None:
  """Checks a checkpoint like `load_params`, from the headers only.

  Raises:
    UserError: the checkpoint is damaged, a pickle, or does not fit; tensors are named.
  """
  _matched(model_source.resolve(source), config)


def _matched(
  path: pathlib.Path, config: transformer.DecoderConfig
) -> tuple[dict[str, tensor_layout.Stored], list[tensor_layout.Piece], dict[str, Any]]:
  """The stored tensors, the pieces that make up the parameters, and leaves by path."""
  from flax import traverse_util

  from raft_jax.models import transformer

  in_gguf = path.is_file()
  family = decoder_config.find_family(fields(path), _config_place(path))
  stored = gguf_file.tensors(path) if in_gguf else stored_tensors(path)
  stored = {_renamed(name, family): tensor for name, tensor in stored.items()}
  family = family.as_stored(stored)
  names = tensor_layout.file_names(family, in_gguf=in_gguf)
  if family.wrapped:
    names = wrappers.file_names(names, stored)
    stored = {name: stored[name] for name in stored if wrappers.is_inside(name)}
  leaves = traverse_util.flatten_dict(transformer.shapes(config), sep="/")
  pieces = model_pieces(family, config, leaves, names)
  if family.mxfp4:
    stored = mxfp4.decoded(stored)
  tied = names["head"] if config.tie_embeddings else None
  if tied in stored and names["embed"] not in stored:
    # A file holds only one of two tensors that share memory; this may be the head.
    stored[names["embed"]] = stored.pop(tied)
  constants = tensor_layout.constants(family, config.n_layers)
  known = {tied, *constants, *unused(config, names)}
  _check_fit(path, stored, pieces, family, known, head=names["head"])
  _check_constants(path, stored, constants)
  if tied in stored:
    _check_tied(path, stored[names["embed"]], stored[tied], tied)
  if in_gguf:
    heads = decoder_config.interleaved_heads(family, config)
    for piece in pieces:
      if (leaf := piece.paths[0]) in heads:
        stored[piece.name] = gguf_file.uninterleaved(stored[piece.name], heads[leaf])
      if leaf.endswith("norm") and config.norm_offset:  # the file holds the sum
        stored[piece.name] = gguf_file.shifted(stored[piece.name], config.norm_offset)
  return stored, pieces, leaves


def model_pieces(
  family: family_row.Family,
  config: transformer.DecoderConfig,
  leaves: Mapping[str, Any],
  names: Mapping[str, str],
) -> list[tensor_layout.Piece]:
  """The tensors of a model's files, as `tensor_layout.pieces`."""
  from raft_jax.models import hybrid

  return tensor_layout.pieces(
    leaves,
    names,
    forms=tensor_layout.forms(family),
    layers_of=functools.partial(hybrid.layers_of, config),
    groups=decoder_config.row_groups(family, config),
  )


def unused(
  config: transformer.DecoderConfig, names: Mapping[str, str]
) -> frozenset[str]:
  """Tensors that files may hold and that no layer reads, of layers that share keys.

  Published models have them; transformers passes over them, too.

  Args:
    names: from `tensor_layout.file_names`.
  """
  from raft_jax.models import hybrid

  return frozenset(
    names[f"layers/{path}"].format(layer)
    for path in hybrid.KEYS_VALUES
    if f"layers/{path}" in names
    for layer in range(hybrid.first_sharing(config), config.n_layers)
  )


def _renamed(name: str, family: family_row.Family) -> str:
  """A tensor's name in the family's table."""
  for theirs, ours in family.aliases.items():
    name = name.replace(f".{theirs}.", f".{ours}.")
  return name


def _read_block(
  tensor: tensor_layout.Stored, index: tensor_layout.Index, dtype: np.dtype, name: str
) -> np.ndarray:
  """A block of a tensor, converted and checked in strips that fit the CPU cache."""
  lengths = [
    len(range(*s.indices(n))) for s, n in zip(index, tensor.shape, strict=True)
  ]
  out = np.empty(lengths, dtype)
  start = index[0].indices(tensor.shape[0])[0]
  rows = max(1, STRIP_BYTES * len(out) // max(out.nbytes, 1))
  for first in range(0, len(out), rows):
    strip = out[first : first + rows]
    strip[...] = tensor.read(
      (slice(start + first, start + first + len(strip)), *index[1:])
    )
    if not _is_finite(strip):
      raise errors.UserError(
        f"{name} holds NaN or infinite values: damaged, or saved by a training that "
        "diverged; fetch it again or use an earlier checkpoint"
      )
  return out


def _is_finite(x: np.ndarray) -> bool:
  if x.dtype != DTYPES["bfloat16"]:
    return bool(np.isfinite(x).all())
  # Without the sign bit, infinity and NaN are the largest values. 20 times as fast as
  # isfinite, which ml_dtypes computes one by one.
  return int((x.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7F80


def _check_fit(
  path: pathlib.Path,
  stored: Mapping[str, tensor_layout.Stored],
  pieces: list[tensor_layout.Piece],
  family: family_row.Family,
  known: Set[str | None],
  *,
  head: str,
) -> None:
  """Raises UserError unless the file holds the parameters and no other tensors.

  Args:
    known: further names that it may hold.
  """
  expected = dict(tensor for piece in pieces for tensor in piece.tensors())

  def some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

  missing = [name for name in expected if name not in stored]
  unexpected, remedy = weight_files.unexpected(
    stored,
    (
      name
      for name, tensor in stored.items()
      if name not in expected
      and name not in known
      and not family.ignored.fullmatch(name)
      and not weight_files.is_buffer(name, tensor)
    ),
    has_experts=family.has_experts,
    wrapped=family.wrapped,
  )
  wrong, coded = [], []
  for name in (name for name in expected if name in stored):
    have = stored[name]
    if have.shape != expected[name]:
      wrong.append(f"{name} is {list(have.shape)}, config asks {list(expected[name])}")
    if have.dtype not in weight_files.FLOATS:
      coded.append(f"{name} is stored as {have.dtype}")
      remedy = weight_files.QUANTISED
  faults = [
    f"{kind}: {some(names)}"
    for kind, names in (
      ("quantised weights", coded),
      ("missing tensors", missing),
      *unexpected.items(),
      ("wrong shapes", wrong),
    )
    if names
  ]
  if faults:
    raise errors.UserError(
      f"{path}: {'; '.join(faults)}; {remedy or _misfit(missing, stored, head)}"
    )


def _misfit(
  missing: Sequence[str],
  stored: Mapping[str, tensor_layout.Stored],
  head: str,
) -> str:
  """Advice for names or shapes that do not match the config."""
  if missing == [head]:
    return "set tie_word_embeddings to true in config.json if its head is the embedding"
  for name in missing[:1]:
    wrapped = next((key for key in stored if key.endswith(f".{name}")), None)
    if wrapped is not None:
      return (
        f"all names begin with {wrapped.removesuffix(name)!r}, of the wrapper that the "
        "model was saved in: save the model inside it"
      )
  return (
    "the weights and the config do not belong together or the architecture is not "
    "supported"
  )


def _check_constants(
  path: pathlib.Path,
  stored: Mapping[str, tensor_layout.Stored],
  constants: Mapping[str, float],
) -> None:
  for name in constants.keys() & stored.keys():
    value = np.asarray(stored[name].read(()), np.float32)
    if not np.allclose(value, constants[name], rtol=2**-8):  # rounded to bfloat16
      raise errors.UserError(
        f"{path}: {name} is {value}, and the decoder computes with {constants[name]} "
        "only; use another model"
      )


def _check_tied(
  path: pathlib.Path, embed: tensor_layout.Stored, head: tensor_layout.Stored, name: str
) -> None:
  # In blocks of rows, so that the two are never both in memory.
  rows = embed.shape[0]
  blocks = [(slice(i, min(i + 8192, rows)), slice(None)) for i in range(0, rows, 8192)]
  same = embed.shape == head.shape and all(
    np.array_equal(embed.read(block), head.read(block)) for block in blocks
  )
  if not same:
    raise errors.UserError(
      f"{path}: the config ties the embeddings, but {name} differs from the embedding; "
      "set tie_word_embeddings to false in config.json if the head is its own"
    )


def stored_tensors(folder: pathlib.Path) -> dict[str, tensor_layout.Stored]:
  """The tensors of a Hugging Face folder by name, from the headers alone.

  Raises:
    UserError: there are no weights, more than one set of them, or a damaged file.
  """
  return weight_files.tensors(folder, weight_shards(folder))


def weight_shards(folder: pathlib.Path) -> weight_files.Shards:
  """The weight files of a Hugging Face folder; errors as for `stored_tensors`."""
  index = folder / weight_files.INDEX
  content = read_json(index) if index.is_file() else None
  return weight_files.shards(folder, content)
