"""LoRA: adapters against the full gradient, PEFT, and the base model itself."""

import dataclasses
import functools
import pathlib
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from raft_jax import balance, errors, export, train
from raft_jax.config import schema
from raft_jax.distillation import objective, sequences, step
from raft_jax.hf import load as hf_load
from raft_jax.hf import peft_adapter
from raft_jax.hf import save as hf_save
from raft_jax.models import lora, partition
from raft_jax.training import (
  checkpoint,
  initial_state,
  optim,
  run_identity,
  run_inputs,
  run_plan,
  step_memory,
  trained_model,
)
from tests.helpers import short_run, tiny_decoder, tiny_run, tiny_step

# No two widths are alike, so that a shape names a kernel.
CONFIG = dataclasses.replace(tiny_decoder.CONFIG, d_model=40, n_heads=6, d_ff=56)
SETTINGS = tiny_step.SETTINGS._replace(decoder=CONFIG)
RANK, ALPHA = 3, 6.0


def split_of(kernels=lora.KERNELS):
  return lora.split(CONFIG, kernels, rank=RANK, alpha=ALPHA, key=jax.random.key(2))


def random_adapters(like, seed=0):
  """Both halves random: the zero at the start would hide mistakes in A."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.array(0.1 * rng.normal(size=x.shape), "f4"), like)


@functools.cache
def setting():
  """Base parameters, and a batch with a rollout and a teacher's view of it."""
  base = tiny_decoder.random_params(CONFIG)
  batch = tiny_step.make_batch()
  rng = np.random.default_rng(1)
  trajectory = sequences.Trajectory(
    jnp.array(rng.integers(6, 97, (4, 5)), jnp.int32), jnp.array([5, 3, 0, 4])
  )
  support = objective.score_teacher(
    base, batch.teacher_BC, batch.teacher_length_B, trajectory, settings=SETTINGS
  )
  return base, batch, trajectory, support


def start(split, base):
  balancer = balance.balance_by_ema()
  optimizer = optim.chain(
    balancer, optax.constant_schedule(1e-2), weight_decay=0.01, clip=1.0
  )
  params = split.start(base)
  state = step.TrainState(jnp.int32(0), params, optimizer.init(params))
  update = functools.partial(step.update, optimizer=optimizer, balancer=balancer)
  return state, jax.jit(update, static_argnames=("settings", "gradient_stats"))


def all_logits(params):
  tokens_BT = jnp.array(np.random.default_rng(3).integers(0, 97, (2, 9)))
  valid_BT = jnp.ones((2, 9), bool)
  return jax.jit(tiny_decoder.logits, static_argnums=1)(
    params, CONFIG, tokens_BT, valid_BT
  )


def test_at_its_start_the_model_is_the_base_bit_for_bit():
  base, *_ = setting()
  split = split_of()
  params = partition.combine(split.freeze(base), split.start(base))
  for name in lora.KERNELS:
    assert np.abs(params["lora"][name]["a"]).max() > 0
  np.testing.assert_array_equal(all_logits(params), all_logits(base))
  jax.tree.map(np.testing.assert_array_equal, lora.merge(params), base)


def test_merged_is_unmerged_and_its_kernels_are_the_equation():
  base, *_ = setting()
  split = split_of(("q", "down"))
  adapters = random_adapters(split.shapes)
  params = partition.combine(split.freeze(base), adapters)
  merged = lora.merge(params)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  np.testing.assert_allclose(all_logits(merged), all_logits(params), atol=2e-5)
  assert np.abs(all_logits(merged) - all_logits(base)).max() > 0.1
  for name, before in base["layers"].items():
    expected = np.array(before, np.float64)
    if name in ("q", "down"):
      a, b = (np.array(adapters["lora"][name][half], np.float64) for half in "ab")
      expected += ALPHA / RANK * b @ a
    np.testing.assert_allclose(merged["layers"][name], expected, atol=1e-6)


def test_the_gradient_is_that_of_the_merged_kernels_by_the_chain_rule():
  """dB = s dW Aᵀ and dA = s Bᵀ dW, with dW of full fine-tuning at the same weights."""
  base, batch, trajectory, support = setting()
  split = split_of()
  adapters = random_adapters(split.shapes)
  frozen = split.freeze(base)
  weights = objective.mean_weights(batch, trajectory, SETTINGS)

  def total(params):
    terms, _ = objective.loss_terms(
      params, batch, trajectory, support, weights, settings=SETTINGS
    )
    return terms["sft"] + terms["kd"]

  ours = jax.jit(jax.grad(lambda p: total(partition.combine(frozen, p))))(adapters)
  full = jax.jit(jax.grad(total))(lora.merge(partition.combine(frozen, adapters)))
  expected = {
    name: {
      "a": ALPHA / RANK * jnp.swapaxes(half["b"], 1, 2) @ full["layers"][name],
      "b": ALPHA / RANK * full["layers"][name] @ jnp.swapaxes(half["a"], 1, 2),
    }
    for name, half in adapters["lora"].items()
  }
  tiny_step.assert_trees_close(ours, {"lora": expected}, 1e-4)


