"""The supported families of models: tensor names, layouts and config fields.

To add a family, add a row to `FAMILIES`, which loading and export use. Nothing here
opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Fields = dict[str, Any]
"""Hugging Face config fields, as in config.json."""


ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""The kinds of rotary scaling that transformers' models share. `dynamic` changes
nothing within the length that a model was made for, and longer rows are refused."""


class Name(NamedTuple):
  """Names of a parameter in files; `{}` stands for the layer's number.

  Parameters of the same name are fused: their rows follow each other in one tensor, in
  the order of the table. An empty `gguf`: not read from GGUF files.
  """

  hf: str
  gguf: str


class Family(NamedTuple):
  """One `model_type`: the names and layout of its files, and its config fields.

  Attributes:
    architecture: the class name in config.json.
    names: our path in the tree -> names in files.
    defaults: config fields that a config.json may leave out, as in transformers' class.
    only: config field -> supported values; other values are refused.
    renamed: config field -> its name in this family's config.json, where that differs
      from Llama's. `defaults`, `only` and `extra` use Llama's name.
    extra: config -> fields of `DecoderConfig` in which it differs from Llama; not those
      that `decoder_config` sets for every family.
    ropes: kinds of rotary scaling that are read.
    slides: config and layer -> whether the layer has a sliding window; None: never.
    delta: config -> fields of `DeltaConfig` beside those of transformers' names, for
      families with layers of Gated DeltaNet; None: it has none.
    aliases: other names of modules in its files -> those of the table, as far as the
      same transformers' class reads both.
    grouped: paths whose rows a fused tensor holds head by head of the linear layers'
      keys, not one parameter after the other.
    rotates: config and layer -> whether the layer has rotary positions; None: always.
    constants: tensors that hold the same number in every model -> that number.
    interleaved: paths whose rows a GGUF file stores in interleaved rotary order.
    ignored: tensors of GGUF files that hold no parameter.
    wrapped: whether it is the text tower of a model with other parts, as `wrappers`
      makes it; then `architecture` and `names` are the whole model's.
  """

  architecture: str
  names: Mapping[str, Name]
  defaults: Mapping[str, Any]
  only: Mapping[str, tuple[Any, ...]]
  renamed: Mapping[str, str] = {}
  extra: Callable[[Fields], dict[str, Any]] = lambda fields: {}
  ropes: tuple[str, ...] = ROPES
  slides: Callable[[Fields, int], bool] | None = None
  delta: Callable[[Fields], dict[str, Any]] | None = None
  aliases: Mapping[str, str] = {}
  grouped: frozenset[str] = frozenset()
  rotates: Callable[[Fields, int], bool] | None = None
  constants: Mapping[str, float] = {}
  interleaved: frozenset[str] = frozenset()
  ignored: re.Pattern[str] = re.compile("(?!)")  # none
  wrapped: bool = False

  @property
  def in_gguf(self) -> bool:
    """Whether its GGUF files are read."""
    return all(name.gguf for name in self.names.values())


_OUTER = {
  "embed": Name("model.embed_tokens.weight", "token_embd.weight"),
  "final_norm": Name("model.norm.weight", "output_norm.weight"),
  "head": Name("lm_head.weight", "output.weight"),
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
_GGUF = {
  "attn_norm": "attn_norm",
  "q": "attn_q",
  "k": "attn_k",
  "v": "attn_v",
  "o": "attn_output",
  "mlp_norm": "ffn_norm",
  "gate": "ffn_gate",
  "up": "ffn_up",
  "down": "ffn_down",
}


def _names(
  *layer: Mapping[str, str], in_gguf: Mapping[str, str] | None = None
) -> dict[str, Name]:
  """The name table; `layer` gives the module of every parameter of a layer."""
  table = dict(_OUTER)
  for path, module in (item for part in layer for item in part.items()):
    kind = "bias" if path.endswith("_bias") else "weight"
    theirs = f"blk.{{}}.{in_gguf[path]}.weight" if in_gguf else ""
    table[f"layers/{path}"] = Name(f"model.layers.{{}}.{module}.{kind}", theirs)
  return table


_LLAMA_LIKE = _names(_PRE_NORMS, _ATTENTION, _MLP)
_NO_BIAS = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1, None),
}
_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}


def _by_layer_type(default: Callable[[Fields, int], bool]):
  """Whether `layer_types`, or what stands in for it, limits the layer by a window."""

  def slides(fields: Fields, layer: int) -> bool:
    kinds = fields.get("layer_types")
    return kinds[layer] == "sliding_attention" if kinds else default(fields, layer)

  return slides


def has_rope(fields: Fields, layer: int) -> bool:
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


def _olmo(fields: Fields) -> dict[str, Any]:
  return {
    "qk_norm": "projection",
    "norm_rounds_last": True,
    "pre_norms": False,
    "post_norms": True,
  }


def _exaone_period(fields: Fields) -> int:
  pattern = fields["sliding_window_pattern"] or 1  # "LLLG" is another name of 4
  return len(pattern) if isinstance(pattern, str) else pattern


_exaone_slides = _by_layer_type(lambda f, i: (i + 1) % _exaone_period(f) != 0)


