"""Gated DeltaNet: a token mixer that keeps a matrix as its state, not keys and values.

Each head has a state that maps a key to a value, and that every token writes and reads
(`delta_rule`). The layer around the rule is that of transformers/models/qwen3_5 and
olmo_hybrid: queries, keys and values pass a short causal convolution, queries and keys
have length 1, and the output is normalised and multiplied by a gate.

**Which token a token continues.** Attention has a mask; a state has none. Each token
continues the last valid token before it in its part of the row. `columns` moves the
valid tokens of each part to its front, where the convolution sees its true predecessors
and the padding behind them leaves the state as it is (a = 1, b = 0). A row may have
several parts: the first is the trunk, and every other part starts from a copy of the
trunk's last state. No part reads another branch, so each has the values of a separate
pass over [trunk | part], and each token is computed once.

Shapes: B rows, T tokens, D model width, H value heads, k and v widths of a head's keys
and values, I inputs of the convolution, W its width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax.models import delta_rule, layer_functions

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
  out_BTHv, matrix_BHkv = delta_rule.delta_rule(
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
