"""A training step compiled for a machine that is absent: `plan` runs it as a process.

`python -m raft_jax.planning.dry_run` reads {"config", "topology"} as JSON and prints
what it measured as JSON. It needs the environment of `machines.environment`, and asks
no weight and no data: every array is a shape with a sharding, as wide as the config's
budgets allow, and goes through `train.run_step`, the step that a run takes.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from raft_jax import errors, train
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import sharding, transformer
from raft_jax.planning import hlo_cost, machines
from raft_jax.training import programs as programs_lib
from raft_jax.training import setup, step_memory

TPU_OPTIONS = {
  # Without it every gather of weights becomes a loop of hundreds of small sends, which
  # hides what is sent; it costs a little memory (0.2 GiB for a 3B model on v5e:4x4).
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": "100000",
  "xla_dump_hlo_as_text": True,
}


def measure(config: schema.Config, topology: str) -> dict[str, Any]:
  """What the run costs on a machine.

  Returns:
    Plain values: `parameters` of the model and those `trained`, `mesh`, bytes a device
    of each class in `memory`, and by phase what `compiled` returns.

  Raises:
    errors.UserError: the config does not suit the model or the machine.
  """
  machine = machines.parse(topology)
  if config.distill.trajectory == "mixed":  # the dearer of its two kinds of step
    distill = config.distill.model_copy(update={"trajectory": "rollout"})
    config = config.model_copy(update={"distill": distill})
  run = prepare(config, machine)
  built = setup.build(config, run)
  phases: dict[str, Any] = {}

  def double(name: str, program: Any) -> Any:
    return program and recorder(phases, name, program, machine)

  programs = programs_lib.Programs(
    double("rollout", built.programs.roll_out),
    double("teacher", built.programs.teach),
    double("update", built.programs.update),
    built.programs.teacher,
  )
  if config.model.attention == "cudnn":
    machines.pretend_cudnn(machine)
  beside = step_memory.beside(config, run, built)
  with jax.set_mesh(run.mesh):
    batch = step_memory.widest_batch(config, run)
    for measured in (False, True) if config.train.measure_every else (False,):
      train.run_step(
        programs,
        built.abstract,
        beside.frozen,
        beside.teacher,
        batch,
        0,
        anchor=beside.anchor,
        measure=measured,
        timed=False,
      )
  rows = batch.row_id_B.sharding.shard_shape(batch.row_id_B.shape)[0]
  length = config.data.max_prompt_tokens + config.rollout.max_new_tokens
  cache = jax.eval_shape(
    lambda: transformer.init_cache(run.decoder, rows, length, config.model.dtype)
  )
  return {
    "parameters": sum(
      leaf.size for leaf in jax.tree.leaves(transformer.shapes(run.decoder))
    ),
    "trained": sum(leaf.size for leaf in jax.tree.leaves(built.abstract.params)),
    "mesh": dict(run.mesh.shape),
    "memory": {
      "parameters": step_memory.held(built.abstract.params),
      "optimizer": step_memory.held(built.abstract.opt_state),
      "base model": step_memory.held(beside),
      "batch": step_memory.held(batch),
      "cache": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
    },
    "phases": phases,
  }


def prepare(config: schema.Config, machine: machines.Machine) -> setup.Prepared:
  """`setup.prepare` without data, tokenizer and weights, for another machine."""
  decoder = hf_load.load_config(config.model.source, weights=False)
  mesh = sharding.make_mesh(
    **config.mesh.model_dump(), devices=machines.devices(machine)
  )
  # Which token ends an answer or fills a row costs nothing.
  nobody: Any = None
  codec = chat.Codec(nobody, eos_ids=(0,), pad_id=0, digest="", controls=())
  setup.check(config, decoder, mesh, distil=setup.distills(config))
  source = config.distill.source
  limits = config.data
  widest = (
    batching.rounded(limits.max_prompt_tokens),
    batching.rounded(limits.max_answer_tokens),
    batching.rounded(limits.max_teacher_tokens),
  )
  return setup.Prepared(
    codec=codec,
    decoder=decoder,
    teacher=None if source is None else hf_load.load_config(source, weights=False),
    mesh=mesh,
    split=setup.make_split(config, decoder),
    dataset=None,
    general=None,
    probed=None,
    total_steps=1,
    identity={},
    asked={},
    replay=None,
    widest=widest,
  )


# --- Compiling instead of running -----------------------------------------------------


def recorder(
  phases: dict[str, Any], name: str, program: Any, machine: machines.Machine
) -> Callable[..., Any]:
  """A program's double: compiles it for the arguments' shapes and notes its cost.

  It returns the results' shapes, placed where the compiler puts them.
  """

  def call(*args: Any, **options: Any) -> Any:
    phase = f"measured {name}" if options.get("measure") else name
    jitted = program if hasattr(program, "trace") else jax.jit(program)
    traced = jitted.trace(*args, **options)
    where: Any = None
    if phase not in phases:
      phases[phase], where = compiled(traced, machine)
      outputs[phase] = put(traced.out_info, where)
    return outputs[phase]

  outputs: dict[str, Any] = {}
  return call


def put(shapes: Any, where: Any) -> Any:
  if where is None:
    return shapes
  return jax.tree.map(
    lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
    shapes,
    where,
  )


def compiled(traced: Any, machine: machines.Machine) -> tuple[dict[str, Any], Any]:
  """Cost of a program on one device, and where its outputs go (None if refused).

  Returns a dict of `flops`; `temporaries`, `output` (what is not written over an
  argument) and `code` in bytes; `traffic` in bytes; `collectives` by kind, each as
  [times, bytes sent]; `largest`, pairs of an array it makes and its bytes; `seconds` of
  compiling. Of a program that TPU's compiler refuses, `refused`: what it says.
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
    written = dumped[-1].read_text(encoding="utf-8") if dumped else program.as_text()
  module = hlo_cost.parse(written)
  by_kind: dict[str, list[float]] = {}
  for one in hlo_cost.collectives(module, machine.devices):
    total = by_kind.setdefault(one.kind, [0, 0.0])
    total[0] += one.times
    total[1] += one.wire
  memory = program.memory_analysis()
  return {
    "flops": flops,
    "temporaries": memory.temp_size_in_bytes,
    "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
    "traffic": hlo_cost.traffic(module),
    "collectives": by_kind,
    "largest": hlo_cost.largest(module, 5),
    "seconds": time.perf_counter() - began,
  }, program.output_shardings


@contextlib.contextmanager
def answering() -> Iterator[Any]:
  """Standard output for the answer alone; what libraries print goes to stderr."""
  with contextlib.redirect_stdout(sys.stderr):
    yield sys.__stdout__


def main(argv: Sequence[str] | None = None) -> None:
  """Reads the question on stdin and prints the answer; {"error"} is the user's."""
  del argv
  with answering() as out:
    asked = json.load(sys.stdin)
    config = schema.Config.model_validate_json(json.dumps(asked["config"]))
    try:
      answer = measure(config, asked["topology"])
    except errors.UserError as error:
      answer = {"error": str(error)}
    print(json.dumps(answer), file=out)


if __name__ == "__main__":
  main()
