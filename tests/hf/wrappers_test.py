"""Models with a text tower: the tower is ours, and the rest of the files stays.

Oracle: transformers' classes of the whole model, on text and on text with an image.
"""

import json
import pathlib
import re
import tracemalloc
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from raft_jax import errors
from raft_jax.generation import engines
from raft_jax.hf import carried_tensors, chat, decoder_config, peft_adapter, wrappers
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.models import hybrid, lora, partition, transformer
from raft_jax.storage import records
from tests.helpers import tiny_decoder, tiny_families, tiny_wrappers

FAST = {"xla_backend_optimization_level": 0}
our_logits = jax.jit(tiny_decoder.logits, static_argnums=1, compiler_options=FAST)
TEXT_BT = np.random.default_rng(0).integers(3, 80, (2, 24)).astype(np.int32)


class Made(NamedTuple):
  """The same weights on both sides."""

  kind: str
  folder: pathlib.Path
  reference: transformers.PreTrainedModel
  config: transformer.DecoderConfig
  params: transformer.Params


# Each has the parts of another one, under the same names.
LIKE_OTHERS = ("gemma4", "gemma4_unified")
KINDS = [
  pytest.param(kind, marks=pytest.mark.slow) if kind in LIKE_OTHERS else kind
  for kind in tiny_wrappers.CONFIGS
]


@pytest.fixture(scope="module", params=KINDS)
def made(request, tokenizer_folder, tmp_path_factory) -> Made:
  kind, folder = request.param, tmp_path_factory.mktemp(request.param)
  reference = tiny_wrappers.make(kind)
  tiny_wrappers.save(folder, reference, tokenizer_folder)
  config = hf_load.load_config(str(folder))
  params = hf_load.load_params(str(folder), config)
  return Made(kind, folder, reference, config, params)


def changed(params: transformer.Params) -> transformer.Params:
  """Other parameters, as after training."""
  return jax.tree.map(lambda leaf: leaf * 1.25, params)


def export(made: Made, out: pathlib.Path, **options: Any) -> pathlib.Path:
  params = options.pop("params", made.params)
  hf_save.save(out, params, made.config, str(made.folder), card="", **options)
  return out


def fields_of(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / "config.json").read_text())


def edit(folder: pathlib.Path, **changes: Any) -> None:
  """Replaces fields of a config.json; None deletes them."""
  fields = {**fields_of(folder), **changes}
  fields = {name: value for name, value in fields.items() if value is not None}
  (folder / "config.json").write_text(json.dumps(fields))


def test_text_logits_equal_transformers(made):
  theirs = tiny_wrappers.logits(made.reference, input_ids=torch.tensor(TEXT_BT))
  ours = our_logits(made.params, made.config, TEXT_BT, jnp.ones(TEXT_BT.shape, bool))
  gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
  print(f"{made.kind}: {gap:.1e}")
  assert gap <= 2e-5
  assert np.abs(theirs).max() > 1


def test_an_image_reaches_the_logits(made):
  """Otherwise the comparisons below could not see a damaged encoder."""
  inputs = tiny_wrappers.image_inputs(made.kind)
  seen = tiny_wrappers.logits(made.reference, **inputs)
  inputs["pixel_values"] = -inputs["pixel_values"]
  other = tiny_wrappers.logits(made.reference, **inputs)
  assert np.abs(seen - other).max() > 0.05 * np.abs(seen).max()


