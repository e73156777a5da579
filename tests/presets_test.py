"""The config.json of published models gives as many parameters as their cards state.

Nothing is allocated: our tree under `jax.eval_shape`, transformers' on torch's meta
device.
"""

import jax
import pytest
import torch
import transformers

from raft_jax import family_config, model

# In units of the stated figure; fields are those of the published config.json files,
# left out where they are the class's defaults. `stated` is, unless said otherwise, the
# model card's or the hub's figure.
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
# Only their number matters here: one for each frequency of the 96 dimensions that turn.
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
QWEN = {"hidden_act": "silu", "vocab_size": 151936, "rope_theta": 1e6}


def shape(width, inner, layers, heads, kv_heads, **fields) -> dict:
  return {
    "hidden_size": width,
    "intermediate_size": inner,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    **fields,
  }


# name -> model_type, stated parameters, the figure's unit, fields
PRESETS = {
  "HuggingFaceTB/SmolLM3-3B": (
    "smollm3",
    3_075_098_624,
    1,
    shape(2048, 11008, 36, 16, 4, vocab_size=128256, rope_theta=5e6)
    | {"no_rope_layers": [1, 1, 1, 0] * 9, "max_position_embeddings": 65536},
  ),
  "meta-llama/Llama-3.2-3B-Instruct": (
    "llama",
    3.21e9,
    1e7,
    shape(3072, 8192, 28, 24, 8, vocab_size=128256, rope_theta=5e5)
    | {"head_dim": 128, "rope_scaling": LLAMA3, "tie_word_embeddings": True}
    | {"max_position_embeddings": 131072},
  ),
  "microsoft/Phi-4-mini-instruct": (
    "phi3",
    3.8e9,
    1e8,
    shape(3072, 8192, 32, 24, 8, vocab_size=200064, partial_rotary_factor=0.75)
    | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096}
    | {"max_position_embeddings": 131072, "sliding_window": 262144}
    | {"tie_word_embeddings": True, "pad_token_id": 199999},
  ),
  "Qwen/Qwen3-4B": (
    "qwen3",
    4.0e9,
    1e8,
    shape(2560, 9728, 36, 32, 8, head_dim=128, tie_word_embeddings=True) | QWEN,
  ),
  "Qwen/Qwen3-32B": (
    "qwen3",
    32.8e9,
    1e8,
    shape(5120, 25600, 64, 64, 8, head_dim=128) | QWEN,
  ),
  "Qwen/Qwen2.5-7B-Instruct": (
    "qwen2",
    7.62e9,  # the hub's; the card cuts it to 7.61
    1e7,
    shape(3584, 18944, 28, 28, 4) | QWEN | {"vocab_size": 152064},
  ),
  "mistralai/Mistral-7B-v0.1": (
    "mistral",
    7.24e9,
    1e7,
    shape(4096, 14336, 32, 32, 8, sliding_window=4096, vocab_size=32000),
  ),
  "allenai/OLMo-2-1124-7B": (
    "olmo2",
    7.30e9,
    1e7,
    shape(4096, 11008, 32, 32, 32, vocab_size=100352, rope_theta=5e5),
  ),
  # "Gemma 2", arXiv 2408.00118, table 2: 2,024,517,888 beside the embedding.
  "google/gemma-2-2b": (
    "gemma2",
    2_024_517_888 + 256_000 * 2304,
    1,
    shape(2304, 9216, 26, 8, 4, vocab_size=256000),
  ),
  # "Gemma 3", arXiv 2503.19786, table 1: 302M and 698M.
  "google/gemma-3-1b-it": (
    "gemma3_text",
    302e6 + 698e6,
    1e6,
    shape(1152, 6912, 26, 4, 1, vocab_size=262144, sliding_window=512),
  ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
  model_type, stated, unit, fields = PRESETS[name]
  config = family_config.decoder_config({**fields, "model_type": model_type}, name)
  count = sum(leaf.size for leaf in jax.tree.leaves(model.shapes(config)))
  print(f"{name}: {count:,}")
  assert abs(count - stated) <= unit / 2
  with torch.device("meta"):
    reference = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(model_type, **fields)
    )
  assert count == sum(parameter.numel() for parameter in reference.parameters())


def test_paper_backbones_keep_their_peculiarities():
  def read(name):
    model_type, _, _, fields = PRESETS[name]
    return family_config.decoder_config({**fields, "model_type": model_type}, name)

  smollm3 = read("HuggingFaceTB/SmolLM3-3B")
  assert smollm3.layer_ropes == (0, 0, 0, 1) * 9
  (llama,) = read("meta-llama/Llama-3.2-3B-Instruct").ropes
  assert (llama.divisors[0], llama.divisors[-1]) == (1.0, 32.0)
  phi = read("microsoft/Phi-4-mini-instruct")
  assert phi.windows == ()  # 262144 positions are more than there are
  (rope,) = phi.ropes
  assert (rope.width, rope.long_after) == (96, 4096)
  assert rope.scale == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
