"""GGUF files, read: the config, the tensors and the tokenizer's data in them.

`gguf_writer` and `gguf_vocabulary` write them. No other module knows the format or
imports the `gguf` package.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
from typing import Any, NamedTuple

import gguf
import numpy as np

from raft_jax import errors
from raft_jax.hf import families, rope_scaling, tensor_layout


def _reader(path: pathlib.Path) -> gguf.GGUFReader:
  stat = path.stat()
  return _mapped(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _mapped(path: str, mtime: int, size: int) -> gguf.GGUFReader:
  """Maps the file into memory. Cached, because parsing the metadata takes seconds."""
  try:
    return gguf.GGUFReader(path)
  except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
    version = importlib.metadata.version("gguf")
    raise errors.UserError(
      f"{path}: damaged or truncated GGUF file, or of a kind that gguf {version} does "
      f"not know ({error}); fetch it again, or run `python -m pip install "
      "--upgrade gguf`"
    ) from error


def _value(reader: gguf.GGUFReader, key: str) -> Any:
  field = reader.get_field(key)
  if field is None:
    return None
  value = field.contents()
  # Decimals such as 1e-5 are stored as float32; return the shortest that rounds to it.
  return float(str(np.float32(value))) if isinstance(value, float) else value


def config_fields(path: pathlib.Path) -> families.Fields:
  """The metadata as the config.json that the model would have.

  Raises:
    UserError: the file is damaged, one of several, or a mixture of experts.
  """
  reader = _reader(path)
  _check_whole_and_dense(reader, path)
  architecture = _value(reader, "general.architecture")
  family = families.FAMILIES.get(architecture)
  readable = family is not None and family.in_gguf

  def meta(name: str) -> Any:
    return _value(reader, f"{architecture}.{name}")

  def token(name: str) -> int | None:
    return _value(reader, f"tokenizer.ggml.{name}_token_id")

  fields = {
    "architectures": [
      family.architecture if family and readable else f"GGUF {architecture}"
    ],
    "model_type": architecture,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": len(_value(reader, "tokenizer.ggml.tokens") or ()),
    "hidden_size": meta("embedding_length"),
    "num_hidden_layers": meta("block_count"),
    "num_attention_heads": meta("attention.head_count"),
    "num_key_value_heads": meta("attention.head_count_kv"),
    "head_dim": meta("attention.key_length") or meta("rope.dimension_count"),
    "intermediate_size": meta("feed_forward_length"),
    "rms_norm_eps": meta("attention.layer_norm_rms_epsilon"),
    "rope_theta": meta("rope.freq_base"),
    "max_position_embeddings": meta("context_length"),
    "tie_word_embeddings": "output.weight" not in _tensor_names(reader),
    "bos_token_id": token("bos"),
    "eos_token_id": token("eos"),
    "pad_token_id": token("padding"),
  }
  fields = {name: value for name, value in fields.items() if value is not None}
  return {**fields, **_rope_fields(reader, path, fields.get("head_dim"))}


def _check_whole_and_dense(reader: gguf.GGUFReader, path: pathlib.Path) -> None:
  """Raises UserError for one of several files, and for a mixture of experts."""
  parts = _value(reader, "split.count") or 1
  if parts > 1:
    raise errors.UserError(
      f"{path}: is one of {parts} files of a model; merge them with llama.cpp's "
      "`llama-gguf-split --merge`"
    )
  architecture = _value(reader, "general.architecture")
  if _value(reader, f"{architecture}.expert_count"):
    raise errors.UserError(
      f"{path}: a mixture of experts is not supported; use a dense model"
    )


def _tensor_names(reader: gguf.GGUFReader) -> set[str]:
  return {tensor.name for tensor in reader.tensors}


def _rope_fields(
  reader: gguf.GGUFReader, path: pathlib.Path, head_dim: Any
) -> families.Fields:
  """The fields of the rotary embedding.

  The base is in two of them: transformers 5 reads `rope_parameters`, and transformers 4
  and vLLM read `rope_theta`.
  """
  architecture = _value(reader, "general.architecture")

  def meta(name: str) -> Any:
    return _value(reader, f"{architecture}.rope.{name}")

  fields: families.Fields = {}
  rotated = meta("dimension_count") or head_dim
  if rotated != head_dim:
    fields["partial_rotary_factor"] = rotated / head_dim
  theta = meta("freq_base")
  theta = fields["rope_theta"] = 10000.0 if theta is None else theta
  kind = meta("scaling.type") or "none"
  if kind not in ("none", "default"):
    raise errors.UserError(
      f"{path}: rope scaling {kind!r} is not read from GGUF; use the model's Hugging "
      "Face folder"
    )
  scaling: families.Fields = {"rope_type": "default"}
  if "rope_freqs.weight" in _tensor_names(reader):
    scaling = _llama3_scaling(reader, path, theta)
    return {
      **fields,
      "rope_parameters": {"rope_theta": theta, **scaling},
      "rope_scaling": scaling,
    }
  return {**fields, "rope_parameters": {"rope_theta": theta, **scaling}}


def _llama3_scaling(
  reader: gguf.GGUFReader, path: pathlib.Path, theta: float
) -> families.Fields:
  """The rope scaling whose divisors of the frequencies are in `rope_freqs.weight`.

  llama.cpp's converter computed the tensor from four numbers of the config. Three of
  them are the same in all Llama 3 models; the fourth is the largest divisor.
  """
  (tensor,) = (t for t in reader.tensors if t.name == "rope_freqs.weight")
  divisors = _decode(path, tensor, tensor.data)
  numbers = {
    "factor": float(divisors.max()),
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  exponents = np.arange(len(divisors)) / len(divisors)
  expected = rope_scaling.llama3_divisors(theta**exponents, **numbers)
  if not np.allclose(divisors, expected, rtol=1e-4):
    raise errors.UserError(
      f"{path}: rope_freqs.weight is not the rope scaling 'llama3' with the numbers of "
      "the published Llama 3 models; use the safetensors folder"
    )
  return {"rope_type": "llama3", **numbers}


def _decode(
  path: pathlib.Path, tensor: gguf.ReaderTensor, data: np.ndarray
) -> np.ndarray:
  """The float32 values of (some rows of) a tensor's data.

  Raises:
    UserError: the `gguf` package cannot decode the tensor's type.
  """
  try:
    return gguf.dequantize(data, tensor.tensor_type)
  except NotImplementedError as error:
    raise errors.UserError(
      f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the gguf "
      "package cannot decode; use a file of another quantisation"
    ) from error


def tensors(path: pathlib.Path) -> dict[str, tensor_layout.Stored]:
  """The tensors by name, dequantised to float32 as they are read.

  Raises:
    UserError: the file is damaged, or stores a tensor as `gguf` cannot decode.
  """
  stored, decodable = {}, set()
  for tensor in _reader(path).tensors:
    if tensor.tensor_type not in decodable:
      _decode(path, tensor, tensor.data[:1])
      decodable.add(tensor.tensor_type)

    def read(
      index: tensor_layout.Index, data=tensor.data, kind=tensor.tensor_type
    ) -> np.ndarray:
      if len(index) == 1:  # a part of a vector may begin inside a block
        return gguf.dequantize(data, kind)[index]
      return gguf.dequantize(data[index[0]], kind)[:, *index[1:]]

    # GGUF lists the fastest dimension first.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    stored[tensor.name] = tensor_layout.Stored(shape, read)
  return stored


def uninterleaved(tensor: tensor_layout.Stored, heads: int) -> tensor_layout.Stored:
  """A tensor with its rows in the order of halves.

  In the file they are interleaved: rows 2i and 2i + 1 of a head rotate together.
  """
  pairs = np.arange(tensor.shape[0]).reshape(heads, -1, 2)
  order = pairs.swapaxes(1, 2).reshape(-1)

  def read(index: tensor_layout.Index) -> np.ndarray:
    return tensor.read((order[index[0]], *index[1:]))

  return tensor_layout.Stored(tensor.shape, read)


class Vocabulary(NamedTuple):
  """The tokenizer's data, under the file's names.

  Attributes:
    kind: of the tokenizer's model; "gpt2" is byte-level BPE.
    pre: name of the pre-tokenizer.
    tokens: in order of ids.
    merges: pairs of tokens, each with a space between the two, in order of rank.
    added: tokens that are cut out of a text before it is tokenised; True for a control
      token.
    special_ids: ids by role: "bos", "eos", "unknown", "padding"; "eot" in what is
      written.
    add_bos: whether texts start with BOS; None if the file does not say.
    chat_template: a dict by name if there are several; "default" is the unnamed one.
  """

  kind: str | None
  pre: str | None
  tokens: list[str]
  merges: list[str]
  added: dict[str, bool]
  special_ids: dict[str, int]
  add_bos: bool | None
  chat_template: str | dict[str, str] | None


def templates(reader: gguf.GGUFReader) -> str | dict[str, str] | None:
  """The chat template; if there are several, a dict by name, as in transformers."""
  default = _value(reader, "tokenizer.chat_template")
  names = _value(reader, "tokenizer.chat_templates")
  if not names:
    return default
  named = {name: _value(reader, f"tokenizer.chat_template.{name}") for name in names}
  by_name = {"default": default, **named}
  return {name: text for name, text in by_name.items() if text is not None}


def vocabulary(path: pathlib.Path) -> Vocabulary:
  """The tokenizer's data.

  Raises:
    UserError: the file is damaged.
  """
  reader = _reader(path)

  def meta(name: str) -> Any:
    return _value(reader, f"tokenizer.ggml.{name}")

  control, defined = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
  tokens = meta("tokens") or []
  with_types = zip(tokens, meta("token_type") or [], strict=False)
  ids = {
    role: meta(f"{role}_token_id") for role in ("bos", "eos", "unknown", "padding")
  }
  return Vocabulary(
    kind=meta("model"),
    pre=meta("pre"),
    tokens=tokens,
    merges=meta("merges") or [],
    added={token: t == control for token, t in with_types if t in (control, defined)},
    special_ids={role: index for role, index in ids.items() if index is not None},
    add_bos=meta("add_bos_token"),
    chat_template=templates(reader),
  )
