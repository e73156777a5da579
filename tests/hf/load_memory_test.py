"""A real-sized checkpoint streams in: host memory stays near the parameters' own."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from raft_jax.hf import families, tensor_layout
from raft_jax.hf import load as hf_load
from raft_jax.models import transformer

# https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json
QWEN_1_5B = {
  "architectures": ["Qwen2ForCausalLM"],
  "model_type": "qwen2",
  "hidden_act": "silu",
  "hidden_size": 1536,
  "intermediate_size": 8960,
  "max_position_embeddings": 131072,
  "num_attention_heads": 12,
  "num_hidden_layers": 28,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
  "tie_word_embeddings": True,
  "vocab_size": 151936,
}


def write_random(folder: pathlib.Path) -> None:
  """A checkpoint of random bfloat16 values in shards with an index."""
  (folder / "config.json").write_text(json.dumps(QWEN_1_5B))
  config = hf_load.load_config(str(folder))
  names = tensor_layout.file_names(families.FAMILIES["qwen2"], in_gguf=False)
  leaves = traverse_util.flatten_dict(transformer.shapes(config), sep="/")
  pieces = tensor_layout.pieces(leaves, names)
  noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
  noise = noise.astype(ml_dtypes.bfloat16)
  weight_map: dict[str, str] = {}
  for path, group in itertools.groupby(pieces, lambda piece: piece.paths[0]):
    file = f"model-{path.replace('/', '-')}.safetensors"
    tensors = {piece.name: np.resize(noise, piece.shape) for piece in group}
    safetensors.numpy.save_file(tensors, folder / file)
    weight_map |= dict.fromkeys(tensors, file)
  index = {"weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.slow
def test_1_5b_parameters_load_within_8_gib(tmp_path):
  write_random(tmp_path)
  try:
    done = subprocess.run(
      [sys.executable, "-m", "tests.benchmarks.load_memory", str(tmp_path)],
      capture_output=True,
      text=True,
      check=False,
      cwd=pathlib.Path(__file__).parents[2],
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
  finally:
    for file in tmp_path.glob("*.safetensors"):
      file.unlink()
  assert done.returncode == 0, done.stderr
  measured = json.loads(done.stdout)
  print(measured)
  assert measured["parameters"] == 1_543_714_304
  embedding_gib = 151936 * 1536 * 2 / (1 << 30)
  beyond = measured["peak_gib"] - measured["before_gib"] - measured["params_gib"]
  assert beyond <= 1.2 * embedding_gib
  assert measured["peak_gib"] < 8
