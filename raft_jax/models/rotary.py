"""Rotary position embeddings: frequencies, their scaling for long texts, the rotation.

A `Rope` describes one rotary embedding; each published scaling divides the frequencies.
Shapes: B rows, T tokens, H heads, h head width, K frequencies (half of the width that
is rotated).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

Rotation = tuple[Array, Array]
"""Cosine and sine [B, T, 1, K], float32."""


@dataclasses.dataclass(frozen=True)
class Rope:
  """One rotary embedding.

  Attributes:
    theta: base of the frequencies.
    width: how many leading dimensions of a head are rotated; None: all.
    divisors: divisors of the frequencies: none, one for all, or one for each. A
      frequency divided by infinity does not rotate: (inf,) is a layer without
      positions.
    long_divisors: replace `divisors` in rows longer than `long_after` positions (Ding
      et al., "LongRoPE", arXiv 2402.13753). A row uses one of the two from its first
      token to its last, also while it is generated: the length that it may reach
      decides, so that cached keys never need another rotation. transformers decides by
      the longest row of the batch in each call, and recomputes the cache when an answer
      crosses the length; before that point it differs.
    scale: factor of cosine and sine.
  """

  theta: float
  width: int | None = None
  divisors: tuple[float, ...] = ()
  long_divisors: tuple[float, ...] = ()
  long_after: int = 0
  scale: float = 1.0


def rotation(
  rope: Rope, positions_BT: Array, head_dim: int, reach_B: Array | None = None
) -> Rotation:
  """Cosine and sine of every position's angles.

  Su et al., "RoFormer", arXiv 2104.09864.

  Args:
    reach_B: int32, length of each row in positions; read only with `long_divisors`.
  """
  width = rope.width or head_dim
  exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
  period = rope.theta**exponent
  if rope.divisors:
    period = jnp.array(rope.divisors, jnp.float32) * period
  inverse_frequency = 1.0 / period
  if rope.long_divisors and reach_B is not None:
    long = 1.0 / (jnp.array(rope.long_divisors, jnp.float32) * rope.theta**exponent)
    is_long_B11 = (reach_B > rope.long_after)[:, None, None]
    inverse_frequency = jnp.where(is_long_B11, long, inverse_frequency)
  angle = positions_BT[..., None].astype(jnp.float32) * inverse_frequency
  cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
  if rope.scale != 1.0:
    cos, sin = cos * rope.scale, sin * rope.scale
  return cos, sin


def rotate(
  x_BTHh: Array, cos: Array, sin: Array, *, interleaved: bool = False
) -> Array:
  """Rotates the leading 2K dimensions of each head.

  Args:
    interleaved: whether dimension 2i rotates with 2i + 1 (GLM), not i with K + i.
  """
  rotating, fixed = jnp.split(x_BTHh, [2 * cos.shape[-1]], axis=-1)
  rotating = rotating.astype(jnp.float32)
  if interleaved:
    first, second = rotating[..., 0::2], rotating[..., 1::2]
  else:
    first, second = jnp.split(rotating, 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  if interleaved:
    rotated = jnp.stack(turned, axis=-1).reshape(rotating.shape)
  else:
    rotated = jnp.concatenate(turned, axis=-1)
  rotated = rotated.astype(x_BTHh.dtype)
  return jnp.concatenate([rotated, fixed], axis=-1) if fixed.shape[-1] else rotated


def query_factor(positions_BT: Array, beta: float, length: int) -> Array:
  """Factor [B, T, 1, 1] of queries, float32, that grows with their position.

  .. math:: 1 + \\beta \\log(1 + \\lfloor p / n \\rfloor)

  It keeps the softmax of a long text as sharp as that of a short one (Llama 4 and
  Ministral 3: transformers/models/ministral3/modular_ministral3.py).

  Args:
    beta: growth of the factor.
    length: n, the positions that the model was first trained on.
  """
  factor_BT = 1.0 + beta * jnp.log1p((positions_BT // length).astype(jnp.float32))
  return factor_BT[:, :, None, None]
