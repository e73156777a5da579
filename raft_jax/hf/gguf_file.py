"""GGUF files, read: the config, the tensors and the tokenizer's data in them.

The only room that knows the format, and the `gguf` package.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
from typing import Any, NamedTuple

import gguf
import numpy as np

from raft_jax import errors
from raft_jax.hf import families, tensor_layout


def _reader(path: pathlib.Path) -> gguf.GGUFReader:
  stat = path.stat()
  return _mapped(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _mapped(path: str, mtime: int, size: int) -> gguf.GGUFReader:
  """Maps the file; parsing its metadata takes seconds, hence the cache."""
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
  # 1e-5 is stored as float32; take the decimal that it was made from.
  return float(str(np.float32(value))) if isinstance(value, float) else value


def config_fields(path: pathlib.Path) -> families.Fields:
  """The metadata as the config.json that the model would have.

  Raises:
    UserError: the file is damaged, one of several, or a mixture of experts.
  """
  reader = _reader(path)
  family = _value(reader, "general.architecture")
  tensors = {tensor.name for tensor in reader.tensors}

  def meta(name: str) -> Any:
    return _value(reader, f"{family}.{name}")

  def token(name: str) -> int | None:
    return _value(reader, f"tokenizer.ggml.{name}_token_id")

  known = families.FAMILIES.get(family)
  parts = _value(reader, "split.count") or 1
  if parts > 1:
    raise errors.UserError(
      f"{path}: is one of {parts} files of a model; merge them with llama.cpp's "
      "`llama-gguf-split --merge`"
    )
  if meta("expert_count"):
    raise errors.UserError(f"{path}: mixture of experts is not supported; use another")
  fields = {
    "architectures": (
      [known.architecture] if known and known.in_gguf else [f"GGUF {family}"]
    ),
    "model_type": family,
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
  kind = meta("rope.scaling.type") or "none"
  fields["rope_parameters"] = {
    "rope_theta": theta,
    "rope_type": "default" if kind == "none" else kind,
  }
  if "rope_freqs.weight" in tensors:
    scaling = _llama3_scaling(reader, path, theta)
    fields["rope_scaling"] = scaling
    fields["rope_parameters"] = {"rope_theta": theta, **scaling}
  return fields


def _llama3_scaling(
  reader: gguf.GGUFReader, path: pathlib.Path, theta: float
) -> families.Fields:
  """The scaling whose divisors of the frequencies are the tensor `rope_freqs.weight`.

  The file holds what llama.cpp's converter computed from the four numbers of the
  config. All Llama 3 models share three of them; the fourth is the largest divisor.
  """
  (tensor,) = (t for t in reader.tensors if t.name == "rope_freqs.weight")
  divisors = gguf.dequantize(tensor.data, tensor.tensor_type)
  numbers = {
    "factor": float(divisors.max()),
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  exponents = np.arange(len(divisors)) / len(divisors)
  expected = families.llama3_divisors(theta**exponents, **numbers)
  if not np.allclose(divisors, expected, rtol=1e-4):
    raise errors.UserError(
      f"{path}: rope_freqs.weight is not the rope scaling 'llama3' with the numbers of "
      "the published Llama 3 models; use the safetensors folder"
    )
  return {"rope_type": "llama3", **numbers}


def tensors(path: pathlib.Path) -> dict[str, tensor_layout.Stored]:
  """The tensors by name, dequantised to float32 as they are read.

  Raises:
    UserError: the file is damaged, or stores a tensor as `gguf` cannot decode.
  """
  stored, known = {}, set()
  for tensor in _reader(path).tensors:
    if tensor.tensor_type not in known:
      try:
        gguf.dequantize(tensor.data[:1], tensor.tensor_type)
      except NotImplementedError as error:
        raise errors.UserError(
          f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the "
          "gguf package cannot decode; use a file of another quantisation"
        ) from error
      known.add(tensor.tensor_type)

    def read(
      index: tensor_layout.Index, data=tensor.data, kind=tensor.tensor_type
    ) -> np.ndarray:
      if len(index) == 1:  # a part of a vector may begin within a block
        return gguf.dequantize(data, kind)[index]
      return gguf.dequantize(data[index[0]], kind)[:, *index[1:]]

    # GGUF lists the fastest dimension first.
    shape = tuple(int(n) for n in reversed(tensor.shape))
    stored[tensor.name] = tensor_layout.Stored(shape, read)
  return stored


def uninterleaved(tensor: tensor_layout.Stored, heads: int) -> tensor_layout.Stored:
  """Rows from interleaved rotary order (pairs 2i, 2i + 1) back to halves."""
  pairs = np.arange(tensor.shape[0]).reshape(heads, -1, 2)
  order = pairs.swapaxes(1, 2).reshape(-1)

  def read(index: tensor_layout.Index) -> np.ndarray:
    return tensor.read((order[index[0]], *index[1:]))

  return tensor_layout.Stored(tensor.shape, read)


class Vocabulary(NamedTuple):
  """The tokenizer's data, in the words of the file.

  Attributes:
    kind: of the model: "gpt2" is byte-level BPE.
    pre: name of the pre-tokenizer.
    tokens: in order of ids.
    merges: each two tokens with a space between, in order of rank.
    added: tokens that are cut out of a text whole; True: a control token.
    special_ids: ids by role: "bos", "eos", "unknown", "padding".
    chat_template: by name where there are several; "default" is the one without.
    add_bos: whether texts start with BOS; None: the file does not say.
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
  """The chat template; by name, as transformers has it, where there are several."""
  default = _value(reader, "tokenizer.chat_template")
  names = _value(reader, "tokenizer.chat_templates")
  if not names:
    return default
  named = {name: _value(reader, f"tokenizer.chat_template.{name}") for name in names}
  found = {"default": default, **named}
  return {name: template for name, template in found.items() if template is not None}


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
  typed = zip(tokens, meta("token_type") or [], strict=False)
  ids = {
    role: meta(f"{role}_token_id") for role in ("bos", "eos", "unknown", "padding")
  }
  return Vocabulary(
    kind=meta("model"),
    pre=meta("pre"),
    tokens=tokens,
    merges=meta("merges") or [],
    added={token: t == control for token, t in typed if t in (control, defined)},
    special_ids={role: index for role, index in ids.items() if index is not None},
    add_bos=meta("add_bos_token"),
    chat_template=templates(reader),
  )
