"""Config fields: what is refused, and renamed ones; parts of fused tensors."""

import numpy as np
import pytest
import transformers

from raft_jax import errors
from raft_jax.hf import decoder_config, families, tensor_layout
from tests.helpers import tiny_families

LLAMA = {**tiny_families.TINY, "model_type": "llama"}
PHI = {**tiny_families.TINY, "model_type": "phi3"}
GEMMA = {**tiny_families.TINY, "model_type": "gemma2"}
QWEN35 = {**tiny_families.TINY, "model_type": "qwen3_5_text"}
GEMMA4 = {
  **tiny_families.TINY,
  "model_type": "gemma4_text",
  "hidden_size_per_layer_input": 0,
}
REFUSED = {
  "embeddings of each layer for another vocabulary": (
    {**tiny_families.TINY, "model_type": "gemma4_text"},
    "vocab_size_per_layer_input is 262144, and vocab_size 90",
  ),
  "embeddings of each layer in Gemma 4 12B": (
    {**GEMMA4, "model_type": "gemma4_unified_text", "hidden_size_per_layer_input": 8},
    "hidden_size_per_layer_input = 8",
  ),
  "keys shared with no layer": (
    {**GEMMA4, "num_kv_shared_layers": 1},
    "the last 1 of 3 layers share keys and values, and some have no layer of",
  ),
  "keys shared by all layers": (
    {**GEMMA4, "num_kv_shared_layers": 3},
    "the last 3 of 3 layers",
  ),
  "a window that is no number": (
    {**GEMMA4, "sliding_window": "long"},
    "sliding_window is 'long', not a positive number",
  ),
  "a width that is no number": (
    {**GEMMA4, "hidden_size_per_layer_input": [8]},
    r"hidden_size_per_layer_input is \[8\], not a positive number",
  ),
  "a number of layers that is none": (
    {**GEMMA4, "num_kv_shared_layers": "two"},
    "num_kv_shared_layers is 'two', not a positive number",
  ),
  "experts without a number": (
    {**GEMMA4, "enable_moe_block": True, "moe_intermediate_size": 8},
    "num_experts is None, not a positive number",
  ),
  "experts and shared keys": (
    {**GEMMA4, "enable_moe_block": True, "num_kv_shared_layers": 1},
    "num_kv_shared_layers = 1",
  ),
  "experts and embeddings of each layer": (
    {**tiny_families.TINY, "model_type": "gemma4_text", "enable_moe_block": True},
    "hidden_size_per_layer_input = 256",
  ),
  "experts in Gemma 4 12B": (
    {
      **tiny_families.TINY,
      "model_type": "gemma4_unified_text",
      "enable_moe_block": True,
    },
    "enable_moe_block = True",
  ),
  "all tokens both ways": (
    {**GEMMA4, "use_bidirectional_attention": "all"},
    "use_bidirectional_attention = 'all'",
  ),
  "rotation of another kind": (
    {
      **GEMMA4,
      "rope_parameters": {"full_attention": {"rope_type": "default"}},
    },
    "scaling 'default'",
  ),
  "global layers alone": (
    {**GEMMA4, "layer_types": ["full_attention"] * 3},
    "all of its 3 have full attention",
  ),
  "global layers of two shapes": (
    {
      **GEMMA4,
      "layer_types": ["full_attention", "sliding_attention", "full_attention"],
      "per_layer_config": {"0": {"head_dim": 16}, "2": {"head_dim": 8}},
    },
    "per_layer_config gives its layers with full attention different shapes",
  ),
  "global heads that do not divide": (
    {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 3},
    "4 heads, 3 key/value heads of width 512",
  ),
  "unknown scaling": ({**LLAMA, "rope_scaling": {"type": "mrope"}}, "scaling 'mrope'"),
  "YaRN without its length": (
    {
      **LLAMA,
      "rope_scaling": {"type": "yarn", "original_max_position_embeddings": "long"},
    },
    "scaling 'yarn': original_max_position_embeddings is 'long'",
  ),
  "scaling without its numbers": (
    {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "scaling 'llama3': low_freq_factor is None",
  ),
  "factors of another width": (
    {
      **PHI,
      "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]},
    },
    "scaling 'longrope': short_factor does not hold 6 numbers",
  ),
  "layers not named": (
    {**tiny_families.TINY, "model_type": "smollm3", "no_rope_layers": [1, 0]},
    "no_rope_layers does not name each of the 3 layers",
  ),
  "code of a repository": (
    {**PHI, "auto_map": {"AutoModelForCausalLM": "odd.Phi3WithMore"}},
    "auto_map",
  ),
  "attention both ways": (
    {**GEMMA, "use_bidirectional_attention": True},
    "use_bidirectional_attention = True",
  ),
  "other local scaling": (
    {
      **GEMMA,
      "model_type": "gemma3_text",
      "rope_parameters": {"sliding_attention": {"rope_type": "yarn"}},
    },
    "scaling 'yarn' of layers with a window",
  ),
  "layers of a third kind": (
    {**QWEN35, "layer_types": ["linear_attention", "sliding_attention"] * 2},
    "model_type qwen3_5_text: layers of kind 'sliding_attention' are not read",
  ),
  "linear layers alone": (
    {**QWEN35, "layer_types": ["linear_attention"] * 3},
    "3 of its 3 are linear",
  ),
  "heads that do not divide": (
    {**QWEN35, "linear_num_key_heads": 3, "full_attention_interval": 2},
    "linear attention with 3 key heads, 32 value heads",
  ),
  "another gate": ({**QWEN35, "output_gate_type": "sigmoid"}, "output_gate_type"),
  "layers without experts": (
    {**QWEN35, "model_type": "qwen3_next", "mlp_only_layers": [0]},
    "mlp_only_layers = .0. is not",
  ),
  "no experts": (
    {**QWEN35, "model_type": "qwen3_next", "num_experts": 0},
    "num_experts is 0, not a positive number",
  ),
  "no shared expert": (
    {
      **QWEN35,
      "model_type": "qwen3_5_moe_text",
      "shared_expert_intermediate_size": 0,
    },
    "shared_expert_intermediate_size is 0, not a positive number",
  ),
  "an interval that is no number": (
    {**QWEN35, "full_attention_interval": 0},
    "full_attention_interval is 0, not a positive number",
  ),
  "positions stretched": (
    {
      **QWEN35,
      "full_attention_interval": 2,
      "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0},
    },
    "scaling 'yarn'",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
  fields, says = REFUSED[name]
  with pytest.raises(errors.UserError, match=says) as caught:
    decoder_config.decoder_config(fields, "m/config.json")
  assert str(caught.value).startswith("m/config.json")
  assert "\n" not in str(caught.value)


def test_global_heads_as_published_and_as_transformers_writes_them():
  """transformers moves the fields of the published configs to `per_layer_config`."""
  fields = {**GEMMA4, "attention_k_eq_v": True, "head_dim": 8}
  fields |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
  written = transformers.AutoConfig.for_model(**fields).to_dict()
  assert "global_head_dim" not in written
  ours, theirs = (
    decoder_config.decoder_config(each, "m/config.json") for each in (fields, written)
  )
  assert ours == theirs
  assert ours.global_attention is not None
  assert ours.global_attention.layers == (2,)  # the last one, whatever the period is
  # Without shared projections, transformers ignores their number of heads.
  fields["attention_k_eq_v"] = False
  config = decoder_config.decoder_config(fields, "m/config.json")
  written = transformers.AutoConfig.for_model(**fields)
  assert config.global_attention is not None
  assert config.global_attention.n_kv_heads == (
    written.per_layer_config[2].num_key_value_heads
  )


def test_a_field_with_another_name_in_config_json(monkeypatch):
  """Its value is read and checked, as transformers writes it under Llama's name."""
  theirs = transformers.LlamaConfig(
    **tiny_families.TINY, rms_norm_eps=0.02, hidden_act="gelu"
  ).to_dict()
  own_names = {"rms_norm_eps": "norm_epsilon", "hidden_act": "activation_function"}
  fields = {own_names.get(name, name): value for name, value in theirs.items()}
  family = families.FAMILIES["llama"]._replace(renamed=own_names)
  monkeypatch.setitem(families.FAMILIES, "llama", family)
  with pytest.raises(errors.UserError, match="activation_function = 'gelu' is not"):
    decoder_config.decoder_config(fields, "m/config.json")
  fields["activation_function"] = "silu"
  config = decoder_config.decoder_config(fields, "m/config.json")
  assert config.rms_eps == theirs["rms_norm_eps"] == 0.02


def test_gguf_is_read_for_families_with_names_in_it():
  readable = {name for name, family in families.FAMILIES.items() if family.in_gguf}
  assert readable == {
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite")
  }


def test_a_part_of_a_fused_tensor_is_read_alone():
  """Row 1 of k, whose rows follow the 4 rows of q: a host reads no more."""
  whole, indices = np.arange(80).reshape(8, 10), []

  def read(index):
    indices.append(index)
    return whole[index]

  leaves = {f"layers/{x}": np.zeros((1, n, 10)) for x, n in zip("kqv", (2, 4, 2))}
  names = dict.fromkeys(("layers/q", "layers/k", "layers/v"), "{}.qkv")
  (piece,) = tensor_layout.pieces(leaves, names)
  assert piece.shape == (8, 10)
  part = tensor_layout.part(tensor_layout.Stored((8, 10), read), piece, "layers/k")
  assert part.shape == (2, 10)
  got = part.read((slice(1, 2), slice(None)))
  np.testing.assert_array_equal(got, whole[5:6])
  assert indices == [(slice(5, 6, 1), slice(None))]
