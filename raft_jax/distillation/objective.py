"""The two losses of a step, as functions of the parameters.

The student reads one packed row per example, [prompt | answer | trajectory], in which
the trajectory cannot see the answer: the prompt is computed once for both losses. The
teacher reads [its context | trajectory]. Hidden states are taken only where a loss
reads them, and no [tokens, vocabulary] array exists.

Shapes: B rows, P prompt width, A answer width, C teacher context width, R trajectory
width, K support size, D model width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax import losses, vocab_head
from raft_jax.data import batching
from raft_jax.models import layer_functions, sampling, sharding, transformer


class Settings(NamedTuple):
  """What is fixed for a run; hashable, so that it can be static under jit."""

  decoder: transformer.DecoderConfig
  eos_ids: tuple[int, ...]
  dtype: str = "float32"
  remat: bool = False
  unroll: int = 1
  rollout_unroll: int = 1
  attention: layer_functions.Implementation = "xla"
  micro_batches: int = 1
  cross_entropy: bool = True
  loss_mean: str = "sequence"
  top_k: int = 512
  support: str = "teacher"
  max_importance: float | None = None
  temperature: float = 1.5
  direction: str = "forward"
  beta: float | None = None
  tail: str = "renormalize"
  scale_by_t2: bool = True
  skip_first: int = 0
  mask_eos: bool = False
  teacher_decoder: transformer.DecoderConfig | None = None
  row_losses: bool = False

  @property
  def mass_temperature(self) -> float:
    """Of the probability mass on the support: the tail bucket needs it at the loss's
    temperature; otherwise it is only logged, for the distribution that is sampled."""
    return self.temperature if self.tail == "bucket" else 1.0

  @property
  def watch(self) -> int:
    """How many of the sampler's most probable tokens a step reads; 0: nothing."""
    if self.support == "student":
      return self.top_k
    return int(self.max_importance is not None)


class Trajectory(NamedTuple):
  """The tokens on which student and teacher are compared."""

  tokens_BR: Any  # int32
  length_B: Any  # int32, 0 where there is nothing to compare
  seen: sampling.SamplerStats | None = None  # by the sampler, where a step reads it


class Support(NamedTuple):
  """The tokens to compare at each position of a trajectory, and how likely they are to
  the teacher."""

  logits_BRK: Array  # float32
  ids_BRK: Array  # int32
  logsumexp_BR: Array  # float32, over the whole vocabulary


def columns(length_B: Array, width: int) -> Array:
  """[B, width]: True on the first `length` columns of each row."""
  return jnp.arange(width) < length_B[:, None]


def read(hidden_BTD: Array, last_B: Array, start: int, count: int) -> Array:
  """Hidden states that predict a segment's tokens.

  The first token of the segment is predicted from `last_B`, the last token before it;
  token i from token i - 1, which sits at column start + i - 1.
  """
  if not count:
    return hidden_BTD[:, :0]
  first_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
  rest = hidden_BTD[:, start : start + count - 1]
  return jnp.concatenate([first_B1D, rest], axis=1)


def teach(
  teacher_params: transformer.Params,
  context_BC: Array,
  context_length_B: Array,
  trajectory: Trajectory,
  *,
  settings: Settings,
) -> Support:
  """The teacher reads its context and the trajectory and scores the K tokens there."""
  width, steps = context_BC.shape[1], trajectory.tokens_BR.shape[1]
  tokens_BT = jnp.concatenate([context_BC, trajectory.tokens_BR], axis=1)
  valid_BT = jnp.concatenate(
    [columns(context_length_B, width), columns(trajectory.length_B, steps)], axis=1
  )
  decoder = settings.teacher_decoder or settings.decoder
  hidden_BTD, _ = transformer.forward(
    teacher_params,
    decoder,
    tokens_BT,
    transformer.positions(valid_BT),
    transformer.causal_mask(valid_BT),
    dtype=settings.dtype,
    unroll=settings.unroll,
    implementation=settings.attention,
  )
  return name_support(
    read(hidden_BTD, context_length_B - 1, width, steps),
    transformer.gathered_head(teacher_params, settings.dtype),
    trajectory,
    softcap=decoder.logit_softcap,
    settings=settings,
  )


def name_support(
  hidden_BRD: Array,
  embedding_VD: Array,
  trajectory: Trajectory,
  *,
  softcap: float | None,
  settings: Settings,
) -> Support:
  """The top K tokens of the teacher's head, or its logits at those of the student."""
  if settings.support == "student":
    assert trajectory.seen is not None
    ids_BRK = trajectory.seen.ids_BRK
    logits_BRK, logsumexp_BR = vocab_head.gather(
      hidden_BRD,
      embedding_VD,
      ids_BRK,
      temperature=settings.mass_temperature,
      softcap=softcap,
      return_logsumexp=True,
    )
    return Support(logits_BRK, ids_BRK, logsumexp_BR)
  logits_BRK, ids_BRK, logsumexp_BR = vocab_head.topk(
    hidden_BRD,
    embedding_VD,
    settings.top_k,
    spread=sharding.spec(("batch", "vocab")),
    temperature=settings.mass_temperature,
    softcap=softcap,
    return_logsumexp=True,
  )
  return Support(logits_BRK, ids_BRK, logsumexp_BR)


