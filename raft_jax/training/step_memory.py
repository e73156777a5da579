"""A run's arrays as shapes in their places, and whether this machine has room for them.

Where the CPU is the device nobody says that memory is full: the kernel swaps, or ends
the process without a word. So it is asked before anything is loaded.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.models import sharding, transformer
from raft_jax.training import initial_state, recipe, setup
from raft_jax.training import programs as programs_lib

LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
"""What a container may use, of the two versions of cgroups."""

QUICKLY = {"xla_backend_optimization_level": 0}
"""How XLA compiles what is not run: the same arrays, in half the time."""


# --- Shapes in their places -----------------------------------------------------------


def beside(
  config: schema.Config, run: setup.Prepared, built: setup.Built
) -> initial_state.Beside:
  """What the steps read beside the state, as `initial_state.first_state` has it: frozen
  parameters and the base model as teacher are the same buffers."""

  def of(decoder: transformer.DecoderConfig, dtype: str) -> transformer.Params:
    return jax.tree.map(
      lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=at),
      transformer.shapes(decoder),
      setup.param_shardings(run.mesh, decoder),
    )

  base = of(run.decoder, config.model.dtype)
  shared = config.model.dtype == "float32"
  anchor = base if shared else of(run.decoder, "float32")
  teacher = base if run.teacher is None else of(run.teacher, config.model.dtype)
  frozen: transformer.Params = {}
  if run.split.freeze is not None:
    whole = sharding.replicated(run.mesh)
    frozen = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
      jax.eval_shape(run.split.freeze, base),
    )
    frozen = {**frozen, **base}
  return initial_state.Beside(
    frozen=frozen,
    teacher=teacher if built.base_teaches else None,
    anchor=anchor if recipe.anchored(config) else None,
  )


def widest_batch(config: schema.Config, run: setup.Prepared) -> batching.Batch:
  """The widest batch of a run."""
  rows, where = setup.batch_rows(config), sharding.batch(run.mesh)

  def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)

  prompt, answer, teacher = run.widest
  return batching.Batch(
    *(ints(rows, prompt), ints(rows)),
    *(ints(rows, answer), ints(rows)),
    *(ints(rows, teacher), ints(rows)),
    ints(rows),
  )


def held(tree: Any) -> int:
  """Bytes of a tree of placed shapes on one device; a buffer that is there twice, as
  frozen parameters, teacher and anchor may be, counts once."""
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
  )


# --- This machine's memory ------------------------------------------------------------


def check(config: schema.Config, run: setup.Prepared, built: setup.Built) -> None:
  """Refuses a run whose widest batch this machine's CPU cannot hold.

  The compiler is asked, which takes some seconds, unless a rough count says that there
  is no need.

  Raises:
    errors.UserError: naming what is needed, what there is, and what takes less.
  """
  if run.mesh.devices.flat[0].platform != "cpu":
    return
  have = host_bytes()
  if rough_bytes(config, run) < have / 3:
    return
  need = step_bytes(config, run, built)
  if need > have:
    recompute = "" if config.model.remat else "set model.remat=true, "
    raise errors.UserError(
      f"memory: a step takes at least {need / 2**30:.1f} GiB, and this machine has "
      f"{have / 2**30:.1f} GiB; {recompute}raise train.micro_batches (now "
      f"{config.train.micro_batches}, of {setup.batch_rows(config)} rows), or lower "
      "data.max_*_tokens or rollout.max_new_tokens. `python -m raft_jax.plan "
      "--topology cpu:1` says what each of them saves"
    )


def step_bytes(config: schema.Config, run: setup.Prepared, built: setup.Built) -> int:
  """What the update of the widest batch, a step's largest program, and all that it
  reads take of this machine's memory, on all of its devices that the run uses."""
  parts = beside(config, run, built)
  memory: Any = compile_update(config, run, built, parts).memory_analysis()
  waiting = held(parts) - held((parts.frozen, parts.anchor))  # the teacher's own
  a_device = (
    waiting
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
  return a_device * len(run.mesh.local_devices)


def rough_bytes(config: schema.Config, run: setup.Prepared) -> float:
  """What a step takes if all activations are kept, in float32: by layer and token about
  twelve of the model's width, six of the feed-forward's, three rows of attention."""
  decoder, rows = run.decoder, setup.batch_rows(config)
  prompt, answer, _ = run.widest
  width = prompt + answer + config.rollout.max_new_tokens
  values = 12 * decoder.d_model + 6 * decoder.d_ff + 3 * decoder.n_heads * width
  parameters = sum(leaf.size for leaf in jax.tree.leaves(transformer.shapes(decoder)))
  # Weights, two moments, a gradient and the base model; then the activations.
  return 4.0 * (5 * parameters + rows * width * decoder.n_layers * values)


def compile_update(
  config: schema.Config,
  run: setup.Prepared,
  built: setup.Built,
  parts: initial_state.Beside,
) -> jax.stages.Compiled:
  """The update of a run's widest batch."""
  state, batch, programs = built.abstract, widest_batch(config, run), built.programs
  roll_out, teach, rows = programs.roll_out, programs.teach, setup.batch_rows(config)
  trajectory = objective.Trajectory(
    np.zeros((rows, 0), np.int32), np.zeros(rows, np.int32)
  )
  support = None
  if roll_out is not None and teach is not None:
    numbers = range(run.total_steps)
    step = next((n for n in numbers if programs_lib.rolls_out(config, n)), 0)
    trajectory, _ = jax.eval_shape(
      lambda *args: roll_out(*args, step), state.params, parts.frozen, batch
    )
    teacher = parts.teacher
    if programs.teacher is not None:
      teacher = programs.teacher(teacher, state, parts.frozen)
    support = jax.eval_shape(
      teach, teacher, batch.teacher_BC, batch.teacher_length_B, trajectory
    )
  update: Any = programs.update
  lowered = update.lower(
    *(state, parts.frozen, batch, trajectory, support), anchor=parts.anchor
  )
  return lowered.compile(compiler_options=QUICKLY)


def host_bytes() -> int:
  """Memory of this machine, or of the container."""
  found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for path in LIMITS:
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
      found.append(int(pathlib.Path(path).read_text()))
  return min(found)