@pytest.mark.parametrize("by_modules", [False, True])
def test_export_is_the_whole_model(made, tmp_path, by_modules):
  """Under both conventions of names, each of which the export keeps."""
  source = tmp_path / "source"
  source.mkdir()
  for file in made.folder.iterdir():
    (source / file.name).write_bytes(file.read_bytes())
  if by_modules:
    tiny_wrappers.rename(source, tiny_wrappers.as_modules)
  made = made._replace(folder=source)
  assert hf_load.load_config(str(source)) == made.config
  loaded = hf_load.load_params(str(source), made.config)
  jax.tree.map(np.testing.assert_array_equal, loaded, made.params)

  out = export(made, tmp_path / "out")
  before, after = (tiny_wrappers.stored(folder) for folder in (source, out))
  assert before.keys() == after.keys()
  assert all(tiny_wrappers.same(before[name], after[name]) for name in before)
  foreign = [name for name in before if not wrappers.is_inside(name)]
  assert any(re.search("vision_tower|visual|vision_embedder", n) for n in foreign)
  assert any(re.search("projector|merger|embed_vision", n) for n in foreign)
  hears = "audio_config" in tiny_wrappers.CONFIGS[made.kind]
  assert hears == any("audio_tower" in name for name in foreign)
  again = tiny_wrappers.load(out)
  for inputs in (
    {"input_ids": torch.tensor(TEXT_BT)},
    tiny_wrappers.image_inputs(made.kind),
  ):
    np.testing.assert_array_equal(
      tiny_wrappers.logits(again, **inputs),
      tiny_wrappers.logits(made.reference, **inputs),
    )
  assert hf_load.load_config(str(out)) == made.config
  second = hf_load.load_params(str(out), made.config)
  jax.tree.map(np.testing.assert_array_equal, second, made.params)


def test_config_and_processor_files_stay(made, tmp_path):
  out = export(made, tmp_path / "out")
  before, after = fields_of(made.folder), fields_of(out)
  assert after.pop(hf_save.MARK)
  assert after.pop("tie_word_embeddings") == made.config.tie_embeddings
  before.pop("tie_word_embeddings", None)
  assert before == after
  name = "preprocessor_config.json"
  assert (out / name).read_bytes() == (made.folder / name).read_bytes()


@pytest.mark.parametrize("made", ["gemma4-e2b"], indirect=True)
def test_projections_that_no_layer_reads_stay(made, tmp_path):
  """Published files have keys and values of layers that share another one's."""
  source = tmp_path / "source"
  source.mkdir()
  for file in made.folder.iterdir():
    (source / file.name).write_bytes(file.read_bytes())
  tensors = tiny_wrappers.stored(source)
  first = made.config.kv_sharing.first
  unread = {
    name.replace(f".{layer}.", f".{layer + first}."): torch.randn(tensor.shape)
    for layer in range(first)
    for name, tensor in tensors.items()
    if re.search(rf"language_model.*\.{layer}\.self_attn\.(k|v)_", name)
  }
  assert len(unread) == 6
  safetensors.torch.save_file(
    {**tensors, **unread}, source / "model.safetensors", metadata={"format": "pt"}
  )
  loaded = hf_load.load_params(str(source), made.config)
  jax.tree.map(np.testing.assert_array_equal, loaded, made.params)
  out = export(made._replace(folder=source), tmp_path / "out")
  after = tiny_wrappers.stored(out)
  assert after.keys() == tensors.keys() | unread.keys()
  assert all(tiny_wrappers.same(after[name], unread[name]) for name in unread)
  text = torch.tensor(TEXT_BT)
  np.testing.assert_array_equal(
    tiny_wrappers.logits(tiny_wrappers.load(out), input_ids=text),
    tiny_wrappers.logits(made.reference, input_ids=text),
  )


def test_training_changes_the_tower_alone(made, tmp_path):
  out = export(made, tmp_path / "out", params=changed(made.params))
  before, after = (tiny_wrappers.stored(folder) for folder in (made.folder, out))
  for name, tensor in before.items():
    if wrappers.is_inside(name):
      torch.testing.assert_close(after[name], tensor * 1.25, rtol=1e-6, atol=0)
    else:
      assert tiny_wrappers.same(after[name], tensor)
  theirs = tiny_wrappers.logits(
    tiny_wrappers.load(out), input_ids=torch.tensor(TEXT_BT)
  )
  mask = jnp.ones(TEXT_BT.shape, bool)
  ours = our_logits(changed(made.params), made.config, TEXT_BT, mask)
  assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