def student_hidden(
  params: transformer.Params,
  batch: batching.Batch,
  trajectory: Trajectory,
  settings: Settings,
) -> tuple[Array, Array]:
  """Hidden states that predict the answer [B, A, D] and the trajectory [B, R, D]."""
  prompt_width, answer_width = batch.prompt_BP.shape[1], batch.answer_BA.shape[1]
  steps = trajectory.tokens_BR.shape[1]
  tokens_BT = jnp.concatenate(
    [batch.prompt_BP, batch.answer_BA, trajectory.tokens_BR], axis=1
  )
  prompt_BP = columns(batch.prompt_length_B, prompt_width)
  answer_BA = columns(batch.answer_length_B, answer_width)
  rollout_BR = columns(trajectory.length_B, steps)
  valid_BT = jnp.concatenate([prompt_BP, answer_BA, rollout_BR], axis=1)
  # Answer and trajectory both continue the prompt, so their positions start alike.
  after_prompt_B1 = batch.prompt_length_B[:, None]
  positions_BT = jnp.concatenate(
    [
      jnp.broadcast_to(jnp.arange(prompt_width), batch.prompt_BP.shape),
      after_prompt_B1 + jnp.arange(answer_width),
      after_prompt_B1 + jnp.arange(steps),
    ],
    axis=1,
  )
  segment_T = jnp.repeat(
    jnp.arange(3),
    jnp.array([prompt_width, answer_width, steps]),
    total_repeat_length=tokens_BT.shape[1],
  )
  sees_TT = (segment_T == 0)[None, :] | (segment_T[:, None] == segment_T[None, :])
  hidden_BTD, _ = transformer.forward(
    params,
    settings.decoder,
    tokens_BT,
    positions_BT,
    transformer.causal_mask(valid_BT) & sees_TT,
    dtype=settings.dtype,
    remat=settings.remat,
    unroll=settings.unroll,
    implementation=settings.attention,
  )
  last_B = batch.prompt_length_B - 1
  answer_BAD = read(hidden_BTD, last_B, prompt_width, answer_width)
  rollout_BRD = read(hidden_BTD, last_B, prompt_width + answer_width, steps)
  return answer_BAD, rollout_BRD


class Weights(NamedTuple):
  """Weights of every token in the two mean losses; each sums to 1, or to 0."""

  sft_BA: Array
  kd_BR: Array


def token_weights(
  batch: batching.Batch, trajectory: Trajectory, settings: Settings
) -> Weights:
  """Weights over the whole batch, so that a split batch gives the same losses."""
  answer_BA = columns(batch.answer_length_B, batch.answer_BA.shape[1])
  answer_BA &= settings.cross_entropy
  return Weights(
    losses.mean_weights(answer_BA, per=settings.loss_mean),
    losses.mean_weights(kd_mask(trajectory, settings), per=settings.loss_mean),
  )


def kd_mask(trajectory: Trajectory, settings: Settings) -> Array:
  """[B, R]: True on the tokens that the distillation loss counts."""
  kd_BR = columns(trajectory.length_B, trajectory.tokens_BR.shape[1])
  kd_BR &= jnp.arange(kd_BR.shape[1]) >= settings.skip_first
  if settings.mask_eos:
    kd_BR &= ~jnp.isin(trajectory.tokens_BR, jnp.array(settings.eos_ids))
  return kd_BR


