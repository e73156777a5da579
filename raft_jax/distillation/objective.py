"""The two losses of a step, as functions of the parameters.

The student's hidden states predict the answer (cross-entropy) and the trajectory, on
which the teacher's logits are its target (distillation). The head is applied only at
the tokens that a loss reads, and no [tokens, vocabulary] array exists.

Shapes: B rows, A answer width, C teacher context width, R trajectory width, K support
size, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax import losses, vocab_head
from raft_jax.data import batching
from raft_jax.distillation import answer_losses, sequences
from raft_jax.models import experts, param_sharding, sharding, transformer


class Settings(NamedTuple):
  """The values of a step that are fixed for a run; hashable, hence static under jit.

  `run_plan.make_settings` makes them from the config, whose reference explains them and
  has their defaults.

  Attributes:
    compute: how the passes of student and teacher are computed.
    rollout_unroll: layers per iteration of the sampler's scan over layers.
    beta: weight of the teacher in the Jensen-Shannon divergence; None for a KL.
    teacher_decoder: the teacher's network; None if it is the student's.
    on_answers: whether every trajectory is the answer, so that the hidden states which
      predict the answer serve both losses.
    row_losses: whether a step also returns the cross-entropy of each row.
    token_rule: None if the answers' tokens count alike, or by weights of the batch.
    router_loss: weight of the load-balancing loss of a mixture of experts.
  """

  decoder: transformer.DecoderConfig
  teacher_decoder: transformer.DecoderConfig | None
  eos_ids: tuple[int, ...]
  compute: transformer.Compute
  rollout_unroll: int
  micro_batches: int
  cross_entropy: bool
  loss_mean: str
  row_losses: bool
  token_rule: answer_losses.TokenRule | None
  top_k: int
  support: str
  max_importance: float | None
  temperature: float
  direction: str
  beta: float | None
  tail: str
  scale_by_t2: bool
  skip_first: int
  mask_eos: bool
  router_loss: float = 0.0
  on_answers: bool = False

  @property
  def mass_temperature(self) -> float:
    """Temperature of the probability mass on the support.

    The tail bucket needs the temperature of the loss. Otherwise the mass is only
    logged, for the distribution that the rollouts are sampled from.
    """
    return self.temperature if self.tail == "bucket" else 1.0

  @property
  def sampler_top_k(self) -> int:
    """How many of the sampler's most probable tokens a step reads; 0 for none."""
    if self.support == "student":
      return self.top_k
    return int(self.max_importance is not None)


class Support(NamedTuple):
  """The tokens to compare at each position, and the teacher's logits for them."""

  logits_BRK: Array  # float32
  ids_BRK: Array  # int32
  logsumexp_BR: Array  # float32, over the whole vocabulary


def score_teacher(
  teacher_params: transformer.Params,
  context_BC: Array,
  context_length_B: Array,
  trajectory: sequences.Trajectory,
  packing: batching.Packing | None = None,
  *,
  settings: Settings,
) -> Support:
  """The teacher reads its context and the trajectory, and scores K tokens of each."""
  decoder = settings.teacher_decoder or settings.decoder
  # No backward pass follows.
  compute = settings.compute._replace(remat=False)
  return teacher_support(
    sequences.teacher_hidden(
      teacher_params,
      decoder,
      context_BC,
      context_length_B,
      trajectory,
      compute,
      packing,
    ),
    param_sharding.gathered_head(teacher_params, compute.dtype),
    trajectory,
    softcap=decoder.logit_softcap,
    settings=settings,
  )


def teacher_support(
  hidden_BRD: Array,
  embedding_VD: Array,
  trajectory: sequences.Trajectory,
  *,
  softcap: float | None,
  settings: Settings,
) -> Support:
  """The teacher's logits at its own top K tokens, or at those of the student."""
  if settings.support == "student":
    assert trajectory.sampler_stats is not None
    ids_BRK = trajectory.sampler_stats.ids_BRK
    logits_BRK, logsumexp_BR = vocab_head.gather_with_logsumexp(
      hidden_BRD,
      embedding_VD,
      ids_BRK,
      temperature=settings.mass_temperature,
      softcap=softcap,
    )
    return Support(logits_BRK, ids_BRK, logsumexp_BR)
  logits_BRK, ids_BRK, logsumexp_BR = vocab_head.topk_with_logsumexp(
    hidden_BRD,
    embedding_VD,
    settings.top_k,
    partition=sharding.spec(("batch", "vocab")),
    temperature=settings.mass_temperature,
    softcap=softcap,
  )
  return Support(logits_BRK, ids_BRK, logsumexp_BR)


