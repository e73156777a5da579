"""The config.json of published models gives as many parameters as their cards state.

Nothing is allocated: our tree under `jax.eval_shape`, transformers' on torch's meta
device.
"""

from typing import Any, NamedTuple

import jax
import pytest
import torch
import transformers

from raft_jax.hf import decoder_config
from raft_jax.models import transformer

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


class Preset(NamedTuple):
  """A published model.

  Attributes:
    stated: parameters, as the source gives them.
    unit: of the stated figure, in which sources round or cut.
    source: of the figure. The fields are those of config.json in the model's own
      repository on the hub, left out where they are the class's defaults.
    embedding: rows of the embedding that the figure leaves out.
  """

  model_type: str
  stated: float
  unit: float
  source: str
  fields: dict[str, Any]
  embedding: int = 0


def shape(width, inner, layers, heads, kv_heads, **fields) -> dict:
  return {
    "hidden_size": width,
    "intermediate_size": inner,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    **fields,
  }


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
  "allenai/Olmo-Hybrid-7B": Preset(
    "olmo_hybrid",
    7e9,
    1e9,
    "Olmo Hybrid, arXiv 2604.03444",
    shape(3840, 11008, 32, 30, 30, vocab_size=100352, rope_theta=None),
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
  print(f"{name}: {count:,}")
  left = count - preset.embedding * preset.fields["hidden_size"]
  assert -preset.unit / 2 <= left - preset.stated < preset.unit
  with torch.device("meta"):
    reference = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(preset.model_type, **preset.fields)
    )
  assert count == sum(parameter.numel() for parameter in reference.parameters())


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
