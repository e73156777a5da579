"""What is known of each supported family of models: names, layout, config.

A family is data: `FAMILIES` is the one table, used for loading and for export, and the
place to add a family. Nothing here opens a file. `config.json` and GGUF metadata both
arrive as the same dict of Hugging Face config fields, so that every rule is written
once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raft_jax import errors

if TYPE_CHECKING:
  from raft_jax import model

Fields = dict[str, Any]
"""Hugging Face config fields, as in config.json."""
Index = tuple[slice, ...]


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


# --- Tensors --------------------------------------------------------------------------


class Stored(NamedTuple):
  """One tensor in a file: its shape, and how to read a block of it."""

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]


class Piece(NamedTuple):
  """One tensor that a file should hold: its name there, and where it is in our tree.

  Attributes:
    name: in the file.
    path: of the leaf, like "layers/q".
    layer: its row of the stacked leaf; None: it is the whole leaf.
    shape: of the tensor in the file.
  """

  name: str
  path: str
  layer: int | None
  shape: tuple[int, ...]


def file_names(family: Family, *, in_gguf: bool) -> dict[str, str]:
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
  result = []
  for path, leaf in leaves.items():
    name, shape = names[path], tuple(leaf.shape)
    if "{}" in name:
      layers = range(shape[0])
      result += [Piece(name.format(i), path, i, shape[1:]) for i in layers]
    else:
      result.append(Piece(name, path, None, shape))
  return result


# --- Config ---------------------------------------------------------------------------


def of(fields: Fields, place: str) -> Family:
  """The family of a model, refusing what `model` does not compute.

  Args:
    fields: the model's config.
    place: where the config was read, for messages.

  Raises:
    UserError: the family or a feature of it is not supported; the message names it.
  """
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


def decoder_config(fields: Fields, place: str) -> model.DecoderConfig:
  """The decoder's shape; arguments and errors as for `of`."""
  from raft_jax import model  # imports jax

  rope = fields.get("rope_parameters") or {}
  fields = {**of(fields, place).defaults, **rope, **fields}

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
