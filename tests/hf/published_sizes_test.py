"""The config.json of published models gives as many parameters as their cards state.

Nothing is allocated: our tree under `jax.eval_shape`, transformers' on torch's meta
device.
"""

import re
from typing import Any, NamedTuple

import jax
import pytest
import torch
import transformers

from raft_jax.hf import decoder_config
from raft_jax.models import experts, transformer

HUB = "https://huggingface.co/"
QWEN25_CARD = "https://qwenlm.github.io/blog/qwen2.5-llm/#model-card"
LLAMA32_CARD = (
  "https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/MODEL_CARD.md"
)
GEMMA2 = "Gemma 2, arXiv 2408.00118, table 2"
VOCAB_3 = 128256


def llama3(factor: float) -> dict:
  scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
  return {
    "rope_scaling": scaling
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
    "vocab_size": VOCAB_3,
  }


# Only their number matters here: one for each frequency of the 96 dimensions that turn.
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
QWEN = {"hidden_act": "silu", "vocab_size": 151936, "rope_theta": 1e6}
QWEN_BIG = {**QWEN, "vocab_size": 152064}
QWEN35_ROPE = {
  "rope_type": "default",
  "rope_theta": 1e7,
  "partial_rotary_factor": 0.25,
  "mrope_section": [11, 11, 10],
  "mrope_interleaved": True,
}
OLMO = {"vocab_size": 100352, "rope_theta": 5e5, "rms_norm_eps": 1e-6}
TIED = {"tie_word_embeddings": True}
OLMO_YARN = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836}
OLMO_YARN |= {"original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1}


class Preset(NamedTuple):
  """A published model.

  Attributes:
    stated: parameters, as the source gives them; of a model with a text tower, those
      of the whole model.
    unit: of the stated figure, in which sources round or cut.
    source: of the figure. The fields are those of config.json in the model's own
      repository on the hub, left out where they are the class's defaults.
    embedding: rows of the embedding that the figure leaves out.
    active: stated parameters that are active for a token, in a mixture of experts.
  """

  model_type: str
  stated: float
  unit: float
  source: str
  fields: dict[str, Any]
  embedding: int = 0
  active: float | None = None


def shape(width, inner, layers, heads, kv_heads, **fields) -> dict:
  return {
    "hidden_size": width,
    "intermediate_size": inner,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    **fields,
  }


def gpt_oss(stated: float, active: float, *, layers: int, experts: int) -> Preset:
  """Of the active parameters, the source leaves out the embedding."""
  rope = {"rope_type": "yarn", "factor": 32.0, "truncate": False}
  rope |= {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
  return Preset(
    "gpt_oss",
    stated,
    1e7,
    "gpt-oss-120b & gpt-oss-20b model card, arXiv 2508.10925, table 1",
    shape(2880, 2880, layers, 64, 8, head_dim=64, vocab_size=201088)
    | {"num_local_experts": experts, "num_experts_per_tok": 4, "rope_scaling": rope},
    active=active + 201088 * 2880,
  )


PRESETS = {
  "HuggingFaceTB/SmolLM3-3B": Preset(
    "smollm3",
    (4.97e9 + 1.18e9) / 2,  # two shards of bfloat16
    1e7,
    HUB + "HuggingFaceTB/SmolLM3-3B/tree/main",
    shape(2048, 11008, 36, 16, 4, vocab_size=VOCAB_3, rope_theta=5e6)
    | {"no_rope_layers": [1, 1, 1, 0] * 9, "max_position_embeddings": 65536},
  ),
  "meta-llama/Llama-3.2-1B": Preset(
    "llama",
    1.23e9,
    1e7,
    LLAMA32_CARD,
    shape(2048, 8192, 16, 32, 8, head_dim=64) | llama3(32.0) | TIED,
  ),
  "meta-llama/Llama-3.2-3B-Instruct": Preset(
    "llama",
    3.21e9,
    1e7,
    LLAMA32_CARD,
    shape(3072, 8192, 28, 24, 8, head_dim=128) | llama3(32.0) | TIED,
  ),
  "meta-llama/Llama-3.1-8B-Instruct": Preset(
    "llama",
    8_030_261_248,
    1,
    HUB + "meta-llama/Llama-3.1-8B-Instruct (safetensors metadata)",
    shape(4096, 14336, 32, 32, 8) | llama3(8.0),
  ),
  "microsoft/Phi-4-mini-instruct": Preset(
    "phi3",
    3.8e9,
    1e8,
    "Phi-4-Mini Technical Report, arXiv 2503.01743",
    shape(3072, 8192, 32, 24, 8, vocab_size=200064, partial_rotary_factor=0.75)
    | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096}
    | {"max_position_embeddings": 131072, "sliding_window": 262144}
    | {"pad_token_id": 199999, **TIED},
  ),
  "Qwen/Qwen3-4B": Preset(
    "qwen3",
    4.0e9,
    1e8,
    HUB + "Qwen/Qwen3-4B#model-overview",
    shape(2560, 9728, 36, 32, 8, head_dim=128) | QWEN | TIED,
  ),
  "Qwen/Qwen3-32B": Preset(
    "qwen3",
    32.8e9,
    1e8,
    HUB + "Qwen/Qwen3-32B#model-overview",
    shape(5120, 25600, 64, 64, 8, head_dim=128) | QWEN,
  ),
  "Qwen/Qwen2.5-1.5B": Preset(
    "qwen2",
    1.54e9,
    1e7,
    QWEN25_CARD,
    shape(1536, 8960, 28, 12, 2) | QWEN | TIED,
  ),
  "Qwen/Qwen2.5-7B-Instruct": Preset(
    "qwen2", 7.61e9, 1e7, QWEN25_CARD, shape(3584, 18944, 28, 28, 4) | QWEN_BIG
  ),
  # The card says 32.5B, of which 31.0B beside the embeddings; its own config.json and
  # weights have more.
  "Qwen/Qwen2.5-32B-Instruct": Preset(
    "qwen2",
    65_527_752_704 / 2,  # bfloat16
    1,
    HUB + "Qwen/Qwen2.5-32B-Instruct/raw/main/model.safetensors.index.json",
    shape(5120, 27648, 64, 40, 8) | QWEN_BIG,
  ),
  "mistralai/Mistral-7B-v0.1": Preset(
    "mistral",
    7_241_732_096,
    1,
    HUB + "mistralai/Mistral-7B-v0.1 (safetensors metadata)",
    shape(4096, 14336, 32, 32, 8, sliding_window=4096, vocab_size=32000),
  ),
  "allenai/OLMo-2-1124-7B": Preset(
    "olmo2",
    7e9,
    1e9,
    HUB + "allenai/OLMo-2-1124-7B",
    shape(4096, 11008, 32, 32, 32) | OLMO,
  ),
  "allenai/OLMo-2-1124-13B": Preset(
    "olmo2",
    13e9,
    1e9,
    HUB + "allenai/OLMo-2-1124-13B",
    shape(5120, 13824, 40, 40, 40) | OLMO,
  ),
  "allenai/OLMo-2-0325-32B": Preset(
    "olmo2",
    32e9,
    1e9,
    HUB + "allenai/OLMo-2-0325-32B",
    shape(5120, 27648, 64, 40, 8) | OLMO,
  ),
  "Qwen/Qwen3-30B-A3B": Preset(
    "qwen3_moe",
    30.5e9,
    1e8,
    HUB + "Qwen/Qwen3-30B-A3B#model-overview",
    shape(2048, 6144, 48, 32, 4, head_dim=128)
    | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    | QWEN,
    active=3.3e9,
  ),
  "allenai/OLMoE-1B-7B-0924": Preset(
    "olmoe",
    6.9e9,
    1e8,
    "OLMoE, arXiv 2409.02060, table 1",
    shape(2048, 1024, 16, 16, 16, num_experts=64, num_experts_per_tok=8)
    | {"vocab_size": 50304},
    active=1.3e9,
  ),
  "mistralai/Mixtral-8x7B-v0.1": Preset(
    "mixtral",
    46_702_792_704,
    1,
    HUB + "mistralai/Mixtral-8x7B-v0.1 (safetensors metadata)",
    shape(4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2)
    | {"vocab_size": 32000},
    active=12.9e9,  # arXiv 2401.04088 says 13B; 46.7B and 12.9B are the announcement's
  ),
  "openai/gpt-oss-20b": gpt_oss(20.91e9, 3.61e9, layers=24, experts=32),
  "openai/gpt-oss-120b": gpt_oss(116.83e9, 5.13e9, layers=36, experts=128),
  "allenai/Olmo-3-7B-Instruct": Preset(
    "olmo3",
    7_298_011_136,
    1,
    HUB + "allenai/Olmo-3-7B-Instruct (safetensors metadata)",
    shape(4096, 11008, 32, 32, 32, vocab_size=100278, rope_theta=5e5)
    | {"rope_scaling": OLMO_YARN, "max_position_embeddings": 65536},
  ),
  "allenai/Olmo-3-32B-Think": Preset(
    "olmo3",
    32e9,
    1e9,
    HUB + "allenai/Olmo-3-32B-Think",
    shape(5120, 27648, 64, 40, 8, vocab_size=100278, rope_theta=5e5)
    | {"rope_scaling": OLMO_YARN, "max_position_embeddings": 65536},
  ),
  "mistralai/Ministral-3-8B-Instruct-2512": Preset(
    "ministral3",
    8.4e9,  # the language model, beside 0.4B of the vision encoder
    1e8,
    HUB + "mistralai/Ministral-3-8B-Instruct-2512",
    shape(4096, 14336, 34, 32, 8, vocab_size=131072),
  ),
  "ibm-granite/granite-3.3-2b-instruct": Preset(
    "granite",
    2.5e9,
    1e8,
    HUB + "ibm-granite/granite-3.3-2b-instruct",
    shape(2048, 8192, 40, 32, 8, vocab_size=49159, rope_theta=1e7, **TIED)
    | {"embedding_multiplier": 12.0, "logits_scaling": 8.0}
    | {"residual_multiplier": 0.22, "attention_multiplier": 0.015625},
  ),
  "ibm-granite/granite-3.3-8b-instruct": Preset(
    "granite",
    8_170_864_640,
    1,
    HUB + "ibm-granite/granite-3.3-8b-instruct (safetensors metadata)",
    shape(4096, 12800, 40, 32, 8, vocab_size=49159, rope_theta=1e7, **TIED)
    | {"embedding_multiplier": 12.0, "logits_scaling": 16.0}
    | {"residual_multiplier": 0.22, "attention_multiplier": 0.0078125},
  ),
  "ByteDance-Seed/Seed-OSS-36B-Instruct": Preset(
    "seed_oss",
    36_151_104_512,
    1,
    HUB + "ByteDance-Seed/Seed-OSS-36B-Instruct (safetensors metadata)",
    shape(5120, 27648, 64, 80, 8, vocab_size=155136, rope_theta=1e7),
  ),
  "LGAI-EXAONE/EXAONE-4.0-1.2B": Preset(
    "exaone4",
    1.07e9,
    1e7,
    HUB + "LGAI-EXAONE/EXAONE-4.0-1.2B#model-configuration",
    shape(2048, 4096, 30, 32, 8, vocab_size=102400, rope_theta=1e6, **TIED)
    | {"sliding_window": None, "layer_types": ["full_attention"] * 30}
    | {"max_position_embeddings": 65536},
    embedding=102400,
  ),
  "LGAI-EXAONE/EXAONE-4.0-32B": Preset(
    "exaone4",
    30.95e9,
    1e7,
    HUB + "LGAI-EXAONE/EXAONE-4.0-32B#model-configuration",
    shape(5120, 27392, 64, 40, 8, vocab_size=102400, rope_theta=1e6)
    | {"sliding_window": 4096, "max_position_embeddings": 131072},
    embedding=2 * 102400,  # and the head
  ),
  "swiss-ai/Apertus-8B-Instruct-2509": Preset(
    "apertus",
    8e9,
    1e9,
    HUB + "swiss-ai/Apertus-8B-Instruct-2509",
    shape(4096, 21504, 32, 32, 8, vocab_size=131072),
  ),
  "arcee-ai/AFM-4.5B": Preset(
    "arcee",
    4.5e9,
    2e8,
    HUB + "arcee-ai/AFM-4.5B",
    shape(2560, 18432, 36, 20, 4, vocab_size=128004, head_dim=128),
  ),
  "THUDM/glm-4-9b-chat-hf": Preset(
    "glm",
    9_399_951_360,
    1,
    HUB + "THUDM/glm-4-9b-chat-hf (safetensors metadata)",
    shape(4096, 13696, 40, 32, 2, vocab_size=151552),
  ),
  "THUDM/GLM-4-9B-0414": Preset(
    "glm4",
    9_400_279_040,
    1,
    HUB + "THUDM/GLM-4-9B-0414 (safetensors metadata)",
    shape(4096, 13696, 40, 32, 2, vocab_size=151552)
    | {"partial_rotary_factor": 0.5, "max_position_embeddings": 32768},
  ),
  "google/gemma-2-2b": Preset(
    "gemma2",
    2_024_517_888,
    1,
    GEMMA2,
    shape(2304, 9216, 26, 8, 4, vocab_size=256000),
    embedding=256000,
  ),
  "google/gemma-2-9b": Preset(
    "gemma2",
    8_324_201_984,
    1,
    GEMMA2,
    shape(3584, 14336, 42, 16, 8, vocab_size=256000),
    embedding=256000,
  ),
  "google/gemma-2-27b": Preset(
    "gemma2",
    26_047_480_320,
    1,
    GEMMA2,
    shape(4608, 36864, 46, 32, 16, vocab_size=256000)
    | {"head_dim": 128, "query_pre_attn_scalar": 144},
    embedding=256000,
  ),
  "google/gemma-3-1b-it": Preset(
    "gemma3_text",
    302e6 + 698e6,
    1e6,
    "Gemma 3, arXiv 2503.19786, table 1",
    shape(1152, 6912, 26, 4, 1, vocab_size=262144, sliding_window=512),
  ),
  # The text model alone. Of its config we know what follows, from its model card and
  # from descriptions by others.
  "google/gemma-4-31B": Preset(
    "gemma4_text",
    30.7e9,
    1e8,
    HUB + "google/gemma-4-31B",
    shape(5376, 21504, 60, 32, 16, vocab_size=262144, head_dim=256)
    | {"global_head_dim": 512, "num_global_key_value_heads": 4}
    | {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
    | {"sliding_window": 1024, "final_logit_softcapping": 30.0}
    | {"max_position_embeddings": 262144},
  ),
  # The text model alone.
  "Qwen/Qwen3.5-27B": Preset(
    "qwen3_5_text",
    27e9,
    1e9,
    HUB + "Qwen/Qwen3.5-27B",
    shape(5120, 17408, 64, 24, 4, vocab_size=248320, linear_num_value_heads=48)
    | {"full_attention_interval": 4, "max_position_embeddings": 262144}
    | {"attn_output_gate": True, "rope_parameters": QWEN35_ROPE},
  ),
  "Qwen/Qwen3.5-35B-A3B": Preset(
    "qwen3_5_moe_text",
    35e9,
    1e9,
    HUB + "Qwen/Qwen3.5-35B-A3B",
    shape(2048, 512, 40, 16, 2, vocab_size=248320, num_experts=256)
    | {"num_experts_per_tok": 8, "moe_intermediate_size": 512}
    | {"shared_expert_intermediate_size": 512, "full_attention_interval": 4}
    | {"attn_output_gate": True, "rope_parameters": QWEN35_ROPE},
  ),
  "Qwen/Qwen3-Next-80B-A3B-Instruct": Preset(
    "qwen3_next",
    80e9,
    1e9,
    HUB + "Qwen/Qwen3-Next-80B-A3B-Instruct",
    shape(2048, 5120, 48, 16, 2, vocab_size=151936, num_experts=512)
    | {"num_experts_per_tok": 10, "moe_intermediate_size": 512}
    | {"shared_expert_intermediate_size": 512, "full_attention_interval": 4}
    | {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}},
  ),
  "allenai/Olmo-Hybrid-7B": Preset(
    "olmo_hybrid",
    7e9,
    1e9,
    "Olmo Hybrid, arXiv 2604.03444",
    shape(3840, 11008, 32, 30, 30, vocab_size=100352, rope_theta=None),
  ),
}


GEMMA3_VISION = {
  "model_type": "siglip_vision_model",
  "hidden_size": 1152,
  "image_size": 896,
  "intermediate_size": 4304,
  "num_attention_heads": 16,
  "num_hidden_layers": 27,
  "patch_size": 14,
  "vision_use_head": False,
}


def gemma3(stated: int, name: str, **text) -> Preset:
  """Gemma 3 from 4B on: a text tower beside an image encoder."""
  text = {
    "model_type": "gemma3_text",
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    **text,
  }
  fields = {"text_config": text, "vision_config": GEMMA3_VISION}
  return Preset("gemma3", stated, 1, f"{HUB}{name} (safetensors metadata)", fields)


def gemma4(stated: float, unit: float, name: str, global_every: int, **text) -> Preset:
  """Gemma 4 E2B and E4B, whose image and audio encoders are the class's defaults.

  Of their text_config we know what the tests of others quote (ollama, x/models/gemma4).
  """
  kinds = ["sliding_attention"] * (global_every - 1) + ["full_attention"]
  text = {
    "model_type": "gemma4_text",
    **{"vocab_size": 262144, "vocab_size_per_layer_input": 262144},
    **{"head_dim": 256, "global_head_dim": 512, "hidden_size_per_layer_input": 256},
    **{"attention_k_eq_v": False, "sliding_window": 512, "rms_norm_eps": 1e-6},
    **{"final_logit_softcapping": 30.0, "max_position_embeddings": 131072},
    **{"tie_word_embeddings": True, "layer_types": kinds * 7, **text},
  }
  fields = {"text_config": text, "vision_config": {}, "audio_config": {}}
  return Preset("gemma4", stated, unit, f"{HUB}{name} (with embeddings)", fields)


PRESETS |= {
  # The text model alone, of whose config we know the same.
  "google/gemma-4-26B-A4B": Preset(
    "gemma4_text",
    25.2e9,
    1e8,
    HUB + "google/gemma-4-26B-A4B",
    shape(2816, 2112, 30, 16, 8, vocab_size=262144, head_dim=256)
    | {"global_head_dim": 512, "num_global_key_value_heads": 2}
    | {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
    | {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8}
    | {"moe_intermediate_size": 704, "sliding_window": 1024},
    active=3.8e9,
  ),
  "google/gemma-4-E2B": gemma4(
    5.1e9,
    1e8,
    "google/gemma-4-E2B",
    5,
    **shape(1536, 6144, 35, 8, 1),
    num_kv_shared_layers=20,
    use_double_wide_mlp=True,
  ),
  "google/gemma-4-E4B": gemma4(
    8e9,
    1e9,
    "google/gemma-4-E4B",
    6,
    **shape(2560, 10240, 42, 8, 2),
    num_kv_shared_layers=18,
    use_double_wide_mlp=False,
  ),
  # Its text_config leaves out the heads and the vocabulary.
  "google/gemma-3-4b-it": gemma3(
    4_300_079_472,
    "google/gemma-3-4b-it",
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=34,
  ),
  "google/gemma-3-27b-it": gemma3(
    27_432_406_640,
    "google/gemma-3-27b-it",
    **shape(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
  ),
  "mistralai/Mistral-Small-3.1-24B-Instruct-2503": Preset(
    "mistral3",
    24_011_361_280,
    1,
    HUB + "mistralai/Mistral-Small-3.1-24B-Instruct-2503 (safetensors metadata)",
    {
      "tie_word_embeddings": False,
      "text_config": {
        "model_type": "mistral",
        **shape(5120, 32768, 40, 32, 8, head_dim=128, vocab_size=131072),
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
      },
      "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "image_size": 1540,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
      },
    },
  ),
}


def read(name: str) -> transformer.DecoderConfig:
  preset = PRESETS[name]
  fields = {**preset.fields, "model_type": preset.model_type}
  return decoder_config.decoder_config(fields, name)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
  preset = PRESETS[name]
  count = sum(leaf.size for leaf in jax.tree.leaves(transformer.shapes(read(name))))
  config = transformers.AutoConfig.for_model(preset.model_type, **preset.fields)
  loader = transformers.AutoModelForCausalLM
  if "text_config" in preset.fields:
    loader = transformers.AutoModelForImageTextToText
  with torch.device("meta"):
    reference = loader.from_config(config)
  beside = sum(
    parameter.numel()
    for name, parameter in reference.named_parameters()
    if re.search("vision|audio|projector", name)
  )
  print(f"{name}: {count:,} and {beside:,} beside them")
  theirs = sum(p.numel() for p in reference.parameters())
  # Gemma 4's scales of layers are no parameters there.
  scales = sum("layer_scalar" in name for name, _ in reference.named_buffers())
  assert count + beside == theirs + scales
  left = count + beside
  if preset.embedding:
    left -= preset.embedding * preset.fields["hidden_size"]
  assert -preset.unit / 2 <= left - preset.stated < preset.unit
  if preset.active is not None:
    active = experts.active_parameters(read(name), count)
    print(f"active {active:,}")
    assert abs(active - preset.active) < 0.06e9


def test_paper_backbones_keep_their_peculiarities():
  smollm3 = read("HuggingFaceTB/SmolLM3-3B")
  assert smollm3.layer_ropes == (0, 0, 0, 1) * 9
  (llama,) = read("meta-llama/Llama-3.2-3B-Instruct").ropes
  assert (llama.divisors[0], llama.divisors[-1]) == (1.0, 32.0)
  phi = read("microsoft/Phi-4-mini-instruct")
  assert phi.windows == ()  # 262144 positions are more than there are
  (rope,) = phi.ropes
  assert (rope.width, rope.long_after) == (96, 4096)
  assert rope.scale == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