def test_carried_tensors_keep_their_type_in_an_export_of_another(
  made, tmp_path, tokenizer_folder
):
  """A bfloat16 source in several files; one tensor outside the tower is of integers."""
  network = tiny_wrappers.make(made.kind).to(torch.bfloat16)
  source = tmp_path / "source"
  tiny_wrappers.save(source, network, tokenizer_folder, max_shard_size="20KB")
  index = json.loads((source / "model.safetensors.index.json").read_text())
  positions = {"vision_tower.positions": torch.arange(7)}
  safetensors.torch.save_file(positions, source / "model-extra.safetensors")
  index["weight_map"]["vision_tower.positions"] = "model-extra.safetensors"
  (source / "model.safetensors.index.json").write_text(json.dumps(index))
  assert len(set(index["weight_map"].values())) > 3

  made = made._replace(folder=source)
  params = hf_load.load_params(str(source), made.config)
  before = tiny_wrappers.stored(source)
  for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
    out = export(
      made, tmp_path / dtype, params=params, dtype=dtype, max_shard_bytes=20000
    )
    after = tiny_wrappers.stored(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
      if wrappers.is_inside(name):
        assert after[name].dtype == kind
        torch.testing.assert_close(after[name].float(), tensor.float(), rtol=0, atol=0)
      else:
        assert tiny_wrappers.same(after[name], tensor)
    fields = fields_of(out)
    types = {fields["dtype"], fields["text_config"].get("dtype", dtype)}
    assert types == {dtype}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = [tensor.nbytes for tensor in after.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    files = list(out.glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 20000 + max(sizes) + 9000


def test_copying_holds_a_chunk_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(carried_tensors, "CHUNK", 1 << 16)
  tensors = {"model.vision": torch.randn(1 << 20), "lm_head.weight": torch.ones(2, 2)}
  safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
  (carried,) = carried_tensors.find(tmp_path, wrappers.outside(tensors))
  tracemalloc.start()
  carried_tensors.copy(tmp_path / "out.safetensors", [carried], {"format": "pt"})
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1 << 20 < carried.size
  copied = safetensors.torch.load_file(tmp_path / "out.safetensors")
  assert copied.keys() == {"model.vision"}
  assert tiny_wrappers.same(copied["model.vision"], tensors["model.vision"])


def test_copying_notices_wrong_bytes(tmp_path, monkeypatch):
  safetensors.torch.save_file({"x": torch.ones(9)}, tmp_path / "model.safetensors")
  read = carried_tensors._chunks

  def flip(path, start, size):
    for chunk in read(path, start, size):
      yield chunk[:-1] + b"!" if path.name == "out" else chunk

  monkeypatch.setattr(carried_tensors, "_chunks", flip)
  with pytest.raises(OSError, match="x on disk differs from what was written"):
    carried_tensors.copy(tmp_path / "out", carried_tensors.find(tmp_path, {"x"}), {})


# --- The head -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "tied", "says"),
  [
    ("gemma3", True, False),
    ("gemma3", False, True),
    ("mistral3", True, False),
    ("mistral3", False, False),
  ],
)
def test_head_is_the_embedding_where_transformers_ties_them(
  kind, tied, says, tmp_path, tokenizer_folder
):
  """A config that does not say so is completed from the files."""
  source, network = (
    tmp_path / "source",
    tiny_wrappers.make(kind, tie_word_embeddings=tied),
  )
  tiny_wrappers.save(source, network, tokenizer_folder)
  edit(source, tie_word_embeddings=tied if says else None)
  heads = [name for name in tiny_wrappers.stored(source) if "lm_head" in name]
  assert len(heads) == (not tied)
  config = hf_load.load_config(str(source))
  assert config.tie_embeddings == tied
  params = hf_load.load_params(str(source), config)
  assert ("head" in params) == (not tied)
  hf_save.save(tmp_path / "out", params, config, str(source), card="")
  text = torch.tensor(TEXT_BT)
  np.testing.assert_array_equal(
    tiny_wrappers.logits(tiny_wrappers.load(tmp_path / "out"), input_ids=text),
    tiny_wrappers.logits(network, input_ids=text),
  )
  # vLLM reads it there.
  fields = fields_of(tmp_path / "out")["text_config"]
  default = {"gemma3": True, "mistral3": False}[kind]
  assert fields.get("tie_word_embeddings", default) == tied


# --- What is refused ------------------------------------------------------------------


REFUSED = {
  "a stray tensor in the tower": (
    lambda tensors: tensors.update({"language_model.model.odd": torch.ones(2)}),
    r"unexpected tensors: language_model\.model\.odd",
  ),
  "a stray head": (
    lambda tensors: tensors.update({"lm_head.weight": torch.ones(90, 48)}),
    r"unexpected tensors: lm_head\.weight",
  ),
  "two towers": (
    lambda tensors: tensors.update(
      {"model.language_model.norm.weight": torch.ones(48)}
    ),
    "missing tensors|unexpected tensors",
  ),
  "a missing tensor": (
    lambda tensors: tensors.pop("language_model.model.norm.weight"),
    r"missing tensors: language_model\.model\.norm\.weight",
  ),
  "a NaN": (
    lambda tensors: tensors["language_model.model.norm.weight"].fill_(torch.nan),
    r"language_model\.model\.norm\.weight holds NaN",
  ),
}


@pytest.mark.parametrize("made", ["gemma3"], indirect=True)
@pytest.mark.parametrize("name", REFUSED)
def test_the_tower_is_read_strictly(name, made, tmp_path):
  change, says = REFUSED[name]
  for file in made.folder.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  tensors = tiny_wrappers.stored(tmp_path)
  change(tensors)
  safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(errors.UserError, match=says):
    hf_load.load_params(str(tmp_path), made.config)


WRAPPED = {
  "model_type": "mistral3",
  "architectures": ["Mistral3ForConditionalGeneration"],
}
REFUSED_CONFIGS = {
  "a tower with experts and embeddings of each layer": (
    {
      "model_type": "gemma4",
      "architectures": ["Gemma4ForConditionalGeneration"],
      "text_config": {"enable_moe_block": True},
    },
    "hidden_size_per_layer_input = 256 is not supported",
  ),
  "tower": (
    {"text_config": {"model_type": "rwkv"}},
    "text_config of model_type 'rwkv'",
  ),
  "quantised tower": (
    {"text_config": {"quantization_config": {"bits": 4}}},
    "quantization_config: quantised weights",
  ),
  "feature of the tower": (
    {"text_config": {"hidden_act": "gelu"}},
    "hidden_act = 'gelu' is not supported",
  ),
  "another class": (
    {"text_config": {}, "architectures": ["Mistral3Model"]},
    "architecture Mistral3Model .*supported: .*Mistral3ForConditionalGeneration",
  ),
  "a width": (
    {"text_config": {**tiny_families.TINY, "hidden_size": "x"}},
    "hidden_size is 'x', not a positive number",
  ),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_config_is_refused_by_name(name):
  changes, says = REFUSED_CONFIGS[name]
  with pytest.raises(errors.UserError, match=says) as caught:
    decoder_config.decoder_config({**WRAPPED, **changes}, "m/config.json")
  assert str(caught.value).startswith("m/config.json")
  assert "\n" not in str(caught.value)


# --- Adapters, identity and words -----------------------------------------------------


@pytest.mark.parametrize(
  "made",
  ["gemma3", "mistral3"]
  + [pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3_5", "gemma4")]
  + ["gemma4-e2b"],
  indirect=True,
)
def test_peft_lays_an_adapter_over_the_whole_model(made, tmp_path):
  names = ("q_proj", "v_proj", "up_proj")  # two of which the encoders have, too
  if made.config.per_layer_inputs:
    names += ("per_layer_input_gate", "per_layer_projection")
  source = str(made.folder)
  family = hf_load.family(source)
  kernels = peft_adapter.targets(family, names)
  split = lora.split(made.config, kernels, rank=4, alpha=6.0, key=jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 99))
  adapters = jax.tree.map(
    lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape), split.shapes
  )
  hf_save.save_adapter(
    tmp_path / "adapter",
    adapters["lora"],
    made.config,
    source,
    rank=4,
    alpha=6.0,
    base_name=None,
    card="",
  )
  network = tiny_wrappers.load(made.folder)
  text = torch.tensor(TEXT_BT)
  before = tiny_wrappers.logits(network, input_ids=text)
  with warnings.catch_warnings():  # PEFT warns of tensors that are missing
    warnings.simplefilter("error", UserWarning)
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
  theirs = tiny_wrappers.logits(adapted, input_ids=text)
  params = partition.combine(split.freeze(made.params), adapters)
  ours = our_logits(params, made.config, TEXT_BT, jnp.ones(TEXT_BT.shape, bool))
  scale = np.abs(theirs).max()
  assert np.abs(ours - theirs).max() <= 2e-5 * scale
  assert np.abs(theirs - before).max() > 0.05 * scale
  # The encoder's projections of the same names have no adapter.
  adapted_modules = {
    name.split(".lora_A")[0]
    for name, _ in adapted.named_modules()
    if name.endswith("lora_A.default")
  }
  counts = [len(hybrid.layers_of(made.config, kernel)) for kernel in adapters["lora"]]
  assert len(adapted_modules) == sum(counts)
  assert all("language_model.layers" in name for name in adapted_modules)


def test_identity_covers_what_is_carried_through(made, tmp_path):
  for file in made.folder.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())

  def identity() -> str:
    engines.identity.cache_clear()
    return engines.identity(str(tmp_path))

  first = identity()
  tensors = tiny_wrappers.stored(tmp_path)
  name = next(name for name in tensors if not wrappers.is_inside(name))
  tensors[name] += 1
  safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
  second = identity()
  (tmp_path / "preprocessor_config.json").write_text("{}")
  assert len({first, second, identity()}) == 3


def test_description_counts_as_transformers_does(made):
  tower = transformer.parameter_count(made.config)
  said = carried_tensors.describe(str(made.folder), tower)
  numbers = re.findall(r"[\d,]+(?= (?:parameters|others))", said)
  counts = [int(number.replace(",", "")) for number in numbers]
  assert len(counts) == 2
  saved = made.reference.state_dict(keep_vars=True).values()
  assert sum(counts) == sum({id(x): x.numel() for x in saved}.values())
  assert said.startswith(f"text tower of {type(made.reference).__name__}: {tower:,} ")


def test_a_text_model_has_no_description(complete):
  assert carried_tensors.describe(str(complete), 1) is None


# --- The chat template ----------------------------------------------------------------

CHAT = [
  ("system", "Answer in one word."),
  ("user", "What is a tort?  It has 2 kinds:\n<image_soft_token> no more."),
  ("assistant", "A wrong."),
  ("user", "Naïve? <|im_end|>"),
]


def templated(tokenizer: Any, turns: int) -> list[int]:
  messages = [{"role": role, "content": text} for role, text in CHAT[:turns]]
  return tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_dict=False
  )


