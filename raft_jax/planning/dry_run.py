"""Compiles a training step for an absent machine; `plan` runs it as a process.

`python -m raft_jax.planning.dry_run` reads {"config", "topology", "compare_rollouts"}
as JSON and prints the costs as JSON. It needs the environment of
`machines.environment`, but no weights and no data: every array is a shape with a
sharding, as wide as the config's budgets allow, and goes through `programs.run_step`,
the step of a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import step as step_lib
from raft_jax.hf import load as hf_load
from raft_jax.models import experts, kv_cache, sharding, transformer
from raft_jax.planning import hlo_cost, machines
from raft_jax.training import plan_checks, run_plan, step_memory
from raft_jax.training import programs as programs_lib

TPU_OPTIONS = {
  # Otherwise every gather of weights becomes a loop of hundreds of small sends, which
  # hides the traffic. Costs a little memory (0.2 GiB for a 3B model on v5e:4x4).
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": "100000",
  "xla_dump_hlo_as_text": True,
}


def measure(
  config: schema.Config, topology: str, *, compare_rollouts: bool = False
) -> dict[str, Any]:
  """The cost of a run on a machine.

  Args:
    compare_rollouts: also compile rollouts for other values of `rollout.tensor`.

  Returns:
    Plain values: `parameters` of the model, those `active` for a token and those
    `trained`, `mesh` and that of `rollouts`, bytes per device of each class in
    `memory`, per phase the values of `compile_cost`, and in `other rollouts` these by
    `rollout.tensor`.

  Raises:
    errors.UserError: the config does not suit the model or the machine.
  """
  machine = machines.parse(topology)
  if config.distill.trajectory == "mixed":  # plan for the dearer kind of step
    distill = config.distill.model_copy(update={"trajectory": "rollout"})
    config = config.model_copy(update={"distill": distill})
  plan = make_plan(config, machine)
  if plan.settings.compute.attention == "cudnn":
    machines.pretend_cudnn(machine)
  reference = step_memory.reference_shapes(plan)
  batch = step_memory.widest_batch(plan)
  state = plan.abstract_state
  with jax.set_mesh(plan.mesh):
    phases = compile_steps(plan, reference, batch, machine)
  others: dict[str, Any] = {}
  for tensor in other_tensors(plan, machine) if compare_rollouts else ():
    with jax.set_mesh(sharding.decode_mesh(plan.mesh, tensor)):
      record_cost(others, str(tensor), plan.programs.roll_out, machine)(
        state.params, reference.frozen, batch, 0
      )
  rollout_mesh = plan.programs.rollout_mesh or plan.mesh
  length = config.data.max_prompt_tokens + plan.rollouts.max_new_tokens
  parameters = transformer.parameter_count(plan.decoder)
  return {
    "parameters": parameters,
    "active": experts.active_parameters(plan.decoder, parameters),
    "trained": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    "mesh": dict(plan.mesh.shape),
    "rollouts": dict(rollout_mesh.shape),
    "memory": {
      "parameters": step_memory.bytes_per_device(state.params),
      "optimizer": step_memory.bytes_per_device(state.opt_state),
      "base model": step_memory.bytes_per_device(reference),
      "batch": step_memory.bytes_per_device(batch),
      "cache": cache_bytes(plan, rollout_mesh, length),
    },
    "phases": phases,
    "other rollouts": others,
  }


def other_tensors(plan: run_plan.RunPlan, machine: machines.Machine) -> list[int]:
  """Values of `rollout.tensor` worth a comparison, but for the run's own.

  Devices of one node share the weights, and as many as divide the key/value heads:
  otherwise these are exchanged at every layer.
  """
  if plan.programs.roll_out is None:
    return []
  own = (plan.programs.rollout_mesh or plan.mesh).shape["tensor"]
  within = machine.shape[-1] if machine.chip.platform == "cuda" else machine.devices
  return [
    value
    for value in plan_checks.rollout_tensors(plan.mesh)
    if value != own and within % value == 0 and plan.decoder.n_kv_heads % value == 0
  ]


def cache_bytes(plan: run_plan.RunPlan, mesh: Mesh, length: int) -> int:
  """Bytes of a rollout's cache on one device."""
  cache = jax.eval_shape(
    lambda: kv_cache.init(
      plan.decoder, plan.batch_rows, length, plan.settings.compute.dtype
    )
  )

  def bytes_of(name: str, leaf: jax.ShapeDtypeStruct) -> int:
    axes = ["layers", "batch", *["width"] * (leaf.ndim - 2)]
    if name in ("k", "v", *kv_cache.GLOBAL_KV):
      axes[3] = "kv_heads"
    elif name == "positions":
      axes = ["batch", "width"]
    shard = sharding.place(mesh, tuple(axes), leaf.shape).shard_shape(leaf.shape)
    return math.prod(shard) * leaf.dtype.itemsize

  return sum(bytes_of(name, leaf) for name, leaf in cache.items())


