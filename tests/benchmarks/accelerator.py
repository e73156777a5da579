"""What this project reaches on the accelerator that is here, as one table.

`python -m tests.benchmarks.accelerator`; `launch/gpu_check.sh` installs and runs it.

Models have published shapes and random weights, so nothing is downloaded. Every row is
a median of timed repetitions in one process, after compiling; the range stands beside
it. `--small` runs the same code on tiny shapes, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import console, table

from raft_jax import vocab_head
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import step as step_lib
from raft_jax.hf import load as hf_load
from raft_jax.models import layer_functions, sharding, transformer
from raft_jax.planning import dry_run, hlo_cost
from raft_jax.training import initial_state, run_plan, step_memory, throughput
from raft_jax.training import programs as programs_lib

LLAMA_1B = {
  **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048},
  **{"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
  **{"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072},
  "tie_word_embeddings": True,
}
SMOLLM3_3B = {
  **{"model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048},
  **{"intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
  **{"num_key_value_heads": 4, "max_position_embeddings": 65536},
  "tie_word_embeddings": True,
}
TINY = {
  **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96},
  **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
  "head_dim": 16,
}
REPETITIONS = 5


class Row(NamedTuple):
  """One line of the table."""

  what: str
  value: str
  note: str = ""


class Timed(NamedTuple):
  """Seconds of one call: the median of the repetitions and their range."""

  median: float
  low: float
  high: float

  def __str__(self) -> str:
    low, median, high = (1e3 * x for x in (self.low, self.median, self.high))
    return f"{median:,.1f} ms ({low:,.1f} to {high:,.1f})"


def timed(call: Callable[[], Any]) -> Timed:
  """Times a call that is compiled already."""
  jax.block_until_ready(call())
  seconds = []
  for _ in range(REPETITIONS):
    began = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - began)
  return Timed(statistics.median(seconds), min(seconds), max(seconds))


def share_of_peak(flops: float, seconds: float) -> str:
  peak = throughput.peak_flops(jax.devices()[0].device_kind)
  reached = f"{flops / seconds / 1e12:,.1f} TFLOP/s"
  return reached if peak is None else f"{reached}, {flops / seconds / peak:.0%} of peak"


# --- Parts ----------------------------------------------------------------------------


def head_rows(small: bool) -> Iterator[Row]:
  """Cross-entropy of the vocabulary head with both gradients, against its products."""
  tokens, width, vocabulary = (256, 64, 1024) if small else (8192, 4096, 151936)
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (1, tokens, width), jnp.bfloat16)
  head = 0.02 * jax.random.normal(keys[1], (vocabulary, width), jnp.bfloat16)
  targets = jax.random.randint(keys[2], (1, tokens), 0, vocabulary)

  def loss(hidden, head):
    return jnp.mean(vocab_head.cross_entropy(hidden, head, targets))

  program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head)
  compiled = program.compile()
  seconds = timed(lambda: compiled(hidden, head))
  flops = 3 * 2 * tokens * width * vocabulary
  memory: Any = compiled.memory_analysis()
  sizes = f"{tokens:,} tokens, width {width:,}, vocabulary {vocabulary:,}"
  yield Row(
    "cross-entropy of the head, with gradients",
    str(seconds),
    f"{sizes}; {memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries; "
    f"{share_of_peak(flops, seconds.median)} (products of an ideal pass)",
  )

  @jax.jit
  def products(hidden, head, logits):
    forward = jnp.einsum("btd,vd->btv", hidden, head)
    return (
      forward,
      jnp.einsum("btv,vd->btd", logits, head),
      jnp.einsum("btv,btd->vd", logits, hidden),
    )

  logits = jnp.zeros((1, tokens, vocabulary), jnp.bfloat16)
  bare = timed(lambda: products(hidden, head, logits))
  ratio = seconds.median / bare.median
  yield Row("its three products alone", str(bare), f"the loss takes {ratio:.2f} x")


def attention_rows(small: bool) -> Iterator[Row]:
  """cuDNN's attention against XLA's, forward and backward."""
  if jax.default_backend() != "gpu":
    yield Row("cuDNN's attention", "not measured", "needs an NVIDIA GPU")
    return
  rows, length, heads, width = (2, 128, 4, 64) if small else (4, 2048, 32, 64)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
    jax.random.normal(key, (rows, length, heads, width), jnp.bfloat16) for key in keys
  )
  mask = jnp.tril(jnp.ones((rows, length, length), bool))
  found = {}
  for kind in ("xla", "cudnn"):

    def loss(q, k, v, kind=kind):
      out = layer_functions.attention(q, k, v, mask, implementation=kind)
      return jnp.sum(out.astype(jnp.float32) ** 2), out

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), _ = program(q, k, v)
    found[kind] = (timed(lambda p=program: p(q, k, v)), np.asarray(out, np.float32))
  gap = np.abs(found["xla"][1] - found["cudnn"][1]).max()
  ratio = found["xla"][0].median / found["cudnn"][0].median
  yield Row(
    "attention by cuDNN, with gradients",
    str(found["cudnn"][0]),
    f"{rows} x {length:,} tokens, {heads} heads; {ratio:.2f} x as fast as XLA's "
    f"({found['xla'][0]}); outputs differ by {gap:.1e}",
  )


def parity_row(small: bool) -> Row:
  """Hidden states of the accelerator against the same network on the host."""
  del small  # the host computes it
  decoder = decoder_of({**TINY, "model_type": "llama"})
  params = transformer.init(jax.random.key(0), decoder)
  tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, decoder.vocab_size)
  valid = jnp.ones(tokens.shape, bool)

  def hidden(dtype: str, device: jax.Device) -> np.ndarray:
    compute = transformer.Compute(dtype=dtype)
    where = jax.sharding.SingleDeviceSharding(device)
    arrays = jax.device_put((params, tokens, valid), where)
    forward = jax.jit(
      lambda params, tokens, valid: transformer.forward(
        params,
        decoder,
        tokens,
        transformer.positions(valid),
        transformer.causal_mask(valid),
        compute=compute,
      )[0]
    )
    return np.asarray(forward(*arrays), np.float32)

  reference = hidden("float32", jax.devices("cpu")[0])
  gaps = {}
  for dtype in ("float32", "bfloat16"):
    difference = hidden(dtype, jax.devices()[0]) - reference
    gaps[dtype] = np.linalg.norm(difference) / np.linalg.norm(reference)
  return Row(
    "hidden states against the host's in float32",
    ", ".join(f"{dtype}: {gap:.1e}" for dtype, gap in gaps.items()),
    "relative, in norm; a GPU multiplies float32 in TF32 unless told otherwise",
  )


# --- Whole steps ----------------------------------------------------------------------


def decoder_of(fields: dict[str, Any]) -> transformer.DecoderConfig:
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "config.json").write_text(json.dumps(fields))
    return hf_load.load_config(folder, weights=False)


def full_batch(plan: run_plan.RunPlan) -> batching.Batch:
  """Random tokens in every place of the widest batch."""
  rng = np.random.default_rng(0)

  def fill(leaf: Any, name: str) -> np.ndarray:
    if name.endswith("length_B"):
      return np.full(leaf.shape, widths[name], np.int32)
    if name == "row_id_B":
      return np.arange(leaf.shape[0], dtype=np.int32)
    return rng.integers(1, plan.decoder.vocab_size, leaf.shape).astype(np.int32)

  shapes = step_memory.widest_batch(plan)._asdict()
  shapes = {name: leaf for name, leaf in shapes.items() if leaf is not None}
  prompt, answer, teacher = plan.widest
  widths = {
    "prompt_length_B": prompt,
    "answer_length_B": answer,
    "teacher_length_B": teacher,
  }
  batch = batching.Batch(**{name: fill(leaf, name) for name, leaf in shapes.items()})
  return sharding.spread(sharding.batch(plan.mesh), batch)


def step_rows(
  name: str, fields: dict[str, Any], settings: dict[str, Any]
) -> Iterator[Row]:
  """A training step of a model with random weights."""
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder)
    (source / "config.json").write_text(json.dumps(fields))
    config = schema.Config.model_validate(
      {
        **settings,
        "model": {"source": folder, "dtype": "bfloat16", "remat": True},
        "output": folder,
      }
    )
    decoder = hf_load.load_config(folder, weights=False)
    mesh = sharding.make_mesh(1, -1, 1)
    plan = run_plan.make_budget_plan(config, decoder, None, mesh)
  with jax.set_mesh(plan.mesh):
    base = jax.jit(
      lambda key: transformer.init(key, decoder), out_shardings=plan.base_shardings
    )(jax.random.key(0))
    reference = initial_state.reference_params(plan, base, None)

    @functools.partial(jax.jit, out_shardings=plan.state_shardings)
    def begin(base: transformer.Params) -> step_lib.TrainState:
      params = plan.split.start(base)
      return step_lib.TrainState(jnp.int32(0), params, plan.optimizer.init(params))

    state = begin(base)
    # A copy of the same type: with another, the second step would compile again.
    state = state._replace(opt_state=state.opt_state.copy())
    del base
    batch = full_batch(plan)
    flops = update_flops(plan, reference, batch)
    laps: list[dict[str, float]] = []
    for step in range(REPETITIONS + 1):
      state, done = programs_lib.run_step(
        plan.programs, state, reference, batch, step, timed=True
      )
      laps.append(done.seconds)
    yield from phase_rows(name, plan, laps[1:], flops)


def update_flops(
  plan: run_plan.RunPlan, reference: Any, batch: batching.Batch
) -> dict[str, float]:
  """FLOPs of the teacher's pass and of the update, counted in their traces."""
  counted: dict[str, float] = {}

  def counting(name: str, program: Any) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
      traced = program.trace(*args, **options)
      counted[name] = hlo_cost.flops(traced.jaxpr.jaxpr)
      return dry_run.place_shapes(traced.out_info, None)

    return call

  programs = plan.programs._replace(
    roll_out=plan.programs.roll_out
    and (lambda *args: jax.eval_shape(plan.programs.roll_out, *args)),  # type: ignore
    score_teacher=counting("teacher", plan.programs.score_teacher),
    update=counting("update", plan.programs.update),
  )
  programs_lib.run_step(programs, plan.abstract_state, reference, batch, 0)
  return counted


