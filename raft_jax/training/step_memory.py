"""Whether this machine has room for a run's steps.

If a CPU is the device, nothing reports that memory is full: the kernel swaps, or kills
the process without a message. So the memory of a step is checked before weights load.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax import errors
from raft_jax.data import batching
from raft_jax.distillation import sequences
from raft_jax.distillation import step as step_lib
from raft_jax.models import quantised_base, sharding, transformer
from raft_jax.training import initial_state, run_plan
from raft_jax.training import programs as programs_lib

LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
"""Files with the memory limit of a container, for the two versions of cgroups."""

FAST_COMPILATION = {"xla_backend_optimization_level": 0}
"""XLA options for a program that will not run: the same buffers, in half the time."""


# --- Shapes and their bytes -----------------------------------------------------------


def reference_shapes(plan: run_plan.RunPlan) -> step_lib.ReferenceParams:
  """The shapes of the parameters that the steps read and never change."""

  def shapes(
    decoder: transformer.DecoderConfig, dtype: str, form: str | None = None
  ) -> transformer.Params:
    return jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      quantised_base.shapes(decoder, form, dtype),
      run_plan.param_shardings(plan.mesh, decoder, form),
    )

  source_teacher = None
  if plan.frozen_teacher and plan.teacher_decoder is not None:
    source_teacher = shapes(plan.teacher_decoder, plan.settings.compute.dtype)
  base = shapes(plan.decoder, plan.base_dtype, plan.base_form)
  return initial_state.reference_params(plan, base, source_teacher)


def widest_batch(plan: run_plan.RunPlan) -> batching.Batch:
  """The shapes of a run's widest batch."""
  rows, by_row = plan.batch_rows, sharding.batch(plan.mesh)

  def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)

  prompt, answer, teacher = plan.widest
  token_weights = None
  if plan.weighs_by_base:
    shape = (rows, answer)
    token_weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_row)
  return batching.Batch(
    prompt_BP=ints(rows, prompt),
    prompt_length_B=ints(rows),
    answer_BA=ints(rows, answer),
    answer_length_B=ints(rows),
    teacher_BC=ints(rows, teacher),
    teacher_length_B=ints(rows),
    row_id_B=ints(rows),
    token_weight_BA=token_weights,
  )


def bytes_per_device(tree: Any) -> int:
  """Bytes of a tree of placed shapes on one device.

  Equal objects count once: frozen parameters, teacher and anchor may share buffers.
  """
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
  )


# --- This machine's memory ------------------------------------------------------------


def check(plan: run_plan.RunPlan) -> None:
  """Refuses a run whose widest batch does not fit into this machine's memory.

  Applies to CPUs only. Compiling the step takes some seconds, so a rough estimate
  comes first and decides if it is low enough.

  Raises:
    errors.UserError: with the bytes needed and available, and what takes less.
  """
  if sharding.platform(plan.mesh) != "cpu":
    return
  available = host_bytes()
  if rough_bytes(plan) < available / 3:
    return
  needed = step_bytes(plan)
  if needed > available:
    recompute = "" if plan.settings.compute.remat else "set model.remat=true, "
    raise errors.UserError(
      f"memory: a step takes at least {needed / 2**30:.1f} GiB, and this machine has "
      f"{available / 2**30:.1f} GiB; {recompute}raise train.micro_batches (now "
      f"{plan.settings.micro_batches}, of {plan.batch_rows} rows), or lower "
      "data.max_*_tokens or rollout.max_new_tokens. `python -m raft_jax.plan "
      "--config FILE --topology cpu:1` shows what each of them saves"
    )


def step_bytes(plan: run_plan.RunPlan) -> int:
  """Bytes of this machine's memory that a step takes, on all devices that it uses.

  The largest program, the update of the widest batch, decides, together with all
  parameters that stay in memory.
  """
  reference = reference_shapes(plan)
  memory: Any = compile_update(plan, reference).memory_analysis()
  read_by_update = (reference.frozen, reference.anchor)
  others = bytes_per_device(reference) - bytes_per_device(read_by_update)
  per_device = (
    others
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
  return per_device * len(plan.mesh.local_devices)


def rough_bytes(plan: run_plan.RunPlan) -> float:
  """Estimate of a step's bytes if all activations are kept, in float32.

  Per layer and token it counts twelve times the model's width, six times the
  feed-forward's, and three rows of attention scores.
  """
  decoder, (prompt, answer, _) = plan.decoder, plan.widest
  width = prompt + answer + plan.rollouts.max_new_tokens
  inner: float = decoder.d_ff * max(decoder.experts_per_token, 1)
  if decoder.kv_sharing is not None:  # the mean over layers of two widths
    first, wide = decoder.kv_sharing.first, decoder.kv_sharing.d_ff
    inner += (wide - decoder.d_ff) * (decoder.n_layers - first) / decoder.n_layers
  values = 12 * decoder.d_model + 6 * inner + 3 * decoder.n_heads * width
  parameters = sum(leaf.size for leaf in jax.tree.leaves(transformer.shapes(decoder)))
  # Weights, two moments, a gradient and the base model; then the activations.
  activations = plan.batch_rows * width * decoder.n_layers * values
  return 4.0 * (5 * parameters + activations)


def compile_update(
  plan: run_plan.RunPlan, reference: step_lib.ReferenceParams
) -> jax.stages.Compiled:
  """Compiles the update of a run's widest batch."""
  state, batch, programs = plan.abstract_state, widest_batch(plan), plan.programs
  roll_out, score_teacher = programs.roll_out, programs.score_teacher
  trajectory = sequences.empty_trajectory(plan.batch_rows)
  support = None
  if roll_out is not None and score_teacher is not None:
    step = first_rollout_step(plan)
    trajectory, _ = jax.eval_shape(
      lambda *args: roll_out(*args, step), state.params, reference.frozen, batch
    )
    teacher = reference.teacher
    if programs.teacher_params is not None:
      teacher = programs.teacher_params(teacher, state, reference.frozen)
    support = jax.eval_shape(
      score_teacher, teacher, batch.teacher_BC, batch.teacher_length_B, trajectory
    )
  update: Any = programs.update
  lowered = update.lower(
    state, reference.frozen, batch, trajectory, support, anchor=reference.anchor
  )
  return lowered.compile(compiler_options=FAST_COMPILATION)


def first_rollout_step(plan: run_plan.RunPlan) -> int:
  """The first step whose trajectory is a rollout; 0 if none is."""
  share, seed = plan.rollouts.share, plan.rollouts.seed
  for step in range(plan.schedule.total_steps):
    if programs_lib.rolls_out(share, seed=seed, step=step):
      return step
  return 0


def host_bytes() -> int:
  """Memory of this machine or, if it is less, of the container."""
  sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for path in LIMITS:
    with contextlib.suppress(OSError, ValueError):  # "max" is not a number
      sizes.append(int(pathlib.Path(path).read_text()))
  return min(sizes)
