"""The plan of a run: everything that follows from its config without weights or rows.

Training, the memory check and `plan`, which compiles for absent machines, use the same
`make_plan`. It allocates nothing on a device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from raft_jax import errors
from raft_jax.baselines import mssr, sdpo
from raft_jax.config import schema
from raft_jax.data import batching, token_rows
from raft_jax.distillation import answer_losses, objective, step
from raft_jax.hf import load as hf_load
from raft_jax.hf import peft_adapter, teacher_prompts
from raft_jax.models import (
  experts,
  lora,
  partition,
  quantised_base,
  sampling,
  sharding,
  transformer,
)
from raft_jax.training import (
  base_losses,
  optim,
  plan_checks,
  step_schedule,
  throughput,
)
from raft_jax.training import programs as programs_lib


class RunPlan(NamedTuple):
  """What a run computes with.

  Attributes:
    split: which parameters are trained.
    optimizer: the whole chain.
    rates: float32 [steps], the learning rate of every step, on the host.
    abstract_state: shapes and shardings of the train state, to restore into.
    state_shardings: of the train state.
    batch_rows: rows of every batch, with replayed ones and one for each rollout.
    widest: padded widths of the widest batch.
    siblings: if the teacher reads other rollouts of the same question; else None.
    leak_phrases: phrases of the teacher's prompt that rollouts must not contain.
    frozen_teacher: whether a model that never changes is the teacher.
    anchored: whether updates read the base model's parameters.
    compares_base: whether validation reads the base model.
    weighs_by_base: whether the base model's losses weigh the answers' tokens.
    base_form: of the quantised kernels of the frozen model; None: it has none.
    meter: what the speed of a step is measured by.
    edits_base: whether validation edits trained weights towards the base model's, as
      `evaluate` does, and so needs them in float32.
  """

  mesh: Mesh
  split: partition.Split
  settings: objective.Settings
  rollouts: programs_lib.Rollouts
  schedule: step_schedule.StepSchedule
  optimizer: optax.GradientTransformationExtraArgs
  rates: np.ndarray
  abstract_state: step.TrainState
  state_shardings: step.TrainState
  programs: programs_lib.Programs
  batch_rows: int
  widest: token_rows.Widths
  siblings: sdpo.Siblings | None
  leak_phrases: tuple[str, ...]
  frozen_teacher: bool
  anchored: bool
  compares_base: bool
  weighs_by_base: bool
  edits_base: bool
  meter: throughput.Meter
  base_form: str | None = None

  @property
  def decoder(self) -> transformer.DecoderConfig:
    """The model's network."""
    return self.settings.decoder

  @property
  def teacher_decoder(self) -> transformer.DecoderConfig | None:
    """The network of `distill.source`; None if the teacher is the model itself."""
    return self.settings.teacher_decoder

  @property
  def base_shardings(self) -> transformer.Params:
    """Shardings of the base model's parameters."""
    return param_shardings(self.mesh, self.decoder, self.base_form)

  @property
  def base_dtype(self) -> str:
    """The type in which the base model is loaded."""
    exact = self.split.trains_base or self.edits_base
    return "float32" if exact else self.settings.compute.dtype


