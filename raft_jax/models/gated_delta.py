"""Gated DeltaNet: a token mixer that keeps a matrix as its state, not keys and values.

Each head has a state S [k, v], which maps a key to a value. A token with query q, key
k, value v, decay a in (0, 1) and strength b writes and reads it:

.. math:: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, \\quad o_t = S_t^T q_t

Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv
2412.06464. The layer around it is that of transformers/models/qwen3_5 and olmo_hybrid:
queries, keys and values pass a short causal convolution, queries and keys have length
1, and the output is normalised and multiplied by a gate.

**Which token a token continues.** Attention has a mask; a state has none. Each token
continues the last valid token before it in its part of the row. `columns` moves the
valid tokens of each part to its front, where the convolution sees its true predecessors
and the padding behind them leaves the state as it is (a = 1, b = 0). A row may have
several parts: the first is the trunk, and every other part starts from a copy of the
trunk's last state. No part reads another branch, so each has the values of a separate
pass over [trunk | part], and each token is computed once.

Shapes: B rows, T tokens, D model width, H value heads, k and v widths of a head's keys
and values, I inputs of the convolution, W its width, C tokens of a chunk, N chunks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax.models import layer_functions

CHUNK = 64
"""Tokens whose updates of the state are computed at once; a power of 2."""
LENGTH_EPS = 1e-6
"""Added to the squared length of queries and keys."""
MIXED = ("q", "k", "v")
"""The projections that pass the convolution."""


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
  """The layers of this kind in a network, and their shape.

  Attributes:
    layers: their numbers, in ascending order.
    key_heads: heads of queries and keys; each serves consecutive value heads.
    value_heads: heads of values, states and outputs.
    key_width: width of a head of queries and keys.
    value_width: width of a head of values.
    conv_width: tokens that the convolution reads, the current one included.
    strength: upper bound of b; above 1, a state's eigenvalues may be negative.
    norm_eps: added to the mean square of a head's output.
  """

  layers: tuple[int, ...]
  key_heads: int
  value_heads: int
  key_width: int
  value_width: int
  conv_width: int
  strength: float = 1.0
  norm_eps: float = 1e-6

  @property
  def widths(self) -> dict[str, int]:
    """Outputs of the projections to queries, keys and values."""
    keys = self.key_heads * self.key_width
    return {"q": keys, "k": keys, "v": self.value_heads * self.value_width}


AXES = {
  **{f"delta_{name}": ("heads", "embed") for name in (*MIXED, "gate", "b", "a")},
  "delta_o": ("embed", "heads"),
  **{f"delta_{name}_conv": ("heads", "head_dim", "head_dim") for name in MIXED},
  "delta_a_log": ("heads",),
  "delta_dt_bias": ("heads",),
  "delta_norm": ("head_dim",),
}
"""A layer's parameters of this kind -> their logical axes."""


def shapes(config: DeltaConfig, d_model: int) -> dict[str, tuple[int, ...]]:
  """A layer's parameters of this kind -> their shapes; kernels are [out, in]."""
  widths, heads = config.widths, config.value_heads
  return {
    **{f"delta_{name}": (width, d_model) for name, width in widths.items()},
    "delta_gate": (widths["v"], d_model),
    "delta_b": (heads, d_model),
    "delta_a": (heads, d_model),
    "delta_o": (d_model, widths["v"]),
    **{
      f"delta_{name}_conv": (width, 1, config.conv_width)
      for name, width in widths.items()
    },
    "delta_a_log": (heads,),
    "delta_dt_bias": (heads,),
    "delta_norm": (config.value_width,),
  }


class State(NamedTuple):
  """What a layer remembers of the tokens so far.

  Attributes:
    conv_BWI: the last W - 1 inputs of the convolution, oldest first.
    matrix_BHkv: float32, the state of each head.
  """

  conv_BWI: Array
  matrix_BHkv: Array


def empty_state(config: DeltaConfig, batch: int, dtype: Any) -> State:
  """The state before the first token."""
  heads = (batch, config.value_heads, config.key_width, config.value_width)
  inputs = sum(config.widths.values())
  return State(
    jnp.zeros((batch, config.conv_width - 1, inputs), dtype), jnp.zeros(heads)
  )