class Weights(NamedTuple):
  """The weight of every token in the two mean losses; each array sums to 1 or 0."""

  sft_BA: Array
  kd_BR: Array


def mean_weights(
  batch: batching.Batch, trajectory: sequences.Trajectory, settings: Settings
) -> Weights:
  """The weights of both means, of the whole batch, so that micro-batches add up."""
  answer_BA = sequences.length_mask(batch.answer_length_B, batch.answer_BA.shape[1])
  answer_BA &= settings.cross_entropy
  return Weights(
    losses.mean_weights(answer_BA, per=settings.loss_mean),
    losses.mean_weights(kd_mask(trajectory, settings), per=settings.loss_mean),
  )


def kd_mask(trajectory: sequences.Trajectory, settings: Settings) -> Array:
  """[B, R]: True on the tokens that the distillation loss counts."""
  kd_BR = sequences.length_mask(trajectory.length_B, trajectory.tokens_BR.shape[1])
  kd_BR &= jnp.arange(kd_BR.shape[1]) >= settings.skip_first
  if settings.mask_eos:
    kd_BR &= ~jnp.isin(trajectory.tokens_BR, jnp.array(settings.eos_ids))
  return kd_BR


def loss_terms(
  params: transformer.Params,
  batch: batching.Batch,
  trajectory: sequences.Trajectory,
  support: Support | None,
  weights: Weights,
  *,
  settings: Settings,
  median: Array | None = None,
) -> tuple[dict[str, Array], dict[str, Any]]:
  """Both losses of a (micro-)batch, as its share of the whole batch's means.

  Args:
    params: the student's, as `transformer.forward` reads them.
    batch: rows; without `settings.cross_entropy` their answers are not read.
    trajectory: tokens of the same rows.
    support: result of `score_teacher`; None makes the `kd` loss 0.
    weights: result of `mean_weights` for the whole batch.
    settings: settings of the run.
    median: of the whole batch's row losses, if `settings.token_rule` needs it; None:
      these rows are the whole batch.

  Returns:
    `{"sft": ..., "kd": ...}`, and auxiliary values to log, without gradient.
  """
  if not settings.cross_entropy:
    batch = batch._replace(answer_BA=batch.answer_BA[:, :0])
  apart = trajectory
  if settings.on_answers:
    apart = sequences.empty_trajectory(batch.answer_BA.shape[0])
  answer_BAD, rollout_BRD, load = sequences.student_pass(
    params, settings.decoder, batch, apart, settings.compute
  )
  if settings.on_answers:
    rollout_BRD = answer_BAD
  embedding_VD = param_sharding.gathered_head(params, settings.compute.dtype)
  terms = {"sft": jnp.float32(0), "kd": jnp.float32(0)}
  answer_aux: dict[str, Any] = {}
  if settings.cross_entropy:
    nll_BA, token_BA = answer_losses.with_weights(
      answer_BAD,
      embedding_VD,
      batch,
      rule=settings.token_rule,
      softcap=settings.decoder.logit_softcap,
      median=median,
    )
    weight_BA = weights.sft_BA
    if token_BA is not None:
      weight_BA *= token_BA
      answer_aux["token_weight"] = jnp.sum(weight_BA)
      answer_aux["loss_sft_unweighted"] = losses.weighted_sum(nll_BA, weights.sft_BA)
    terms["sft"] = losses.weighted_sum(nll_BA, weight_BA)
  if settings.row_losses:
    answer_aux[ROW_LOSSES] = answer_losses.mean_by_row(nll_BA, batch.answer_length_B)
  if load is not None:
    answer_aux[EXPERT_LOAD] = load
    if settings.router_loss:
      # Its value would change the balance of both losses.
      terms["sft"] += _gradient_of(settings.router_loss * experts.balance_loss(load))
  answer_aux = jax.lax.stop_gradient(answer_aux)
  if support is None:
    return terms, answer_aux
  terms["kd"], aux = distillation_loss(
    rollout_BRD, embedding_VD, trajectory, support, weights.kd_BR, settings=settings
  )
  return terms, aux | answer_aux


def _gradient_of(x: Array) -> Array:
  """0, with the gradient of x."""
  return x - jax.lax.stop_gradient(x)


ROW_LOSSES = "row_loss_B"
"""Key of the rows' cross-entropies among the auxiliary values."""
EXPERT_LOAD = "expert_load"
"""Key of the `experts.Load` of all layers among the auxiliary values."""


def row_losses(
  params: transformer.Params, batch: batching.Batch, settings: Settings
) -> Array:
  """[B]: each answer's cross-entropy in nats per token."""
  nll_BA = answer_nll(params, batch, settings)
  return sharding.everywhere(answer_losses.mean_by_row(nll_BA, batch.answer_length_B))


