"""One training step as pure functions: rollout, teacher, update.

The student reads one packed row per example, [prompt | answer | trajectory], in which
the trajectory cannot see the answer: the prompt is computed once for both losses. The
teacher reads [its context | trajectory]. Hidden states are taken only where a loss
reads them, and no [tokens, vocabulary] array exists.

Shapes: B rows, P prompt width, A answer width, C teacher context width, R trajectory
width, K support size, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raft_jax import (
  balance,
  data,
  losses,
  model,
  sample,
  sharding,
  trainable,
  vocab_head,
)


class Settings(NamedTuple):
  """What is fixed for a run; hashable, so that it can be static under jit."""

  decoder: model.DecoderConfig
  eos_ids: tuple[int, ...]
  dtype: str = "float32"
  remat: bool = False
  unroll: int = 1
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
  teacher_decoder: model.DecoderConfig | None = None
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


class TrainState(NamedTuple):
  """All that a step changes; a tree of arrays, of their shapes or of shardings."""

  step: Any  # [] int32, steps taken
  params: model.Params  # the trainable tree, float32
  opt_state: Any


class Trajectory(NamedTuple):
  """The tokens on which student and teacher are compared."""

  tokens_BR: Any  # int32
  length_B: Any  # int32, 0 where there is nothing to compare
  seen: sample.Seen | None = None  # by the sampler, where a step reads it


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
  teacher_params: model.Params,
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
  hidden_BTD, _ = model.forward(
    teacher_params,
    decoder,
    tokens_BT,
    model.positions(valid_BT),
    model.causal_mask(valid_BT),
    dtype=settings.dtype,
    unroll=settings.unroll,
  )
  return name_support(
    read(hidden_BTD, context_length_B - 1, width, steps),
    model.gathered_head(teacher_params, settings.dtype),
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
    temperature=settings.mass_temperature,
    softcap=softcap,
    return_logsumexp=True,
  )
  return Support(logits_BRK, ids_BRK, logsumexp_BR)


def student_hidden(
  params: model.Params, batch: data.Batch, trajectory: Trajectory, settings: Settings
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
  hidden_BTD, _ = model.forward(
    params,
    settings.decoder,
    tokens_BT,
    positions_BT,
    model.causal_mask(valid_BT) & sees_TT,
    dtype=settings.dtype,
    remat=settings.remat,
    unroll=settings.unroll,
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
  batch: data.Batch, trajectory: Trajectory, settings: Settings
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
  params: model.Params,
  batch: data.Batch,
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
  embedding_VD = model.gathered_head(params, settings.dtype)
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


def row_losses(params: model.Params, batch: data.Batch, settings: Settings) -> Array:
  """[B]: each answer's cross-entropy in nats per token; no gradient is taken."""
  rows = batch.answer_BA.shape[0]
  nothing = Trajectory(jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32))
  answer_BAD, _ = student_hidden(params, batch, nothing, settings)
  nll_BA = vocab_head.cross_entropy(
    answer_BAD,
    model.gathered_head(params, settings.dtype),
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
  """The weighted divergence of the student's head from the teacher's support."""
  weighs = settings.max_importance is not None
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


class Gradients(NamedTuple):
  """The balanced gradient of a step and what it was made of."""

  balanced: model.Params
  losses: dict[str, Array]
  valid: dict[str, Array]  # whether any token entered each loss
  norms: dict[str, Array] | None  # of each loss's gradient, where taken apart
  cosine: Array | None
  seen: dict[str, Array]


Parts = tuple[data.Batch, Trajectory, Support | None, Weights]
Losses = Callable[[model.Params, Parts], tuple[dict[str, Array], dict[str, Array]]]
"""`loss_terms` of what is trained and of a batch, or of a part of it."""


def gradients_together(
  loss: Losses, params: model.Params, parts: Parts, weigh: Any
) -> Gradients:
  """One backward pass: both losses, one pullback, the weights, and (1, lambda) back."""
  terms, pullback, seen = jax.vjp(lambda p: loss(p, parts), params, has_aux=True)
  valid = any_token(parts[-1])
  balanced = pullback(weigh(losses=terms, valid=valid))[0]
  return Gradients(balanced, terms, valid, None, None, seen)


def gradients_apart(
  loss: Losses,
  params: model.Params,
  parts: Parts,
  weigh: Any,
  *,
  micro_batches: int = 1,
  measure: bool = False,
) -> Gradients:
  """One gradient tree a loss, summed over micro-batches until the weights are known.

  The weights depend on the losses of the whole batch, which is why the trees cannot be
  added earlier. Costs one more backward pass and one more tree than
  `gradients_together`. With `measure` it also gives both norms and their cosine; not
  otherwise, so that a batch in parts is weighted as the whole one is.
  """

  def of_micro_batch(part: Parts):
    terms, pullback, seen = jax.vjp(lambda p: loss(p, part), params, has_aux=True)
    one, zero = jnp.float32(1), jnp.float32(0)
    trees = {"sft": pullback({"sft": one, "kd": zero})[0]}
    if part[2] is not None:
      trees["kd"] = pullback({"sft": zero, "kd": one})[0]
    rows_B = seen.pop(ROWS, None)  # the only thing that is not summed
    return (trees, terms, seen), rows_B

  def add(total: Any, part: Parts):
    found, rows_B = of_micro_batch(part)
    return jax.tree.map(jnp.add, total, found), rows_B

  # Rows i, i + M, ... form micro-batch i: a batch spread over devices in blocks of rows
  # is then split without moving a row.
  stacked = jax.tree.map(
    lambda x: x.reshape(
      x.shape[0] // micro_batches, micro_batches, *x.shape[1:]
    ).swapaxes(0, 1),
    parts,
  )
  first = jax.tree.map(lambda x: x[0], stacked)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_micro_batch, first)[0]
  )
  (trees, terms, seen), rows_MB = jax.lax.scan(add, zeros, stacked)
  if rows_MB is not None:
    seen[ROWS] = rows_MB.swapaxes(0, 1).reshape(-1)
  valid = any_token(parts[-1])
  norms = cosine = None
  if measure and "kd" in trees:
    norms = {name: optax.tree.norm(tree) for name, tree in trees.items()}
    product = jnp.maximum(norms["sft"] * norms["kd"], 1e-30)
    # Not `optax.tree.vdot`: it flattens every array, and so gathers it whole.
    cosine = optax.tree.sum(optax.tree.mul(trees["sft"], trees["kd"])) / product
  weights = weigh(losses=terms, valid=valid, gradient_norms=norms)
  balanced = trees["sft"]
  if "kd" in trees:
    balanced = jax.tree.map(
      lambda sft, kd: weights["sft"] * sft + weights["kd"] * kd, balanced, trees["kd"]
    )
  return Gradients(balanced, terms, valid, norms, cosine, seen)


