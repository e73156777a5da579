"""Families of models with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from raft_jax.hf import family_parts, family_row


def _normalized(fields: family_row.Fields) -> dict[str, Any]:
  return {"experts_normalized": bool(fields["norm_topk_prob"])}


def _gpt_oss_names() -> dict[str, family_row.Name]:
  table = family_parts.names(
    family_parts.PRE_NORMS,
    family_parts.ATTENTION,
    {f"{name}_bias": f"self_attn.{name}_proj" for name in "qkvo"},
    {"router": "mlp.router", "router_bias": "mlp.router"},
  )
  prefix = "model.layers.{}."
  table["layers/sinks"] = family_row.Name(f"{prefix}self_attn.sinks", "")
  experts = f"{prefix}mlp.experts."
  for name in ("gate", "up"):
    table[f"layers/{name}"] = family_row.Name(
      f"{experts}gate_up_proj", "", family_row.Form(True, True)
    )
    table[f"layers/{name}_bias"] = family_row.Name(
      f"{experts}gate_up_proj_bias", "", family_row.Form(False, True)
    )
  table["layers/down"] = family_row.Name(
    f"{experts}down_proj", "", family_row.Form(True, False)
  )
  table["layers/down_bias"] = family_row.Name(
    f"{experts}down_proj_bias", "", family_row.Form()
  )
  return table


FAMILIES = {
  "qwen3_moe": family_row.Family(
    models="Qwen3-MoE",
    architecture="Qwen3MoeForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS,
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.EXPERTS,
    ),
    defaults={
      **family_parts.QWEN,
      **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
      "intermediate_size": 768,
    },
    only={
      **family_parts.NO_BIAS,
      "decoder_sparse_step": (1,),  # otherwise some layers are dense
      "mlp_only_layers": ([], None),
    },
    # The field `intermediate_size` is the width of dense layers, of which it has none.
    renamed={"intermediate_size": "moe_intermediate_size"},
    extra=lambda fields: {"qk_norm": "head", **_normalized(fields)},
    slides=family_parts.qwen_slides,
  ),
  "olmoe": family_row.Family(
    models="OLMoE",
    architecture="OlmoeForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS,
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.EXPERTS,
    ),
    defaults={
      **family_parts.COMMON,
      **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
    },
    only={**family_parts.NO_BIAS, "clip_qkv": (None,)},
    extra=lambda fields: {"qk_norm": "projection", **_normalized(fields)},
  ),
  "mixtral": family_row.Family(
    models="Mixtral",
    architecture="MixtralForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS,
      family_parts.ATTENTION,
      {
        "router": "block_sparse_moe.gate",
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
      },
    ),
    defaults={
      **family_parts.COMMON,
      **{"num_experts": 8, "num_experts_per_tok": 2},
      "rms_norm_eps": 1e-5,
      "rope_theta": 1000000.0,
      "max_position_embeddings": 131072,
      "sliding_window": None,
    },
    only={**family_parts.NO_BIAS, "router_jitter_noise": (0, None)},
    extra=lambda fields: {"experts_normalized": True},
    slides=lambda fields, layer: True,
  ),
  "gpt_oss": family_row.Family(
    models="gpt-oss",
    architecture="GptOssForCausalLM",
    names=_gpt_oss_names(),
    defaults={
      **family_parts.COMMON,
      **{"num_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0},
      **{"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64},
      **{"max_position_embeddings": 131072, "sliding_window": 128},
      "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0},
        **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        "original_max_position_embeddings": 4096,
      },
    },
    only={
      "hidden_act": ("silu",),
      "attention_bias": (True, None),
      "swiglu_alpha": (1.702, None),
      "partial_rotary_factor": (1, None),
    },
    extra=lambda fields: {
      **{"qkv_bias": True, "o_bias": True, "attention_sinks": True},
      **{"expert_biases": True, "experts_normalized": True},
      "norm_rounds_last": True,
      "gate_limit": float(fields["swiglu_limit"]),
    },
    slides=family_parts.by_layer_type(lambda fields, layer: layer % 2 == 0),
    mxfp4=True,
  ),
}