# --- The order of the tokens ----------------------------------------------------------


class Part(NamedTuple):
  """Consecutive columns of the rows, of which `count_B` hold tokens."""

  width: int
  count_B: Array


class Columns(NamedTuple):
  """The order in which a layer reads the columns of its rows.

  Attributes:
    parts: the trunk and its branches.
    valid_BT: True for the columns that hold tokens, in the new order.
    order_BT: column that stands at each place of the new order; None: as they are.
    place_BT: the inverse of `order_BT`.
  """

  parts: tuple[Part, ...]
  valid_BT: Array
  order_BT: Array | None
  place_BT: Array | None


def columns(valid_BT: Array, widths: Sequence[int] = ()) -> Columns:
  """Moves the valid tokens of each part to its front, in their order.

  Args:
    valid_BT: True for columns that hold a token.
    widths: of the trunk and of each branch, which together are the row; empty: the
      whole row is one part.
  """
  if valid_BT.shape[1] == 1:
    part = Part(1, valid_BT[:, 0].astype(jnp.int32))
    return Columns((part,), valid_BT, None, None)
  parts, orders, start = [], [], 0
  for width in filter(None, widths or (valid_BT.shape[1],)):
    of_part = valid_BT[:, start : start + width]
    parts.append(Part(width, jnp.sum(of_part, axis=1, dtype=jnp.int32)))
    orders.append(start + jnp.argsort(~of_part, axis=1, stable=True))
    start += width
  if start != valid_BT.shape[1]:
    raise ValueError(f"parts of {list(widths)} columns do not add up to the row's")
  order_BT = jnp.concatenate(orders, axis=1)
  valid_BT = jnp.take_along_axis(valid_BT, order_BT, axis=1)
  return Columns(tuple(parts), valid_BT, order_BT, jnp.argsort(order_BT, axis=1))


@jax.custom_vjp
def _reordered(x_BTD: Array, order_BT: Array, place_BT: Array) -> Array:
  """The columns of x in a new order, whose inverse is `place_BT`."""
  del place_BT
  return jnp.take_along_axis(x_BTD, order_BT[..., None], axis=1)


# A gather each way; derived, the gradient would be a scatter.
_reordered.defvjp(
  lambda x, order, place: (_reordered(x, order, place), (order, place)),
  lambda orders, gradient: (_reordered(gradient, *orders[::-1]), None, None),
)


# --- The layer ------------------------------------------------------------------------


def mix(
  config: DeltaConfig,
  weights: Mapping[str, Array],
  lora: Mapping[str, Any],
  x_BTD: Array,
  columns: Columns,
  state: State | None,
) -> tuple[Array, State]:
  """One layer of Gated DeltaNet.

  Args:
    weights: of `shapes`.
    lora: adapters of its projections, by the same names.
    columns: the parts of the rows and the order of their tokens.
    state: of the tokens before this pass; None: there are none.

  Returns:
    out_BTD in the dtype of x, and the state after the trunk's last token.
  """
  if columns.order_BT is not None and columns.place_BT is not None:
    x_BTD = _reordered(x_BTD, columns.order_BT, columns.place_BT)

  def project(name: str) -> Array:
    return layer_functions.project(x_BTD, weights[name], lora.get(name))

  mixed_BTI = jnp.concatenate([project(f"delta_{name}") for name in MIXED], axis=-1)
  decay_BTH, strength_BTH = _gates(config, weights, project, columns.valid_BT)
  kernel_IW = jnp.concatenate([weights[f"delta_{name}_conv"][:, 0] for name in MIXED])
  state = state or empty_state(config, len(x_BTD), x_BTD.dtype)
  qkv_BTI, conv_BWI = convolve(mixed_BTI, kernel_IW, state.conv_BWI, columns.parts)
  out_BTHv, matrix_BHkv = delta_rule(
    *_heads(config, qkv_BTI),
    decay_BTH,
    strength_BTH,
    state.matrix_BHkv,
    widths=[part.width for part in columns.parts],
  )
  out_BTHv = out_BTHv.astype(x_BTD.dtype)
  gate_BTHv = project("delta_gate").reshape(out_BTHv.shape)
  normed = layer_functions.rms_norm(
    out_BTHv, weights["delta_norm"], eps=config.norm_eps
  )
  gated = normed.astype(jnp.float32) * jax.nn.silu(gate_BTHv.astype(jnp.float32))
  gated_BTI = gated.astype(x_BTD.dtype).reshape(*x_BTD.shape[:-1], -1)
  out_BTD = layer_functions.project(gated_BTI, weights["delta_o"], lora.get("delta_o"))
  if columns.order_BT is not None and columns.place_BT is not None:
    out_BTD = _reordered(out_BTD, columns.place_BT, columns.order_BT)
  return out_BTD, State(conv_BWI, matrix_BHkv)