def make_plan(config: schema.Config, machine: machines.Machine) -> run_plan.RunPlan:
  """The plan of a run on another machine, with batches as wide as the budgets allow."""
  source, teacher_source = config.model.source, config.distill.source
  decoder = hf_load.load_config(source, weights=False)
  mesh = sharding.make_mesh(
    **config.mesh.model_dump(), devices=machines.devices(machine)
  )
  teacher_decoder = None
  if teacher_source is not None:
    teacher_decoder = hf_load.load_config(teacher_source, weights=False)
  return run_plan.make_budget_plan(config, decoder, teacher_decoder, mesh)


# --- Compiling instead of running -----------------------------------------------------


def compile_steps(
  plan: run_plan.RunPlan,
  reference: step_lib.ReferenceParams,
  batch: batching.Batch,
  machine: machines.Machine,
) -> dict[str, Any]:
  """The cost of each phase of a step, and of an update that measures both gradients."""
  phases: dict[str, Any] = {}

  def recorded(name: str, program: Any) -> Any:
    return program and record_cost(phases, name, program, machine)

  programs = plan.programs._replace(
    roll_out=recorded("rollout", plan.programs.roll_out),
    score_teacher=recorded("teacher", plan.programs.score_teacher),
    update=recorded("update", plan.programs.update),
  )
  measures = plan.schedule.gradient_stats_every > 0
  for gradient_stats in (False, True) if measures else (False,):
    programs_lib.run_step(
      programs,
      plan.abstract_state,
      reference,
      batch,
      step=0,
      gradient_stats=gradient_stats,
    )
  return phases


def record_cost(
  phases: dict[str, Any], name: str, program: Any, machine: machines.Machine
) -> Callable[..., Any]:
  """Replaces a program by one that compiles it and adds its cost to `phases`.

  It returns the shapes of the results, placed as the compiler places them.
  """
  outputs: dict[str, Any] = {}

  def call(*args: Any, **options: Any) -> Any:
    phase = f"measured {name}" if options.get("gradient_stats") else name
    if phase not in phases:
      jitted = program if hasattr(program, "trace") else jax.jit(program)
      traced = jitted.trace(*args, **options)
      phases[phase], shardings = compile_cost(traced, machine)
      outputs[phase] = place_shapes(traced.out_info, shardings)
    return outputs[phase]

  return call


def place_shapes(shapes: Any, shardings: Any) -> Any:
  """Shapes with their shardings; without these if they are None."""
  if shardings is None:
    return shapes
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    shardings,
  )


def compile_cost(traced: Any, machine: machines.Machine) -> tuple[dict[str, Any], Any]:
  """The cost of a program on one device, and the shardings of its outputs.

  Returns:
    A dict of `flops`; `temporaries`, `output` (without what overwrites arguments) and
    `code` in bytes; memory `traffic` in bytes; `collectives`, which maps each kind to
    [times, bytes sent]; `latency`, the seconds that these would take without bytes;
    `largest`, pairs of an array's type and its bytes; `seconds` of
    compiling. For a program that the TPU compiler refuses it holds `flops` and the
    message `refused`, and the shardings are None.
  """
  began = time.perf_counter()
  flops = hlo_cost.flops(traced.jaxpr.jaxpr) / machine.devices
  with tempfile.TemporaryDirectory() as folder:
    tpu = machine.chip.platform == "tpu"
    options = {**TPU_OPTIONS, "xla_dump_to": folder} if tpu else None
    try:
      program = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return {"flops": flops, "refused": str(error).strip().split("\n")[0]}, None
    # libtpu 0.0.52 cannot print some programs for v5p, but it can dump them.
    dumped = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"))
    text = dumped[-1].read_text(encoding="utf-8") if dumped else program.as_text()
  module = hlo_cost.parse(text)
  by_kind: dict[str, list[float]] = {}
  latency = 0.0
  for collective in hlo_cost.collectives(module, machine.devices):
    total = by_kind.setdefault(collective.kind, [0, 0.0])
    total[0] += collective.times
    total[1] += collective.wire
    latency += collective.times * machine.latency(collective.kind, collective.group)
  memory = program.memory_analysis()
  return {
    "flops": flops,
    "temporaries": memory.temp_size_in_bytes,
    "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
    "traffic": hlo_cost.traffic(module),
    "collectives": by_kind,
    "latency": latency,
    "largest": hlo_cost.largest(module, 5),
    "seconds": time.perf_counter() - began,
  }, program.output_shardings


@contextlib.contextmanager
def clean_stdout() -> Iterator[Any]:
  """Standard output for the answer alone; whatever libraries print goes to stderr."""
  with contextlib.redirect_stdout(sys.stderr):
    yield sys.__stdout__


def main(argv: Sequence[str] | None = None) -> None:
  """Reads config and topology on stdin; prints costs, or {"error"} of the user's."""
  del argv
  with clean_stdout() as out:
    request = json.load(sys.stdin)
    config = schema.Config.model_validate_json(json.dumps(request["config"]))
    try:
      answer = measure(
        config,
        request["topology"],
        compare_rollouts=request["compare_rollouts"],
      )
    except errors.UserError as error:
      answer = {"error": str(error)}
    print(json.dumps(answer), file=out)


if __name__ == "__main__":
  main()
