"""GGUF files against transformers and the gguf package itself."""

import json
import pathlib

import gguf
import numpy as np
import pytest
import safetensors
import torch
import transformers
from transformers import modeling_rope_utils

from raft_jax import errors
from raft_jax.hf import load as hf_load
from raft_jax.hf import model_source
from raft_jax.hf import save as hf_save
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.models import transformer
from tests.helpers import tiny_llama


@pytest.fixture(scope="module")
def reference(smollm):
  """The real model as transformers itself dequantises the GGUF file."""
  path = model_source.resolve(smollm)
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )


# --- The real GGUF --------------------------------------------------------------------


def test_gguf_config_is_transformers(smollm, reference):
  ours, c = hf_load.load_config(smollm), reference.config
  assert ours == transformer.DecoderConfig(
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
  tiny_llama.assert_same(
    hf_load.load_params(smollm, hf_load.load_config(smollm)), reference
  )


@pytest.mark.slow
def test_gguf_export_is_read_by_transformers(smollm, reference, tmp_path):
  config = hf_load.load_config(smollm)
  params = hf_load.load_params(smollm, config)
  hf_save.save(tmp_path / "out", params, config, smollm, card="# card\n")
  again = tiny_llama.theirs(tmp_path / "out")
  for name, tensor in tiny_llama.tensors_of(reference).items():
    np.testing.assert_array_equal(
      tensor, tiny_llama.tensors_of(again)[name], err_msg=name
    )
  assert again.config.rope_parameters == reference.config.rope_parameters
  assert again.config.tie_word_embeddings
  assert again.generation_config.eos_token_id == [2, 0]
  with safetensors.safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
    assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert file.metadata()["format"] == "pt"
  assert hf_load.load_config(str(tmp_path / "out")) == config
  text = "Torts in 1999:\n\n  42 cases <|im_end|>"
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  ours = hf_tokenizer.load(smollm)
  assert tokenizer(text).input_ids == ours(text).input_ids
  assert tokenizer.chat_template == ours.chat_template
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
  assert (tmp_path / "out/README.md").read_text() == "# card\n"


# --- Small files ----------------------------------------------------------------------

Kind = gguf.GGMLQuantizationType
WIDTH = 256  # of every matrix: a block of the K-quants
SHAPES = {
  "token_embd": (3, WIDTH),
  "output_norm": (WIDTH,),
  "output": (3, WIDTH),
  "blk.0.attn_norm": (WIDTH,),
  "blk.0.attn_q": (WIDTH, WIDTH),
  "blk.0.attn_k": (128, WIDTH),
  "blk.0.attn_v": (128, WIDTH),
  "blk.0.attn_output": (WIDTH, WIDTH),
  "blk.0.ffn_norm": (WIDTH,),
  "blk.0.ffn_gate": (WIDTH, WIDTH),
  "blk.0.ffn_up": (WIDTH, WIDTH),
  "blk.0.ffn_down": (WIDTH, WIDTH),
}
# Places in a block of the upper bytes of its float16 scales (ggml-common.h).
SCALES = {
  "Q2_K": (81, 83),
  "Q3_K": (109,),
  "Q4_K": (1, 3),
  "Q5_K": (1, 3),
  "Q6_K": (209,),
  "Q8_K": (3,),
}


def encoded(kind: Kind, rows: int, rng: np.random.Generator) -> np.ndarray:
  """Random rows of `WIDTH` values in a storage format."""
  if kind.name not in SCALES:
    return gguf.quantize(rng.standard_normal((rows, WIDTH), np.float32), kind)
  _, size = gguf.GGML_QUANT_SIZES[kind]
  blocks = rng.integers(0, 256, (rows, size), np.uint8)
  blocks[:, SCALES[kind.name]] &= 0xAF  # finite, of either sign and below 1/8
  return blocks


def small(path: pathlib.Path, kind: Kind, meta: dict | None = None, **extra) -> str:
  """A Llama of one layer, written by the gguf package's own writer."""
  writer = gguf.GGUFWriter(path, "llama")
  numbers = {
    "embedding_length": WIDTH,
    "block_count": 1,
    "feed_forward_length": WIDTH,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 64,
    "vocab_size": 3,
  }
  for key, value in numbers.items():
    writer.add_uint32(f"llama.{key}", value)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_token_list(["a", "b", "c"])
  for key, value in (meta or {}).items():
    add = writer.add_string if isinstance(value, str) else writer.add_uint32
    add(key, value)
  rng = np.random.default_rng(0)
  for name, (rows, *columns) in SHAPES.items():
    if columns:
      writer.add_tensor(f"{name}.weight", encoded(kind, rows, rng), raw_dtype=kind)
    else:
      writer.add_tensor(f"{name}.weight", rng.standard_normal(rows, np.float32))
  for name, array in extra.items():
    if isinstance(array, np.ndarray) and array.dtype == np.uint8:
      writer.add_tensor(name, array, raw_dtype=Kind.Q8_K)
    else:
      writer.add_tensor(name, np.asarray(array, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


@pytest.mark.parametrize(
  "kind",
  [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
  ],
)
def test_storage_formats_are_transformers_bit_for_bit(tmp_path, kind, monkeypatch):
  source = small(tmp_path / "m.gguf", Kind[kind])
  config = hf_load.load_config(source)
  assert (config.head_dim, config.rope_theta, config.tie_embeddings) == (64, 1e4, False)
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="m.gguf", dtype=torch.float32
  )
  assert reference.lm_head.weight.std() > 1e-3
  tiny_llama.assert_same(hf_load.load_params(source, config), reference)
  # In strips of 7 rows, which begin anywhere in a head.
  monkeypatch.setattr(hf_load, "STRIP_BYTES", 7 * WIDTH * 4)
  tiny_llama.assert_same(hf_load.load_params(source, config), reference)


def test_llama3_scaling_is_read_from_its_divisors(tmp_path):
  """Transformers computes them, and reads our export's four numbers back."""
  scaling = dict(tiny_llama.LLAMA_3_SCALING)
  theirs = transformers.LlamaConfig(
    head_dim=64, max_position_embeddings=131072, rope_parameters=scaling
  )
  inverse, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs)
  plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
  divisors = plain / inverse.numpy()
  assert 1 < divisors[17] < 32  # of a blended frequency
  meta = {"llama.rope.freq_base": 500000, "llama.context_length": 131072}
  source = small(tmp_path / "m.gguf", Kind.F32, meta, **{"rope_freqs.weight": divisors})
  (rope,) = hf_load.load_config(source).ropes
  np.testing.assert_allclose(rope.divisors, divisors, rtol=1e-5)
  fields = hf_load.fields(model_source.resolve(source))
  (tmp_path / "config.json").write_text(json.dumps(fields))
  again = transformers.AutoConfig.from_pretrained(tmp_path)
  assert again.rope_parameters == tiny_llama.LLAMA_3_SCALING
  assert "rope_freqs" not in str(
    hf_load.load_params(source, hf_load.load_config(source)).keys()
  )


@pytest.mark.parametrize(
  ("meta", "extra", "says"),
  [
    ({"llama.rope.scaling.type": "yarn"}, {}, "rope scaling 'yarn'"),
    ({}, {"rope_freqs.weight": [3.0] * 32}, "rope_freqs.weight is not the rope"),
    (
      {},
      {"blk.0.attn_q.bias": [0.0] * WIDTH},
      r"unexpected tensors: blk\.0\.attn_q\.bias",
    ),
    ({"llama.expert_count": 8}, {}, "mixture of experts"),
    (
      {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16},
      {},
      "partial_rotary_factor = 0.5",
    ),
  ],
)
def test_features_refused_by_name(tmp_path, meta, extra, says):
  source = small(tmp_path / "m.gguf", Kind.F32, meta, **extra)
  with pytest.raises(errors.UserError, match=says) as caught:
    hf_load.load_params(source, hf_load.load_config(source))
  assert "\n" not in str(caught.value)


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path):
  source = small(tmp_path / "m.gguf", Kind.Q8_K)
  with pytest.raises(errors.UserError, match=r"token_embd\.weight is stored as Q8_K"):
    hf_load.check_params(source, hf_load.load_config(source))