def _ministral(fields: Fields) -> dict[str, Any]:
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


def _glm(fields: Fields) -> dict[str, Any]:
  return {"qkv_bias": bool(fields["attention_bias"]), "rope_interleaved": True}


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


def _gemma(fields: Fields) -> dict[str, Any]:
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


def _delta_names(module: str, tensors: Mapping[str, str]) -> dict[str, Name]:
  """The name table of the layers of Gated DeltaNet, without the prefix `delta_`."""
  prefix = f"model.layers.{{}}.{module}"
  return {
    f"layers/delta_{path}": Name(f"{prefix}.{tensor}", "")
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


def _qwen_linear(fields: Fields) -> dict[str, Any]:
  return {
    "qk_norm": "head",
    "norm_offset": 1.0,
    "norm_rounds_last": True,
    "attention_gate": True,
  }


def _qwen_delta(fields: Fields) -> dict[str, Any]:
  return {"norm_eps": float(fields["rms_norm_eps"])}


_OLMO_DELTA = {
  **{name: f"{name}_proj.weight" for name in "qkvabo"},
  "gate": "g_proj.weight",
  **{f"{name}_conv": f"{name}_conv1d.weight" for name in "qkv"},
  "a_log": "A_log",
  "dt_bias": "dt_bias",
  "norm": "o_norm.weight",
}


def is_linear(fields: Fields, layer: int) -> bool:
  """Whether a layer has a linear mixer in place of attention."""
  kinds = fields.get("layer_types")
  if kinds:
    return kinds[layer] == "linear_attention"
  return (layer + 1) % fields["full_attention_interval"] != 0


FAMILIES = {
  "llama": Family(
    architecture="LlamaForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _MLP, in_gguf=_GGUF),
    defaults={**_COMMON, "max_position_embeddings": 2048},
    only=_NO_BIAS,
    # llama.cpp's convert_hf_to_gguf.py permutes these two (LlamaModel.permute).
    interleaved=frozenset({"layers/q", "layers/k"}),
    ignored=re.compile(r"rope_freqs\.weight"),  # the config's
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    names=_names(
      _PRE_NORMS,
      _ATTENTION,
      _QKV_BIASES,
      _MLP,
    ),
    defaults=_QWEN,
    only={name: _NO_BIAS[name] for name in ("hidden_act", "partial_rotary_factor")},
    extra=lambda fields: {"qkv_bias": True},
    slides=_qwen_slides,
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QK_NORMS, _MLP),
    defaults={**_QWEN, "head_dim": 128},
    only=_NO_BIAS,
    extra=lambda fields: {"qk_norm": "head"},
    slides=_qwen_slides,
  ),
  "mistral": Family(
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
  "ministral3": Family(
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
  "granite": Family(
    architecture="GraniteForCausalLM",
    names=_LLAMA_LIKE,
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
  ),
  "seed_oss": Family(
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
  "exaone4": Family(
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
  "apertus": Family(
    architecture="ApertusForCausalLM",
    names=_names(
      {"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
      _ATTENTION,
      _QK_NORMS,
      _PLAIN_MLP,
    )
    | {
      f"layers/xielu_{sign}": Name(f"model.layers.{{}}.mlp.act_fn.alpha_{sign}", "")
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
  "arcee": Family(
    architecture="ArceeForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _PLAIN_MLP),
    defaults={**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    only={**_NO_BIAS, "hidden_act": ("relu2",)},
    extra=lambda fields: {"activation": "relu2", "gated_mlp": False},
  ),
  "glm": Family(
    architecture="GlmForCausalLM",
    names=_names(_PRE_NORMS, _ATTENTION, _QKV_BIASES, _FUSED_MLP),
    defaults=_GLM,
    only={"hidden_act": ("silu",)},
    extra=_glm,
  ),
  "glm4": Family(
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
  "smollm3": Family(
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
  "olmo2": Family(
    architecture="Olmo2ForCausalLM",
    names=_names(
      _ATTENTION,
      _QK_NORMS,
      _POST_NORMS,
      _MLP,
    ),
    defaults=_OLMO,
    only=_NO_BIAS,
    extra=_olmo,
  ),
  "olmo3": Family(
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
  "phi3": Family(
    architecture="Phi3ForCausalLM",
    names=_names(
      _PRE_NORMS,
      {
        **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
        "o": "self_attn.o_proj",
      },
      _FUSED_MLP,
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
  ),
  "gemma2": Family(
    architecture="Gemma2ForCausalLM",
    names=_names(_GEMMA_NORMS, _ATTENTION, _MLP),
    defaults={
      **_GEMMA,
      "max_position_embeddings": 8192,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
    only=_GEMMA_ONLY,
    extra=_gemma,
    slides=_by_layer_type(lambda fields, layer: layer % 2 == 0),
  ),
  "gemma3_text": Family(
    architecture="Gemma3ForCausalLM",
    names=_names(_GEMMA_NORMS, _ATTENTION, _QK_NORMS, _MLP),
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
  "qwen3_5_text": Family(
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
  "qwen3_next": Family(
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
  "olmo_hybrid": Family(
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