def make_plan(
  config: schema.Config,
  decoder: transformer.DecoderConfig,
  teacher_decoder: transformer.DecoderConfig | None,
  mesh: Mesh,
  *,
  batch_rows: int,
  widest: token_rows.Widths,
  total_steps: int,
  eos_ids: tuple[int, ...],
  pad_id: int,
) -> RunPlan:
  """Plans a run that `plan_checks.check` has accepted.

  Args:
    teacher_decoder: the network of `distill.source`, if it is set.
    eos_ids: ids that end an answer; with `pad_id`, all that is needed of a tokenizer.

  Raises:
    errors.UserError: a section's values do not fit this model or run.
  """
  train, distill, validation = config.train, config.distill, config.validation
  plan_checks.check_experts(config.model.source, decoder, train, config.soft_mask)
  distils = uses_distillation(distill, config.balance)
  split = make_split(config.lora, config.model.source, decoder, train.seed)
  balancer = optim.make_balancer(config.balance, total_steps)
  rate = optim.warmup_cosine(train.learning_rate, total_steps, train.warmup_ratio)
  optimizer = optim.make_optimizer(
    config, balancer, rate, split.shapes, decoder, total_steps
  )
  abstract_state, shardings = state_shardings(mesh, split, optimizer)
  platform = sharding.platform(mesh)
  settings = make_settings(config, decoder, teacher_decoder, eos_ids, platform)
  rollouts = make_rollouts(config.rollout, distill, train.seed, pad_id)
  sections = (config.prune, config.hard_threshold, config.interpolate)
  edits = any(section is not None for section in sections)
  return RunPlan(
    mesh=mesh,
    split=split,
    settings=settings,
    rollouts=rollouts,
    schedule=step_schedule.make(train, config.balance, validation, total_steps),
    optimizer=optimizer,
    rates=np.asarray(jax.vmap(rate)(jnp.arange(total_steps))),
    abstract_state=abstract_state,
    state_shardings=shardings,
    programs=programs_lib.compile_programs(
      settings,
      rollouts,
      optimizer=optimizer,
      balancer=balancer,
      state_shardings=shardings,
      teacher=distill.teacher if distils else None,
      rollout_mesh=make_rollout_mesh(mesh, config.rollout),
    ),
    batch_rows=batch_rows,
    widest=widest,
    siblings=make_siblings(distill, config.rollout, config.data) if distils else None,
    leak_phrases=teacher_prompts.leak_phrases(distill.teacher_context),
    frozen_teacher=distils and distill.teacher == "base",
    anchored=optim.reads_anchor(config.anchor, config.recadam),
    compares_base=validation is not None and (edits or bool(validation.drift.prompts)),
    weighs_by_base=base_losses.are_read(config.token_weights),
    edits_base=validation is not None and edits,
    meter=make_meter(decoder, mesh, trains_weights=split.trains_base),
    base_form=config.lora.base if config.lora is not None else None,
  )


def make_budget_plan(
  config: schema.Config,
  decoder: transformer.DecoderConfig,
  teacher_decoder: transformer.DecoderConfig | None,
  mesh: Mesh,
) -> RunPlan:
  """The plan of a run whose rows are as long as the budgets of `data` allow.

  Raises:
    errors.UserError: as `plan_checks.check`.
  """
  distils = uses_distillation(config.distill, config.balance)
  layout = plan_checks.batch_layout(
    config.train.batch_size, config.replay, config.rollout, distils=distils
  )
  plan_checks.check(
    config.model,
    decoder,
    mesh,
    top_k=config.distill.top_k if distils else None,
    rows=layout.rows,
    micro_batches=config.train.micro_batches,
    rollout_tensor=config.rollout.tensor,
  )
  prompt, answer, teacher = map(batching.padded_width, token_rows.budgets(config.data))
  return make_plan(
    config,
    decoder,
    teacher_decoder,
    mesh,
    batch_rows=layout.rows,
    widest=(prompt, answer, teacher),
    total_steps=1,
    # Any ids will do: they change no cost.
    eos_ids=(0,),
    pad_id=0,
  )


def make_rollouts(
  rollout: schema.Rollout, distill: schema.Distill, seed: int, pad_id: int
) -> programs_lib.Rollouts:
  """How trajectories are made."""
  return programs_lib.Rollouts(
    share=programs_lib.rollout_share(distill),
    seed=seed,
    max_new_tokens=rollout.max_new_tokens,
    temperature=rollout.temperature,
    top_p=rollout.top_p,
    pad_id=pad_id,
  )


def make_rollout_mesh(mesh: Mesh, rollout: schema.Rollout) -> Mesh | None:
  """The mesh on which the student samples; None: that of the run."""
  if rollout.tensor in (None, mesh.shape["tensor"]):
    return None
  return sharding.decode_mesh(mesh, rollout.tensor)


def make_meter(
  decoder: transformer.DecoderConfig, mesh: Mesh, *, trains_weights: bool
) -> throughput.Meter:
  """What the speed of a step on a mesh is measured by."""
  peak = throughput.peak_flops(mesh.devices.flat[0].device_kind)
  count = transformer.parameter_count(decoder)
  return throughput.Meter(
    active=experts.active_parameters(decoder, count),
    trains_weights=trains_weights,
    peak=None if peak is None else peak * mesh.size,
  )


def make_siblings(
  distill: schema.Distill, rollout: schema.Rollout, data: schema.Data
) -> sdpo.Siblings | None:
  """If the teacher reads other rollouts of the same question, which ones; else None."""
  if distill.teacher_context != "sibling":
    return None
  return sdpo.Siblings(rollout.group, distill.success, data.max_teacher_tokens)