def answer_nll(
  params: transformer.Params, batch: batching.Batch, settings: Settings
) -> Array:
  """[B, A]: the cross-entropy of every answer token in nats."""
  no_rollout = sequences.empty_trajectory(batch.answer_BA.shape[0])
  batch = batch._replace(packing=None)  # that of rows with a trajectory
  answer_BAD, _ = sequences.student_hidden(
    params, settings.decoder, batch, no_rollout, settings.compute
  )
  return vocab_head.cross_entropy(
    answer_BAD,
    param_sharding.gathered_head(params, settings.compute.dtype),
    batch.answer_BA,
    softcap=settings.decoder.logit_softcap,
  )


def distillation_loss(
  hidden_BRD: Array,
  embedding_VD: Array,
  trajectory: sequences.Trajectory,
  support: Support,
  weight_BR: Array,
  *,
  settings: Settings,
) -> tuple[Array, dict[str, Array]]:
  """The divergence of student and teacher on the support, and its auxiliary values.

  Args:
    hidden_BRD: the student's hidden states that predict the trajectory.
    embedding_VD: the student's output embedding.
    trajectory: the compared tokens.
    support: result of `score_teacher`.
    weight_BR: `kd_BR` of `mean_weights`.
    settings: settings of the run.
  """
  logits_BRK, logsumexp_BR, log_prob_BR = student_logits(
    hidden_BRD, embedding_VD, support.ids_BRK, trajectory.tokens_BR, settings=settings
  )
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
  if log_prob_BR is not None:
    assert trajectory.sampler_stats is not None
    assert settings.max_importance is not None
    divergence_BR *= losses.truncated_importance_weights(
      log_prob_BR,
      trajectory.sampler_stats.log_prob_BR,
      max_weight=settings.max_importance,
    )
  student = support._replace(logits_BRK=logits_BRK, logsumexp_BR=logsumexp_BR)
  aux = by_position(divergence_BR, weight_BR > 0)
  for name, side in (("teacher", support), ("student", student)):
    mass_BR = losses.mass_on_support(
      side.logits_BRK, side.logsumexp_BR, temperature=settings.mass_temperature
    )
    aux[f"{name}_mass_in_support"] = losses.weighted_sum(mass_BR, weight_BR)
  loss = losses.weighted_sum(divergence_BR, weight_BR)
  return loss, jax.lax.stop_gradient(aux)


def student_logits(
  hidden_BRD: Array,
  embedding_VD: Array,
  ids_BRK: Array,
  tokens_BR: Array,
  *,
  settings: Settings,
) -> tuple[Array, Array, Array | None]:
  """The student's logits on the support, and what normalises and weighs them.

  Returns:
    Logits at `ids_BRK`, the log-sum-exp over the vocabulary, and the log-probability of
    each sampled token (None without `settings.max_importance`).

  Raises:
    ValueError: If tokens have importance weights and `mass_temperature` is not 1. Their
      probabilities must be those that the sampler had.
  """
  weighted = settings.max_importance is not None
  if weighted and settings.mass_temperature != 1:
    raise ValueError(
      f"max_importance needs temperature 1, got {settings.mass_temperature}"
    )
  if weighted:  # also gather the logit of the sampled token
    ids_BRK = jnp.concatenate([ids_BRK, tokens_BR[..., None]], axis=-1)
  logits_BRK, logsumexp_BR = vocab_head.gather_with_logsumexp(
    hidden_BRD,
    embedding_VD,
    ids_BRK,
    temperature=settings.mass_temperature,
    softcap=settings.decoder.logit_softcap,
  )
  if not weighted:
    return logits_BRK, logsumexp_BR, None
  log_prob_BR = logits_BRK[..., -1] - logsumexp_BR
  return logits_BRK[..., :-1], logsumexp_BR, log_prob_BR


POSITION_BINS = {"0": 1, "1_3": 4, "4_15": 16, "16_31": 32, "32_up": 1 << 30}


def by_position(values_BR: Array, mask_BR: Array) -> dict[str, Array]:
  """Sum and count of the divergence in each bin of positions in the trajectory."""
  position, low, sums = jnp.arange(values_BR.shape[1]), 0, {}
  for name, high in POSITION_BINS.items():
    inside_BR = mask_BR & (position >= low) & (position < high)
    sums[f"kd_sum_at_{name}"] = jnp.sum(jnp.where(inside_BR, values_BR, 0.0))
    sums[f"kd_count_at_{name}"] = jnp.sum(inside_BR, dtype=jnp.float32)
    low = high
  return sums
