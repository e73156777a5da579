"""Each bad checkpoint's one clear line, before a tensor is read where possible."""

import json

import ml_dtypes
import numpy as np
import pytest

from raft_jax import errors
from raft_jax.hf import load as hf_load
from tests.helpers import tiny_llama


def truncate(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1000])


def to_pickle(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder):
  (folder / "config.json").unlink()


def bad_json(folder):
  (folder / "config.json").write_text('{"model_type": ')


def no_weights(folder):
  (folder / "model.safetensors").unlink()


def reshard(folder, after):
  """Cuts the folder into shards, then lets `after` harm them."""
  tiny_llama.save(folder, tied=True, max_shard_size="8KB")
  (folder / "model.safetensors").unlink()
  after(folder)


def drop_shard(folder):
  sorted(folder.glob("model-*"))[1].unlink()


def cut_shard(folder):
  path = sorted(folder.glob("model-*"))[1]
  path.write_bytes(path.read_bytes()[:-8])


def wrong_index(folder):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  first, *_ = sorted(set(index["weight_map"].values()))
  index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = first
  path.write_text(json.dumps(index))


def escaping_index(folder):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["model.norm.weight"] = "../outside.safetensors"
  path.write_text(json.dumps(index))


Q1 = "model.layers.1.self_attn.q_proj.weight"
BAD = {
  "missing": (tiny_llama.edit_weights(lambda t: t.pop(Q1)), rf"missing tensors: {Q1}"),
  "extra": (
    tiny_llama.edit_weights(lambda t: t.update(odd=np.ones(3, np.float32))),
    "unexpected tensors: odd",
  ),
  "extra layer": (
    tiny_llama.edit_config(num_hidden_layers=2),
    r"unexpected.*layers\.2.*6 more",
  ),
  "shape": (
    tiny_llama.edit_weights(lambda t: t.update({Q1: t[Q1][:-1].copy()})),
    rf"wrong shapes: {Q1} is \[31, 32\], config asks \[32, 32\]",
  ),
  "vocabulary": (
    tiny_llama.edit_config(vocab_size=97),
    r"embed_tokens.weight is \[96, 32\]",
  ),
  "head not tied": (
    tiny_llama.edit_weights(
      lambda t: t.update({"lm_head.weight": np.ones((96, 32), np.float32)})
    ),
    "lm_head.weight differs from the embedding",
  ),
  "quantised": (
    tiny_llama.edit_weights(lambda t: t.update({Q1: t[Q1].astype(np.int8)})),
    f"{Q1} is stored as I8",
  ),
  "truncated": (truncate, r"model\.safetensors: damaged or truncated"),
  "pickle": (to_pickle, r"pytorch_model\.bin: pickle weights are never opened"),
  "no config": (no_config, r"no config\.json"),
  "bad json": (bad_json, r"config\.json: not readable as JSON"),
  "no weights": (no_weights, r"no model\.safetensors"),
  "shard missing": (lambda f: reshard(f, drop_shard), r"missing shard model-00002-of-"),
  "shard cut": (lambda f: reshard(f, cut_shard), r"model-00002.*damaged or truncated"),
  "index wrong": (
    lambda f: reshard(f, wrong_index),
    r"disagree on .*layers\.2\.mlp\.up",
  ),
  "index escapes": (lambda f: reshard(f, escaping_index), "is not a file name"),
  "remote code": (
    tiny_llama.edit_config(auto_map={"AutoModel": "modeling.Odd"}),
    "auto_map.*trust_remote_code",
  ),
  "quantization": (
    tiny_llama.edit_config(quantization_config={"bits": 4}),
    "quantization_config",
  ),
  "quantization by MLX": (
    tiny_llama.edit_config(quantization={"bits": 4, "group_size": 64}),
    "config.json: quantization: quantised weights",
  ),
  "family": (
    tiny_llama.edit_config(model_type="mamba", architectures=["MambaForCausalLM"]),
    "MambaForCausalLM .*not supported; supported: LlamaForCausalLM",
  ),
  "task": (
    tiny_llama.edit_config(architectures=["LlamaForSequenceClassification"]),
    "LlamaForSequenceClassification .*not supported",
  ),
  "attention bias": (
    tiny_llama.edit_config(attention_bias=True),
    "attention_bias = True",
  ),
  "mlp bias": (tiny_llama.edit_config(mlp_bias=True), "mlp_bias = True"),
  "activation": (tiny_llama.edit_config(hidden_act="gelu"), "hidden_act = 'gelu'"),
  "rope 4": (
    tiny_llama.edit_config(rope_scaling={"type": "xpos", "factor": 2}),
    "rope scaling 'xpos'",
  ),
  "rope 5": (
    tiny_llama.edit_config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
    "rope scaling 'llama3'",
  ),
  "number": (tiny_llama.edit_config(hidden_size="32"), "hidden_size is '32'"),
  "heads": (tiny_llama.edit_config(num_key_value_heads=3), "do not fit together"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint(tmp_path, case, monkeypatch):
  harm, says = BAD[case]
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  harm(folder)
  reads = []
  monkeypatch.setattr(hf_load, "_read_block", lambda *args: reads.append(args))
  with pytest.raises(errors.UserError, match=says) as caught:
    hf_load.load_params(str(folder), hf_load.load_config(str(folder)))
  assert "\n" not in str(caught.value)
  assert str(folder) in str(caught.value)
  assert not reads


# --- Values ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value, dtype):
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  tiny_llama.edit_weights(lambda t: t[Q1].__setitem__((30, 31), value))(folder)
  with pytest.raises(errors.UserError, match=f"m: {Q1} holds NaN or inf") as caught:
    hf_load.load_params(str(folder), hf_load.load_config(str(folder)), dtype=dtype)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_values_are_finite(dtype):
  kind = hf_load.DTYPES[dtype]
  largest = ml_dtypes.finfo(kind).max
  assert hf_load._is_finite(np.array([largest, -largest, 0], kind))
  assert not hf_load._is_finite(np.array([largest, -np.inf, 0], kind))


# --- Code of a repository -------------------------------------------------------------


@pytest.mark.parametrize(
  ("auto_map", "refused"),
  [
    ({"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}, False),
    ({"AutoConfig": "modeling.OddConfig"}, False),
    ({"AutoModelForCausalLM": "modeling.OddForCausalLM"}, True),
    ({"AutoModelForCausalLM": "owner/other--modeling.OddForCausalLM"}, True),
    ({"AutoModel": "modeling.OddModel"}, True),
  ],
)
def test_code_is_passed_over_or_refused_but_never_run(tmp_path, auto_map, refused):
  """A class that bears the family's own name is the one that transformers took in."""
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  reference = tiny_llama.theirs(folder)
  tiny_llama.edit_config(auto_map=auto_map)(folder)
  (folder / "modeling.py").write_text("raise SystemExit('run')")
  if refused:
    with pytest.raises(errors.UserError, match=r"auto_map.*which is never done"):
      hf_load.load_config(str(folder))
  else:
    params = hf_load.load_params(str(folder), hf_load.load_config(str(folder)))
    tiny_llama.assert_same(params, reference)
