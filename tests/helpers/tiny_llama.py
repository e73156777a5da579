"""A tiny random Llama as transformers saves it, and ways to change its folder."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

from raft_jax.models import transformer

TINY = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LLAMA_3_SCALING = {
  "rope_type": "llama3",
  "rope_theta": 5e5,
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
"""Of `rope_parameters`, as Llama 3.2 has it."""


def save(
  folder: pathlib.Path, *, tied: bool, max_shard_size: str = "5GB", **fields: Any
) -> pathlib.Path:
  """A random Llama of a few thousand parameters, written by transformers."""
  torch.manual_seed(0)
  fields = {**TINY, "rope_theta": 5000.0, **fields}
  config = transformers.LlamaConfig(**fields, tie_word_embeddings=tied)
  network = transformers.LlamaForCausalLM(config)
  network.save_pretrained(folder, max_shard_size=max_shard_size)
  return folder


def theirs(folder: pathlib.Path) -> transformers.PreTrainedModel:
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors_of(reference: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
  """Named tensors; a tied head is listed once by named_parameters."""
  return {name: p.detach().numpy() for name, p in reference.named_parameters()}


def assert_same(
  params: transformer.Params, reference: transformers.PreTrainedModel
) -> None:
  """Every parameter, layer by layer, bit for bit; written without the name table."""
  state = tensors_of(reference)

  def take(name: str) -> np.ndarray:
    return state.pop(name)

  np.testing.assert_array_equal(params["embed"], take("model.embed_tokens.weight"))
  np.testing.assert_array_equal(params["final_norm"], take("model.norm.weight"))
  if "head" in params:
    np.testing.assert_array_equal(params["head"], take("lm_head.weight"))
  places = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
  }
  for ours, place in places.items():
    for i, layer in enumerate(np.asarray(params["layers"][ours])):
      np.testing.assert_array_equal(layer, take(f"model.layers.{i}.{place}.weight"))
  assert not state


def cut_tokenizer(folder: pathlib.Path, size: int) -> None:
  """Leaves a byte-level BPE tokenizer its first `size` tokens, and no merges."""
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  vocabulary = content["model"]["vocab"]
  content["model"]["vocab"] = {t: i for t, i in vocabulary.items() if i < size}
  content["model"]["merges"] = []
  path.write_text(json.dumps(content))


Edit = Callable[[pathlib.Path], None]


def edit_config(**changes: Any) -> Edit:
  def edit(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))

  return edit


def edit_weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Edit:
  def edit(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})

  return edit