def _gates(
  config: DeltaConfig, weights: Mapping[str, Array], project: Any, valid_BT: Array
) -> tuple[Array, Array]:
  """log a and b of each token, float32; padding leaves the state as it is."""
  step_BTH = project("delta_a").astype(jnp.float32)
  step_BTH = jax.nn.softplus(step_BTH + weights["delta_dt_bias"].astype(jnp.float32))
  decay_BTH = -jnp.exp(weights["delta_a_log"].astype(jnp.float32)) * step_BTH
  strength_BTH = config.strength * jax.nn.sigmoid(project("delta_b"))
  valid_BT1 = valid_BT[..., None]
  return (
    jnp.where(valid_BT1, decay_BTH, 0),
    jnp.where(valid_BT1, strength_BTH.astype(jnp.float32), 0),
  )


def convolve(
  x_BTI: Array, kernel_IW: Array, before_BWI: Array, parts: Sequence[Part]
) -> tuple[Array, Array]:
  """SiLU of a causal convolution over the tokens, one filter for each input.

  Args:
    x_BTI: the parts of the rows; the first `count_B` tokens of each part are valid.
    kernel_IW: the last column multiplies the current token.
    before_BWI: the W - 1 inputs before the trunk's first token.

  Returns:
    The outputs, and the trunk's last W - 1 valid inputs.
  """
  width = kernel_IW.shape[1]
  kernel_IW = kernel_IW.astype(x_BTI.dtype).astype(jnp.float32)
  ends = itertools.accumulate(part.width for part in parts)
  trunk, *branches = (
    x_BTI[:, end - part.width : end] for part, end in zip(parts, ends, strict=True)
  )
  trunk_BTI = jnp.concatenate([before_BWI.astype(x_BTI.dtype), trunk], axis=1)
  last_BW = parts[0].count_B[:, None] + jnp.arange(width - 1)
  after_BWI = jnp.take_along_axis(trunk_BTI, last_BW[..., None], axis=1)
  # Before each part are the inputs that it continues; behind it, the next part's.
  inputs = [trunk_BTI, *(x for branch in branches for x in (after_BWI, branch))]
  inputs_BTI = jnp.concatenate(inputs, axis=1)
  length = inputs_BTI.shape[1] - (width - 1)
  sums_BTI = sum(
    inputs_BTI[:, tap : tap + length].astype(jnp.float32) * kernel_IW[:, tap]
    for tap in range(width)
  )
  out_BTI = jax.nn.silu(jnp.asarray(sums_BTI).astype(x_BTI.dtype))
  starts = itertools.accumulate((part.width + width - 1 for part in parts), initial=0)
  outputs = [
    out_BTI[:, start : start + part.width] for start, part in zip(starts, parts)
  ]
  return jnp.concatenate(outputs, axis=1), after_BWI


def _heads(config: DeltaConfig, qkv_BTI: Array) -> tuple[Array, Array, Array]:
  """Queries and keys [B, T, H, k], values [B, T, H, v], all float32."""
  splits = list(itertools.accumulate(config.widths.values()))[:-1]
  parts = jnp.split(qkv_BTI.astype(jnp.float32), splits, axis=-1)
  counts = (config.key_heads, config.key_heads, config.value_heads)
  q, k, v = (
    part.reshape(*part.shape[:-1], count, -1)
    for part, count in zip(parts, counts, strict=True)
  )
  shared = config.value_heads // config.key_heads
  q, k = (jnp.repeat(_unit(x), shared, axis=2) for x in (q, k))
  return q * config.key_width**-0.5, k, v


