"""What a run starts from: train state, reference parameters and replay memory."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.baselines import anchors, das, fisher, mssr
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.distillation import step as step_lib
from raft_jax.hf import load as hf_load
from raft_jax.models import quantised, sharding, transformer
from raft_jax.runtime import distributed, progress
from raft_jax.training import (
  base_losses,
  checkpoint,
  optim,
  run_inputs,
  run_plan,
)


class Start(NamedTuple):
  """What the loop begins with.

  Attributes:
    replayer: adaptive replay with its memory, or None.
    token_weights: weight of each answer token by row id, if it comes from the base
      model's losses; else None.
    step: steps that were already taken.
  """

  state: step_lib.TrainState
  reference: step_lib.ReferenceParams
  replayer: mssr.Replayer | None
  token_weights: Mapping[int, np.ndarray] | None
  step: int


def start(
  config: schema.Config,
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  checkpoints: Any,
  *,
  on_corrupt: str,
) -> Start:
  """Loads the base model as far as it is needed, and makes or restores the state.

  Args:
    checkpoints: Orbax's manager of the run's checkpoints.
    on_corrupt: see `checkpoint.check_latest`.
  """
  resumes = checkpoints.latest_step() is not None
  losses = stored_base_losses(config, inputs)
  measures = inputs.base_loss_rows is not None and losses is None
  base = None
  if reads_base(plan) or measures or not resumes:
    source = config.model.source
    base = load_params(
      source,
      plan.decoder,
      plan.base_dtype,
      plan.base_shardings,
      form=plan.base_form,
    )
  if resumes:
    state, memory, step = restore(checkpoints, plan, inputs, on_corrupt)
    print(f"resuming after step {step} of {plan.schedule.total_steps}")
  else:
    assert base is not None
    state = new_state(
      plan,
      inputs,
      base,
      anchor=config.anchor,
      soft_mask=config.soft_mask,
      seed=config.train.seed,
    )
    step = 0
    memory = first_memory(plan, inputs.replay, base, config.train.batch_size)
  token_weights = base_token_weights(config, plan, inputs, base, losses)
  source_teacher = None
  if plan.frozen_teacher and plan.teacher_decoder is not None:
    source_teacher = load_params(
      str(config.distill.source),
      plan.teacher_decoder,
      plan.settings.compute.dtype,
      run_plan.param_shardings(plan.mesh, plan.teacher_decoder),
    )
  reference = reference_params(plan, base, source_teacher)
  replayer = None
  if inputs.replay is not None and memory is not None:
    replayer = mssr.Replayer(inputs.replay, memory)
  return Start(state, reference, replayer, token_weights, step)


def load_params(
  source: str,
  decoder: transformer.DecoderConfig,
  dtype: str,
  shardings: transformer.Params,
  *,
  form: str | None = None,
) -> transformer.Params:
  """A model's parameters in their shards; each process reads those of its devices.

  Args:
    form: of quantised kernels; None: there are none.
  """
  return distributed.run_on_all(
    lambda: hf_load.load_params(
      source, decoder, dtype=dtype, shardings=shardings, form=form
    )
  )


# --- Reference parameters -------------------------------------------------------------


def reads_base(plan: run_plan.RunPlan) -> bool:
  """Whether the steps or the validation read the base model's parameters."""
  return _reads_rounded_base(plan) or plan.anchored


def _reads_rounded_base(plan: run_plan.RunPlan) -> bool:
  base_teaches = plan.frozen_teacher and plan.teacher_decoder is None
  return base_teaches or plan.compares_base or plan.split.freeze is not None


def reference_params(
  plan: run_plan.RunPlan,
  base: transformer.Params | None,
  source_teacher: transformer.Params | None,
) -> step_lib.ReferenceParams:
  """The parameters that the steps read, from the base model's or their placed shapes.

  Of shapes it gives shapes, of which equal objects stand for one buffer.

  Args:
    base: the base model in `plan.base_dtype`; None if nothing reads it.
    source_teacher: the model of `distill.source`, if that is the teacher.
  """
  if base is None or not reads_base(plan):
    return step_lib.ReferenceParams({}, source_teacher, None)
  rounded = base
  if _reads_rounded_base(plan):
    rounded = jax.tree.map(
      lambda leaf: _cast(leaf, plan.settings.compute.dtype),
      base,
      is_leaf=quantised.is_quantised,
    )
  teacher = source_teacher
  if plan.frozen_teacher and plan.teacher_decoder is None:
    teacher = rounded
  compared = base if plan.edits_base else rounded
  return step_lib.ReferenceParams(
    frozen=_frozen(plan, rounded),
    teacher=teacher,
    anchor=base if plan.anchored else None,
    base=compared if plan.compares_base else None,
  )


def _cast(leaf: Any, dtype: str) -> Any:
  """An array or a placed shape in a dtype; the same object if it has that dtype.

  Quantised kernels are left as they are.
  """
  if quantised.is_quantised(leaf) or leaf.dtype == jnp.dtype(dtype):
    return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
  return leaf.astype(dtype)


def _frozen(plan: run_plan.RunPlan, base: transformer.Params) -> transformer.Params:
  """The frozen tree, in the buffers (or shapes) of the base model."""
  freeze = plan.split.freeze
  if freeze is None:
    return {}
  if not isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct):
    return freeze(base)
  everywhere = sharding.replicated(plan.mesh)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
    jax.eval_shape(freeze, base),
  )
  return {**shapes, **base}


# --- A new run ------------------------------------------------------------------------


