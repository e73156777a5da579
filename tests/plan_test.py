"""A whole plan on CPU, what it prints and refuses, and the real compilers (slow)."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from raft_jax import errors, plan
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.planning import estimate, machines
from tests.helpers import bare_model
from tests.helpers.bare_model import COUNT

ROOT = pathlib.Path(__file__).parents[1]
PRESETS = ("llama32_3b", "phi4_mini", "smollm3_3b")


def write(folder: pathlib.Path, source: object, **keys) -> schema.Config:
  """A run's config: no data, and of the model a config.json."""
  path = folder / "run.yaml"
  tree = {
    "model": {"source": str(source), "remat": True},
    "data": {
      "questions": "absent.jsonl",
      "max_prompt_tokens": 16,
      "max_answer_tokens": 10,
      "max_teacher_tokens": 32,
    },
    "rollout": {"max_new_tokens": 12},
    "distill": {"top_k": 32},
    "train": {"gradient_stats_every": 0},
    "output": str(folder / "out"),
  }
  path.write_text(json.dumps(tree | keys))
  return config_load.load(path, without_data=True)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """What a plan for 8 CPU devices measured, and what it printed."""
  folder = tmp_path_factory.mktemp("plan")
  run = write(folder, bare_model.save(folder / "model"))
  answers, printed = [], io.StringIO()

  def measure(*args, **options):
    answers.append(real_measure(*args, **options))
    return answers[-1]

  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
    real_measure = estimate.measure
    patch.setattr(estimate, "measure", measure)
    plan.plan(run, ["cpu:8"], questions=100, compare_rollouts=True)
  return run, answers[0], printed.getvalue()


