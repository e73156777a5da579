"""The gated delta rule: a recurrence over tokens whose state is a matrix.

With query q, key k, value v, decay a in (0, 1) and strength b of a token:

.. math:: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, \\quad o_t = S_t^T q_t

Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv
2412.06464. One token follows it as it stands; several are computed in chunks, with
products of matrices.

Shapes: B rows, T tokens, H heads, k and v widths of a head's keys and values, C tokens
of a chunk, N chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CHUNK = 64
"""Tokens whose updates of the state are computed at once; a power of 2."""


def delta_rule(
  q_BTHk: Array,
  k_BTHk: Array,
  v_BTHv: Array,
  decay_BTH: Array,
  strength_BTH: Array,
  state_BHkv: Array,
  *,
  widths: Sequence[int] = (),
) -> tuple[Array, Array]:
  """The outputs [B, T, H, v] of the recurrence, and the trunk's last state; float32.

  Args:
    q_BTHk: queries, scaled.
    k_BTHk: keys of length at most 1.
    decay_BTH: log a, at most 0.
    strength_BTH: b, in 0..2.
    state_BHkv: before the first token.
    widths: tokens of the trunk and of each branch; empty: all are the trunk's.
  """
  tokens = q_BTHk, k_BTHk, v_BTHv, decay_BTH, strength_BTH
  if q_BTHk.shape[1] == 1:
    return _one_token(*tokens, state_BHkv)
  return _chunked(*tokens, state_BHkv, widths or (q_BTHk.shape[1],))


def _one_token(
  q_B1Hk: Array,
  k_B1Hk: Array,
  v_B1Hv: Array,
  decay_B1H: Array,
  strength_B1H: Array,
  state_BHkv: Array,
) -> tuple[Array, Array]:
  q_BHk, k_BHk, v_BHv = q_B1Hk[:, 0], k_B1Hk[:, 0], v_B1Hv[:, 0]
  state_BHkv = state_BHkv * jnp.exp(decay_B1H[:, 0, :, None, None])
  known_BHv = jnp.einsum("bhkv,bhk->bhv", state_BHkv, k_BHk)
  change_BHv = (v_BHv - known_BHv) * strength_B1H[:, 0, :, None]
  state_BHkv = state_BHkv + k_BHk[..., None] * change_BHv[:, :, None]
  out_BHv = jnp.einsum("bhkv,bhk->bhv", state_BHkv, q_BHk)
  return out_BHv[:, None], state_BHkv


def _chunked(
  q_BTHk: Array,
  k_BTHk: Array,
  v_BTHv: Array,
  decay_BTH: Array,
  strength_BTH: Array,
  state_BHkv: Array,
  widths: Sequence[int],
) -> tuple[Array, Array]:
  """The recurrence chunk by chunk, with products of matrices inside a chunk.

  Every part begins with a chunk of its own; a branch's first one takes the state that
  the trunk's last one left.
  """
  size = min(CHUNK, 1 << (max(widths) - 1).bit_length())
  counts = [-(-width // size) for width in widths]
  tokens = (q_BTHk, k_BTHk, v_BTHv, decay_BTH, strength_BTH)
  chunks = _chunks(*(_split(x, widths, size) for x in tokens))
  firsts = list(itertools.accumulate(counts, initial=0))
  number_N = np.arange(firsts[-1])
  marks = np.isin(number_N, firsts[1:-1]), number_N == counts[0] - 1

  def step(states: tuple[Array, Array], inputs: Any) -> Any:
    before_BHkv, trunk_BHkv = states
    chunk, begins_branch, ends_trunk = inputs
    before_BHkv = jnp.where(begins_branch, trunk_BHkv, before_BHkv)
    out_BHCv, after_BHkv = _through_chunk(chunk, before_BHkv)
    trunk_BHkv = jnp.where(ends_trunk, after_BHkv, trunk_BHkv)
    return (after_BHkv, trunk_BHkv), out_BHCv

  (_, trunk_BHkv), out_NBHCv = jax.lax.scan(
    step, (state_BHkv, state_BHkv), (chunks, *map(jnp.array, marks))
  )
  out_BNCHv = jnp.moveaxis(out_NBHCv, (0, 2), (1, 3))
  out_BTHv = out_BNCHv.reshape(q_BTHk.shape[0], -1, *v_BTHv.shape[2:])
  outputs = [
    out_BTHv[:, first * size : first * size + width]
    for first, width in zip(firsts, widths)
  ]
  return jnp.concatenate(outputs, axis=1), trunk_BHkv


def _split(x_BTH: Array, widths: Sequence[int], size: int) -> Array:
  """[N, B, H, C, ...], with tokens behind each part that change nothing."""
  parts = []
  for width, end in zip(widths, itertools.accumulate(widths), strict=True):
    pads = [(0, 0)] * x_BTH.ndim
    pads[1] = (0, -width % size)
    parts.append(jnp.pad(x_BTH[:, end - width : end], pads))
  x_BTH = jnp.concatenate(parts, axis=1)
  x_BNCH = x_BTH.reshape(x_BTH.shape[0], -1, size, *x_BTH.shape[2:])
  return jnp.moveaxis(x_BNCH, (1, 3), (0, 2))


class Chunk(NamedTuple):
  """What is independent of the state before a chunk, for one or for all of them.

  Attributes:
    q_BHCk: queries, times the decay since the chunk's start.
    k_BHCk: keys, times the decay until the chunk's end.
    scores_BHCC: products of each query with the keys up to it, decayed.
    new_BHCv: the updates of the state, if it were 0 before.
    old_BHCk: what the state before takes away from them.
    decay_BH: of the whole chunk.
  """

  q_BHCk: Array
  k_BHCk: Array
  scores_BHCC: Array
  new_BHCv: Array
  old_BHCk: Array
  decay_BH: Array


def _chunks(
  q_NBHCk: Array,
  k_NBHCk: Array,
  v_NBHCv: Array,
  decay_NBHC: Array,
  strength_NBHC: Array,
) -> Chunk:
  """All chunks at once.

  A chunk's updates of the state are the solution u of (I + A) u = b (v - a k^T S),
  where A holds the products of each key with the keys before it (section 3 of the
  paper). The inverse of I + A is independent of the state.
  """
  row_C = np.arange(decay_NBHC.shape[-1])
  is_past_CC = row_C[:, None] >= row_C
  # Between each two tokens, the logs are added on their own: a difference of two sums
  # from the chunk's start would keep the rounding of the larger one.
  later = jnp.where(row_C[:, None] > row_C, decay_NBHC[..., None], 0)
  between = jnp.exp(jnp.where(is_past_CC, jnp.cumsum(later, axis=-2), -jnp.inf))
  since_NBHC1 = jnp.exp(jnp.cumsum(decay_NBHC, axis=-1))[..., None]
  scores = jnp.einsum("...ck,...sk->...cs", q_NBHCk, k_NBHCk) * between
  strong_k = k_NBHCk * strength_NBHC[..., None]
  products = jnp.einsum("...ck,...sk->...cs", strong_k, k_NBHCk) * between
  inverse = unit_lower_inverse(jnp.tril(products, -1))
  return Chunk(
    q_NBHCk * since_NBHC1,
    k_NBHCk * between[..., -1, :, None],
    scores,
    inverse @ (v_NBHCv * strength_NBHC[..., None]),
    inverse @ (strong_k * since_NBHC1),
    since_NBHC1[..., -1, 0],
  )


def _through_chunk(chunk: Chunk, before_BHkv: Array) -> tuple[Array, Array]:
  """A chunk's outputs [B, H, C, v], and the state after it."""
  change_BHCv = chunk.new_BHCv - chunk.old_BHCk @ before_BHkv
  out_BHCv = chunk.q_BHCk @ before_BHkv + chunk.scores_BHCC @ change_BHCv
  written_BHkv = jnp.einsum("bhck,bhcv->bhkv", chunk.k_BHCk, change_BHCv)
  return out_BHCv, before_BHkv * chunk.decay_BH[..., None, None] + written_BHkv