def new_state(
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  base: transformer.Params,
  *,
  anchor: schema.Anchor | None,
  soft_mask: schema.SoftMask | None,
  seed: int,
) -> step_lib.TrainState:
  """The state before the first step."""

  @functools.partial(jax.jit, out_shardings=plan.state_shardings)
  def init(base: transformer.Params) -> step_lib.TrainState:
    params = plan.split.start(base)
    return step_lib.TrainState(jnp.int32(0), params, plan.optimizer.init(params))

  state = init(base)
  importance: dict[str, Any] = {}
  if inputs.anchor_batches is not None and anchor is not None:
    importance[optim.ANCHOR] = anchors.with_importance(
      state.opt_state[optim.ANCHOR],
      parameter_importance(anchor, seed, plan, inputs, base),
    )
  if inputs.soft_mask_batches is not None and soft_mask is not None:
    importance[optim.SOFT_MASK] = das.importance(
      base,
      placed(plan.mesh, inputs.soft_mask_batches, "importance of units"),
      settings=plan.settings,
      rate=soft_mask.drop,
      seed=seed,
    )
  # A copy of the same type: with another, the second step would compile again.
  opt_state = state.opt_state.copy()
  opt_state.update(importance)
  return state._replace(opt_state=opt_state)


def parameter_importance(
  settings: schema.Anchor,
  seed: int,
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  base: transformer.Params,
) -> transformer.Params:
  """The Fisher information that weighs the pull to the base model."""
  batches = placed(plan.mesh, inputs.anchor_batches, "importance of parameters")
  size = 1
  if settings.importance == "sampled":
    size = settings.batch_size
    batches = fisher.sampled(
      base,
      batches,
      plan.settings,
      seed=seed,
      max_new_tokens=settings.max_new_tokens,
      pad_id=inputs.tokenizer.pad_id,
    )
  information = fisher.diagonal(
    functools.partial(fisher.log_likelihood, settings=plan.settings),
    base,
    batches,
    size,
  )
  return fisher.normalised(information)


def first_memory(
  plan: run_plan.RunPlan,
  replay: mssr.Plan | None,
  base: transformer.Params,
  batch_size: int,
) -> mssr.Memory | None:
  """The memory of adaptive replay: takes one pass over all rows that it may replay."""
  if replay is None:
    return None
  batches = batching.sequential_batches(
    replay.rows, batch_size, pad_id=replay.pad_id, width=replay.widths[-1]
  )
  losses_of = jax.jit(functools.partial(objective.row_losses, settings=plan.settings))
  losses = [
    distributed.to_host(losses_of(base, batch))
    for batch in placed(plan.mesh, batches, "losses before training")
  ]
  return mssr.fresh(
    np.concatenate(losses)[: len(replay.rows)],
    strength=replay.settings.strength,
    interval=replay.settings.interval,
  )


def stored_base_losses(
  config: schema.Config, inputs: run_inputs.RunInputs
) -> base_losses.Losses | None:
  """The stored losses of the base model, if token weights read them and they fit."""
  if inputs.base_loss_rows is None:
    return None
  own = base_losses.identity(inputs.identity, config.model.dtype)
  return base_losses.read_on_all(pathlib.Path(config.output), own)


def base_token_weights(
  config: schema.Config,
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  base: transformer.Params | None,
  losses: base_losses.Losses | None,
) -> Mapping[int, np.ndarray] | None:
  """The token weights that follow from the base model's losses, by row id.

  Args:
    base: the base model's parameters; read only to measure the losses.
    losses: the stored ones; None: measures and stores them.
  """
  rows, settings = inputs.base_loss_rows, config.token_weights
  if rows is None or settings is None:
    return None
  if losses is None:
    assert base is not None
    title = "losses of the base model"
    measured = base_losses.measure(
      base, rows, plan.settings, lambda batches: placed(plan.mesh, batches, title)
    )
    own = base_losses.identity(inputs.identity, config.model.dtype)
    output = pathlib.Path(config.output)

    def write() -> None:
      if distributed.is_primary():
        base_losses.write(output, measured, own)

    distributed.run_on_all(write)
    losses = measured
  return base_losses.weights_by_row(settings, losses, rows)


def placed(mesh: Any, batches: Any, title: str) -> Iterable[batching.Batch]:
  """Batches on their devices, with a progress bar."""
  if distributed.is_primary():
    batches = progress.with_bar(batches, title, unit="step")
  for batch in batches:
    # A batch of few rows, such as one, may not divide: every device then reads it all.
    rows = sharding.place(mesh, ("batch",), batch.row_id_B.shape)
    yield sharding.spread(rows, batch)


# --- Checkpoints ----------------------------------------------------------------------


def save(
  checkpoints: Any,
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  step: int,
  state: step_lib.TrainState,
  replayer: mssr.Replayer | None,
) -> None:
  """Starts to save the train state and, with adaptive replay, its memory."""
  tree: Any = state
  if replayer is not None:
    memory = sharding.spread(sharding.replicated(plan.mesh), replayer.memory)
    tree = {**state._asdict(), "memory": memory}
  checkpoint.save(checkpoints, step, tree, inputs.identity)


def restore(
  checkpoints: Any,
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  on_corrupt: str,
) -> tuple[step_lib.TrainState, mssr.Memory | None, int]:
  """State, replay memory and step of the newest checkpoint."""
  identity = inputs.identity
  if inputs.replay is None:
    state, step = checkpoint.restore(
      checkpoints, plan.abstract_state, identity, on_corrupt=on_corrupt
    )
    return state, None, step
  everywhere = sharding.replicated(plan.mesh)
  blank = mssr.fresh(np.zeros(len(inputs.replay.rows)), strength=0, interval=0)
  memory = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
    blank,
  )
  tree, step = checkpoint.restore(
    checkpoints,
    {**plan.abstract_state._asdict(), "memory": memory},
    identity,
    on_corrupt=on_corrupt,
  )
  memory = distributed.to_host(tree.pop("memory"))
  return step_lib.TrainState(**tree), memory, step
