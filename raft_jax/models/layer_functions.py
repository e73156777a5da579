"""The functions that a transformer layer is made of: norm, projection, attention.

Shapes: B rows, T queries, S keys, I inputs, O outputs, r rank, H query heads, N
key/value heads, G query heads for each key/value head, h head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from raft_jax.models import quantised

Implementation = Literal["xla", "cudnn"]
"""Implementations of `jax.nn.dot_product_attention`."""
GATE_SLOPE = 1.702
"""`swiglu_alpha` of gpt-oss."""
XIELU_BETA = 0.5
"""Slope of xIELU at 0."""
XIELU_EPS = -1e-6
"""The exponent of xIELU is at most this."""


def rms_norm(
  x: Array,
  scale: Array | None,
  *,
  eps: float,
  offset: float = 0.0,
  rounds_last: bool = False,
) -> Array:
  """Root mean square normalisation over the last axis, computed in float32.

  Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.

  Args:
    scale: factor of each component; None: there is none.
    eps: added to the mean square.
    offset: added to the scale.
    rounds_last: whether to multiply by the scale before rounding to the dtype of x.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + eps)
  if scale is None:
    return normed.astype(x.dtype)
  if rounds_last:
    return (normed * (offset + scale.astype(jnp.float32))).astype(x.dtype)
  return normed.astype(x.dtype) * (offset + scale).astype(x.dtype)


def xielu(x: Array, p: Array, n: Array) -> Array:
  """The activation xIELU with two learned numbers, computed in float32.

  .. math::
    \\alpha_p x^2 + \\beta x \\; (x > 0), \\quad
    \\alpha_n (e^{\\min(x, \\epsilon)} - 1 - x) + \\beta x \\; (x \\le 0)

  with α_p = softplus(p) and α_n = β + softplus(n). Huang and Schlag, "Deriving
  Activation Functions Using Integration", arXiv 2411.13010; β and ε as in
  transformers/activations.py.

  Args:
    p, n: one number each, of shape [1].
  """
  x32 = x.astype(jnp.float32)
  alpha_p, alpha_n = (jax.nn.softplus(a.astype(jnp.float32)) for a in (p, n))
  positive = alpha_p * x32 * x32
  negative = (XIELU_BETA + alpha_n) * (jnp.expm1(jnp.minimum(x32, XIELU_EPS)) - x32)
  return (jnp.where(x32 > 0, positive, negative) + XIELU_BETA * x32).astype(x.dtype)


def project(
  x_BTI: Array,
  kernel: Array | quantised.QuantisedKernel | nnx.Param,
  adapter: Mapping[str, Array] | None = None,
) -> Array:
  """Linear map by a Hugging Face kernel [out, in], in the dtype of the activations.

  With an adapter {"a": [r, in], "b": [out, r], "scale": []}, the map by kernel +
  scale * b a, without forming that sum (Hu et al., "LoRA", arXiv 2106.09685).
  """
  if isinstance(kernel, nnx.Param):
    kernel = kernel.get_value()
  if isinstance(kernel, quantised.QuantisedKernel):
    out_BTO = quantised.product(x_BTI, kernel)
  else:
    # Rows and tokens as one axis. With two, XLA:CPU transposes the output's gradient in
    # the loop that computes it, for its product with the input, which is slow.
    x_MI = x_BTI.reshape(-1, x_BTI.shape[-1])
    out_MO = jnp.einsum("mi,oi->mo", x_MI, kernel.astype(x_BTI.dtype))
    out_BTO = out_MO.reshape(*x_BTI.shape[:-1], -1)
  if adapter is None:
    return out_BTO
  adapter = {name: leaf.astype(x_BTI.dtype) for name, leaf in adapter.items()}
  # The barrier keeps XLA:GPU from joining the adapter to its kernel, to multiply with
  # both at once: while sampling it would do that for every token.
  apart_BTI = jax.lax.optimization_barrier(x_BTI)
  low_BTr = jnp.einsum("...i,ri->...r", apart_BTI, adapter["a"]) * adapter["scale"]
  return out_BTO + jnp.einsum("...r,or->...o", low_BTr, adapter["b"])


def clamped_gate(gate: Array, up: Array, limit: float) -> Array:
  """The gated activation of gpt-oss: both factors are clamped, and 1 is added to one.

  .. math:: (\\tilde u + 1) \\, \\tilde g \\, \\sigma(1.702\\, \\tilde g)

  with g at most `limit` and u within it (transformers/models/gpt_oss).
  """
  gate = jnp.minimum(gate, limit)
  up = jnp.clip(up, -limit, limit)
  return (up + 1) * (gate * jax.nn.sigmoid(gate * GATE_SLOPE))


def attention(
  q_BTHh: Array,
  k_BSNh: Array,
  v_BSNh: Array,
  mask_BTS: Array,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  sinks_H: Array | None = None,
  implementation: Implementation = "xla",
) -> Array:
  """Softmax attention; consecutive query heads share a key/value head.

  Args:
    mask_BTS: True where a query may attend to a key.
    scale: factor of the scores; None: h ** -0.5.
    softcap: c in c * tanh(scores / c), or None.
    sinks_H: each head's score of one more key, whose value is 0; None: there is none.
      transformers/models/gpt_oss/modeling_gpt_oss.py.
    implementation: read without softcap and sinks only; jax has none with them.
  """
  if softcap is None and sinks_H is None:
    return jax.nn.dot_product_attention(
      q_BTHh,
      k_BSNh,
      v_BSNh,
      mask=mask_BTS[:, None],
      scale=scale,
      implementation=implementation,
    )
  batch, length, heads, width = q_BTHh.shape
  q_BTNGh = q_BTHh.reshape(batch, length, k_BSNh.shape[2], -1, width)
  scores_BNGTS = jnp.einsum(
    "btngh,bsnh->bngts", q_BTNGh, k_BSNh, preferred_element_type=jnp.float32
  )
  scores_BNGTS *= width**-0.5 if scale is None else scale
  if softcap is not None:
    scores_BNGTS = softcap * jnp.tanh(scores_BNGTS / softcap)
  # Finite, so that a padding row whose keys are all masked gets no NaN.
  lowest = jnp.finfo(jnp.float32).min
  scores_BNGTS = jnp.where(mask_BTS[:, None, None], scores_BNGTS, lowest)
  if sinks_H is not None:
    sinks_NG11 = sinks_H.astype(jnp.float32).reshape(*scores_BNGTS.shape[1:3], 1, 1)
    sinks = jnp.broadcast_to(sinks_NG11, (*scores_BNGTS.shape[:-1], 1))
    scores_BNGTS = jnp.concatenate([scores_BNGTS, sinks], axis=-1)
  share_BNGTS = jax.nn.softmax(scores_BNGTS, axis=-1).astype(v_BSNh.dtype)
  share_BNGTS = share_BNGTS[..., : k_BSNh.shape[1]]
  out_BTNGh = jnp.einsum("bngts,bsnh->btngh", share_BNGTS, v_BSNh)
  return out_BTNGh.reshape(batch, length, heads, width)