def phase_rows(
  name: str,
  plan: run_plan.RunPlan,
  laps: list[dict[str, float]],
  flops: dict[str, float],
) -> Iterator[Row]:
  rows, devices = plan.batch_rows, plan.mesh.size
  prompt, answer, teacher = plan.widest
  new = plan.rollouts.max_new_tokens if plan.rollouts.share else answer
  tokens = {
    "rollout": new,
    "teacher": teacher + new,
    "update": prompt + answer + new,
  }
  for phase in laps[0]:
    if phase == "rollout" and plan.rollouts.share == 0:
      continue
    seconds = [lap[phase] for lap in laps]
    spent = Timed(statistics.median(seconds), min(seconds), max(seconds))
    rate = rows * tokens[phase] / spent.median / devices
    note = f"{rate:,.0f} tokens/s per device"
    if phase in flops:
      note += f"; {share_of_peak(flops[phase] / devices, spent.median)}"
    yield Row(f"{name}: {phase}", str(spent), note)
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    kept = step_memory.bytes_per_device(plan.abstract_state)
    kept += step_memory.bytes_per_device(step_memory.reference_shapes(plan))
    yield Row(
      f"{name}: memory so far",
      f"{stats['peak_bytes_in_use'] / 2**30:.1f} GiB at most",
      f"{kept / 2**30:.1f} GiB of it are state and base model, as `plan` counts them",
    )


