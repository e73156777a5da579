"""Written GGUF files against transformers, and against our own reader."""

import contextlib
import copy
import errno
import json
import pathlib
import shutil
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from tokenizers import processors

from raft_jax import errors
from raft_jax.hf import gguf_file, gguf_tokenizer, gguf_vocabulary, gguf_writer
from raft_jax.hf import load as hf_load
from raft_jax.hf import tokenizer as hf_tokenizer
from tests.helpers import tiny_llama

SIZE = 1500  # of the tokenizer
BASE = {
  "vocab_size": SIZE,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "initializer_range": 0.2,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
# transformers reads no head_dim of a Qwen3 file and takes the class's own, 128.
FAMILIES = {
  "llama": {"rope_theta": 5000.0, "tie_word_embeddings": False},
  "llama-tied": {"head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
  "qwen2": {"tie_word_embeddings": False, "rope_theta": 1e6},
  "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
}
TEXTS = (
  "Torts in Rome:\n\n  cases, don't-ask!\t(x) ",
  "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
  "naïve Ünïcode 日本語 🙂 <|endoftext|>  end",
  "def f(x):\n    return x**2\n\n\n<repo_name>",
  "",
  " ",
)


@pytest.fixture(scope="module")
def tokenizer_files(smollm, tmp_path_factory) -> pathlib.Path:
  """SmolLM2's tokenizer with its first tokens and the merges that make them."""
  folder = tmp_path_factory.mktemp("tokenizer")
  hf_tokenizer.load(smollm).save_pretrained(folder)
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  model = content["model"]
  kept = {token for token, index in model["vocab"].items() if index < SIZE}
  model["vocab"] = {t: i for t, i in model["vocab"].items() if t in kept}
  pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
  model["merges"] = [m for m in pairs if {*m, "".join(m)} <= kept]
  assert len(model["merges"]) > 1000
  path.write_text(json.dumps(content))
  return folder


def save(folder, tokenizer_files, family: str = "llama", **fields) -> pathlib.Path:
  """A tiny random model, as transformers saves it."""
  torch.manual_seed(0)
  kind = family.partition("-")[0]
  own = FAMILIES.get(family, {})
  config = transformers.AutoConfig.for_model(kind, **{**BASE, **own, **fields})
  network = transformers.AutoModelForCausalLM.from_config(config)
  for parameter in network.parameters():  # norms and biases are not all ones and zeros
    if parameter.ndim == 1:
      torch.nn.init.normal_(parameter, 1.0, 0.3)
  network.save_pretrained(folder)
  shutil.copytree(tokenizer_files, folder, dirs_exist_ok=True)
  return folder


def read_by_transformers(path: pathlib.Path) -> transformers.PreTrainedModel:
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )


def logits(network) -> np.ndarray:
  with torch.no_grad():
    return network(torch.arange(60).reshape(2, 30) * 23 % SIZE).logits.numpy()


def expected(tensor: torch.Tensor, kind: str) -> np.ndarray:
  """The tensor as the type rounds it; torch's own rounding."""
  types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
  return tensor.to(types[kind]).float().numpy() if tensor.ndim > 1 else tensor.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_every_tensor(tmp_path, tokenizer_files, family):
  folder = save(tmp_path / "model", tokenizer_files, family)
  reference = tiny_llama.theirs(folder)
  tensors = {n: p.detach() for n, p in reference.named_parameters()}
  for kind in gguf_writer.KINDS:
    path = tmp_path / f"{kind}.gguf"
    written = gguf_writer.write(folder, path, kind, name="tiny")
    again = read_by_transformers(path)
    assert written == (path.stat().st_size, len(tensors))
    assert again.config.model_type == reference.config.model_type
    named = tiny_llama.tensors_of(again)
    assert named.keys() == tensors.keys()
    for name, tensor in tensors.items():
      if kind != "q8_0":
        np.testing.assert_array_equal(named[name], expected(tensor, kind), err_msg=name)
      elif tensor.ndim > 1:
        # Half a step of the largest of 32 values, and its scale rounded to float16.
        blocks = tensor.numpy().reshape(-1, 32)
        bound = np.abs(blocks).max(axis=1, keepdims=True) * (0.5 / 127 + 2**-11)
        assert (np.abs(named[name].reshape(-1, 32) - blocks) <= bound).all(), name
    # The same weights in the original's network: the file's config says the same.
    network = copy.deepcopy(reference)
    network.load_state_dict(again.state_dict())
    np.testing.assert_allclose(logits(again), logits(network), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_our_reader_reads_what_is_written(tmp_path, tokenizer_files, family):
  folder = save(tmp_path / "model", tokenizer_files, family)
  gguf_writer.write(folder, tmp_path / "m.gguf", "f32", name="tiny")
  source = str(tmp_path / "m.gguf")
  config = hf_load.load_config(source)
  assert config == hf_load.load_config(str(folder))
  tiny_llama.assert_same(hf_load.load_params(source, config), tiny_llama.theirs(folder))


def test_llama_3_scaling_is_read_back(tmp_path, tokenizer_files):
  folder = save(
    tmp_path / "model",
    tokenizer_files,
    head_dim=64,
    rope_parameters=dict(tiny_llama.LLAMA_3_SCALING),
    max_position_embeddings=131072,
  )
  gguf_writer.write(folder, tmp_path / "m.gguf", "f16", name="tiny")
  ours = hf_load.load_config(str(folder))
  again = hf_load.load_config(str(tmp_path / "m.gguf"))
  assert max(ours.ropes[0].divisors) == 32
  np.testing.assert_allclose(again.ropes[0].divisors, ours.ropes[0].divisors, rtol=1e-6)
  assert hf_load.load_params(str(tmp_path / "m.gguf"), again).keys()


# --- The tokenizer --------------------------------------------------------------------


def cut_as(folder: pathlib.Path, pre: str) -> None:
  """Gives the folder's tokenizer another pre-tokenizer."""
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  merges = [
    m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]
  ]
  splitter = gguf_tokenizer.SPLITTERS[pre]
  made = gguf_tokenizer.byte_level_bpe(content["model"]["vocab"], merges, splitter)
  new = json.loads(made.to_str())
  path.write_text(json.dumps({**new, "added_tokens": content["added_tokens"]}))


@pytest.mark.parametrize("pre", gguf_tokenizer.SPLITTERS)
def test_token_ids_and_template(tmp_path, tokenizer_files, pre):
  folder = save(tmp_path / "model", tokenizer_files)
  cut_as(folder, pre)
  gguf_writer.write(folder, tmp_path / "m.gguf", "q8_0", name="tiny")
  original = transformers.AutoTokenizer.from_pretrained(folder)
  ours = hf_tokenizer.load(str(tmp_path / "m.gguf"))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
  question = [{"role": "user", "content": "What is a tort?"}]
  for text in (*TEXTS, "in 1999, 12,345.6 cases", "cafe\u0301"):
    assert ours(text).input_ids == original(text).input_ids, text
    # transformers cuts no digits in a "smollm" file, and never normalises.
    if text in TEXTS:
      assert theirs(text).input_ids == original(text).input_ids, text
  for read in (ours, theirs):
    assert read.chat_template == original.chat_template
    assert (read.bos_token, read.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert read.apply_chat_template(
      question, add_generation_prompt=True, return_dict=False
    ) == original.apply_chat_template(
      question, add_generation_prompt=True, return_dict=False
    )
  assert gguf_file.vocabulary(tmp_path / "m.gguf").pre == pre


@pytest.mark.parametrize(
  ("made", "pre"),
  [(transformers.GPT2Tokenizer, "gpt-2"), (transformers.Qwen2Tokenizer, "qwen2")],
)
def test_pre_tokenizers_of_transformers_own_classes(made, pre, tokenizer_files):
  model = json.loads((tokenizer_files / "tokenizer.json").read_text())["model"]
  merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in model["merges"]]
  tokenizer = made(vocab=model["vocab"], merges=[tuple(m) for m in merges])
  data = gguf_vocabulary.vocabulary(tokenizer, SIZE, (), "here")
  assert data.pre == pre
  assert data.add_bos is False


def test_bos_before_every_text(tmp_path, tokenizer_files):
  folder = save(tmp_path / "model", tokenizer_files)
  path = str(folder / "tokenizer.json")
  backend = tokenizers.Tokenizer.from_file(path)
  backend.post_processor = processors.TemplateProcessing(
    single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
  )
  backend.save(path)
  gguf_writer.write(folder, tmp_path / "m.gguf", "q8_0", name="tiny")
  original = transformers.AutoTokenizer.from_pretrained(folder)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
  assert original("a b").input_ids[0] == 1
  for read in (hf_tokenizer.load(str(tmp_path / "m.gguf")), theirs):
    assert read("a b").input_ids == original("a b").input_ids


def test_types_and_ids_of_tokens(tmp_path, tokenizer_files):
  """Rows without a token, a token without a row, and an end of turn beside EOS."""
  folder = save(tmp_path / "model", tokenizer_files, vocab_size=SIZE + 3)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  tokenizer.add_tokens(["<think>"])
  tokenizer.eos_token = "<|endoftext|>"
  tokenizer.save_pretrained(folder)
  gguf_writer.write(folder, tmp_path / "m.gguf", "f16", name="tiny")
  reader = gguf.GGUFReader(tmp_path / "m.gguf")

  def field(name: str):
    return reader.get_field(f"tokenizer.ggml.{name}").contents()

  assert field("tokens")[SIZE:] == ["<think>", f"[PAD{SIZE + 1}]", f"[PAD{SIZE + 2}]"]
  control, own = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
  types = field("token_type")
  assert types[:3] == [control] * 3
  assert types[SIZE:] == [own, gguf.TokenType.UNUSED, gguf.TokenType.UNUSED]
  assert set(types[17:SIZE]) == {gguf.TokenType.NORMAL}
  assert (field("eos_token_id"), field("eot_token_id")) == (0, 2)
  small = gguf_vocabulary.vocabulary(tokenizer, SIZE, (2,), "here")
  assert "<think>" not in {*small.tokens, *small.added}


def edit_tokenizer(change):
  def edit(folder: pathlib.Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  return edit


def cut_digits(content) -> None:
  content["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False


def like_sentencepiece(content) -> None:
  content["model"]["byte_fallback"] = True
  content["pre_tokenizer"] = {
    "type": "Metaspace",
    "replacement": "▁",
    "prepend_scheme": "always",
    "split": True,
  }


def lower(content) -> None:
  content["normalizer"] = {"type": "Lowercase"}


def strips(content) -> None:
  content["added_tokens"][3]["lstrip"] = True


def adds_eos(content) -> None:
  content["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [
      {"Sequence": {"id": "A", "type_id": 0}},
      {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {
      "<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}
    },
  }


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (cut_digits, "cuts text by Digits, ByteLevel is none of the pre-tokenizers"),
    (like_sentencepiece, "cuts text by Metaspace is none of the pre-tokenizers"),
    (lower, "is none of the pre-tokenizers that can be written to GGUF"),
    (strips, "takes up the spaces beside it"),
    (adds_eos, "adds other tokens to a text than BOS"),
  ],
)
def test_tokenizers_refused_by_name(tmp_path, tokenizer_files, change, says):
  folder = save(tmp_path / "model", tokenizer_files)
  edit_tokenizer(change)(folder)
  with pytest.raises(errors.UserError, match=says) as caught:
    gguf_writer.describe(str(folder))
  assert "delete `export.gguf`" in str(caught.value)


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("family", "fields", "says"),
  [
    ("mistral", {"sliding_window": None}, "of type 'mistral' cannot be written"),
    ("smollm3", {"pad_token_id": 2}, "of type 'smollm3' cannot be written"),
    ("olmo2", {"pad_token_id": 2}, "of type 'olmo2' cannot be written"),
    ("gemma2", {"head_dim": 16}, "of type 'gemma2' cannot be written"),
    (
      "qwen2",
      {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
      "a sliding window cannot be written",
    ),
    (
      "qwen3",
      {
        "rope_parameters": {
          "rope_type": "llama3",
          "rope_theta": 1e4,
          "factor": 8.0,
          "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32,
        }
      },
      "rope scaling of a 'qwen3' model cannot be written",
    ),
  ],
)
def test_models_refused_by_name(tmp_path, tokenizer_files, family, fields, says):
  folder = save(tmp_path / "model", tokenizer_files, family, **fields)
  (folder / "model.safetensors").unlink()  # no weights are read for this
  with pytest.raises(errors.UserError, match=says):
    gguf_writer.describe(str(folder))


@pytest.fixture
def model(tmp_path, tokenizer_files) -> pathlib.Path:
  return save(tmp_path / "model", tokenizer_files)


@pytest.mark.parametrize(
  ("kind", "value"), [("f16", 7e4), ("f16", -7e4), ("q8_0", 1e7)]
)
def test_values_beyond_the_type(model, tmp_path, kind, value):
  def change(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

  tiny_llama.edit_weights(change)(model)
  with pytest.raises(
    errors.UserError, match=r"blk\.1\.ffn_up\.weight has values beyond .*bf16 or f32"
  ):
    gguf_writer.write(model, tmp_path / "m.gguf", kind, name="tiny")
  assert {path.name for path in tmp_path.iterdir()} == {"model"}
  gguf_writer.write(model, tmp_path / "m.gguf", "bf16", name="tiny")


def test_a_full_disk_leaves_the_earlier_file(model, tmp_path, monkeypatch):
  target = tmp_path / "out" / "m.gguf"
  gguf_writer.write(model, target, "f16", name="tiny")
  before = target.read_bytes()
  write, count = gguf.GGUFWriter.write_tensor_data, []

  def full(self, tensor, *args):
    count.append(tensor)
    if len(count) == 3:
      raise OSError(errno.ENOSPC, "No space left on device")
    write(self, tensor, *args)

  with monkeypatch.context() as patch:
    patch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(errors.UserError, match=r"No space left.*make room"):
      gguf_writer.write(model, target, "f16", name="tiny")
  usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(errors.UserError, match=r"bytes and 1,000 are free"):
    gguf_writer.write(model, target, "f16", name="tiny")
  assert target.read_bytes() == before
  assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_write_left_is_removed(model, tmp_path):
  left = tmp_path / ".tmp-0123456789ab-m.gguf"
  left.write_bytes(b"GGUF")
  gguf_writer.write(model, tmp_path / "m.gguf", "q8_0", name="tiny")
  assert not left.exists()


def test_wrong_bytes_are_noticed(model, tmp_path, monkeypatch):
  write = gguf.GGUFWriter.write_tensor_data

  def flip(self, tensor, *args):
    wrong = tensor.copy()
    wrong.view(np.uint8).flat[7] ^= 1
    write(self, wrong, *args)

  monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", flip)
  with pytest.raises(errors.UserError, match="on disk differs from what was written"):
    gguf_writer.write(model, tmp_path / "m.gguf", "f16", name="tiny")
  assert not (tmp_path / "m.gguf").exists()


def as_folder(path: pathlib.Path) -> None:
  path.mkdir()


def as_link(path: pathlib.Path) -> None:
  path.symlink_to("elsewhere.gguf")


def as_another(path: pathlib.Path) -> None:
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_name("another's")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  writer.close()


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (as_folder, "exists and is not a file"),
    (as_link, "exists and is not a file"),
    (as_another, "is not an earlier export"),
    (lambda path: path.write_text("thesis"), "is not an earlier export"),
    (lambda path: path.write_bytes(b""), "is not an earlier export"),
  ],
)
def test_a_target_that_is_not_ours(tmp_path, make, says):
  make(tmp_path / "m.gguf")
  with pytest.raises(errors.UserError, match=says):
    gguf_writer.check_target(tmp_path / "m.gguf")


def test_memory_is_that_of_one_tensor(tmp_path, tokenizer_files):
  folder = save(
    tmp_path / "model",
    tokenizer_files,
    hidden_size=256,
    intermediate_size=2048,
    num_hidden_layers=8,
  )
  largest = 256 * 2048 * 4
  described = gguf_writer.describe(str(folder))
  tensors = list(gguf_writer._tensors(folder, described, gguf_writer.Type.Q8_0))
  assert (folder / "model.safetensors").stat().st_size > 20 * largest
  tracemalloc.start()
  with contextlib.closing(gguf.GGUFWriter(tmp_path / "m.gguf", "llama")) as writer:
    gguf_writer._write_tensors(writer, tensors, folder)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 6 * largest  # the encoder's own arrays among them


def test_export_of_params_is_what_is_read(tmp_path, tokenizer_files):
  """Hugging Face weights of bfloat16 are read as they are."""
  folder = save(tmp_path / "model", tokenizer_files)
  reference = tiny_llama.theirs(folder).to(torch.bfloat16)
  reference.save_pretrained(folder)
  gguf_writer.write(folder, tmp_path / "m.gguf", "bf16", name="tiny")
  source = str(tmp_path / "m.gguf")
  params = hf_load.load_params(source, hf_load.load_config(source))
  own = hf_load.load_params(str(folder), hf_load.load_config(str(folder)))
  jax.tree.map(np.testing.assert_array_equal, params, own)
  assert safetensors.numpy.load_file(folder / "model.safetensors")
