"""Gemma 4: layers with a window, and global ones with wider heads.

In E2B and E4B, layers also have embeddings of their own, and the last ones share the
keys and values of earlier ones. In the 26B, experts stand beside a dense feed-forward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raft_jax.hf import family_parts, family_row

_PER_LAYER = {
  "per_layer_gate": "per_layer_input_gate",
  "per_layer_out": "per_layer_projection",
  "per_layer_norm": "post_per_layer_input_norm",
}
_PER_LAYER_OUTER = {
  "per_layer_embed": "model.embed_tokens_per_layer.weight",
  "per_layer_proj": "model.per_layer_model_projection.weight",
  "per_layer_proj_norm": "model.per_layer_projection_norm.weight",
}

_PARALLEL = {
  **{f"shared_{name}": module for name, module in family_parts.MLP.items()},
  "shared_post_norm": "post_feedforward_layernorm_1",
  "experts_norm": "pre_feedforward_layernorm_2",
  "experts_post_norm": "post_feedforward_layernorm_2",
  "router": "router.proj",
}
"""A dense feed-forward and what it has beside it of experts, without their kernels."""


def _table(*parts: Mapping[str, str]) -> dict[str, family_row.Name]:
  """Names of what all models have, and of the parts in which they differ."""
  attention = {**family_parts.ATTENTION, **family_parts.QK_NORMS}
  table = family_parts.names(
    family_parts.GEMMA_NORMS,
    attention,
    {f"global_{name}": module for name, module in attention.items()},
    *parts,
  )
  table["layers/layer_scale"] = family_row.Name("model.layers.{}.layer_scalar", "")
  return table


def _mixture_names() -> dict[str, family_row.Name]:
  """The name table of a mixture of experts; files stack those of a layer."""
  table, prefix = _table(_PARALLEL), "model.layers.{}."
  scales = {"router_scale": "scale", "router_expert_scale": "per_expert_scale"}
  for path, name in scales.items():
    table[f"layers/{path}"] = family_row.Name(f"{prefix}router.{name}", "")
  for path, name in (("gate", "gate_up"), ("up", "gate_up"), ("down", "down")):
    table[f"layers/{path}"] = family_row.Name(
      f"{prefix}experts.{name}_proj", "", family_row.Form()
    )
  return table


def _names() -> dict[str, family_row.Name]:
  """The name table. Files call the parameters of all kinds of layers the same."""
  table = _table(family_parts.MLP, _PER_LAYER)
  shared = {
    path.replace("layers/", "layers/kv_shared_"): name
    for path, name in table.items()
    if path.startswith("layers/") and not re.search("/(global_)?(k|v|k_norm)$", path)
  }
  outer = {path: family_row.Name(name, "") for path, name in _PER_LAYER_OUTER.items()}
  return {**table, **shared, **outer}


_ROPES = {
  "full_attention": {
    "rope_type": "proportional",
    "partial_rotary_factor": 0.25,
    "rope_theta": 1000000.0,
  },
  "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
_DEFAULTS = {
  **family_parts.COMMON,
  "vocab_size": 262144,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 30,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "global_head_dim": 512,
  "tie_word_embeddings": True,
  "attention_k_eq_v": False,
  "final_logit_softcapping": None,
  "rope_parameters": _ROPES,
  "rope_theta": 1000000.0,
  "rope_local_base_freq": 10000.0,
  "num_kv_shared_layers": 0,
  "use_double_wide_mlp": False,
}
# Here they name the experts' width, and Llama's name is that of the dense part's.
_RENAMED = {
  "intermediate_size": "moe_intermediate_size",
  "shared_expert_intermediate_size": "intermediate_size",
  "num_experts_per_tok": "top_k_experts",
}
_ONLY = {
  "enable_moe_block": (False, None),
  "hidden_activation": ("gelu_pytorch_tanh",),
  "attention_bias": (False, None),
  # With "vision", only the tokens of an image see those behind them.
  "use_bidirectional_attention": (None, "vision"),
}


def _extra(fields: family_row.Fields) -> dict[str, Any]:
  return {
    "qk_norm": "head",
    "value_norm": True,
    "layer_scales": True,
    "post_norms": True,
    "norm_rounds_last": True,
    "activation": "gelu_tanh",
    "embed_scale": float(fields["hidden_size"]) ** 0.5,
    "query_scale": 1.0,
    "logit_softcap": fields["final_logit_softcapping"],
    "per_layer_inputs": fields.get("hidden_size_per_layer_input") or 0,
  }


_by_kind = family_parts.by_layer_type(lambda fields, layer: (layer + 1) % 6 != 0)


def slides(fields: family_row.Fields, layer: int) -> bool:
  """Whether a layer has a window. The last one never has, whatever the config says."""
  return layer != fields["num_hidden_layers"] - 1 and _by_kind(fields, layer)


def global_shape(fields: family_row.Fields) -> dict[str, int] | None:
  """The fields in which the layers without a window differ from the others.

  transformers 5 writes them for each layer (`per_layer_config`); published configs name
  them once. None: they are not the same for all of these layers and for no other.
  """
  by_layer = fields.get("per_layer_config")
  if isinstance(by_layer, Mapping):
    layers = {
      str(layer)
      for layer in range(fields["num_hidden_layers"])
      if not slides(fields, layer)
    }
    shapes = list(by_layer.values())
    same = {*map(str, by_layer)} == layers and all(s == shapes[0] for s in shapes)
    return shapes[0] if same and isinstance(shapes[0], dict) else None
  shape = {"head_dim": fields["global_head_dim"]}
  heads = fields.get("num_global_key_value_heads")
  if fields["attention_k_eq_v"] and heads is not None:
    shape["num_key_value_heads"] = heads
  return shape


_TEXT = family_row.Family(
  models="Gemma 4 (text)",
  architecture="Gemma4ForCausalLM",
  names=_names(),
  defaults={
    **_DEFAULTS,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
  },
  only=_ONLY,
  extra=_extra,
  ropes=("proportional",),
  slides=slides,
)
_MIXTURE = _TEXT._replace(
  names=_mixture_names(),
  defaults={
    **{name: value for name, value in _TEXT.defaults.items() if name not in _RENAMED},
    "shared_expert_intermediate_size": _DEFAULTS["intermediate_size"],
  },
  only={
    **{name: values for name, values in _ONLY.items() if name != "enable_moe_block"},
    # No published mixture has them.
    **{"hidden_size_per_layer_input": (0, None), "num_kv_shared_layers": (0, None)},
  },
  renamed=_RENAMED,
  extra=lambda fields: {
    **_extra(fields),
    **{"experts_normalized": True, "parallel_experts": True},
  },
)
FAMILIES = {
  "gemma4_text": _TEXT._replace(mixture=_MIXTURE),
  "gemma4_unified_text": _TEXT._replace(
    architecture="Gemma4UnifiedForCausalLM",
    defaults={
      **_DEFAULTS,
      "max_position_embeddings": 262144,
      "sliding_window": 1024,
    },
    only={**_ONLY, "hidden_size_per_layer_input": (0, None)},
  ),
}
