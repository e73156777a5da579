"""The rows of tokens that student and teacher read, and the hidden states of each.

The student reads one packed row per example, [prompt | answer | trajectory], in which
the trajectory cannot attend to the answer, so the prompt is computed once for both
losses. Layers that keep a state (`gated_delta`) continue the prompt twice, from a copy
of its state. The teacher reads [its context | trajectory].

Shapes: B rows, P prompt width, A answer width, C teacher context width, R trajectory
width, T width of a whole row, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax.data import batching
from raft_jax.models import experts, sampling, transformer


class Trajectory(NamedTuple):
  """The tokens on which student and teacher are compared.

  Attributes:
    tokens_BR: int32.
    length_B: int32; 0 for a row on which nothing is compared.
    sampler_stats: the sampler's most probable tokens, if the loss reads them.
  """

  tokens_BR: Any
  length_B: Any
  sampler_stats: sampling.SamplerStats | None = None


def empty_trajectory(rows: int) -> Trajectory:
  """A trajectory without tokens, for losses that only read the answers."""
  return Trajectory(np.zeros((rows, 0), np.int32), np.zeros(rows, np.int32))


def length_mask(length_B: Array, width: int) -> Array:
  """[B, width]: True on the first `length` columns of each row."""
  return jnp.arange(width) < length_B[:, None]


def predictive_hidden(
  hidden_BTD: Array, last_B: Array, start: int, count: int
) -> Array:
  """Hidden states that predict the `count` tokens of a segment, [B, count, D].

  Column `last_B` of each row, its last token before the segment, predicts the first
  token. Token i - 1, at column start + i - 1, predicts token i.
  """
  if not count:
    return hidden_BTD[:, :0]
  first_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
  rest = hidden_BTD[:, start : start + count - 1]
  return jnp.concatenate([first_B1D, rest], axis=1)


class StudentPass(NamedTuple):
  """What the student's pass makes.

  Attributes:
    answer_BAD: hidden states that predict the answer.
    rollout_BRD: hidden states that predict the trajectory.
    load: of the experts of each layer, by all tokens; None in a dense model.
  """

  answer_BAD: Array
  rollout_BRD: Array
  load: experts.Load | None


def student_hidden(
  params: transformer.Params,
  decoder: transformer.DecoderConfig,
  batch: batching.Batch,
  trajectory: Trajectory,
  compute: transformer.Compute,
) -> tuple[Array, Array]:
  """Hidden states that predict the answer [B, A, D] and the trajectory [B, R, D]."""
  return student_pass(params, decoder, batch, trajectory, compute)[:2]


def student_pass(
  params: transformer.Params,
  decoder: transformer.DecoderConfig,
  batch: batching.Batch,
  trajectory: Trajectory,
  compute: transformer.Compute,
) -> StudentPass:
  """Computes the hidden states of the packed rows."""
  prompt_width, answer_width = batch.prompt_BP.shape[1], batch.answer_BA.shape[1]
  steps = trajectory.tokens_BR.shape[1]
  tokens_BT = jnp.concatenate(
    [batch.prompt_BP, batch.answer_BA, trajectory.tokens_BR], axis=1
  )
  prompt_BP = length_mask(batch.prompt_length_B, prompt_width)
  answer_BA = length_mask(batch.answer_length_B, answer_width)
  rollout_BR = length_mask(trajectory.length_B, steps)
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
  hidden_BTD, _, load = transformer.run(
    params,
    decoder,
    tokens_BT,
    positions_BT,
    transformer.causal_mask(valid_BT) & sees_TT,
    branches=(prompt_width, answer_width, steps),
    compute=compute,
    counted_BT=valid_BT if decoder.n_experts else None,
  )
  last_B = batch.prompt_length_B - 1
  answer_BAD = predictive_hidden(hidden_BTD, last_B, prompt_width, answer_width)
  rollout_BRD = predictive_hidden(
    hidden_BTD, last_B, prompt_width + answer_width, steps
  )
  return StudentPass(answer_BAD, rollout_BRD, load)


def teacher_hidden(
  params: transformer.Params,
  decoder: transformer.DecoderConfig,
  context_BC: Array,
  context_length_B: Array,
  trajectory: Trajectory,
  compute: transformer.Compute,
) -> Array:
  """Hidden states that predict the trajectory after a context, [B, R, D]."""
  width, steps = context_BC.shape[1], trajectory.tokens_BR.shape[1]
  tokens_BT = jnp.concatenate([context_BC, trajectory.tokens_BR], axis=1)
  valid_BT = jnp.concatenate(
    [length_mask(context_length_B, width), length_mask(trajectory.length_B, steps)],
    axis=1,
  )
  hidden_BTD, _ = transformer.forward(
    params,
    decoder,
    tokens_BT,
    transformer.positions(valid_BT),
    transformer.causal_mask(valid_BT),
    compute=compute,
  )
  return predictive_hidden(hidden_BTD, context_length_B - 1, width, steps)
