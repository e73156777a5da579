"""The supported families of models: tensor names, layouts and config fields.

To add a family, add a row to `FAMILIES`, which loading and export use. Nothing here
opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from raft_jax.hf import family_row

_OUTER = {
  "embed": family_row.Name("model.embed_tokens.weight", "token_embd.weight"),
  "final_norm": family_row.Name("model.norm.weight", "output_norm.weight"),
  "head": family_row.Name("lm_head.weight", "output.weight"),
}
_PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ATTENTION = {name: f"self_attn.{name}_proj" for name in "qkvo"}
_MLP = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_FUSED_MLP = {**_MLP, **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")}
_PLAIN_MLP = {name: _MLP[name] for name in ("up", "down")}
_QKV_BIASES = {f"{name}_bias": _ATTENTION[name] for name in "qkv"}
_POST_NORMS = {
  "attn_post_norm": "post_attention_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_EXPERTS = {
  "router": "mlp.gate",
  **{name: f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}
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


def _names(
  *layer: Mapping[str, str], in_gguf: Mapping[str, str] | None = None
) -> dict[str, family_row.Name]:
  """The name table; `layer` gives the module of every parameter of a layer."""
  table = dict(_OUTER)
  for path, module in (item for part in layer for item in part.items()):
    kind = "bias" if path.endswith("_bias") else "weight"
    theirs = f"blk.{{}}.{in_gguf[path]}.{kind}" if in_gguf else ""
    table[f"layers/{path}"] = family_row.Name(
      f"model.layers.{{}}.{module}.{kind}", theirs
    )
  return table


_LLAMA_LIKE = _names(_PRE_NORMS, _ATTENTION, _MLP)
_NO_BIAS = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1, None),
}
_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}


def _by_layer_type(default: Callable[[family_row.Fields, int], bool]):
  """Whether `layer_types`, or what stands in for it, limits the layer by a window."""

  def slides(fields: family_row.Fields, layer: int) -> bool:
    kinds = fields.get("layer_types")
    return kinds[layer] == "sliding_attention" if kinds else default(fields, layer)

  return slides


def has_rope(fields: family_row.Fields, layer: int) -> bool:
  """Whether a layer has rotary positions at all."""
  flags = fields.get("no_rope_layers")  # despite its name, 1 for layers with them
  if flags:
    return bool(flags[layer])
  interval = fields.get("no_rope_layer_interval")
  return not interval or (layer + 1) % interval != 0


_qwen_slides = _by_layer_type(lambda fields, i: i >= fields["max_window_layers"])
_QWEN = {
  **_COMMON,
  "max_position_embeddings": 32768,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
}

_OLMO = {**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def _olmo(fields: family_row.Fields) -> dict[str, Any]:
  return {
    "qk_norm": "projection",
    "norm_rounds_last": True,
    "pre_norms": False,
    "post_norms": True,
  }


def _exaone_period(fields: family_row.Fields) -> int:
  pattern = fields["sliding_window_pattern"] or 1  # "LLLG" is another name of 4
  return len(pattern) if isinstance(pattern, str) else pattern


_exaone_slides = _by_layer_type(lambda f, i: (i + 1) % _exaone_period(f) != 0)


def _ministral(fields: family_row.Fields) -> dict[str, Any]:
  beta = fields.get("llama_4_scaling_beta")
  original = fields.get("original_max_position_embeddings")
  length = original or fields["max_position_embeddings"]
  return {"query_growth": (float(beta), int(length)) if beta else None}


_GLM = {
  **_COMMON,
  "rms_norm_eps": 1.5625e-7,
  "head_dim": 128,
  "max_position_embeddings": 131072,
  "attention_bias": True,
  "partial_rotary_factor": 0.5,
}


def _glm(fields: family_row.Fields) -> dict[str, Any]:
  return {"qkv_bias": bool(fields["attention_bias"]), "rope_interleaved": True}


def _normalized(fields: family_row.Fields) -> dict[str, Any]:
  return {"experts_normalized": bool(fields["norm_topk_prob"])}


_GEMMA_NORMS = {
  "attn_norm": "input_layernorm",
  "attn_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA = {
  **_COMMON,
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


def _gpt_oss_names() -> dict[str, family_row.Name]:
  table = _names(
    _PRE_NORMS,
    _ATTENTION,
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


def _delta_names(module: str, tensors: Mapping[str, str]) -> dict[str, family_row.Name]:
  """The name table of the layers of Gated DeltaNet, without the prefix `delta_`."""
  prefix = f"model.layers.{{}}.{module}"
  return {
    f"layers/delta_{path}": family_row.Name(f"{prefix}.{tensor}", "")
    for path, tensor in tensors.items()
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
  **_COMMON,
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
  "llama": family_row.Family(
    models="Llama 1 to 3, SmolLM2",
    architecture="LlamaForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _MLP, in_gguf=_GGUF),
    defaults={**_COMMON, "max_position_embeddings": 2048},
    only=_NO_BIAS,
    # llama.cpp's convert_hf_to_gguf.py permutes these two (LlamaModel.permute).
    interleaved=frozenset({"layers/q", "layers/k"}),
    ignored=re.compile(r"rope_freqs\.weight"),  # the config's
  ),
  "qwen2": family_row.Family(
    models="Qwen2 and Qwen2.5",
    architecture="Qwen2ForCausalLM",
    names=_names(
      _PRE_NORMS,
      _ATTENTION,
      _QKV_BIASES,
      _MLP,
      in_gguf=_GGUF,
    ),
    defaults=_QWEN,
    only={name: _NO_BIAS[name] for name in ("hidden_act", "partial_rotary_factor")},
    extra=lambda fields: {"qkv_bias": True},
    slides=_qwen_slides,
  ),
  "qwen3": family_row.Family(
    models="Qwen3",
    architecture="Qwen3ForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QK_NORMS, _MLP, in_gguf=_GGUF),
    defaults={**_QWEN, "head_dim": 128},
    only=_NO_BIAS,
    extra=lambda fields: {"qk_norm": "head"},
    slides=_qwen_slides,
  ),
  "mistral": family_row.Family(
    models="Mistral",
    architecture="MistralForCausalLM",
    names=_LLAMA_LIKE,
    defaults={
      **_COMMON,
      "max_position_embeddings": 131072,
      "sliding_window": 4096,
    },
    only=_NO_BIAS,
    slides=lambda fields, layer: True,
  ),
  "ministral3": family_row.Family(
    models="Ministral 3",
    architecture="Ministral3ForCausalLM",
    names=_LLAMA_LIKE,
    defaults={
      **_COMMON,
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
    only=_NO_BIAS,
    extra=_ministral,
    slides=lambda fields, layer: True,
  ),
  "granite": family_row.Family(
    models="Granite (dense)",
    architecture="GraniteForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _MLP, in_gguf=_GGUF),
    defaults={
      **_COMMON,
      "max_position_embeddings": 2048,
      "embedding_multiplier": 1.0,
      "logits_scaling": 1.0,
      "residual_multiplier": 1.0,
      "attention_multiplier": 1.0,
    },
    only=_NO_BIAS,
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
    names=_names(_PRE_NORMS, _ATTENTION, _QKV_BIASES, _MLP),
    defaults={
      **_COMMON,
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
    names=_names(_ATTENTION, _QK_NORMS, _POST_NORMS, _MLP),
    defaults={
      **_COMMON,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 2048,
      "sliding_window": 4096,
      "sliding_window_pattern": 4,
    },
    only=_NO_BIAS,
    extra=lambda fields: {"qk_norm": "head", "pre_norms": False, "post_norms": True},
    slides=_exaone_slides,
    # Once some layers have windows, those without one have no positions.
    rotates=lambda f, i: not f["sliding_window"] or _exaone_slides(f, i),
  ),
  "apertus": family_row.Family(
    models="Apertus",
    architecture="ApertusForCausalLM",
    names=_names(
      {"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
      _ATTENTION,
      _QK_NORMS,
      _PLAIN_MLP,
    )
    | {
      f"layers/xielu_{sign}": family_row.Name(
        f"model.layers.{{}}.mlp.act_fn.alpha_{sign}", ""
      )
      for sign in "pn"
    },
    defaults={
      **_COMMON,
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
    only={**_NO_BIAS, "hidden_act": ("xielu",)},
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
    names=_names(_PRE_NORMS, _ATTENTION, _PLAIN_MLP),
    defaults={**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    only={**_NO_BIAS, "hidden_act": ("relu2",)},
    extra=lambda fields: {"activation": "relu2", "gated_mlp": False},
  ),
  "glm": family_row.Family(
    models="GLM-4",
    architecture="GlmForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QKV_BIASES, _FUSED_MLP),
    defaults=_GLM,
    only={"hidden_act": ("silu",)},
    extra=_glm,
  ),
  "glm4": family_row.Family(
    models="GLM-4-0414",
    architecture="Glm4ForCausalLM",
    names=_names(
      {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
      },
      _ATTENTION,
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
      **_COMMON,
      "rope_theta": 2000000.0,
      "max_position_embeddings": 32768,
      "tie_word_embeddings": True,
      "no_rope_layer_interval": 4,
      "use_sliding_window": False,
    },
    only=_NO_BIAS,
    slides=_by_layer_type(
      lambda fields, layer: not has_rope(fields, layer) and fields["use_sliding_window"]
    ),
    rotates=has_rope,
  ),
  "olmo2": family_row.Family(
    models="OLMo 2",
    architecture="Olmo2ForCausalLM",
    names=_names(
      _ATTENTION,
      _QK_NORMS,
      _POST_NORMS,
      _MLP,
      in_gguf=_GGUF,
    ),
    defaults=_OLMO,
    only={**_NO_BIAS, "sliding_window": (None,)},
    extra=_olmo,
    # llama.cpp gives files of OLMo 3 the same name.
    gguf_fields=lambda meta, fields: {
      "sliding_window": meta("attention.sliding_window")
    },
  ),
  "olmo3": family_row.Family(
    models="OLMo 3",
    architecture="Olmo3ForCausalLM",
    names=_names(_ATTENTION, _QK_NORMS, _POST_NORMS, _MLP),
    defaults={
      **_OLMO,
      "rope_theta": 500000.0,
      # transformers does not read `rope_theta` for the layers with a window.
      "rope_local_base_freq": 500000.0,
      "sliding_window": 4096,
    },
    only=_NO_BIAS,
    extra=_olmo,
    slides=_by_layer_type(lambda fields, layer: (layer + 1) % 4 != 0),
  ),
  "phi3": family_row.Family(
    models="Phi-3 and Phi-4-mini",
    architecture="Phi3ForCausalLM",
    names=_names(
      _PRE_NORMS,
      {
        **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
        "o": "self_attn.o_proj",
      },
      _FUSED_MLP,
      in_gguf=_FUSED_GGUF,
    ),
    defaults={**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
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
  "qwen3_moe": family_row.Family(
    models="Qwen3-MoE",
    architecture="Qwen3MoeForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QK_NORMS, _EXPERTS),
    defaults={
      **_QWEN,
      **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
      "intermediate_size": 768,
    },
    only={
      **_NO_BIAS,
      "decoder_sparse_step": (1,),  # otherwise some layers are dense
      "mlp_only_layers": ([], None),
    },
    # The field `intermediate_size` is the width of dense layers, of which it has none.
    renamed={"intermediate_size": "moe_intermediate_size"},
    extra=lambda fields: {"qk_norm": "head", **_normalized(fields)},
    slides=_qwen_slides,
  ),
  "olmoe": family_row.Family(
    models="OLMoE",
    architecture="OlmoeForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QK_NORMS, _EXPERTS),
    defaults={
      **_COMMON,
      **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
    },
    only={**_NO_BIAS, "clip_qkv": (None,)},
    extra=lambda fields: {"qk_norm": "projection", **_normalized(fields)},
  ),
  "mixtral": family_row.Family(
    models="Mixtral",
    architecture="MixtralForCausalLM",
    names=_names(
      _PRE_NORMS,
      _ATTENTION,
      {
        "router": "block_sparse_moe.gate",
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
      },
    ),
    defaults={
      **_COMMON,
      **{"num_experts": 8, "num_experts_per_tok": 2},
      "rms_norm_eps": 1e-5,
      "rope_theta": 1000000.0,
      "max_position_embeddings": 131072,
      "sliding_window": None,
    },
    only={**_NO_BIAS, "router_jitter_noise": (0, None)},
    extra=lambda fields: {"experts_normalized": True},
    slides=lambda fields, layer: True,
  ),
  "gpt_oss": family_row.Family(
    models="gpt-oss",
    architecture="GptOssForCausalLM",
    names=_gpt_oss_names(),
    defaults={
      **_COMMON,
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
    slides=_by_layer_type(lambda fields, layer: layer % 2 == 0),
    mxfp4=True,
  ),
  "gemma2": family_row.Family(
    models="Gemma 2",
    architecture="Gemma2ForCausalLM",
    names=_names(_GEMMA_NORMS, _ATTENTION, _MLP, in_gguf=_GGUF),
    defaults={
      **_GEMMA,
      "max_position_embeddings": 8192,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
    only=_GEMMA_ONLY,
    extra=_gemma,
    gguf_fields=_gemma_gguf,
    slides=_by_layer_type(lambda fields, layer: layer % 2 == 0),
  ),
  "gemma3_text": family_row.Family(
    models="Gemma 3 (text)",
    architecture="Gemma3ForCausalLM",
    names=_names(_GEMMA_NORMS, _ATTENTION, _QK_NORMS, _MLP, in_gguf=_GGUF),
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
    slides=_by_layer_type(lambda f, i: (i + 1) % f["sliding_window_pattern"] != 0),
  ),
  "qwen3_5_text": family_row.Family(
    models="Qwen3.5",
    architecture="Qwen3_5ForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QK_NORMS, _MLP)
    | _delta_names("linear_attn", _QWEN_DELTA),
    defaults=_QWEN_LINEAR,
    only=_QWEN_LINEAR_ONLY,
    extra=_qwen_linear,
    ropes=("default",),
    delta=_qwen_delta,
    ignored=re.compile(r"mtp\..*"),  # predicts further tokens; transformers drops it
  ),
  # Without experts; the published models have them.
  "qwen3_next": family_row.Family(
    models="Qwen3-Next without experts",
    architecture="Qwen3NextForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QK_NORMS, _MLP)
    | _delta_names("linear_attn", _NEXT_DELTA),
    defaults={**_QWEN_LINEAR, "num_experts": 512},
    only={**_QWEN_LINEAR_ONLY, "num_experts": (0,)},
    extra=_qwen_linear,
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
    names=_names(
      _ATTENTION,
      _QK_NORMS,
      {
        "attn_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
      },
      _PRE_NORMS,
      _MLP,
    )
    | _delta_names("linear_attn", _OLMO_DELTA),
    defaults={
      **_COMMON,
      "max_position_embeddings": 65536,
      "full_attention_interval": 4,
      "linear_conv_kernel_dim": 4,
      "linear_allow_neg_eigval": True,
    },
    only={
      "hidden_act": ("silu",),
      "attention_bias": (False, None),
    },
    extra=lambda fields: {
      "qk_norm": "projection",
      "norm_rounds_last": True,
      "pre_norms": False,
      "post_norms": True,
    },
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
