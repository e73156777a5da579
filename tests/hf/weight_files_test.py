"""Folders of weights in the wild: which files are read, and what is in the way."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from raft_jax import errors
from raft_jax.hf import load as hf_load
from raft_jax.hf import model_source
from tests.helpers import tiny_llama

Q0 = "model.layers.0.self_attn.q_proj"


def added(name, tensor):
  return tiny_llama.edit_weights(lambda t: t.update({name: tensor}))


def sharded(folder):
  (folder / "model.safetensors").unlink(missing_ok=True)
  tiny_llama.save(folder, tied=True, max_shard_size="8KB")


def edit_index(**changes):
  """A sharded folder whose index is changed; a value of None takes a key away."""

  def edit(folder):
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    kept = {k: v for k, v in index["weight_map"].items() if v is not None}
    path.write_text(json.dumps(index | {"weight_map": kept}))

  return edit


def both_sets(folder):
  whole = (folder / "model.safetensors").read_bytes()
  sharded(folder)
  (folder / "model.safetensors").write_bytes(whole)


def index_left_over(folder):
  both_sets(folder)
  for part in folder.glob("model-*"):
    part.unlink()


def index_of_one_file(folder):
  names = safetensors.numpy.load_file(folder / "model.safetensors")
  index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def wrong_size(folder):
  sharded(folder)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text()) | {"metadata": {"total_size": 1}}
  path.write_text(json.dumps(index))


def links(folder):
  """As the hub's cache lays a model out."""
  sharded(folder)
  (folder / "blobs").mkdir()
  for i, path in enumerate([*folder.glob("model*"), folder / "config.json"]):
    path.symlink_to(path.rename(folder / f"blobs/{i}"))


def copied(name):
  return lambda folder: shutil.copy(folder / "model.safetensors", folder / name)


def renamed(name):
  return lambda folder: (folder / "model.safetensors").rename(folder / name)


def head_alone(folder):
  """What is left of two tensors that share memory."""
  move = {"lm_head.weight": "model.embed_tokens.weight"}
  tiny_llama.edit_weights(
    lambda t: t.update({new: t.pop(old) for new, old in move.items()})
  )(folder)


def half(folder):
  path = folder / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  weights = {name: tensor.astype(np.float16) for name, tensor in weights.items()}
  safetensors.numpy.save_file(weights, path, metadata={"format": "pt"})
  tiny_llama.edit_config(torch_dtype="float16")(folder)


BUFFERS = {
  "model.rotary_emb.inv_freq": np.ones(4, np.float32),
  "model.layers.2.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
  "model.rotary_emb.original_inv_freq": np.ones(4, np.float32),
  "model.rotary_emb_local.inv_freq": np.ones(4, np.float16),
  "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 64, 8), np.float32),
  "model.embeddings.position_ids": np.arange(64)[None],
  "position_ids": np.arange(64),
  "model.layers.1.self_attn.bias": np.tri(64, dtype=bool)[None, None],
  "model.layers.1.attn.bias": np.tri(64, dtype=np.float32)[None, None],
  "model.layers.1.attn.masked_bias": np.array(-1e9, np.float32),
}

SAME = {
  **{name: added(name, tensor) for name, tensor in BUFFERS.items()},
  "shards": sharded,
  "a total size that is wrong": wrong_size,
  "an index of the one file": index_of_one_file,
  "links": links,
  "Mistral's own layout beside it": copied("consolidated.safetensors"),
  "its shards beside it": copied("consolidated-00001-of-00002.safetensors"),
  "a variant beside it": copied("model.fp16.safetensors"),
  "GGUF beside it": copied("model-q4.gguf"),
  "a tied head alone": head_alone,
  "half precision": half,
}


@pytest.mark.parametrize("case", SAME)
def test_is_read_as_transformers_reads_it(tmp_path, case):
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  SAME[case](folder)
  params = hf_load.load_params(str(folder), hf_load.load_config(str(folder)))
  tiny_llama.assert_same(params, tiny_llama.theirs(folder))


def test_a_variant_that_is_not_read_is_told_of_once(tmp_path, capsys):
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  copied("model.fp16.safetensors")(folder)
  for _ in range(2):
    hf_load.check_params(str(folder), hf_load.load_config(str(folder)))
  assert capsys.readouterr().err.count("model.fp16.safetensors is another variant") == 1


def stray(name, dtype=np.float32):
  return added(name, np.ones((4, 32), dtype))


