"""Names of tensors and config fields that several families of models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raft_jax.hf import family_row

_OUTER = {
  "embed": family_row.Name("model.embed_tokens.weight", "token_embd.weight"),
  "final_norm": family_row.Name("model.norm.weight", "output_norm.weight"),
  "head": family_row.Name("lm_head.weight", "output.weight"),
}
PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
ATTENTION = {name: f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {
  "router": "mlp.gate",
  **{name: f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}
POST_NORMS = {
  "attn_post_norm": "post_attention_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
GEMMA_NORMS = {
  "attn_norm": "input_layernorm",
  "attn_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def names(
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


NO_BIAS = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1, None),
}
COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}


def by_layer_type(default: Callable[[family_row.Fields, int], bool]):
  """Whether `layer_types`, or what stands in for it, limits the layer by a window."""

  def slides(fields: family_row.Fields, layer: int) -> bool:
    kinds = fields.get("layer_types")
    return kinds[layer] == "sliding_attention" if kinds else default(fields, layer)

  return slides


qwen_slides = by_layer_type(lambda fields, i: i >= fields["max_window_layers"])
QWEN = {
  **COMMON,
  "max_position_embeddings": 32768,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
}


def olmo(fields: family_row.Fields) -> dict[str, Any]:
  """OLMo 2's norms, which its successors keep."""
  return {
    "qk_norm": "projection",
    "norm_rounds_last": True,
    "pre_norms": False,
    "post_norms": True,
  }
