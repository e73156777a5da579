"""GGUF files of every family that is read, written by the `gguf` package.

The names of tensors are the package's, and the two changes to their values those of
llama.cpp's convert_hf_to_gguf.py. Oracle: the network that was written, and
transformers' own reader where it knows the architecture.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers

from raft_jax import errors
from raft_jax.hf import load as hf_load
from tests.helpers import tiny_decoder, tiny_families

TINY = {
  **tiny_families.TINY,
  "num_hidden_layers": 2,
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.2,
  "pad_token_id": 0,
}
SCALES = {
  "embedding_multiplier": 3.0,
  "residual_multiplier": 0.3,
  "attention_multiplier": 0.1,
  "logits_scaling": 0.7,
}
GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 8}
KEYS = {
  "rope.freq_base": 1e4,
  "attention.layer_norm_rms_epsilon": 1e-6,
}


class Case(NamedTuple):
  """A model: its config beside `TINY`, its metadata beside `KEYS`, what reads it.

  Attributes:
    in_transformers: whether transformers' reader knows the architecture and reads all
      that the file says.
  """

  architecture: str
  fields: Mapping[str, Any] = {}
  meta: Mapping[str, Any] = {}
  in_transformers: bool = True


CASES = {
  "llama": Case("llama", meta={"rope.dimension_count": 12}),
  "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
  "qwen3": Case("qwen3", {"head_dim": 128}, {"attention.key_length": 128}),
  "gemma2": Case(
    "gemma2",
    {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    {
      "attention.key_length": 256,
      "attention.sliding_window": 8,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
  ),
  "gemma3_text": Case(
    "gemma3",
    {**GEMMA, "num_hidden_layers": 6},
    {
      "attention.key_length": 256,
      "attention.sliding_window": 8,
      "rope.freq_base": 1e6,
    },
  ),
  "gemma3 from 4B on": Case(
    "gemma3",
    {
      **GEMMA,
      "model_type": "gemma3_text",
      "num_hidden_layers": 6,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    },
    {
      "attention.key_length": 256,
      "attention.sliding_window": 8,
      "rope.freq_base": 1e6,
      "rope.scaling.type": "linear",
      "rope.scaling.factor": 8.0,
    },
    in_transformers=False,
  ),
  "phi3": Case("phi3", {}, {"rope.dimension_count": 12}),
  "phi-4-mini": Case(
    "phi3",
    {
      "model_type": "phi3",
      "sliding_window": 9,
      "original_max_position_embeddings": 20,
      "tie_word_embeddings": True,
      "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [1.5, 3.0, 9.0],
      },
    },
    {
      "rope.dimension_count": 6,
      "attention.sliding_window": 9,
      "rope.scaling.original_context_length": 20,
    },
    in_transformers=False,
  ),
  "olmo2": Case("olmo2", in_transformers=False),
  "granite": Case(
    "granite",
    SCALES,
    {
      "embedding_scale": 3.0,
      "residual_scale": 0.3,
      "attention.scale": 0.1,
      "logit_scale": 0.7,
    },
    in_transformers=False,
  ),
}
PERMUTED = ("llama", "granite")
FAST = {"xla_backend_optimization_level": 0}
logits = jax.jit(tiny_decoder.logits, static_argnums=1, compiler_options=FAST)


def permuted(kernel: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's `LlamaModel.permute`."""
  halves = kernel.reshape(heads, 2, -1, kernel.shape[1])
  return halves.swapaxes(1, 2).reshape(kernel.shape)


def write(
  path: pathlib.Path, case: Case, network: transformers.PreTrainedModel
) -> None:
  config, name = network.config, case.architecture
  (arch,) = (a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
  names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
  writer = gguf.GGUFWriter(path, name)
  sizes = {
    "embedding_length": config.hidden_size,
    "block_count": config.num_hidden_layers,
    "feed_forward_length": config.intermediate_size,
    "attention.head_count": config.num_attention_heads,
    "attention.head_count_kv": config.num_key_value_heads,
    "context_length": config.max_position_embeddings,
    "vocab_size": config.vocab_size,
  }
  for key, value in {**sizes, **KEYS, **case.meta}.items():
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](f"{name}.{key}", value)
  writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
  writer.add_pad_token_id(TINY["pad_token_id"])
  for length in ("long", "short"):
    factors = config.rope_parameters.get(f"{length}_factor")
    if factors:
      writer.add_tensor(f"rope_factors_{length}.weight", np.float32(factors))
  for full, tensor in network.named_parameters():
    stem, suffix = full.rsplit(".", 1)
    value = tensor.detach().numpy()
    if name.startswith("gemma") and "norm" in stem:
      value = value + 1
    if name in PERMUTED and stem.endswith(("q_proj", "k_proj")):
      is_q = stem.endswith("q_proj")
      heads = config.num_attention_heads if is_q else config.num_key_value_heads
      value = permuted(value, heads)
    writer.add_tensor(f"{names.get_name(stem)}.{suffix}", value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_file_are_those_of_its_network(tmp_path, name):
  case = CASES[name]
  fields = {**TINY, "model_type": name, **case.fields}
  torch.manual_seed(0)
  network = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(**fields), attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    for of, parameter in network.named_parameters():
      if "norm" in of:
        parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
      if of.endswith("bias"):
        parameter.normal_()
  write(tmp_path / "m.gguf", case, network)
  source = str(tmp_path / "m.gguf")
  config = hf_load.load_config(source)
  params = hf_load.load_params(source, config)
  ids_BT = np.random.default_rng(0).integers(3, TINY["vocab_size"], (2, 30))
  ours = np.asarray(logits(params, config, ids_BT, np.ones(ids_BT.shape, bool)))
  cap = config.logit_softcap
  ours = cap * np.tanh(ours / cap) if cap else ours
  others = [network, as_config_json(tmp_path / "m.gguf", network)]
  if case.in_transformers:
    others.append(
      transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="m.gguf",
        dtype=torch.float32,
        attn_implementation="eager",
      ).eval()
    )
  for other in others:
    with torch.no_grad():
      theirs = other(torch.tensor(ids_BT)).logits.numpy()
    gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{name}: {gap:.1e}")
    assert gap <= 2e-5


def as_config_json(
  path: pathlib.Path, network: transformers.PreTrainedModel
) -> transformers.PreTrainedModel:
  """The network as transformers makes it of the config that an export gets."""
  again = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(**hf_load.fields(path)),
    attn_implementation="eager",
  ).eval()
  again.load_state_dict(network.state_dict())
  return again


def test_the_scores_of_gemma_27b_are_scaled_by_the_models_width(tmp_path):
  """Its file does not say so; llama.cpp knows it by its layers."""
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma2")
  sizes = {"embedding_length": 4608, "block_count": 46, "feed_forward_length": 36864}
  heads = {"attention.head_count": 32, "attention.head_count_kv": 16}
  for key, value in {**sizes, **heads, "attention.key_length": 128}.items():
    writer.add_uint32(f"gemma2.{key}", value)
  writer.add_token_list(["a", "b", "c"])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  config = hf_load.load_config(str(tmp_path / "m.gguf"))
  assert config.query_scale == pytest.approx(144**-0.5)


def test_windows_of_olmo_3_are_refused(tmp_path):
  case = Case("olmo2", meta={"attention.sliding_window": 9})
  fields = {**TINY, "model_type": "olmo2"}
  network = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(**fields)
  )
  write(tmp_path / "m.gguf", case, network)
  with pytest.raises(errors.UserError, match="sliding_window = 9 is not supported"):
    hf_load.load_config(str(tmp_path / "m.gguf"))