LAST = "model-00016-of-00016.safetensors"
REFUSED = {
  "an unknown integer": (stray("odd", np.int64), r"unexpected tensors: odd \(I64\)"),
  "a bias of a layer": (
    added("model.layers.0.self_attn.bias", np.ones(32, np.float32)),
    r"unexpected tensors: model\.layers\.0\.self_attn\.bias \(F32\)",
  ),
  "GPTQ": (
    stray(f"{Q0}.qweight", np.int32),
    rf"quantised weights: {Q0}\.qweight; .* use the unquantised",
  ),
  "bitsandbytes": (stray(f"{Q0}.weight.absmax"), "quantised weights: .*absmax"),
  "MLX": (stray(f"{Q0}.scales"), "quantised weights: .*scales"),
  "an adapter inside": (
    stray(f"{Q0}.lora_A.default.weight"),
    r"LoRA adapters: .*lora_A.*merge_and_unload",
  ),
  "vision": (
    stray("vision_tower.layers.0.weight"),
    r"parts of a multimodal model: vision_tower.* a model of text alone",
  ),
  "optimizer": (
    stray(f"{Q0}.exp_avg"),
    r"optimizer state: .*exp_avg; use the model's own weights",
  ),
  "experts": (
    stray("model.layers.0.mlp.experts.0.gate_proj.weight"),
    "a mixture of experts: .*dense",
  ),
  "torch.compile": (
    tiny_llama.edit_weights(
      lambda t: [t.update({f"_orig_mod.{n}": t.pop(n)}) for n in list(t)]
    ),
    r"all names begin with '_orig_mod\.'",
  ),
  "two sets": (
    both_sets,
    r"two sets of weights, model\.safetensors and model\.safetensors\.index\.json;",
  ),
  "index left over": (
    index_left_over,
    r"two sets.* model\.safetensors and .*index\.json, whose model-00001-of-00016",
  ),
  "shards of another save": (
    lambda f: (sharded(f), shutil.copy(f / LAST, f / LAST.replace("16.s", "17.s"))),
    r"two sets.*index\.json and model-00016-of-00017\.safetensors",
  ),
  "shards beside one file": (
    copied(LAST),
    rf"two sets of weights, model\.safetensors and {LAST}",
  ),
  "shards alone": (renamed(LAST), rf"{LAST} need their model\.safetensors\.index"),
  "not in the index": (
    edit_index(**{"model.norm.weight": None}),
    rf"disagree on model\.norm\.weight: .*lists it nowhere, and {LAST} holds it",
  ),
  "elsewhere in the index": (
    edit_index(**{"model.norm.weight": "model-00001-of-00016.safetensors"}),
    rf"disagree on model\.norm\.weight: .*in model-00001-of-.*, and {LAST} holds it",
  ),
  "nowhere but the index": (
    edit_index(**{"lm_head.weight": LAST}),
    rf"disagree on lm_head\.weight: .*lists it in {LAST}, and no file holds it",
  ),
  "index without a map": (
    lambda f: (sharded(f), (f / "model.safetensors.index.json").write_text("{}")),
    "the index is empty",
  ),
  "index with a list": (
    lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["x"]}'),
    "no weight_map of tensors",
  ),
  "only Mistral's": (renamed("consolidated.safetensors"), "Mistral's own layout"),
  "only a variant": (
    renamed("model.fp16.safetensors"),
    r"rename model\.fp16\.safetensors to it",
  ),
  "another case": (renamed("Model.SafeTensors"), r"rename Model\.SafeTensors to it"),
  "another name": (renamed("weights.safetensors"), r"weights\.safetensors is another"),
  "two of GGUF": (
    lambda f: (renamed("a.gguf")(f), (f / "b.GGUF").touch()),
    r"name the GGUF file itself: .*a\.gguf or .*b\.GGUF",
  ),
  "an adapter": (renamed("adapter_model.safetensors"), "LoRA adapter; merge it into"),
  "an adapter beside": (
    lambda f: (f / "adapter_config.json").write_text("{}"),
    r"adapter_config\.json.* beside .*model\.safetensors",
  ),
  "a pointer": (
    lambda f: (f / "model.safetensors").write_text(
      "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ),
    "is a Git LFS pointer",
  ),
  "a dead link": (
    lambda f: (renamed("x")(f), (f / "model.safetensors").symlink_to("gone")),
    "is a link to gone, which is not there",
  ),
  "a folder": (
    lambda f: (renamed("x")(f), (f / "model.safetensors").mkdir()),
    "it is a folder",
  ),
  "untied, and no head": (
    tiny_llama.edit_config(tie_word_embeddings=False),
    r"missing tensors: lm_head\.weight; set tie_word_embeddings to true",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(tmp_path, case):
  harm, says = REFUSED[case]
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  harm(folder)
  with pytest.raises(errors.UserError, match=says) as caught:
    hf_load.check_params(str(folder), hf_load.load_config(str(folder)))
  assert "\n" not in str(caught.value)
  assert str(folder) in str(caught.value)


def test_a_tensor_in_two_shards(tmp_path):
  folder = tiny_llama.save(tmp_path / "m", tied=True)
  sharded(folder)
  first, last = folder / "model-00001-of-00016.safetensors", folder / LAST
  twice = safetensors.numpy.load_file(first) | safetensors.numpy.load_file(last)
  safetensors.numpy.save_file(twice, first, metadata={"format": "pt"})
  with pytest.raises(errors.UserError, match=f"{first.name} and {LAST} both hold"):
    hf_load.check_params(str(folder), hf_load.load_config(str(folder)))


def test_the_folder_of_a_gguf_file_names_it(tmp_path):
  (tmp_path / "m-Q4.GGUF").touch()
  with pytest.raises(errors.UserError, match=r"a \.gguf file \(m-Q4\.GGUF in it\)"):
    hf_load.load_config(str(tmp_path))


def test_a_gguf_file_in_capitals(tmp_path, smollm):
  (tmp_path / "SMOL.GGUF").symlink_to(model_source.resolve(smollm))
  assert hf_load.load_config(str(tmp_path / "SMOL.GGUF")) == hf_load.load_config(smollm)