def test_memory_by_class_is_what_the_arrays_take(planned):
  _, answer, _ = planned
  assert answer["parameters"] == answer["trained"] == COUNT
  assert answer["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
  memory = answer["memory"]
  # float32 master weights; AdamW's two moments, its count and the balancer's scalars.
  assert memory["parameters"] == 4 * COUNT / 8
  assert 0 < memory["optimizer"] - 8 * COUNT / 8 < 100
  assert memory["base model"] == 4 * COUNT / 8
  # Two of 16 rows: prompt, answer (10, padded to 16) and context, three lengths, an id.
  assert memory["batch"] == 2 * 4 * (16 + 16 + 32 + 4)
  # Keys and values of 3 layers, 2 rows, 16 + 12 columns, 2 heads of 16.
  assert memory["cache"] == 2 * 3 * 2 * (16 + 12) * 2 * 16 * 4


def test_flops_are_those_of_the_formula(planned):
  """2 a weight and token; attention over what is padded; the head where it is read."""
  _, answer, _ = planned
  layer, heads, head = 64 * (64 * 2 + 32 * 2 + 128 * 3), 4 * 16, 2 * 512 * 64
  tokens = 32 + 12
  teacher = 3 * (2 * layer * tokens + 4 * heads * tokens**2) + head * 12
  assert answer["phases"]["teacher"]["flops"] == 2 * teacher  # 2 rows a device
  # Prefill of 16, then 11 tokens against 28 columns; each predicts one token.
  prefill = 3 * (2 * layer * 16 + 4 * heads * 16 * 28) + head
  decode = 3 * (2 * layer + 4 * heads * 28) + head
  assert answer["phases"]["rollout"]["flops"] == 2 * (prefill + 11 * decode)
  # Recomputing leaves out a layer's last product; the head forward once, and backward
  # three products for the answer, two for the rollout, whose log-sum-exp is no loss.
  tokens = 16 + 16 + 12
  last = 2 * 64 * 128 * tokens
  update = 3 * (4 * (2 * layer * tokens + 4 * heads * tokens**2) - last)
  update += head * (16 * 4 + 12 * 3)
  assert answer["phases"]["update"]["flops"] == 2 * update


def sent(phase: dict) -> float:
  return sum(wire for _, wire in phase["collectives"].values())


def test_weights_are_gathered_once_and_activations_stay(planned):
  """A ring sends 7/8 of what it gathers: the sampler's weights once, however many
  tokens it decides, and the teacher's. Beside them looked up embeddings on their way to
  their rows, and the like: not the activations of every layer's 7 products."""
  _, answer, _ = planned
  whole = 4 * COUNT * 7 / 8
  activations = 4 * 16 * (32 + 12) * 64
  for name in ("rollout", "teacher"):
    total = sent(answer["phases"][name])
    assert whole <= total <= whole + 3 * activations, name
  # Again to recompute, and on CPU XLA leaves gradients reduced whole (2 x 7/8).
  assert 2 * whole <= sent(answer["phases"]["update"]) <= 4 * whole + 6 * activations


def test_a_rollout_whose_weights_two_devices_share(planned):
  """The model has 2 key/value heads, so nothing but 2 is compared with 1."""
  _, answer, _ = planned
  assert [*answer["other rollouts"]] == ["2"]
  gathered, shared = answer["phases"]["rollout"], answer["other rollouts"]["2"]
  # Each layer sums its attention and its MLP, and the look-up its halves, at 12 passes.
  assert shared["collectives"]["all-reduce"][0] == 12 * (2 * 3 + 1)
  # A device gathers a half, of which it has an eighth, and holds no more.
  activations = 4 * 16 * (32 + 12) * 64
  wire = shared["collectives"]["all-gather"][1]
  assert 0 <= wire - 4 * COUNT * 3 / 8 <= 3 * activations
  assert gathered["temporaries"] - shared["temporaries"] > 4 * COUNT / 3


def test_what_is_printed(planned):
  run, answer, printed = planned
  lines = printed.splitlines()
  assert lines[0] == (
    f"{run.model.source}: {COUNT:,} parameters, {COUNT:,} trained; activations "
    "float32, remat"
  )
  assert "cpu:8: 8 devices, mesh data 1 x fsdp 8 x tensor 1" in lines
  assert any(line.startswith("  fits: ") for line in lines)
  assert "  run: 18 steps, 0:00:00 to 0:00:00 (a roofline, not a measurement)" in lines
  assert "  smallest that fits: cpu:1 (at most " in printed
  number = r"\d+ ms, [\d.]+ MiB; "
  (fastest,) = re.findall(
    rf"  rollout.tensor 1: {number}2: {number}the fastest that fits: (\d)", printed
  )
  # 84 sums of 12 µs outweigh the bytes of a model this small.
  assert fastest == "1"
  update = next(line for line in lines if line.startswith("│ update"))
  model_flops = 6 * COUNT * 16 * (16 + 10 + 12)
  share = answer["phases"]["update"]["flops"] * 8 / model_flops
  assert f" {share:.2f} " in update


def test_adapters_train_little_and_their_teacher_is_the_frozen_model(planned, tmp_path):
  full, whole, _ = planned
  run = write(tmp_path, full.model.source, lora={"rank": 8, "targets": ["q_proj"]})
  answer = estimate.measure(run.model_dump(mode="json"), machines.parse("cpu:8"))
  # [8, 64] and [64, 8] in 3 layers; their width of 64 is spread over 8 devices, or over
  # tensor, which is 1.
  assert (answer["parameters"], answer["trained"]) == (COUNT, 3 * 2 * 8 * 64)
  trained = 4 * 3 * (8 * 64 / 8 + 64 * 8)
  assert answer["memory"]["parameters"] == trained
  assert 0 < answer["memory"]["optimizer"] - 2 * trained < 100
  # Beside the base model an adapter's scale in each layer.
  assert answer["memory"]["base model"] == whole["memory"]["base model"] + 4 * 3
  assert sent(answer["phases"]["rollout"]) < 2 * sent(whole["phases"]["rollout"])


def test_steps_of_a_run(tmp_path, law):
  run = write(tmp_path, "none")
  assert (
    plan.total_steps(run.data, run.train, None) is None
  )  # data is absent and nobody says
  assert plan.total_steps(run.data, run.train, 2000) == 3 * 125
  short = write(tmp_path, "none", train={"max_steps": 10})
  assert {plan.total_steps(short.data, short.train, n) for n in (None, 2000)} == {10}
  there = write(tmp_path, "none", data={"questions": str(law / "train.jsonl")})
  assert plan.total_steps(there.data, there.train, None) == 3 * (705 // 16)


def test_without_the_extra_the_command_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(machines.PACKAGES, "tpu", ("no_such_library.inside",))
  with pytest.raises(errors.UserError) as caught:
    plan.plan(write(tmp_path, "none"), ["cpu:8", "v5e:4x4"])
  assert str(caught.value) == (
    "--topology v5e:4x4: compiling for it needs the extra `plan` (module "
    "no_such_library.inside is missing; Linux x86_64 only); run "
    f"{errors.install('plan')}"
  )


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "raft_jax.plan", *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "HF_HUB_OFFLINE": "1"},
  )