def test_only_adapters_are_trained_decayed_and_kept_in_the_state():
  base, *parts = setting()
  split = split_of()
  frozen = split.freeze(base)
  state, update = start(split, base)
  # Adam's two moments, and the adapters themselves: nothing of the base's size.
  size = sum(leaf.size for leaf in jax.tree.leaves(split.shapes))
  moments = state.opt_state["adamw"][0]
  assert (
    sum(leaf.size for leaf in jax.tree.leaves((moments.mu, moments.nu))) == 2 * size
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * size + 20
  assert all(jax.tree.leaves(optim.decays(split.shapes)))
  moved, values = update(state, frozen, *parts, settings=SETTINGS)
  assert jax.tree.structure(moved) == jax.tree.structure(state)
  # While B is 0, A's gradient is 0 and only weight decay moves it.
  for name, before in state.params["lora"].items():
    after = moved.params["lora"][name]
    np.testing.assert_allclose(after["a"], before["a"] * (1 - 1e-2 * 0.01), rtol=1e-6)
    assert np.abs(after["b"]).min(axis=(1, 2)).max() > 0
  again, lower = update(moved, frozen, *parts, settings=SETTINGS)
  assert lower["loss_sft"] < values["loss_sft"]
  assert (
    np.abs(again.params["lora"]["q"]["a"] - moved.params["lora"]["q"]["a"]).max() > 1e-3
  )


def test_micro_batches_change_nothing():
  base, *parts = setting()
  split = split_of()
  frozen = split.freeze(base)
  state, update = start(split, base)
  state = state._replace(params=random_adapters(split.shapes))
  whole, a = update(state, frozen, *parts, settings=SETTINGS)
  split_up, b = update(
    state, frozen, *parts, settings=SETTINGS._replace(micro_batches=2)
  )
  for name in ("loss_sft", "loss_kd", "kd_weight", "grad_norm"):
    np.testing.assert_allclose(a[name], b[name], rtol=1e-4)
  tiny_step.assert_trees_close(split_up.params, whole.params, 1e-3)


def kernel_sized_results(split, base) -> int:
  """Products and writes of the lowered update whose result has a kernel's shape."""
  state, update = start(split, base)
  frozen = split.freeze(base) if split.freeze else {}
  lowered = update.lower(state, frozen, *setting()[1:], settings=SETTINGS).as_text()
  stacked = [base["layers"][name].shape for name in lora.KERNELS]
  shapes = [base["embed"].shape, *stacked, *(shape[1:] for shape in stacked)]
  sizes = {"x".join(map(str, shape)) for shape in shapes}
  results = re.findall(
    r"stablehlo\.(?:dot_general|dynamic_update_slice|add|multiply).*tensor<([\dx]+)xf32>$",
    re.sub(r" loc\(.*\)$", "", lowered, flags=re.MULTILINE),
    flags=re.MULTILINE,
  )
  assert results
  return sum(size in sizes for size in results)


def test_a_step_has_no_gradient_and_no_copy_of_a_kernel():
  base, *_ = setting()
  assert kernel_sized_results(partition.everything(CONFIG), base) > 20
  assert kernel_sized_results(split_of(), base) == 0


def test_two_trees_with_one_leaf_are_refused():
  whole = partition.combine({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})
  assert whole == {"a": {"x": 1, "y": 2}, "b": 3}
  with pytest.raises(ValueError, match="x is both"):
    partition.combine({"a": {"x": 1}}, {"a": {"x": 2}})


def laid_over(network, folder: pathlib.Path) -> peft.PeftModel:
  with warnings.catch_warnings():
    # PEFT warns of tensors that are missing and of keys that it does not know.
    warnings.simplefilter("error", UserWarning)
    return peft.PeftModel.from_pretrained(network, folder)


COMMON = {
  "vocab_size": 90,
  "hidden_size": 48,
  "intermediate_size": 56,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "initializer_range": 0.2,
  "pad_token_id": 0,
}


def make_network(family: str):
  torch.manual_seed(0)
  if family == "llama":
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
  elif family == "qwen2":
    made = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON))
  elif family == "apertus":
    made = transformers.ApertusForCausalLM(transformers.ApertusConfig(**COMMON))
  elif family == "phi3":
    made = transformers.Phi3ForCausalLM(transformers.Phi3Config(**COMMON))
  else:
    hybrid = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    hybrid |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    if family == "qwen3_next":
      hybrid |= {"num_experts": 4, "num_experts_per_tok": 2}
      widths = ("moe_intermediate_size", "shared_expert_intermediate_size")
      hybrid |= dict.fromkeys(widths, 8)
    hybrid |= {"layer_types": ["linear_attention", "full_attention"]}
    made = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(family, **COMMON, **hybrid)
    )
  return made.eval()


