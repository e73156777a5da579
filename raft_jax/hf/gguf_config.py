"""GGUF metadata as the config.json that the model would have."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

from raft_jax import errors
from raft_jax.hf import families, family_row, gguf_file, rope_scaling

Meta = Callable[[str], Any]
"""Key of the metadata, without the architecture -> its value or None."""


def config_fields(path: pathlib.Path) -> family_row.Fields:
  """The metadata as the config.json that the model would have.

  Raises:
    UserError: the file is damaged, one of several, or a mixture of experts.
  """
  file = gguf_file.reader(path)
  architecture = gguf_file.value(file, "general.architecture")
  meta: Meta = lambda name: gguf_file.value(file, f"{architecture}.{name}")  # noqa: E731
  _check_whole_and_dense(file, path, meta)
  kind, family = _family(architecture)
  fields: family_row.Fields = {
    "architectures": [family.architecture if family else f"GGUF {architecture}"],
    "model_type": kind,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": len(gguf_file.value(file, "tokenizer.ggml.tokens") or ()),
    "hidden_size": meta("embedding_length"),
    "num_hidden_layers": meta("block_count"),
    "num_attention_heads": meta("attention.head_count"),
    "num_key_value_heads": meta("attention.head_count_kv"),
    "head_dim": meta("attention.key_length") or meta("rope.dimension_count"),
    "intermediate_size": meta("feed_forward_length"),
    "rms_norm_eps": meta("attention.layer_norm_rms_epsilon"),
    "rope_theta": meta("rope.freq_base"),
    "max_position_embeddings": meta("context_length"),
    "tie_word_embeddings": "output.weight" not in _tensor_names(file),
    **{
      f"{role}_token_id": gguf_file.value(file, f"tokenizer.ggml.{name}_token_id")
      for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    },
  }
  if family is not None:
    for name in ("hidden_act", "attention_bias", "mlp_bias"):
      if name not in family.only:  # its config has no such field
        del fields[name]
    fields |= family.gguf_fields(meta, fields)
  fields = {name: value for name, value in fields.items() if value is not None}
  fields |= _rope_fields(file, path, meta, fields)
  local = fields.get("rope_local_base_freq")
  if local is not None:  # transformers wants one section for each kind of layer
    sliding = {"rope_type": "default", "rope_theta": local}
    rope = {"full_attention": fields["rope_parameters"], "sliding_attention": sliding}
    fields["rope_parameters"] = rope
  return fields


def _family(architecture: str) -> tuple[str, family_row.Family | None]:
  """`model_type` and family of an architecture; no family if it is not read."""
  for kind, family in families.FAMILIES.items():
    if family.in_gguf and (family.gguf or kind) == architecture:
      return kind, family
  return architecture, None


def _check_whole_and_dense(
  file: gguf.GGUFReader, path: pathlib.Path, meta: Meta
) -> None:
  """Raises UserError for one of several files, and for a mixture of experts."""
  parts = gguf_file.value(file, "split.count") or 1
  if parts > 1:
    raise errors.UserError(
      f"{path}: is one of {parts} files of a model; merge them with llama.cpp's "
      "`llama-gguf-split --merge`"
    )
  if meta("expert_count"):
    raise errors.UserError(
      f"{path}: a mixture of experts is not supported; use a dense model"
    )


def _tensor_names(file: gguf.GGUFReader) -> set[str]:
  return {tensor.name for tensor in file.tensors}


def _values(file: gguf.GGUFReader, path: pathlib.Path, name: str) -> np.ndarray:
  """The values of a small tensor."""
  (tensor,) = (t for t in file.tensors if t.name == name)
  return gguf_file.decode(path, tensor, tensor.data)


def _rope_fields(
  file: gguf.GGUFReader, path: pathlib.Path, meta: Meta, fields: family_row.Fields
) -> family_row.Fields:
  """The fields of the rotary embedding.

  The base is in two of them: transformers 5 reads `rope_parameters`, and transformers 4
  and vLLM read `rope_theta`.
  """
  result: family_row.Fields = {}
  head_dim, rotated = fields.get("head_dim"), meta("rope.dimension_count")
  if head_dim and rotated and rotated != head_dim:
    result["partial_rotary_factor"] = rotated / head_dim
  theta = result["rope_theta"] = fields.get("rope_theta", 10000.0)
  scaling = _scaling(file, path, meta, theta)
  result["rope_parameters"] = {"rope_theta": theta, **scaling}
  if scaling["rope_type"] == "llama3":
    result["rope_scaling"] = scaling
  return result


def _scaling(
  file: gguf.GGUFReader, path: pathlib.Path, meta: Meta, theta: float
) -> family_row.Fields:
  names = _tensor_names(file)
  kind = meta("rope.scaling.type") or "none"
  if "rope_freqs.weight" in names:
    return _llama3_scaling(file, path, theta)
  if "rope_factors_long.weight" in names:
    long, short = (
      _values(file, path, f"rope_factors_{length}.weight").tolist()
      for length in ("long", "short")
    )
    return {"rope_type": "longrope", "long_factor": long, "short_factor": short}
  if kind == "linear":
    return {"rope_type": kind, "factor": meta("rope.scaling.factor")}
  if kind not in ("none", "default"):
    raise errors.UserError(
      f"{path}: rope scaling {kind!r} is not read from GGUF; use the model's Hugging "
      "Face folder"
    )
  return {"rope_type": "default"}


def _llama3_scaling(
  file: gguf.GGUFReader, path: pathlib.Path, theta: float
) -> family_row.Fields:
  """The rope scaling whose divisors of the frequencies are in `rope_freqs.weight`.

  llama.cpp's converter computed the tensor from four numbers of the config. Three of
  them are the same in all Llama 3 models; the fourth is the largest divisor.
  """
  divisors = _values(file, path, "rope_freqs.weight")
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
