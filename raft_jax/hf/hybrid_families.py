"""Families of models with Gated DeltaNet in some layers and attention in the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raft_jax.hf import family_parts, family_row


def _delta_names(module: str, tensors: Mapping[str, str]) -> dict[str, family_row.Name]:
  """The name table of the layers of Gated DeltaNet, without the prefix `delta_`."""
  prefix = f"model.layers.{{}}.{module}"
  return {
    f"layers/delta_{path}": family_row.Name(f"{prefix}.{tensor}", "")
    for path, tensor in tensors.items()
  }


_QWEN_ATTENTION = (
  family_parts.PRE_NORMS,
  family_parts.ATTENTION,
  family_parts.QK_NORMS,
)
_QWEN_EXPERTS = {
  **family_parts.EXPERTS,
  **{
    f"shared_{name}": f"mlp.shared_expert.{name}_proj"
    for name in ("gate", "up", "down")
  },
  "shared_router": "mlp.shared_expert_gate",
}
_STACKED = "model.layers.{}.mlp.experts"
_QWEN_STACKED = {
  **dict.fromkeys(
    ("layers/gate", "layers/up"),
    family_row.Name(f"{_STACKED}.gate_up_proj", "", family_row.Form()),
  ),
  "layers/down": family_row.Name(f"{_STACKED}.down_proj", "", family_row.Form()),
}
_QWEN_DELTA = {
  **dict.fromkeys(("q", "k", "v"), "in_proj_qkv.weight"),
  "gate": "in_proj_z.weight",
  "b": "in_proj_b.weight",
  "a": "in_proj_a.weight",
  **dict.fromkeys(("q_conv", "k_conv", "v_conv"), "conv1d.weight"),
  "a_log": "A_log",
  "dt_bias": "dt_bias",
  "norm": "norm.weight",
  "o": "out_proj.weight",
}
_NEXT_DELTA = {
  **_QWEN_DELTA,
  **dict.fromkeys(("q", "k", "v", "gate"), "in_proj_qkvz.weight"),
  **dict.fromkeys(("b", "a"), "in_proj_ba.weight"),
}
_QWEN_LINEAR = {
  **family_parts.COMMON,
  "head_dim": 256,
  "max_position_embeddings": 32768,
  "partial_rotary_factor": 0.25,
  "full_attention_interval": 4,
  "linear_num_key_heads": 16,
  "linear_num_value_heads": 32,
  "linear_key_head_dim": 128,
  "linear_value_head_dim": 128,
  "linear_conv_kernel_dim": 4,
}
_QWEN_LINEAR_ONLY = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "attn_output_gate": (True, None),
  "output_gate_type": ("swish", "silu", None),
}


def _qwen_linear(fields: family_row.Fields) -> dict[str, Any]:
  return {
    "qk_norm": "head",
    "norm_offset": 1.0,
    "norm_rounds_last": True,
    "attention_gate": True,
  }


def _qwen_delta(fields: family_row.Fields) -> dict[str, Any]:
  return {"norm_eps": float(fields["rms_norm_eps"])}


_OLMO_DELTA = {
  **{name: f"{name}_proj.weight" for name in "qkvabo"},
  "gate": "g_proj.weight",
  **{f"{name}_conv": f"{name}_conv1d.weight" for name in "qkv"},
  "a_log": "A_log",
  "dt_bias": "dt_bias",
  "norm": "o_norm.weight",
}


def is_linear(fields: family_row.Fields, layer: int) -> bool:
  """Whether a layer has a linear mixer in place of attention."""
  kinds = fields.get("layer_types")
  if kinds:
    return kinds[layer] == "linear_attention"
  return (layer + 1) % fields["full_attention_interval"] != 0


FAMILIES = {
  "qwen3_5_text": family_row.Family(
    models="Qwen3.5",
    architecture="Qwen3_5ForCausalLM",
    names=family_parts.names(*_QWEN_ATTENTION, family_parts.MLP)
    | _delta_names("linear_attn", _QWEN_DELTA),
    defaults=_QWEN_LINEAR,
    only=_QWEN_LINEAR_ONLY,
    extra=_qwen_linear,
    ropes=("default",),
    delta=_qwen_delta,
    ignored=re.compile(r"mtp\..*"),  # predicts further tokens; transformers drops it
  ),
  "qwen3_5_moe_text": family_row.Family(
    models="Qwen3.5-MoE",
    architecture="Qwen3_5MoeForCausalLM",
    names=family_parts.names(*_QWEN_ATTENTION, _QWEN_EXPERTS)
    | _delta_names("linear_attn", _QWEN_DELTA),
    defaults={
      **_QWEN_LINEAR,
      **{"num_experts": 256, "num_experts_per_tok": 8},
      **{"intermediate_size": 512, "shared_expert_intermediate_size": 512},
    },
    only=_QWEN_LINEAR_ONLY,
    # The width of the experts; no layer is dense.
    renamed={"intermediate_size": "moe_intermediate_size"},
    extra=lambda fields: {**_qwen_linear(fields), "experts_normalized": True},
    ropes=("default",),
    delta=_qwen_delta,
    ignored=re.compile(r"mtp\..*"),
    stacked=_QWEN_STACKED,
  ),
  "qwen3_next": family_row.Family(
    models="Qwen3-Next",
    architecture="Qwen3NextForCausalLM",
    names=family_parts.names(*_QWEN_ATTENTION, _QWEN_EXPERTS)
    | _delta_names("linear_attn", _NEXT_DELTA),
    defaults={
      **_QWEN_LINEAR,
      **{"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True},
      **{"intermediate_size": 512, "shared_expert_intermediate_size": 512},
    },
    only={
      **_QWEN_LINEAR_ONLY,
      "decoder_sparse_step": (1,),  # otherwise some layers are dense
      "mlp_only_layers": ([], None),
    },
    renamed={"intermediate_size": "moe_intermediate_size"},
    extra=lambda fields: {
      **_qwen_linear(fields),
      "experts_normalized": bool(fields["norm_topk_prob"]),
    },
    ropes=("default",),
    delta=_qwen_delta,
    grouped=frozenset(
      f"layers/delta_{name}" for name in ("q", "k", "v", "gate", "b", "a")
    ),
    ignored=re.compile(r"mtp\..*"),
  ),
  "olmo_hybrid": family_row.Family(
    models="OLMo Hybrid",
    architecture="OlmoHybridForCausalLM",
    names=family_parts.names(
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.POST_NORMS,
      family_parts.PRE_NORMS,
      family_parts.MLP,
    )
    | _delta_names("linear_attn", _OLMO_DELTA),
    defaults={
      **family_parts.COMMON,
      "max_position_embeddings": 65536,
      "full_attention_interval": 4,
      "linear_conv_kernel_dim": 4,
      "linear_allow_neg_eigval": True,
    },
    only={
      "hidden_act": ("silu",),
      "attention_bias": (False, None),
    },
    extra=family_parts.olmo,
    ropes=("default", "none"),
    delta=lambda fields: {
      "strength": 2.0 if fields["linear_allow_neg_eigval"] else 1.0,
      "norm_eps": 1e-5,
    },
    aliases={
      "attention_layer_norm": "input_layernorm",
      "feedforward_layer_norm": "post_attention_layernorm",
    },
  ),
}
