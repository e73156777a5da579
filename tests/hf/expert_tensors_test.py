"""Tensors of experts in files: reading a part of them, missing ones, MXFP4."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers.integrations import mxfp4 as their_mxfp4

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.hf import decoder_config, families, mxfp4, peft_adapter, tensor_layout
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.models import transformer
from raft_jax.training import plan_checks
from tests.helpers import tiny_families

FIELDS = {
  **tiny_families.TINY,
  **{"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def saved(folder, model_type, **fields) -> transformers.PreTrainedModel:
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(model_type, **{**FIELDS, **fields})
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  model.save_pretrained(folder)
  return model


def edited(folder, edit) -> None:
  """Rewrites the weights; `edit` changes the dict of tensors in place."""
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  edit(tensors)
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def olmoe(tmp_path):
  saved(tmp_path, "olmoe", num_experts=4, num_experts_per_tok=2, intermediate_size=20)
  return tmp_path


def test_only_the_experts_of_an_index_are_read():
  """Two of four, and columns 1 and 2 of these."""
  rng, reads = np.random.default_rng(0), []
  whole = rng.normal(size=(4, 6, 5))

  def stored(expert):
    def read(index):
      reads.append((expert, index))
      return whole[expert][index]

    return tensor_layout.Stored((6, 5), read)

  leaves = {"layers/up": np.zeros((3, 4, 6, 5))}
  pieces = tensor_layout.pieces(leaves, {"layers/up": "l.{}.e.{}.up"})
  assert [piece.shape for piece in pieces] == [(4, 6, 5)] * 3
  assert [name for name, _ in pieces[1].tensors()] == [
    f"l.1.e.{i}.up" for i in range(4)
  ]
  files = {f"l.1.e.{i}.up": stored(i) for i in range(4)}
  part = tensor_layout.part(
    tensor_layout.whole(files, pieces[1]), pieces[1], "layers/up"
  )
  block = part.read((slice(1, 3), slice(None), slice(1, 3)))
  np.testing.assert_array_equal(block, whole[1:3, :, 1:3])
  assert [expert for expert, _ in reads] == [1, 2]
  assert all(index == (slice(None), slice(1, 3)) for _, index in reads)


def test_every_shard_of_experts_holds_its_part(olmoe):
  """Experts in two parts and widths in four, as a mesh places them."""
  config = hf_load.load_config(str(olmoe))
  want = hf_load.load_params(str(olmoe), config)
  stored, pieces, _ = hf_load._matched(olmoe, config)
  for piece in pieces:
    if not piece.of_experts:
      continue
    (path,) = piece.paths
    tensor = tensor_layout.whole(stored, piece)
    leaf = np.asarray(want["layers"][path.removeprefix("layers/")])[piece.layer]
    index = (slice(2, 4), slice(5, 10), slice(None))
    np.testing.assert_array_equal(tensor.read(index), leaf[index])


def test_a_missing_expert_is_named(olmoe):
  edited(olmoe, lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
  config = hf_load.load_config(str(olmoe))
  with pytest.raises(errors.UserError) as caught:
    hf_load.load_params(str(olmoe), config)
  assert "missing tensors: model.layers.1.mlp.experts.2.up_proj.weight" in str(
    caught.value
  )


def test_experts_that_the_config_does_not_count_are_named(olmoe):
  file = olmoe / "config.json"
  fields = json.loads(file.read_text())
  file.write_text(json.dumps({**fields, "num_experts": 3}))
  config = hf_load.load_config(str(olmoe))
  with pytest.raises(errors.UserError) as caught:
    hf_load.load_params(str(olmoe), config)
  assert "unexpected tensors: model.layers.0.mlp.experts.3" in str(caught.value)
  assert "do not belong together" in str(caught.value)
  assert "dense" not in str(caught.value)


def test_a_nan_in_an_expert_is_found(olmoe):
  def spoil(tensors):
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"][0, 0] = np.nan

  edited(olmoe, spoil)
  with pytest.raises(errors.UserError, match=r"layers\.1\.mlp\.experts\.\*\.down_proj"):
    hf_load.load_params(str(olmoe), hf_load.load_config(str(olmoe)))


@pytest.mark.parametrize(
  ("model_type", "fields", "message"),
  [
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of 8 experts"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0, not a positive"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0 is not"),
    ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    (
      "mixtral",
      {"quantization_config": {"quant_method": "mxfp4"}},
      "quantised weights",
    ),
  ],
)
def test_what_is_not_computed_is_refused(model_type, fields, message):
  with pytest.raises(errors.UserError, match=message):
    decoder_config.decoder_config(
      {**FIELDS, "model_type": model_type, **fields}, "m/config.json"
    )


def test_updates_of_experts_are_refused_by_name():
  family = families.FAMILIES["qwen3_moe"]
  assert peft_adapter.targets(family, ("q_proj", "o_proj")) == ("q", "o")
  with pytest.raises(errors.UserError, match="gate_proj, up_proj, down_proj of this"):
    peft_adapter.targets(family, schema.Lora().targets)
  adapter = peft_adapter.config(family, ("q", "v"), rank=4, alpha=8)
  assert adapter["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
  ("experts", "changes", "message"),
  [
    (4, {"soft_mask": schema.SoftMask()}, "soft_mask: m is a mixture of experts"),
    (0, {"train": schema.Train(router_loss=0.01)}, "router_loss: m is not a mixture"),
  ],
)
def test_sections_that_do_not_suit_the_network_are_refused(experts, changes, message):
  config = schema.Config(
    model=schema.Model(source="m"),
    data=schema.Data(questions="none"),
    output="none",
    **changes,
  )
  fields = {**FIELDS, "model_type": "olmoe" if experts else "olmo2"}
  decoder = decoder_config.decoder_config(fields, "m/config.json")
  with pytest.raises(errors.UserError, match=message):
    plan_checks.check_experts(
      config.model.source, decoder, config.train, config.soft_mask
    )


# --- MXFP4 ----------------------------------------------------------------------------


def random_mxfp4(rng, *shape) -> tuple[np.ndarray, np.ndarray]:
  """Blocks and scales of values [..., inputs]; every code and several exponents."""
  *outer, inputs = shape
  blocks = rng.integers(0, 256, (*outer, inputs // 32, 16)).astype(np.uint8)
  scales = rng.integers(118, 124, (*outer, inputs // 32)).astype(np.uint8)
  return blocks, scales


def test_mxfp4_equals_transformers():
  blocks, scales = random_mxfp4(np.random.default_rng(0), 3, 8, 96)
  theirs = their_mxfp4.convert_moe_packed_tensors(
    torch.tensor(blocks), torch.tensor(scales), dtype=torch.bfloat16
  )
  stored = {
    name: tensor_layout.Stored(x.shape, x.__getitem__, "U8")
    for name, x in (("a.w_blocks", blocks), ("a.w_scales", scales))
  }
  (tensor,) = mxfp4.decoded(stored).values()
  assert tensor.shape == tuple(theirs.shape)
  for index in (
    (slice(None),) * 3,
    (slice(1, 2), slice(20, 70), slice(3, 5)),  # inside of groups
    (slice(0, 3), slice(32, 64), slice(None)),
  ):
    np.testing.assert_array_equal(tensor.read(index), theirs.float().numpy()[index])


def test_an_mxfp4_checkpoint_loads_and_exports_unquantised(tmp_path, tokenizer_folder):
  folder, out = tmp_path / "in", tmp_path / "out"
  reference = saved(
    folder,
    "gpt_oss",
    **{"hidden_size": 64, "intermediate_size": 32, "head_dim": 16},
    **{"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 6},
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
  )
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  rng, decoded = np.random.default_rng(0), {}

  def quantise(tensors):
    for name in [name for name in tensors if name.endswith("up_proj")] + [
      name for name in tensors if name.endswith("down_proj")
    ]:
      experts, inputs, outputs = tensors.pop(name).shape
      blocks, scales = random_mxfp4(rng, experts, outputs, inputs)
      tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
      decoded[name] = their_mxfp4.convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
      )

  edited(folder, quantise)
  file = folder / "config.json"
  fields = json.loads(file.read_text())
  coding = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
  file.write_text(json.dumps({**fields, "quantization_config": coding}))
  reference.load_state_dict(decoded, strict=False)
  assert len(decoded) == 4

  config = hf_load.load_config(str(folder))
  params = hf_load.load_params(str(folder), config)
  ids = np.arange(3, 23, dtype=np.int32)[None]
  valid = np.ones(ids.shape, bool)
  hidden, _ = transformer.forward(
    params,
    config,
    ids,
    transformer.positions(jax.numpy.asarray(valid)),
    transformer.causal_mask(jax.numpy.asarray(valid)),
  )
  ours = np.asarray(hidden[0]) @ np.asarray(transformer.output_embedding(params)).T
  with torch.no_grad():
    theirs = reference(torch.tensor(ids)).logits[0].numpy()
  assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()

  hf_save.save(out, params, config, str(folder), card="")
  assert "quantization_config" not in json.loads((out / "config.json").read_text())
  again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  with torch.no_grad():
    np.testing.assert_array_equal(again(torch.tensor(ids)).logits[0], theirs)