def any_token(weights: Weights) -> dict[str, Array]:
  """Whether any token enters each loss."""
  return {"sft": jnp.any(weights.sft_BA > 0), "kd": jnp.any(weights.kd_BR > 0)}


def update(
  state: TrainState,
  frozen: model.Params,
  batch: data.Batch,
  trajectory: Trajectory,
  support: Support | None,
  *,
  optimizer: optax.GradientTransformationExtraArgs,
  balancer: optax.GradientTransformationExtraArgs,
  settings: Settings,
  anchor: model.Params | None = None,
  measure: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
  """Moves the parameters by one optimizer step.

  Args:
    frozen: parameters beside the trained ones; see `trainable`.
    support: None trains on the answers alone.
    optimizer: from `optim.chain`, with `balancer` under the name `balance`.
    anchor: the base model's parameters, for the optimizers that stay near them.
    measure: take the two gradients apart, for their norms and cosine.

  Returns:
    The next state and float32 scalars to log.
  """
  weights = token_weights(batch, trajectory, settings)

  def weigh(**observed: Any) -> dict[str, Array]:
    # Eq. 11-12: lambda contains the current step's losses, so the balancer moves before
    # the gradient exists; the chain makes the same move below and keeps it.
    _, advanced = balancer.update({}, state.opt_state["balance"], **observed)
    return balance.loss_weights(advanced)

  def loss(params: model.Params, part: Parts):
    return loss_terms(trainable.combine(frozen, params), *part, settings=settings)

  parts = (batch, trajectory, support, weights)
  if measure or settings.micro_batches > 1:
    taken = gradients_apart(
      loss,
      state.params,
      parts,
      weigh,
      micro_batches=settings.micro_batches,
      measure=measure,
    )
  else:
    taken = gradients_together(loss, state.params, parts, weigh)
  updates, opt_state = optimizer.update(
    taken.balanced,
    state.opt_state,
    state.params,
    losses=taken.losses,
    valid=taken.valid,
    gradient_norms=taken.norms,
    anchor=anchor,
  )
  params = optax.apply_updates(state.params, updates)
  metrics = describe(taken, opt_state["balance"], trajectory)
  if not settings.cross_entropy:
    metrics = {name: value for name, value in metrics.items() if name not in OF_BOTH}
  return TrainState(state.step + 1, params, opt_state), metrics


OF_BOTH = frozenset(
  {"loss_sft", "ema_sft", "kd_ratio", "grad_norm_sft", "grad_norm_kd", "grad_cosine"}
)
"""What is not worth logging where there is no cross-entropy."""


def describe(
  taken: Gradients, balance_state: balance.BalanceState, trajectory: Trajectory
) -> dict[str, Array]:
  """Scalars to log of one step."""
  out = {
    "loss_sft": taken.losses["sft"],
    "grad_norm": optax.tree.norm(taken.balanced),
  }
  seen = dict(taken.seen)
  if ROWS in seen:
    out[ROWS] = sharding.everywhere(seen.pop(ROWS))
  if not seen:
    return out
  kd_weight = balance.loss_weights(balance_state)["kd"]
  out |= {
    "loss_kd": taken.losses["kd"],
    "ema_sft": balance_state.ema["sft"],
    "ema_kd": balance_state.ema["kd"],
    "kd_weight": kd_weight,
    "kd_ratio": kd_weight * taken.losses["kd"] / taken.losses["sft"],
    # NaN is logged as null: without a rollout there is no mass to speak of.
    "teacher_mass_in_support": jnp.where(
      taken.valid["kd"], seen["teacher_mass_in_support"], jnp.nan
    ),
    "student_mass_outside_support": jnp.where(
      taken.valid["kd"], 1.0 - seen["student_mass_in_support"], jnp.nan
    ),
    "rollout_length": jnp.mean(trajectory.length_B.astype(jnp.float32)),
    "rollout_empty": jnp.mean(trajectory.length_B == 0),
  }
  for name in POSITION_BINS:
    # 0/0 is NaN on purpose: no rollout reached this far, and the log shows null.
    out[f"kd_at_{name}"] = seen[f"kd_sum_at_{name}"] / seen[f"kd_count_at_{name}"]
  if taken.norms is not None:
    out |= {f"grad_norm_{name}": norm for name, norm in taken.norms.items()}
    out["grad_cosine"] = taken.cosine
  return out