def test_a_hub_that_does_not_answer_is_one_line_with_the_way_out(tmp_path):
  write(tmp_path, "somebody/a-model-that-is-not-here")
  done = command(
    *("--config", tmp_path / "run.yaml"),
    *("--topology", "cpu:1", "train.batch_size=8"),
  )
  assert done.returncode == 2
  assert done.stdout == ""
  notice, line = done.stderr.splitlines()
  assert notice == "compiling for cpu:1 ..."
  assert line.startswith(
    "error: --topology cpu:1: model somebody/a-model-that-is-not-here: no such folder"
  )
  assert line.endswith(
    "or save its config.json into a folder and give that as model.source"
  )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_run(name):
  run = config_load.load(ROOT / f"configs/{name}.yaml")
  assert (run.method, run.model.dtype, run.model.remat) == ("raft", "bfloat16", True)
  assert (run.train.epochs, run.train.batch_size) == (3, 16)
  assert (run.train.learning_rate, run.train.weight_decay) == (5e-6, 0.01)
  assert (run.distill.top_k, run.distill.temperature) == (512, 1.5)
  assert (run.balance.mode, run.balance.decay) == ("ema", 0.9)
  # Meshes of 8 and 16 devices share its rows.
  assert run.mesh.fsdp == -1
  assert run.train.batch_size % 16 == 0


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["a100_80:8", "h100:2x4", "v5e:2x4", "v5p:2x2x2"])
def test_the_real_compilers(planned, topology):
  """The same arrays and sums as on CPU, and no more to send; the extra `plan`."""
  run, on_cpu, _ = planned
  machine = machines.parse(topology)
  estimate.check_installed(machine)
  run = run.model_copy(update={"train": schema.Train(gradient_stats_every=20)})
  answer = estimate.measure(run.model_dump(mode="json"), machine)
  assert answer["memory"] == on_cpu["memory"]
  assert "measured update" in answer["phases"]
  for name, phase in on_cpu["phases"].items():
    costs = answer["phases"][name]
    assert costs["flops"] == phase["flops"]
    assert 0 < sent(costs) <= 1.1 * sent(phase), name
    assert estimate.phase(answer, name, machine).seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["a100_80:8", "h100:8"])
def test_cudnns_attention_compiles_and_saves_traffic(tmp_path, topology):
  """Without a GPU that is all there is to see of it."""
  widths = dict.fromkeys(("prompt", "answer", "teacher"), 256)
  long = {f"max_{name}_tokens": width for name, width in widths.items()}
  long = {"questions": "absent.jsonl", **long}
  answers = {}
  for attention in ("xla", "cudnn"):
    folder = tmp_path / attention
    folder.mkdir()
    source = str(bare_model.save(folder / "model"))
    how = {"source": source, "dtype": "bfloat16", "attention": attention}
    run = write(folder, "", model={**how, "remat": True}, data=long)
    answers[attention] = estimate.measure(
      run.model_dump(mode="json"), machines.parse(topology)
    )["phases"]
  for name in ("teacher", "update"):
    ours, theirs = (answers[which][name] for which in ("cudnn", "xla"))
    assert ours["traffic"] < theirs["traffic"], name
    assert 1 <= ours["flops"] / theirs["flops"] < 1.1, name  # scores twice, backward
  assert answers["cudnn"]["rollout"]["flops"] == answers["xla"]["rollout"]["flops"]