def _unit(x: Array) -> Array:
  """Vectors of length 1, except near 0."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + LENGTH_EPS)


# --- The delta rule -------------------------------------------------------------------


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

  A chunk's updates of the state are the solution u of (I + A) u = b (v - a k^T S),
  where A holds the products of each key with the keys before it (section 3 of the
  paper). The inverse of I + A is independent of the state, so all chunks compute it at
  once. Every part begins with a chunk of its own; a branch's first one takes the state
  that the trunk's last one left.
  """
  size = min(CHUNK, 1 << (max(widths) - 1).bit_length())
  counts = [-(-width // size) for width in widths]
  ends = list(itertools.accumulate(widths))

  def split(x_BTH: Array) -> Array:
    """[N, B, H, C, ...], with tokens behind each part that change nothing."""
    parts = []
    for width, count, end in zip(widths, counts, ends, strict=True):
      pads = [(0, 0)] * x_BTH.ndim
      pads[1] = (0, count * size - width)
      parts.append(jnp.pad(x_BTH[:, end - width : end], pads))
    x_BTH = jnp.concatenate(parts, axis=1)
    x_BNCH = x_BTH.reshape(x_BTH.shape[0], -1, size, *x_BTH.shape[2:])
    return jnp.moveaxis(x_BNCH, (1, 3), (0, 2))

  q, k, v, strength = map(split, (q_BTHk, k_BTHk, v_BTHv, strength_BTH))
  passed_NBHC = jnp.cumsum(split(decay_BTH), axis=-1)  # log of the decays up to a token
  between = passed_NBHC[..., :, None] - passed_NBHC[..., None, :]
  is_past_CC = jnp.tril(jnp.ones((size, size), bool))
  between = jnp.exp(jnp.where(is_past_CC, between, -jnp.inf))
  scores = jnp.einsum("...ck,...sk->...cs", q, k) * between
  strong_k = k * strength[..., None]
  products = jnp.einsum("...ck,...sk->...cs", strong_k, k) * between
  inverse = unit_lower_inverse(jnp.tril(products, -1))
  new_v = inverse @ (v * strength[..., None])
  old_k = inverse @ (strong_k * jnp.exp(passed_NBHC)[..., None])

  def chunk(states: tuple[Array, Array], inputs: tuple[Array, ...]) -> Any:
    before_BHkv, trunk_BHkv = states
    q, k, scores, new_v, old_k, passed_BHC, begins_branch, ends_trunk = inputs
    before_BHkv = jnp.where(begins_branch, trunk_BHkv, before_BHkv)
    change_BHCv = new_v - old_k @ before_BHkv
    out_BHCv = (q * jnp.exp(passed_BHC)[..., None]) @ before_BHkv
    out_BHCv = out_BHCv + scores @ change_BHCv
    all_BH1 = passed_BHC[..., -1:]
    kept_k = k * jnp.exp(all_BH1 - passed_BHC)[..., None]
    written_BHkv = jnp.einsum("bhck,bhcv->bhkv", kept_k, change_BHCv)
    after_BHkv = before_BHkv * jnp.exp(all_BH1)[..., None] + written_BHkv
    trunk_BHkv = jnp.where(ends_trunk, after_BHkv, trunk_BHkv)
    return (after_BHkv, trunk_BHkv), out_BHCv

  firsts = list(itertools.accumulate(counts, initial=0))
  number_N = np.arange(firsts[-1])
  marks = np.isin(number_N, firsts[1:-1]), number_N == counts[0] - 1
  (_, trunk_BHkv), out_NBHCv = jax.lax.scan(
    chunk,
    (state_BHkv, state_BHkv),
    (q, k, scores, new_v, old_k, passed_NBHC, *map(jnp.array, marks)),
  )
  out_BNCHv = jnp.moveaxis(out_NBHCv, (0, 2), (1, 3))
  out_BTHv = out_BNCHv.reshape(q_BTHk.shape[0], -1, *v_BTHv.shape[2:])
  outputs = [
    out_BTHv[:, first * size : first * size + width]
    for first, width in zip(firsts, widths)
  ]
  return jnp.concatenate(outputs, axis=1), trunk_BHkv


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