def loss_terms(
  params: transformer.Params,
  batch: batching.Batch,
  trajectory: Trajectory,
  support: Support | None,
  weights: Weights,
  *,
  settings: Settings,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Both losses (their share of the whole batch's mean) and what is worth logging.

  Without a `support` there is nothing to distil and `kd` is 0; without cross-entropy
  the answer is not even read.
  """
  if not settings.cross_entropy:
    batch = batch._replace(answer_BA=batch.answer_BA[:, :0])
  answer_BAD, rollout_BRD = student_hidden(params, batch, trajectory, settings)
  embedding_VD = transformer.gathered_head(params, settings.dtype)
  softcap = settings.decoder.logit_softcap
  terms = {"sft": jnp.float32(0), "kd": jnp.float32(0)}
  if settings.cross_entropy:
    nll_BA = vocab_head.cross_entropy(
      answer_BAD, embedding_VD, batch.answer_BA, softcap=softcap
    )
    terms["sft"] = losses.weighted_sum(nll_BA, weights.sft_BA)
  rows = {}
  if settings.row_losses:
    rows[ROWS] = jax.lax.stop_gradient(mean_by_row(nll_BA, batch.answer_length_B))
  if support is None:
    return terms, rows
  terms["kd"], seen = distillation(
    rollout_BRD, embedding_VD, trajectory, support, weights.kd_BR, settings=settings
  )
  return terms, seen | rows


ROWS = "row_loss_B"
"""Name of each row's cross-entropy among what a step leaves behind."""


def mean_by_row(nll_BA: Array, length_B: Array) -> Array:
  """[B]: mean over the tokens of each answer."""
  valid_BA = columns(length_B, nll_BA.shape[1])
  return jnp.sum(jnp.where(valid_BA, nll_BA, 0), axis=1) / jnp.maximum(length_B, 1)


def row_losses(
  params: transformer.Params, batch: batching.Batch, settings: Settings
) -> Array:
  """[B]: each answer's cross-entropy in nats per token; no gradient is taken."""
  rows = batch.answer_BA.shape[0]
  nothing = Trajectory(jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32))
  answer_BAD, _ = student_hidden(params, batch, nothing, settings)
  nll_BA = vocab_head.cross_entropy(
    answer_BAD,
    transformer.gathered_head(params, settings.dtype),
    batch.answer_BA,
    softcap=settings.decoder.logit_softcap,
  )
  return sharding.everywhere(mean_by_row(nll_BA, batch.answer_length_B))


def distillation(
  hidden_BRD: Array,
  embedding_VD: Array,
  trajectory: Trajectory,
  support: Support,
  weight_BR: Array,
  *,
  settings: Settings,
) -> tuple[Array, dict[str, Array]]:
  """The weighted divergence of the student's head from the teacher's support.

  Raises:
    ValueError: If it weighs by importance and `mass_temperature` is not 1: rollouts are
      compared as they were sampled.
  """
  weighs = settings.max_importance is not None
  if weighs and settings.mass_temperature != 1:
    raise ValueError(
      f"max_importance needs temperature 1, got {settings.mass_temperature}"
    )
  ids_BRK = support.ids_BRK
  if weighs:  # the sampled token rides along as one more
    ids_BRK = jnp.concatenate([ids_BRK, trajectory.tokens_BR[..., None]], axis=-1)
  logits_BRK, logsumexp_BR = vocab_head.gather(
    hidden_BRD,
    embedding_VD,
    ids_BRK,
    temperature=settings.mass_temperature,
    softcap=settings.decoder.logit_softcap,
    return_logsumexp=True,
  )
  if weighs:
    log_prob_BR = logits_BRK[..., -1] - logsumexp_BR
    logits_BRK = logits_BRK[..., :-1]
  bucket = settings.tail == "bucket"
  if not bucket:
    logsumexp_BR = jax.lax.stop_gradient(logsumexp_BR)
  divergence_BR = losses.divergence_on_support(
    logits_BRK,
    support.logits_BRK,
    kind=settings.direction,
    beta=settings.beta,
    temperature=settings.temperature,
    scale_by_t2=settings.scale_by_t2,
    student_logsumexp=logsumexp_BR if bucket else None,
    teacher_logsumexp=support.logsumexp_BR if bucket else None,
  )
  if weighs:
    assert trajectory.seen is not None
    assert settings.max_importance is not None
    divergence_BR *= losses.importance(
      log_prob_BR, trajectory.seen.log_prob_BR, most=settings.max_importance
    )
  mass = functools.partial(
    losses.mass_on_support, temperature=settings.mass_temperature
  )
  student_mass_BR = mass(logits_BRK, logsumexp_BR)
  teacher_mass_BR = mass(support.logits_BRK, support.logsumexp_BR)
  seen = {
    "teacher_mass_in_support": losses.weighted_sum(teacher_mass_BR, weight_BR),
    "student_mass_in_support": losses.weighted_sum(student_mass_BR, weight_BR),
    **by_position(divergence_BR, weight_BR > 0),
  }
  loss = losses.weighted_sum(divergence_BR, weight_BR)
  return loss, jax.lax.stop_gradient(seen)


POSITION_BINS = {"0": 1, "1_3": 4, "4_15": 16, "16_31": 32, "32_up": 1 << 30}


def by_position(values_BR: Array, mask_BR: Array) -> dict[str, Array]:
  """Sum and count of the divergence in bins of trajectory position."""
  position, low, out = jnp.arange(values_BR.shape[1]), 0, {}
  for name, high in POSITION_BINS.items():
    inside_BR = mask_BR & (position >= low) & (position < high)
    out[f"kd_sum_at_{name}"] = jnp.sum(jnp.where(inside_BR, values_BR, 0.0))
    out[f"kd_count_at_{name}"] = jnp.sum(inside_BR, dtype=jnp.float32)
    low = high
  return out
