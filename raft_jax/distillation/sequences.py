"""The rows of tokens that student and teacher read, and the hidden states of each.

The student reads one packed row per example, [prompt | answer | trajectory], in which
the trajectory cannot attend to the answer, so the prompt is computed once for both
losses. Layers that keep a state (`gated_delta`) continue the prompt twice, from a copy
of its state. The teacher reads [its context | trajectory].

Rows are computed one by one, or, with a `Packing`, several in a lane.

Shapes: B rows, P prompt width, A answer width, C teacher context width, R trajectory
width, T width of a whole row, D model width; G groups of N lanes of L columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax.data import batching
from raft_jax.models import experts, sampling, sharding, transformer


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
  rows = Rows(
    tokens_BT, positions_BT, valid_BT, widths=(prompt_width, answer_width, steps)
  )
  hidden_BTD, load = hidden_of_rows(params, decoder, rows, batch.packing, compute)
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
  packing: batching.Packing | None = None,
) -> Array:
  """Hidden states that predict the trajectory after a context, [B, R, D]."""
  width, steps = context_BC.shape[1], trajectory.tokens_BR.shape[1]
  tokens_BT = jnp.concatenate([context_BC, trajectory.tokens_BR], axis=1)
  valid_BT = jnp.concatenate(
    [length_mask(context_length_B, width), length_mask(trajectory.length_B, steps)],
    axis=1,
  )
  rows = Rows(
    tokens_BT, transformer.positions(valid_BT), valid_BT, widths=(width + steps,)
  )
  hidden_BTD, _ = hidden_of_rows(
    params, decoder, rows, packing, compute, counts_load=False
  )
  return predictive_hidden(hidden_BTD, context_length_B - 1, width, steps)


# --- Rows, and the lanes in which they are computed -----------------------------------


class Rows(NamedTuple):
  """Padded rows of one trunk and what continues it, each without seeing the rest.

  Attributes:
    valid_BT: the tokens that are no padding.
    widths: of the trunk and of each part that continues it; together T.
  """

  tokens_BT: Array
  positions_BT: Array
  valid_BT: Array
  widths: tuple[int, ...]


def hidden_of_rows(
  params: transformer.Params,
  decoder: transformer.DecoderConfig,
  rows: Rows,
  packing: batching.Packing | None,
  compute: transformer.Compute,
  *,
  counts_load: bool = True,
) -> tuple[Array, experts.Load | None]:
  """Hidden states of every column [B, T, D], and the load of the experts.

  With a packing, padding has those of any token.

  Args:
    counts_load: whether the load is wanted; it is None in a dense model, too.
  """
  tokens, positions, valid, widths = rows
  part = jnp.repeat(
    jnp.arange(len(widths)), jnp.array(widths), total_repeat_length=sum(widths)
  )[None]
  if packing is not None:
    assert packing.place_BT.shape == tokens.shape, "packed for other widths"
    token_NL = packing.token_GNL.reshape(-1, packing.token_GNL.shape[-1])
    index_GS = packing.token_GNL.reshape(len(packing.token_GNL), -1)
    tokens, positions, valid = (
      pick(x, index_GS).reshape(token_NL.shape) for x in (tokens, positions, valid)
    )
    valid &= token_NL >= 0
    part = part[0, token_NL % sum(widths)]
  part_q, part_k = part[:, :, None], part[:, None, :]
  mask = transformer.causal_mask(valid) & ((part_k == 0) | (part_q == part_k))
  if packing is not None:
    row_NL = token_NL // sum(widths)
    mask &= row_NL[:, :, None] == row_NL[:, None, :]
    # Not every implementation of attention gives numbers to a query without a key.
    mask |= (token_NL < 0)[:, :, None] & jnp.eye(token_NL.shape[1], dtype=bool)
  hidden, _, load = transformer.run(
    params,
    decoder,
    tokens,
    positions,
    mask,
    branches=widths,
    compute=compute,
    counted_BT=valid if counts_load and decoder.n_experts else None,
  )
  if packing is not None:
    hidden = pick(hidden, packing.place_BT.reshape(len(packing.token_GNL), -1))
  return hidden.reshape(*rows.tokens_BT.shape, -1), load


def pick(x: Array, index_GS: Array) -> Array:
  """Elements of [X, Y, ...] by their index in a group of X / G lines: [G, S, ...].

  An index of -1 gives any element.
  """
  flat = x.reshape(len(index_GS), -1, *x.shape[2:])
  picked = jax.vmap(lambda group, index: group[index])(flat, jnp.maximum(index_GS, 0))
  return sharding.constrain(picked, "batch", *("width",) * (picked.ndim - 1))


def put_back(x_GS: Array, index_GS: Array, shape: tuple[int, int]) -> Array:
  """The inverse of `pick`: an array of this shape, with 0 where nothing was picked."""
  size = math.prod(shape) // len(index_GS)
  places_GS = jnp.where(index_GS < 0, size, index_GS)
  flat = jax.vmap(
    lambda values, places: (
      jnp.zeros(size, values.dtype).at[places].set(values, mode="drop")
    )
  )(x_GS, places_GS)
  return flat.reshape(shape)