def make_settings(
  config: schema.Config,
  decoder: transformer.DecoderConfig,
  teacher_decoder: transformer.DecoderConfig | None,
  eos_ids: tuple[int, ...],
  device_platform: str,
) -> objective.Settings:
  """The values of a step that are fixed for a run."""
  model, train, distill = config.model, config.train, config.distill
  return objective.Settings(
    decoder=decoder,
    eos_ids=eos_ids,
    compute=transformer.Compute(
      dtype=model.dtype,
      remat=model.remat,
      unroll=model.unroll,
      attention=model.attention,
    ),
    rollout_unroll=sampling.unrolled(
      config.rollout.unroll, model.unroll, device_platform
    ),
    micro_batches=train.micro_batches,
    cross_entropy=train.cross_entropy,
    loss_mean=train.loss_mean,
    top_k=distill.top_k,
    support=distill.support,
    max_importance=distill.max_importance,
    temperature=distill.temperature,
    direction=distill.direction,
    beta=distill.beta if distill.direction == "jsd" else None,
    tail=distill.tail,
    scale_by_t2=distill.scale_by_t2,
    skip_first=distill.skip_first,
    mask_eos=distill.mask_eos,
    teacher_decoder=teacher_decoder,
    row_losses=mssr.is_adaptive(config.replay),
    token_rule=make_token_rule(config.token_weights, model.source, decoder.vocab_size),
    router_loss=train.router_loss,
    on_answers=train.cross_entropy and distill.trajectory == "answer",
  )


def make_token_rule(
  settings: schema.TokenWeights | None, source: str, vocabulary: int
) -> answer_losses.TokenRule | None:
  """How the step weighs tokens; None if it does not, or by weights of the batch.

  Raises:
    errors.UserError: the vocabulary is smaller than `token_weights.top_k`.
  """
  if settings is None or base_losses.are_read(settings):
    return None
  if settings.rule == "eaft" and settings.top_k > vocabulary:
    raise errors.UserError(
      f"token_weights.top_k: {settings.top_k} is larger than the vocabulary of "
      f"{source} ({vocabulary}); lower it"
    )
  return answer_losses.TokenRule(
    name=settings.rule,
    exponent=settings.exponent,
    top_k=settings.top_k,
    max_entropy=settings.max_entropy,
    floor=settings.floor,
    temperature=settings.temperature,
  )


def uses_distillation(distill: schema.Distill, balance: schema.Balance) -> bool:
  """Whether a run distils; a term of constant weight 0 is not computed at all."""
  never = balance.mode == "fixed" and balance.weight == 0
  return distill.teacher != "none" and not never


def make_split(
  settings: schema.Lora | None,
  source: str,
  decoder: transformer.DecoderConfig,
  seed: int,
) -> partition.Split:
  """Which parameters are trained: all, or the adapters of the `lora` section.

  Raises:
    errors.UserError: the section does not fit the model.
  """
  if settings is None:
    return partition.everything(decoder)
  quantised_base.check(decoder, settings.base, source)
  # Apart from the keys of the rollouts, which fold a step into the seed.
  key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
  kernels = peft_adapter.targets(hf_load.family(source), settings.targets)
  return lora.split(decoder, kernels, rank=settings.rank, alpha=settings.alpha, key=key)


# --- Devices, shapes and shardings ----------------------------------------------------


def param_shardings(
  mesh: Mesh, decoder: transformer.DecoderConfig, form: str | None = None
) -> transformer.Params:
  """Shardings of all parameters of a model.

  Args:
    form: of quantised kernels; None: there are none.
  """
  return sharding.tree(
    mesh, quantised_base.axes(decoder, form), quantised_base.shapes(decoder, form)
  )


def state_shardings(
  mesh: Mesh,
  split: partition.Split,
  optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[step.TrainState, step.TrainState]:
  """The train state as placed shapes, and its shardings; allocates nothing."""
  params = split.shapes
  placed = sharding.tree(mesh, split.axes, params)
  everywhere = sharding.replicated(mesh)
  opt_shapes = jax.eval_shape(optimizer.init, params)
  opt_placed = optax.tree.map_params(
    optimizer,
    lambda _, where: where,
    opt_shapes,
    placed,
    transform_non_params=lambda _: everywhere,
  )
  step_shape = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = step.TrainState(step_shape, params, opt_shapes)
  shardings = step.TrainState(everywhere, placed, opt_placed)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    shardings,
  )
  return abstract, shardings