def test_rope_divisors_that_cannot_be_read_are_named(tmp_path):
  divisors = encoded(Kind.Q8_K, 1, np.random.default_rng(0))
  source = small(tmp_path / "m.gguf", Kind.F32, **{"rope_freqs.weight": divisors})
  with pytest.raises(errors.UserError, match=r"rope_freqs\.weight is stored as Q8_K"):
    hf_load.load_config(source)


def test_a_quantisation_of_the_future(tmp_path):
  path = tmp_path / "m.gguf"
  small(path, Kind.F32)
  content = bytearray(path.read_bytes())
  # After the name: the number of dimensions (4 bytes), 2 sizes (8 each), the kind.
  place = content.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
  assert content[place : place + 4] == Kind.F32.to_bytes(4, "little")
  content[place] = 199
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match=r"does not know .*199.*--upgrade gguf"):
    hf_load.load_config(str(path))


def test_values_that_are_not_finite_are_named(tmp_path):
  source = small(tmp_path / "m.gguf", Kind.F16)
  content = bytearray((tmp_path / "m.gguf").read_bytes())
  content[-2:] = b"\x00\x7c"  # infinity, in the last tensor
  (tmp_path / "m.gguf").write_bytes(content)
  with pytest.raises(errors.UserError, match=r"blk\.0\.ffn_down\.weight holds NaN or"):
    hf_load.load_params(source, hf_load.load_config(source))


def test_truncated(smollm, tmp_path):
  whole = model_source.resolve(smollm).read_bytes()
  for name, size in (("head", 1000), ("body", len(whole) - 4096)):
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(whole[:size])
    with pytest.raises(errors.UserError, match="damaged or truncated GGUF"):
      hf_load.load_config(str(path))
