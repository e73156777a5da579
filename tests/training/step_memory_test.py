"""Whether there is room for a step: by a rough count, the compiler and the limits."""

import json
import os

import jax
import pytest

from raft_jax.config import load as config_load
from raft_jax.planning import dry_run, machines
from raft_jax.training import step_memory
from tests.helpers import bare_model


def make_plan(folder, fields=None, **sections):
  """A run's plan, from a model's config.json alone."""
  long = {"max_position_embeddings": 1024}
  model = bare_model.save(folder / "model", **long, **(fields or {}))
  path = folder / "run.yaml"
  tree = {
    "model": {"source": str(model)},
    "data": {"questions": "absent.jsonl", "max_teacher_tokens": 256},
    "distill": {"top_k": 32},
    "output": str(folder / "out"),
  }
  for name, keys in sections.items():
    tree[name] = tree.get(name, {}) | keys if isinstance(keys, dict) else keys
  path.write_text(json.dumps(tree))
  settings = config_load.load(path, without_data=True)
  return dry_run.make_plan(settings, machines.parse("cpu:1"))


def step_bytes(plan):
  with jax.set_mesh(plan.mesh):
    return step_memory.step_bytes(plan)


@pytest.mark.parametrize(
  ("fields", "sections"),
  [
    ({"vocab_size": 32_768}, {}),
    ({"num_attention_heads": 16}, {"data": {"max_answer_tokens": 512}}),
    ({"intermediate_size": 1024}, {"rollout": {"max_new_tokens": 16}}),
    ({}, {"method": "sft"}),
    ({}, {"lora": {"rank": 8}}),
    ({}, {"method": "sdpo"}),
  ],
)
def test_what_the_rough_count_lets_pass_the_compiler_would_let_pass(
  tmp_path, fields, sections
):
  """`check` asks only the count where a third of memory would do by it."""
  plan = make_plan(tmp_path, fields, **sections)
  assert step_bytes(plan) < 3 * step_memory.rough_bytes(plan)


def test_a_step_takes_its_state_and_less_in_parts_or_recomputed(tmp_path):
  sizes = {}
  for name, sections in {
    "whole": {},
    "parts": {"train": {"micro_batches": 8}},
    "recomputed": {"model": {"remat": True}},
  }.items():
    folder = tmp_path / name
    folder.mkdir()
    sizes[name] = step_bytes(make_plan(folder, **sections))
  # What each layer keeps of 16 rows of 768 tokens for the backward pass: its input, and
  # its products with queries, keys, values, the output and the feed-forward's branches.
  kept = 4 * 3 * 16 * 768 * (64 + 64 + 2 * 32 + 64 + 2 * 128)
  # Weights, two moments and the teacher's weights are there all the time.
  assert sizes["whole"] > kept + 4 * 4 * bare_model.COUNT
  assert sizes["parts"] < sizes["whole"] / 4
  assert sizes["recomputed"] < sizes["whole"] - kept / 2
  # Of three layers' attention, 453 MB of scores, none is kept.
  assert sizes["whole"] < 1.2 * sizes["recomputed"]


def test_a_base_model_that_only_validation_reads_counts(tmp_path):
  """In float32, as it is loaded where all parameters are trained."""
  sizes = []
  for name, sections in {
    "sft": {},
    "validated": {
      "data": {"validation": "held_out.jsonl"},
      "validation": {"drift": {"prompts": "absent.jsonl"}},
    },
  }.items():
    folder = tmp_path / name
    folder.mkdir()
    plan = make_plan(folder, method="sft", **sections)
    shapes = step_memory.reference_shapes(plan)
    sizes.append(step_memory.bytes_per_device(shapes))
  assert sizes == [0, 4 * bare_model.COUNT]


@pytest.mark.parametrize(
  ("form", "kernel_bytes"),
  [
    (None, 2 * 36_864),
    # A scale for each output of q, o, k, v, gate, up and down, or of 64 inputs each.
    ("int8", 36_864 + 4 * (64 + 64 + 32 + 32 + 128 + 128 + 64)),
    ("nf4", 36_864 // 2 + 4 * 36_864 // 64),
  ],
)
def test_a_quantised_base_counts_by_its_codes_and_scales(tmp_path, form, kernel_bytes):
  """Once, though it is the frozen model and the teacher; the rest is in bfloat16."""
  plan = make_plan(tmp_path, model={"dtype": "bfloat16"}, lora={"base": form})
  reference = step_memory.reference_shapes(plan)
  adapters = step_memory.bytes_per_device(reference.frozen["lora"])
  assert step_memory.bytes_per_device(reference) - adapters == (
    3 * kernel_bytes + 2 * (bare_model.COUNT - 3 * 36_864)
  )


def test_a_containers_limit_counts_where_it_is_less(tmp_path, monkeypatch):
  machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  files = [tmp_path / name for name in ("memory.max", "limit_in_bytes")]
  monkeypatch.setattr(step_memory, "LIMITS", [str(file) for file in files])
  assert step_memory.host_bytes() == machine
  files[0].write_text("max\n")
  files[1].write_text("9223372036854771712\n")  # no limit, in version 1
  assert step_memory.host_bytes() == machine
  files[0].write_text("1048576\n")
  assert step_memory.host_bytes() == 1 << 20