@jax.custom_vjp
def unit_lower_inverse(lower: Array) -> Array:
  """The inverse of I + lower, where `lower` [..., C, C] is strictly lower triangular.

  By halves, with products of matrices only, from blocks of one row to the whole:

  .. math:: (A, 0; B, C)^{-1} = (A^{-1}, 0; -C^{-1} B A^{-1}, C^{-1})

  Args:
    lower: C is a power of 2.
  """
  size = lower.shape[-1]
  row_C = np.arange(size)
  # Of each level, the blocks B: both halves are in one block, a row in the second.
  level_M = np.arange((size - 1).bit_length())[:, None, None]
  half_MC1 = row_C[:, None] >> level_M
  half_M1C = row_C[None, :] >> level_M
  below_MCC = (half_MC1 >> 1 == half_M1C >> 1) & (half_MC1 > half_M1C)

  def double(inverse: Array, below_CC: Array) -> tuple[Array, None]:
    corner = inverse @ jnp.where(below_CC, lower, 0) @ inverse
    return inverse - corner, None

  blocks = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
  with jax.default_matmul_precision("highest"):
    return jax.lax.scan(double, blocks, jnp.array(below_MCC))[0]


def _inverse_gradient(inverse: Array, gradient: Array) -> tuple[Array]:
  turned = jnp.swapaxes(inverse, -1, -2)
  with jax.default_matmul_precision("highest"):
    return (-jnp.tril(turned @ gradient @ turned, -1),)


unit_lower_inverse.defvjp(
  lambda lower: (unit_lower_inverse(lower),) * 2, _inverse_gradient
)