@pytest.mark.parametrize(
  ("family", "names"),
  [
    ("llama", schema.Lora().targets),
    ("qwen2", ("v_proj", "o_proj")),
    ("phi3", schema.Lora().targets),
    ("apertus", schema.Lora().targets),
    ("phi3", ("q_proj", "v_proj", "up_proj")),
    ("qwen3_5_text", ("q_proj", "up_proj", "in_proj_qkv", "in_proj_a", "out_proj")),
    ("qwen3_next", ("o_proj", "in_proj_qkvz", "in_proj_ba")),
    ("olmo_hybrid", ("q_proj", "down_proj", "linear_attn.k_proj", "g_proj")),
  ],
)
def test_peft_computes_our_logits_from_the_adapter(tmp_path, family, names):
  network = make_network(family)
  network.save_pretrained(tmp_path / "base")
  source = str(tmp_path / "base")
  decoder = hf_load.load_config(source)
  base = hf_load.load_params(source, decoder)
  kernels = peft_adapter.targets(hf_load.family(source), names)
  split = lora.split(decoder, kernels, rank=4, alpha=6.0, key=jax.random.key(0))
  adapters = random_adapters(split.shapes)
  params = partition.combine(split.freeze(base), adapters)
  hf_save.save_adapter(
    tmp_path / "adapter",
    adapters["lora"],
    decoder,
    source,
    rank=4,
    alpha=6.0,
    base_name=None,
    card="",
  )
  ids_BT = np.random.default_rng(0).integers(0, 90, (3, 20))
  ours = jax.jit(tiny_decoder.logits, static_argnums=1)(
    params, decoder, ids_BT, jnp.ones(ids_BT.shape, bool)
  )
  with torch.no_grad():
    before = network(torch.tensor(ids_BT)).logits.numpy()
    theirs = laid_over(network, tmp_path / "adapter")(torch.tensor(ids_BT))
    theirs = theirs.logits.numpy()
  scale = np.abs(theirs).max()
  assert np.abs(ours - theirs).max() <= 2e-5 * scale
  assert np.abs(theirs - before).max() > 0.05 * scale


@pytest.fixture(scope="module")
def source(tmp_path_factory, smollm):
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


LORA = (
  *("lora.rank=4", "lora.alpha=6.0", "train.learning_rate=1.0e-2"),
  *("data.buckets=1", "train.gradient_stats_every=0"),  # fewer programs to compile
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source, law):
  """A RAFT run with adapters from start to end; its config."""
  output = tmp_path_factory.mktemp("run") / "lora"
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(output, source, law, *LORA)
  train.fit(settings)
  return settings


def adapters_of(settings):
  source = settings.model.source
  split = run_plan.make_split(
    settings.lora, source, hf_load.load_config(source), settings.train.seed
  )
  identity = run_identity.model_identity(source, settings.lora)
  return checkpoint.restore_params(settings.output, split.shapes, identity)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(trained, tmp_path):
  output = tmp_path / "resumed"
  shutil.copytree(trained.output, output)
  shutil.rmtree(output / "checkpoints" / str(short_run.STEPS))
  settings = trained.model_copy(update={"output": str(output)})
  assert adapters_of(settings)[1] < short_run.STEPS
  train.fit(settings)
  whole, step_number = adapters_of(trained)
  assert set(whole) == {"lora"}
  resumed, again = adapters_of(settings)
  assert step_number == again == short_run.STEPS
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert short_run.rows(output) == short_run.rows(pathlib.Path(trained.output))


