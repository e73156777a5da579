"""Runs with a quantised base: a tiny model from start to export, and the real one."""

import json
import pathlib
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from raft_jax import errors, evaluate, export, train
from raft_jax.config import schema
from raft_jax.evaluation import scoring, test_sets
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import quantised
from raft_jax.storage import journal
from raft_jax.training import (
  checkpoint,
  initial_state,
  run_identity,
  run_inputs,
  run_plan,
  step_memory,
  trained_model,
)
from tests.helpers import short_run, tiny_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory, smollm):
  folder = tmp_path_factory.mktemp("model")
  wide = {"hidden_size": 64, "intermediate_size": 128}
  return str(tiny_run.save_model(folder, smollm, **wide))


def overrides(law: pathlib.Path, form: str) -> list[str]:
  return [
    f"lora={{rank: 4, base: {form}}}",
    *("train.learning_rate=1.0e-2", "data.buckets=1", "train.gradient_stats_every=0"),
    *(f"data.{name}={law / name}.jsonl" for name in ("test", "validation")),
    "validation={every: 3, limit: 4}",
    "evaluate={limit: 6, max_new_tokens: 4, batch_size: 4, samples: 2}",
    "balance.max_weight=1.0",
  ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source, law):
  """A RAFT run on an nf4 base from start to end; its config."""
  output = tmp_path_factory.mktemp("run") / "nf4"
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(output, source, law, *overrides(law, "nf4"))
  train.fit(settings)
  return settings


def adapters_of(settings):
  source = settings.model.source
  split = run_plan.make_split(settings.lora, source, hf_load.load_config(source), 0)
  identity = run_identity.model_identity(source, settings.lora)
  return checkpoint.restore_params(settings.output, split.shapes, identity)


def copy_of(settings, output, **changes):
  shutil.copytree(settings.output, output)
  return settings.model_copy(update={"output": str(output), **changes})


def test_it_learns_and_resumes_bit_for_bit_on_its_own_base_only(trained, tmp_path):
  rows = short_run.rows(pathlib.Path(trained.output))
  first, last = (rows[step - 1][1]["validation_loss"] for step in (3, 6))
  assert last < first
  settings = copy_of(trained, tmp_path / "resumed")
  output = pathlib.Path(settings.output)
  shutil.rmtree(output / "checkpoints" / str(short_run.STEPS))
  other = trained.lora.model_copy(update={"base": "int8"})
  with pytest.raises(errors.UserError, match=r"lora\.base: nf4 -> int8"):
    train.fit(settings.model_copy(update={"lora": other}))
  lock = output / "config/train.yaml"
  lock.unlink()  # checkpoints know it, too
  with pytest.raises(errors.UserError, match="saved by a run whose lora was"):
    train.fit(settings.model_copy(update={"lora": other}))
  lock.unlink()
  train.fit(settings)
  jax.tree.map(
    np.testing.assert_array_equal, adapters_of(settings)[0], adapters_of(trained)[0]
  )
  assert short_run.rows(output) == rows