def raft(rows: int, prompt: int, answer: int, new: int) -> dict[str, Any]:
  return {
    "data": {
      **{"questions": "none", "max_prompt_tokens": prompt, "max_answer_tokens": answer},
      "max_teacher_tokens": prompt + answer,
    },
    "train": {"batch_size": rows, "gradient_stats_every": 0},
    "rollout": {"max_new_tokens": new},
    "distill": {"top_k": 128},
  }


def distillation(rows: int, length: int) -> dict[str, Any]:
  """Distillation alone on given answers: rows of prompt and answer, half each."""
  settings = raft(rows, length // 2, length // 2, 8)
  settings["train"]["cross_entropy"] = False
  settings["distill"] |= {"trajectory": "answer", "teacher_context": "none"}
  settings["data"]["max_teacher_tokens"] = length // 2
  return settings


def rows_of(small: bool) -> Iterator[Row]:
  """All rows, the cheapest first."""
  yield parity_row(small)
  yield from head_rows(small)
  yield from attention_rows(small)
  one, three = LLAMA_1B, SMOLLM3_3B
  if small:
    one, three = ({**fields, **TINY} for fields in (one, three))
  kd = distillation(2, 64) if small else distillation(32, 1024)
  yield from step_rows("1B, distillation of 32 x 1,024 tokens", one, kd)
  step = raft(2, 32, 32, 8) if small else raft(16, 256, 256, 128)
  yield from step_rows("1B, RAFT, batch 16", one, step)
  yield from step_rows("3B, RAFT, batch 16", three, step)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument(
    "--small", action="store_true", help="tiny shapes, on any machine"
  )
  small = parser.parse_args().small
  devices = jax.devices()
  print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}", flush=True)
  rows = table.Table(show_lines=True)
  for column in ("measured", "median (range)", ""):
    rows.add_column(column)
  for row in rows_of(small):
    print(f"{row.what}: {row.value}; {row.note}", flush=True)
    rows.add_row(*row)
  console.Console().print(rows)


if __name__ == "__main__":
  main()
