"""Families of models with attention and a dense feed-forward in every layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from raft_jax.hf import family_parts, family_row

_FUSED_MLP = {**family_parts.MLP, **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")}
_PLAIN_MLP = {name: family_parts.MLP[name] for name in ("up", "down")}
_QKV_BIASES = {f"{name}_bias": family_parts.ATTENTION[name] for name in "qkv"}
_GGUF = {
  "attn_norm": "attn_norm",
  "attn_post_norm": "post_attention_norm",
  **{name: f"attn_{name}" for name in ("q", "k", "v", "q_norm", "k_norm")},
  **{f"{name}_bias": f"attn_{name}" for name in "qkv"},
  "o": "attn_output",
  "mlp_norm": "ffn_norm",
  "mlp_post_norm": "post_ffw_norm",
  "gate": "ffn_gate",
  "up": "ffn_up",
  "down": "ffn_down",
}
_FUSED_GGUF = {
  **_GGUF,
  **dict.fromkeys(("q", "k", "v"), "attn_qkv"),
  **dict.fromkeys(("gate", "up"), "ffn_up"),
}
_LLAMA_LIKE = family_parts.names(
  family_parts.PRE_NORMS, family_parts.ATTENTION, family_parts.MLP
)


def has_rope(fields: family_row.Fields, layer: int) -> bool:
  """Whether a layer has rotary positions at all."""
  flags = fields.get("no_rope_layers")  # despite its name, 1 for layers with them
  if flags:
    return bool(flags[layer])
  interval = fields.get("no_rope_layer_interval")
  return not interval or (layer + 1) % interval != 0


_OLMO = {**family_parts.COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def _exaone_period(fields: family_row.Fields) -> int:
  pattern = fields["sliding_window_pattern"] or 1  # "LLLG" is another name of 4
  return len(pattern) if isinstance(pattern, str) else pattern


_exaone_slides = family_parts.by_layer_type(
  lambda f, i: (i + 1) % _exaone_period(f) != 0
)


def _ministral(fields: family_row.Fields) -> dict[str, Any]:
  beta = fields.get("llama_4_scaling_beta")
  original = fields.get("original_max_position_embeddings")
  length = original or fields["max_position_embeddings"]
  return {"query_growth": (float(beta), int(length)) if beta else None}


_GLM = {
  **family_parts.COMMON,
  "rms_norm_eps": 1.5625e-7,
  "head_dim": 128,
  "max_position_embeddings": 131072,
  "attention_bias": True,
  "partial_rotary_factor": 0.5,
}


def _glm(fields: family_row.Fields) -> dict[str, Any]:
  return {"qkv_bias": bool(fields["attention_bias"]), "rope_interleaved": True}


_GEMMA = {
  **family_parts.COMMON,
  "head_dim": 256,
  "tie_word_embeddings": True,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
}
_GEMMA_ONLY = {
  "hidden_activation": ("gelu_pytorch_tanh",),
  "attention_bias": (False, None),
  "use_bidirectional_attention": (False, None),
  "partial_rotary_factor": (1, None),
}


def _gemma(fields: family_row.Fields) -> dict[str, Any]:
  return {
    "post_norms": True,
    "norm_offset": 1.0,
    "norm_rounds_last": True,
    "activation": "gelu_tanh",
    "embed_scale": float(fields["hidden_size"]) ** 0.5,
    "query_scale": float(fields["query_pre_attn_scalar"]) ** -0.5,
    "attention_softcap": fields["attn_logit_softcapping"],
    "logit_softcap": fields["final_logit_softcapping"],
  }


def _even_width(fields: family_row.Fields) -> int | None:
  width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
  return width // heads if width and heads else None


def _gemma_gguf(
  meta: Callable[[str], Any], fields: family_row.Fields
) -> family_row.Fields:
  # llama.cpp knows the two models of 27B, whose scores are scaled in another way, by
  # their number of layers.
  is_27b = fields["num_hidden_layers"] in (46, 62)
  return {
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": meta("attention.sliding_window"),
    "query_pre_attn_scalar": _even_width(fields) if is_27b else fields["head_dim"],
    "attn_logit_softcapping": meta("attn_logit_softcapping"),
    "final_logit_softcapping": meta("final_logit_softcapping"),
  }


FAMILIES = {
  "llama": family_row.Family(
    models="Llama 1 to 3, SmolLM2",
    architecture="LlamaForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS, family_parts.ATTENTION, family_parts.MLP, in_gguf=_GGUF
    ),
    defaults={**family_parts.COMMON, "max_position_embeddings": 2048},
    only=family_parts.NO_BIAS,
    # llama.cpp's convert_hf_to_gguf.py permutes these two (LlamaModel.permute).
    interleaved=frozenset({"layers/q", "layers/k"}),
    ignored=re.compile(r"rope_freqs\.weight"),  # the config's
  ),
  "qwen2": family_row.Family(
    models="Qwen2 and Qwen2.5",
    architecture="Qwen2ForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS,
      family_parts.ATTENTION,
      _QKV_BIASES,
      family_parts.MLP,
      in_gguf=_GGUF,
    ),
    defaults=family_parts.QWEN,
    only={
      name: family_parts.NO_BIAS[name]
      for name in ("hidden_act", "partial_rotary_factor")
    },
    extra=lambda fields: {"qkv_bias": True},
    slides=family_parts.qwen_slides,
  ),
  "qwen3": family_row.Family(
    models="Qwen3",
    architecture="Qwen3ForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS,
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.MLP,
      in_gguf=_GGUF,
    ),
    defaults={**family_parts.QWEN, "head_dim": 128},
    only=family_parts.NO_BIAS,
    extra=lambda fields: {"qk_norm": "head"},
    slides=family_parts.qwen_slides,
  ),
  "mistral": family_row.Family(
    models="Mistral",
    architecture="MistralForCausalLM",
    names=_LLAMA_LIKE,
    defaults={
      **family_parts.COMMON,
      "max_position_embeddings": 131072,
      "sliding_window": 4096,
    },
    only=family_parts.NO_BIAS,
    slides=lambda fields, layer: True,
  ),
  "ministral3": family_row.Family(
    models="Ministral 3",
    architecture="Ministral3ForCausalLM",
    names=_LLAMA_LIKE,
    defaults={
      **family_parts.COMMON,
      "rms_norm_eps": 1e-5,
      "head_dim": 128,
      "max_position_embeddings": 262144,
      "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
      },
    },
    only=family_parts.NO_BIAS,
    extra=_ministral,
    slides=lambda fields, layer: True,
  ),
  "granite": family_row.Family(
    models="Granite (dense)",
    architecture="GraniteForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS, family_parts.ATTENTION, family_parts.MLP, in_gguf=_GGUF
    ),
    defaults={
      **family_parts.COMMON,
      "max_position_embeddings": 2048,
      "embedding_multiplier": 1.0,
      "logits_scaling": 1.0,
      "residual_multiplier": 1.0,
      "attention_multiplier": 1.0,
    },
    only=family_parts.NO_BIAS,
    extra=lambda fields: {
      "embed_scale": float(fields["embedding_multiplier"]),
      "residual_scale": float(fields["residual_multiplier"]),
      "query_scale": float(fields["attention_multiplier"]),
      "hidden_scale": 1.0 / fields["logits_scaling"],
    },
    gguf_fields=lambda meta, fields: {
      "embedding_multiplier": meta("embedding_scale"),
      "residual_multiplier": meta("residual_scale"),
      "attention_multiplier": meta("attention.scale"),
      "logits_scaling": meta("logit_scale"),
    },
    interleaved=frozenset({"layers/q", "layers/k"}),  # as Llama's
  ),
  "seed_oss": family_row.Family(
    models="Seed-OSS",
    architecture="SeedOssForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS, family_parts.ATTENTION, _QKV_BIASES, family_parts.MLP
    ),
    defaults={
      **family_parts.COMMON,
      "head_dim": 128,
      "max_position_embeddings": 524288,
      "attention_bias": True,
    },
    only={
      "hidden_act": ("silu",),
      "attention_out_bias": (False, None),
      "mlp_bias": (False, None),
      "partial_rotary_factor": (1, None),
    },
    extra=lambda fields: {"qkv_bias": bool(fields["attention_bias"])},
  ),
  "exaone4": family_row.Family(
    models="EXAONE 4",
    architecture="Exaone4ForCausalLM",
    names=family_parts.names(
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.POST_NORMS,
      family_parts.MLP,
    ),
    defaults={
      **family_parts.COMMON,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 2048,
      "sliding_window": 4096,
      "sliding_window_pattern": 4,
    },
    only=family_parts.NO_BIAS,
    extra=lambda fields: {"qk_norm": "head", "pre_norms": False, "post_norms": True},
    slides=_exaone_slides,
    # Once some layers have windows, those without one have no positions.
    rotates=lambda f, i: not f["sliding_window"] or _exaone_slides(f, i),
  ),
  "apertus": family_row.Family(
    models="Apertus",
    architecture="ApertusForCausalLM",
    names=family_parts.names(
      {"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      _PLAIN_MLP,
    )
    | {
      f"layers/xielu_{sign}": family_row.Name(
        f"model.layers.{{}}.mlp.act_fn.alpha_{sign}", ""
      )
      for sign in "pn"
    },
    defaults={
      **family_parts.COMMON,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 65536,
      "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 12000000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      },
    },
    only={**family_parts.NO_BIAS, "hidden_act": ("xielu",)},
    extra=lambda fields: {
      "qk_norm": "head",
      "activation": "xielu",
      "gated_mlp": False,
    },
    constants={
      "model.layers.{}.mlp.act_fn.beta": 0.5,
      "model.layers.{}.mlp.act_fn.eps": -1e-6,
    },
  ),
  "arcee": family_row.Family(
    models="Arcee",
    architecture="ArceeForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS, family_parts.ATTENTION, _PLAIN_MLP
    ),
    defaults={
      **family_parts.COMMON,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
    },
    only={**family_parts.NO_BIAS, "hidden_act": ("relu2",)},
    extra=lambda fields: {"activation": "relu2", "gated_mlp": False},
  ),
  "glm": family_row.Family(
    models="GLM-4",
    architecture="GlmForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS, family_parts.ATTENTION, _QKV_BIASES, _FUSED_MLP
    ),
    defaults=_GLM,
    only={"hidden_act": ("silu",)},
    extra=_glm,
  ),
  "glm4": family_row.Family(
    models="GLM-4-0414",
    architecture="Glm4ForCausalLM",
    names=family_parts.names(
      {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
      },
      family_parts.ATTENTION,
      _QKV_BIASES,
      _FUSED_MLP,
    ),
    defaults=_GLM,
    only={"hidden_act": ("silu",)},
    extra=lambda fields: {**_glm(fields), "post_norms": True},
  ),
  "smollm3": family_row.Family(
    models="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    names=_LLAMA_LIKE,
    defaults={
      **family_parts.COMMON,
      "rope_theta": 2000000.0,
      "max_position_embeddings": 32768,
      "tie_word_embeddings": True,
      "no_rope_layer_interval": 4,
      "use_sliding_window": False,
    },
    only=family_parts.NO_BIAS,
    slides=family_parts.by_layer_type(
      lambda fields, layer: not has_rope(fields, layer) and fields["use_sliding_window"]
    ),
    rotates=has_rope,
  ),
  "olmo2": family_row.Family(
    models="OLMo 2",
    architecture="Olmo2ForCausalLM",
    names=family_parts.names(
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.POST_NORMS,
      family_parts.MLP,
      in_gguf=_GGUF,
    ),
    defaults=_OLMO,
    only={**family_parts.NO_BIAS, "sliding_window": (None,)},
    extra=family_parts.olmo,
    # llama.cpp gives files of OLMo 3 the same name.
    gguf_fields=lambda meta, fields: {
      "sliding_window": meta("attention.sliding_window")
    },
  ),
  "olmo3": family_row.Family(
    models="OLMo 3",
    architecture="Olmo3ForCausalLM",
    names=family_parts.names(
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.POST_NORMS,
      family_parts.MLP,
    ),
    defaults={
      **_OLMO,
      "rope_theta": 500000.0,
      # transformers does not read `rope_theta` for the layers with a window.
      "rope_local_base_freq": 500000.0,
      "sliding_window": 4096,
    },
    only=family_parts.NO_BIAS,
    extra=family_parts.olmo,
    slides=family_parts.by_layer_type(lambda fields, layer: (layer + 1) % 4 != 0),
  ),
  "phi3": family_row.Family(
    models="Phi-3 and Phi-4-mini",
    architecture="Phi3ForCausalLM",
    names=family_parts.names(
      family_parts.PRE_NORMS,
      {
        **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
        "o": "self_attn.o_proj",
      },
      _FUSED_MLP,
      in_gguf=_FUSED_GGUF,
    ),
    defaults={
      **family_parts.COMMON,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
    },
    only={
      "hidden_act": ("silu",),
      "attention_bias": (False, None),
      "mlp_bias": (False, None),
      "lm_head_bias": (False, None),
    },
    ropes=("default", "longrope"),
    slides=lambda fields, layer: True,
    gguf_fields=lambda meta, fields: {
      "head_dim": _even_width(fields),  # the file has the rotated part of it
      "sliding_window": meta("attention.sliding_window") or None,
      "original_max_position_embeddings": meta("rope.scaling.original_context_length"),
    },
    ignored=re.compile(r"rope_factors_(long|short)\.weight"),  # the config's
  ),
  "gemma2": family_row.Family(
    models="Gemma 2",
    architecture="Gemma2ForCausalLM",
    names=family_parts.names(
      family_parts.GEMMA_NORMS, family_parts.ATTENTION, family_parts.MLP, in_gguf=_GGUF
    ),
    defaults={
      **_GEMMA,
      "max_position_embeddings": 8192,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
    only=_GEMMA_ONLY,
    extra=_gemma,
    gguf_fields=_gemma_gguf,
    slides=family_parts.by_layer_type(lambda fields, layer: layer % 2 == 0),
  ),
  "gemma3_text": family_row.Family(
    models="Gemma 3 (text)",
    architecture="Gemma3ForCausalLM",
    names=family_parts.names(
      family_parts.GEMMA_NORMS,
      family_parts.ATTENTION,
      family_parts.QK_NORMS,
      family_parts.MLP,
      in_gguf=_GGUF,
    ),
    gguf="gemma3",
    gguf_fields=lambda meta, fields: {
      **_gemma_gguf(meta, fields),
      "rope_local_base_freq": meta("rope.freq_base_swa") or 10000.0,
    },
    defaults={
      **_GEMMA,
      "rope_theta": 1000000.0,
      "rope_local_base_freq": 10000.0,
      "max_position_embeddings": 131072,
      "sliding_window_pattern": 6,
    },
    only=_GEMMA_ONLY,
    extra=lambda fields: {**_gemma(fields), "qk_norm": "head"},
    slides=family_parts.by_layer_type(
      lambda f, i: (i + 1) % f["sliding_window_pattern"] != 0
    ),
  ),
}