def test_frozen_model_and_teacher_are_the_same_codes_in_memory(trained, tmp_path):
  output = tmp_path / "fresh"
  shutil.copytree(pathlib.Path(trained.output) / "refined", output / "refined")
  (output / "config").mkdir()
  half = trained.model.model_copy(update={"dtype": "bfloat16"})
  settings = trained.model_copy(update={"output": str(output), "model": half})
  plan, inputs = run_inputs.prepare(settings)
  with jax.set_mesh(plan.mesh), checkpoint.manager(output, keep=2) as checkpoints:
    _, reference, *_ = initial_state.start(
      settings, plan, inputs, checkpoints, on_corrupt="stop"
    )

  def address(leaf):
    return leaf.unsafe_buffer_pointer()

  frozen = {name: reference.frozen[name] for name in reference.teacher}
  assert jax.tree.map(address, frozen) == jax.tree.map(address, reference.teacher)
  layers = reference.teacher["layers"]
  assert {layers["q"].codes.dtype, layers["attn_norm"].dtype} == {
    np.dtype("uint8"),
    jax.numpy.dtype("bfloat16"),
  }
  counted = step_memory.reference_shapes(plan)

  def describe(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

  assert describe(counted.frozen) == describe(reference.frozen)
  # The mesh is of one device: what is counted is what is there.
  assert step_memory.bytes_per_device(counted.teacher) == sum(
    leaf.nbytes for leaf in jax.tree.leaves(reference.teacher)
  )


def test_evaluation_shows_the_loss_on_the_base_that_was_trained_on(trained, capsys):
  evaluate.main(trained)
  folder = pathlib.Path(trained.output) / "evaluation"
  as_trained = json.loads((folder / "scores.json").read_text())["as_trained"]
  assert as_trained.pop("form") == "nf4"
  decoder = hf_load.load_config(trained.model.source)
  tokenizer = chat.load(trained.model.source)
  merged, _ = trained_model.load(trained, decoder)
  base = hf_load.load_params(trained.model.source, decoder)
  rounded = {  # to the levels of nf4, as floats
    name: quantised.restore(quantised.quantise(leaf, "nf4", ("heads", "embed")))
    if leaf.ndim == 3
    else leaf
    for name, leaf in base["layers"].items()
  }
  updates = {
    name: leaf - base["layers"][name] for name, leaf in merged["layers"].items()
  }
  models = {
    "base": {**base, "layers": rounded},
    "trained": {
      **base,
      "layers": {name: rounded[name] + updates[name] for name in rounded},
    },
  }
  rows = test_sets.read_validation(
    trained.data.model_copy(update={"validation": trained.data.test}), tokenizer, 6
  ).rows
  assert as_trained.keys() == models.keys()
  for name, params in models.items():
    how = scoring.Settings(4, "float32", 1)
    model = scoring.eval_model(params, decoder, tokenizer, how, None)
    with journal.open_journal(folder / "again.jsonl") as log:
      losses = scoring.losses(model, rows, log, name="loss")
    np.testing.assert_allclose(as_trained[name], np.mean(losses), rtol=1e-5)
  assert f"base {as_trained['base']:.3f}, trained {as_trained['trained']:.3f}" in (
    capsys.readouterr().out
  )


def test_the_export_is_the_source_with_the_updates(trained, source):
  """The merged folder, and the adapter on the source's own weights, by PEFT."""
  ids = torch.tensor(np.random.default_rng(0).integers(0, 4000, (2, 12)))
  merged = export.export(trained).folder
  adapter = export.export(
    trained.model_copy(update={"export": schema.Export(adapter=True)})
  ).folder
  load = transformers.AutoModelForCausalLM.from_pretrained
  with torch.no_grad():
    base = load(source, dtype=torch.float32)
    before = base(ids).logits.numpy()
    want = load(merged, dtype=torch.float32)(ids).logits.numpy()
    got = peft.PeftModel.from_pretrained(base, adapter)(ids).logits.numpy()
  assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
  assert np.abs(before - want).max() > 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("form", [None, "int8", "nf4"])
def test_the_real_model_learns_on_each_base(tmp_path, smollm, law, form):
  """SFT of SmolLM2-135M-Instruct; bytes, losses on 16 held-out questions, export.

  Its projections have 106,168,320 numbers in 155,520 rows, the rest is 28,346,688.
  """
  output = tmp_path / "run"
  short_run.write_refined(output, law, count=64)
  _, settings = short_run.make_config(
    output,
    smollm,
    law,
    f"lora={{base: {form or 'null'}}}",
    *("method=sft", "train.batch_size=8", "train.max_steps=6", "data.buckets=1"),
    *("train.learning_rate=5.0e-4", "train.checkpoint_every=6"),
    *("data.max_prompt_tokens=96", "data.max_answer_tokens=128", "data.too_long=skip"),
  )
  plan, _ = run_inputs.prepare(settings)
  shapes = step_memory.reference_shapes(plan)
  adapters = step_memory.bytes_per_device(shapes.frozen["lora"])
  size = step_memory.bytes_per_device(shapes.frozen) - adapters
  kernels, rows, rest = 106_168_320, 155_520, 28_346_688
  assert (
    size
    == 4 * rest
    + {
      None: 4 * kernels,
      "int8": kernels + 4 * rows,
      "nf4": kernels // 2 + 4 * kernels // 64,
    }[form]
  )
  train.fit(settings)

  decoder, tokenizer = hf_load.load_config(smollm), chat.load(smollm)
  base = hf_load.load_params(smollm, decoder)
  merged, _ = trained_model.load(settings, decoder)
  models = {"base": base, "trained": merged}
  if form is not None:
    on_codes = trained_model.load_as_trained(settings, decoder, form)
    models |= {f"{name} on {form}": tree for name, tree in on_codes.items()}
  held_out = settings.data.model_copy(update={"validation": str(law / "test.jsonl")})
  questions = test_sets.read_validation(held_out, tokenizer, 16).rows
  losses = {}
  with journal.open_journal(tmp_path / "losses.jsonl") as log:
    for name, params in models.items():
      how = scoring.Settings(8, "float32", 1)
      model = scoring.eval_model(params, decoder, tokenizer, how, None)
      values = scoring.losses(model, questions, log, name="loss")
      losses[name] = float(np.mean(values))
  print(f"\nlora.base={form}: {size:,} bytes;", losses)
  assert losses["trained"] < losses["base"] - 0.1
  if form is not None:
    # Rounding costs little beside what is learned, before and after.
    costs = losses[f"base on {form}"] - losses["base"]
    assert abs(costs) < {"int8": 0.01, "nf4": 0.15}[form]
    learned = losses["base"] - losses["trained"]
    assert abs(losses[f"trained on {form}"] - losses["trained"]) < learned

  if form == "nf4":
    row = questions[0]
    ids = torch.tensor([[*row.prompt, *row.answer]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      export.export(settings).folder, dtype=torch.float32
    )
    with torch.no_grad():
      logits = theirs(ids).logits[0, len(row.prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer))
    model = scoring.eval_model(merged, decoder, tokenizer, how, None)
    with journal.open_journal(tmp_path / "one.jsonl") as log:
      ours = scoring.losses(model, questions[:1], log, name="loss")[0]
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