def test_a_run_learns_and_its_first_step_begins_at_the_base(trained, source):
  rows = short_run.rows(pathlib.Path(trained.output))
  assert rows[-1][1]["loss_sft"] < rows[0][1]["loss_sft"]
  params, _ = trained_model.load(trained, hf_load.load_config(source))
  base = hf_load.load_params(source, hf_load.load_config(source))
  assert jax.tree.structure(params) == jax.tree.structure(base)
  np.testing.assert_array_equal(params["embed"], base["embed"])
  assert not np.array_equal(params["layers"]["q"], base["layers"]["q"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_is_the_frozen_base_and_no_copy(trained, tmp_path, dtype):
  output = tmp_path / "fresh"
  shutil.copytree(pathlib.Path(trained.output) / "refined", output / "refined")
  (output / "config").mkdir()
  model_section = trained.model.model_copy(update={"dtype": dtype})
  settings = trained.model_copy(update={"output": str(output), "model": model_section})
  plan, inputs = run_inputs.prepare(settings)
  with jax.set_mesh(plan.mesh), checkpoint.manager(output, keep=2) as checkpoints:
    state, (frozen, teacher, *_), *_ = initial_state.start(
      settings, plan, inputs, checkpoints, on_corrupt="stop"
    )
  assert "lora" not in teacher

  def same(ours, theirs):
    assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    assert ours.dtype == dtype

  jax.tree.map(same, {name: frozen[name] for name in teacher}, teacher)
  # The memory check counts the same arrays, and what they share once.
  shapes = step_memory.reference_shapes(plan)

  def describe(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)

  assert describe((shapes.frozen, shapes.teacher)) == describe((frozen, teacher))
  counted = {id(leaf) for leaf in jax.tree.leaves(shapes.frozen)}
  assert all(id(leaf) in counted for leaf in jax.tree.leaves(shapes.teacher))
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("f4")}


def test_merged_export_and_adapter_give_the_same_logits(trained, source):
  ids = torch.tensor(np.random.default_rng(0).integers(0, 4000, (2, 12)))
  merged = export.export(trained).folder
  switched = trained.model_copy(update={"export": schema.Export(adapter=True)})
  export.main(switched)
  adapter = export.export(switched).folder  # replaces the one before
  assert {path.name for path in adapter.iterdir()} == {
    *("adapter_config.json", "adapter_model.safetensors", "README.md")
  }
  card = (adapter / "README.md").read_text()
  assert "library_name: peft" in card
  assert "peft.PeftModel.from_pretrained(model, folder)" in card
  assert source not in card + (adapter / "adapter_config.json").read_text()
  with torch.no_grad():
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(source, dtype=torch.float32)
    before = base(ids).logits.numpy()
    want = load(merged, dtype=torch.float32)(ids).logits.numpy()
    got = laid_over(base, adapter)(ids).logits.numpy()
  assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
  assert np.abs(before - want).max() > 1e-2 * np.abs(want).max()
  (adapter / "adapter_model.safetensors").write_bytes(b"of somebody else")
  with pytest.raises(errors.UserError, match="not an earlier export"):
    export.export(switched)


@pytest.mark.parametrize(
  "overrides", [("method=sft",), ("method=fused_sft", "train.micro_batches=2")]
)
def test_methods_without_a_teacher_train_adapters(tmp_path, source, law, overrides):
  output = tmp_path / "plain"
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(
    output, source, law, *LORA, "train.max_steps=2", *overrides
  )
  train.fit(settings)
  adapters, _ = adapters_of(settings)
  assert all(np.abs(half["b"]).max() > 0 for half in adapters["lora"].values())


def test_other_settings_of_lora_are_another_run(trained, source, law):
  path = pathlib.Path(trained.output)
  _, other = short_run.make_config(path, source, law, *LORA, "lora.rank=8")
  with pytest.raises(errors.UserError, match=r"lora\.rank: 4 -> 8"):
    train.fit(other)
  with pytest.raises(errors.UserError, match="saved by a run whose lora was"):
    trained_model.load(other, hf_load.load_config(source))
  full = trained.model_copy(update={"lora": None})
  with pytest.raises(errors.UserError, match="whose lora was"):
    trained_model.load(full, hf_load.load_config(source))


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["export.adapter=true"], r"export\.adapter: needs a `lora` section"),
    (["lora.rank=0"], r"lora\.rank: must be greater than 0"),
    (["lora.targets=[]"], r"lora\.targets: must not be empty"),
    (["lora.rnak=4"], r"did you mean `lora\.rank`"),
  ],
)
def test_config_faults_are_named(tmp_path, source, law, overrides, message):
  with pytest.raises(errors.UserError, match=message):
    short_run.make_config(tmp_path / "bad", source, law, *overrides)


def test_an_unknown_target_stops_before_weights_are_read(
  tmp_path, source, law, monkeypatch
):
  def no_weights(*args, **kwargs):
    raise AssertionError("weights were read")

  monkeypatch.setattr(hf_load, "load_params", no_weights)
  _, settings = short_run.make_config(
    tmp_path / "bad", source, law, "method=sft", "lora.targets=[query]"
  )
  with pytest.raises(errors.UserError, match=r"lora\.targets: no projection 'query'"):
    train.fit(settings)