def ours_templated(folder: pathlib.Path, turns: int) -> list[int]:
  messages = [records.Message(role, text) for role, text in CHAT[:turns]]
  return chat.prompt_ids(chat.load(str(folder)), messages)


def test_a_chat_has_transformers_ids(made, tmp_path):
  """From the folder of the whole model, and from its export."""
  theirs = templated(transformers.AutoTokenizer.from_pretrained(made.folder), 3)
  assert len(theirs) > 40
  for folder in (made.folder, export(made, tmp_path / "out")):
    assert ours_templated(folder, 3) == theirs


def test_a_chat_has_the_ids_of_a_whole_processor(smollm, tmp_path):
  """Its template is the tokenizer's; the spelling of an image's token stays text."""
  hf_tokenizer.load(smollm).save_pretrained(tmp_path / "tokenizer")
  source = tiny_wrappers.save_gemma3(tmp_path / "source", tmp_path / "tokenizer")
  tokenizer = transformers.AutoTokenizer.from_pretrained(source)
  processor = transformers.AutoProcessor.from_pretrained(source)
  (of_processor,) = templated(processor, 1)  # it makes batches
  assert ours_templated(source, 1) == templated(tokenizer, 1) == of_processor
  image = tokenizer.convert_tokens_to_ids("<image_soft_token>")
  assert image in templated(tokenizer, 2)
  ours = ours_templated(source, 4)
  assert image not in ours
  assert tokenizer.decode(ours) == tokenizer.decode(templated(tokenizer, 4))
