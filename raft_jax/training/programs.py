"""The compiled parts of a step, as the config wants them: rollout, teacher, update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from raft_jax.baselines import mssr, sdpo
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.distillation import step as step_lib
from raft_jax.hf import chat
from raft_jax.models import partition, sampling, transformer
from raft_jax.training import recipe


class Programs(NamedTuple):
  """The three compiled parts of a step, and whose parameters the teacher has.

  Attributes:
    teacher: (the base model's or `distill.source`'s parameters, state, frozen
      parameters) -> the teacher's.
    instruct: (batch, trajectory) -> both with a teacher's context that depends on the
      rollouts; made on the host, which waits for them.
  """

  roll_out: Callable[..., tuple[objective.Trajectory, jax.Array | None]] | None
  teach: Callable[..., objective.Support] | None
  update: Callable[..., tuple[step_lib.TrainState, dict[str, jax.Array]]]
  teacher: Callable[..., transformer.Params] | None = None
  instruct: Callable[..., sdpo.Instructed] | None = None


TEACHERS: dict[str, Callable[..., transformer.Params]] = {
  "base": lambda base, state, frozen: base,
  "live": lambda base, state, frozen: partition.combine(frozen, state.params),
  "average": lambda base, state, frozen: partition.combine(
    frozen, state.opt_state[recipe.AVERAGE].average
  ),
}
"""`distill.teacher` -> `Programs.teacher`."""


def make_settings(
  config: schema.Config,
  decoder: transformer.DecoderConfig,
  tokenizer: chat.ChatTokenizer,
  teacher: transformer.DecoderConfig | None = None,
  *,
  platform: str = "cpu",
) -> objective.Settings:
  """The few values the step needs on devices of a platform, as JAX names it."""
  distill, unroll = config.distill, config.model.unroll
  return objective.Settings(
    decoder=decoder,
    eos_ids=tokenizer.eos_ids,
    dtype=config.model.dtype,
    remat=config.model.remat,
    unroll=unroll,
    attention=config.model.attention,
    rollout_unroll=sampling.unrolled(config.rollout.unroll, unroll, platform),
    micro_batches=config.train.micro_batches,
    cross_entropy=config.train.cross_entropy,
    loss_mean=config.train.loss_mean,
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
    teacher_decoder=teacher,
    row_losses=mssr.adaptive(config),
  )


def rolls_out(config: schema.Config, step: int) -> bool:
  """Whether the trajectory of a step is a rollout: a function of seed and step."""
  if config.distill.trajectory != "mixed":
    return config.distill.trajectory == "rollout"
  drawn = np.random.default_rng((config.train.seed, step)).random()  # in [0, 1)
  return bool(drawn < config.distill.on_policy)


def compile_programs(
  config: schema.Config,
  settings: objective.Settings,
  tokenizer: chat.ChatTokenizer,
  optimizer: optax.GradientTransformationExtraArgs,
  balancer: optax.GradientTransformationExtraArgs,
  state_shardings: step_lib.TrainState,
  *,
  distil: bool,
  asked: Mapping[int, batching.Conversation],
) -> Programs:
  """Jits rollout, teacher and update; each compiles once per batch width.

  Args:
    asked: questions and answers by row id, for a teacher that reads rollouts.
  """
  update = jax.jit(
    functools.partial(
      step_lib.update, optimizer=optimizer, balancer=balancer, settings=settings
    ),
    static_argnames="measure",
    donate_argnums=0,
    out_shardings=(state_shardings, None),
  )
  if not distil:
    return Programs(None, None, update)

  def roll_out(
    params: transformer.Params,
    frozen: transformer.Params,
    batch: batching.Batch,
    step: int,
  ):
    if not rolls_out(config, step):
      return objective.Trajectory(batch.answer_BA, batch.answer_length_B), None
    rollout = sampling.generate(
      partition.combine(frozen, params),
      settings.decoder,
      batch.prompt_BP,
      batch.prompt_length_B,
      batch.row_id_B,
      seed=config.train.seed,
      step=step,
      max_new_tokens=config.rollout.max_new_tokens,
      temperature=config.rollout.temperature,
      top_p=config.rollout.top_p,
      eos_ids=tokenizer.eos_ids,
      pad_id=tokenizer.pad_id,
      dtype=settings.dtype,
      unroll=settings.rollout_unroll,
      top_tokens=settings.watch,
    )
    trajectory = objective.Trajectory(
      rollout.tokens_BR, rollout.length_B, rollout.stats
    )
    return trajectory, rollout.ended_B

  teach = jax.jit(functools.partial(objective.teach, settings=settings))
  instruct = None
  if config.distill.teacher_context == "sibling":
    instruct = functools.partial(
      sdpo.instruct,
      tokenizer=tokenizer,
      asked=asked,
      group=config.rollout.group,
      success=config.distill.success,
      max_tokens=config.data.max_teacher_tokens,
    )
  return Programs(roll_out, teach, update, TEACHERS[config.distill.teacher], instruct)
