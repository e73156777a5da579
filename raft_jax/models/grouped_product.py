"""Products of rows that are sorted by group, each group with a kernel of its own.

The products of a mixture of experts, and their gradients: by `jax.lax.ragged_dot` where
it is fast, elsewhere in a loop over blocks of rows.

Shapes: M rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(
  x_MI: Array, kernel_EOI: Array, sizes_E: Array, parts: int = 1
) -> Array:
  """Multiplies consecutive rows by their group's kernel, which is [out, in].

  Args:
    x_MI: rows, those of group 0 first.
    sizes_E: int32, the number of rows of each group; rows after them give 0.
    parts: among how many devices the groups are divided; only `plan` reads it, to count
      the rows that this device multiplies on average.

  Returns:
    [M, O] in the dtype of x.
  """
  return _named_product(2, parts)(x_MI, kernel_EOI, sizes_E)


def _product_forward(x_MI: Array, kernel_EOI: Array, sizes_E: Array, parts: int):
  return grouped_product(x_MI, kernel_EOI, sizes_E, parts), (x_MI, kernel_EOI, sizes_E)


def _product_backward(parts: int, saved: tuple[Array, ...], gradient_MO: Array):
  x_MI, kernel_EOI, sizes_E = saved
  x_gradient_MI = _named_product(1, parts)(gradient_MO, kernel_EOI, sizes_E)
  kernel_gradient_EOI = _named_outer(parts)(gradient_MO, x_MI, sizes_E)
  return x_gradient_MI, kernel_gradient_EOI.astype(kernel_EOI.dtype), None


grouped_product.defvjp(_product_forward, _product_backward)


@functools.cache
def _named_product(axis: int, parts: int) -> Callable[..., Array]:
  """x and kernels to products over that axis of the kernels, as a named program.

  `hlo_cost.flops` knows the name.
  """

  def product(x_MI: Array, kernel_EOI: Array, sizes_E: Array) -> Array:
    size = x_MI.shape[0] * math.prod(kernel_EOI.shape[1:])
    ragged = functools.partial(ragged_product, axis=axis)
    blocked = functools.partial(blocked_product, axis=axis)
    return _on_platform(ragged, blocked, size, x_MI, kernel_EOI, sizes_E)

  product.__name__ = f"grouped_product_over_{parts}"
  return jax.jit(product)


@functools.cache
def _named_outer(parts: int) -> Callable[..., Array]:
  """Gradient and rows to the gradient of the kernels, [E, O, I] float32."""

  def outer(gradient_MO: Array, x_MI: Array, sizes_E: Array) -> Array:
    size = gradient_MO.size * x_MI.shape[1]
    return _on_platform(ragged_outer, blocked_outer, size, gradient_MO, x_MI, sizes_E)

  outer.__name__ = f"grouped_outer_over_{parts}"
  return jax.jit(outer)


LARGEST_RAGGED = {"cpu": 2**20, "gpu": 2**31}
"""Up to how many products of numbers for each group `jax.lax.ragged_dot` is used."""


def _on_platform(
  ragged: Callable[..., Array],
  blocked: Callable[..., Array],
  size: int,
  *arrays: Array,
) -> Array:
  """Computes by `jax.lax.ragged_dot` or in a loop over blocks; the values are equal.

  Only TPUs have a kernel of `ragged_dot`. Elsewhere (jax 0.10.2) it multiplies all rows
  with the kernels of all groups, in E times the memory. That is faster than a loop only
  if the rows are few, as in decoding: a round of the loop takes about 20 µs on a GPU.

  Args:
    size: products of numbers, if all rows were of one group.
  """
  small = {name: size <= limit for name, limit in LARGEST_RAGGED.items()}
  return jax.lax.platform_dependent(
    *arrays,
    tpu=ragged,
    cpu=ragged if small["cpu"] else blocked,
    default=ragged if small["gpu"] else blocked,
  )


def ragged_product(
  x_MI: Array, kernel_EOI: Array, sizes_E: Array, *, axis: int
) -> Array:
  """`grouped_product` by `jax.lax.ragged_dot`; contracts that axis of the kernels."""
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (axis,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,),
  )
  out_MO = jax.lax.ragged_dot_general(x_MI, kernel_EOI, sizes_E, dimensions)
  return _within(out_MO, sizes_E)


def ragged_outer(gradient_MO: Array, x_MI: Array, sizes_E: Array) -> Array:
  """The gradient of the kernels by `jax.lax.ragged_dot`."""
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
  )
  return jax.lax.ragged_dot_general(
    gradient_MO, x_MI, sizes_E, dimensions, preferred_element_type=jnp.float32
  )


def _within(out_MO: Array, sizes_E: Array) -> Array:
  """0 in the rows of no group."""
  is_row_M = jnp.arange(out_MO.shape[0]) < jnp.sum(sizes_E)
  return jnp.where(is_row_M[:, None], out_MO, 0)


class _Blocks(NamedTuple):
  """Equal blocks of rows that cover every group; one may reach into the next groups.

  Attributes:
    size: rows of a block.
    most: number of blocks if the rows are spread in the worst way.
    used: number of blocks.
    expert: group of each block; `start`, its first row; `end`, the end of its group.
  """

  size: int
  most: int
  used: Array
  expert: Array
  start: Array
  end: Array


def _blocks(rows: int, sizes_E: Array) -> _Blocks:
  experts = sizes_E.shape[0]
  # A power of two near the rows of a group, between those that GPUs multiply well.
  size = 2 ** round(math.log2(max(rows / experts, 1)))
  size = min(max(size, 8), 512)
  most = rows // size + min(experts, rows)
  count_E = -(-sizes_E // size)
  last_E, end_E = jnp.cumsum(count_E), jnp.cumsum(sizes_E)
  index = jnp.arange(most, dtype=jnp.int32)
  expert = jnp.minimum(jnp.searchsorted(last_E, index, side="right"), experts - 1)
  nth = index - (last_E - count_E)[expert]
  start = (end_E - sizes_E)[expert] + nth * size
  return _Blocks(size, most, last_E[-1], expert, start, end_E[expert])


def _over_blocks(
  blocks: _Blocks, body: Callable[[Array, Array], Array], out: Array
) -> Array:
  """Applies `body` to the number of each block that is used, and `out`, in order."""
  # The second bound is for the compiler and `plan`, which do not know the first.
  return jax.lax.while_loop(
    lambda state: (state[0] < blocks.used) & (state[0] < blocks.most),
    lambda state: (state[0] + 1, body(state[0], state[1])),
    (jnp.int32(0), out),
  )[1]


def blocked_product(
  x_MI: Array, kernel_EOI: Array, sizes_E: Array, *, axis: int
) -> Array:
  """`grouped_product` in a loop over blocks of rows."""
  rows, blocks = x_MI.shape[0], _blocks(x_MI.shape[0], sizes_E)
  # The last block may reach behind the last row.
  padded_MI = jnp.pad(x_MI, ((0, blocks.size), (0, 0)))

  def multiply(index: Array, out_MO: Array) -> Array:
    start = blocks.start[index]
    part = jax.lax.dynamic_slice_in_dim(padded_MI, start, blocks.size)
    kernel = jax.lax.dynamic_index_in_dim(
      kernel_EOI, blocks.expert[index], keepdims=False
    )
    product = jax.lax.dot_general(part, kernel, (((1,), (axis - 1,)), ((), ())))
    # What is written behind the end of a group is overwritten by the next one's.
    return jax.lax.dynamic_update_slice_in_dim(out_MO, product, start, axis=0)

  shape = (padded_MI.shape[0], kernel_EOI.shape[3 - axis])
  out_MO = _over_blocks(blocks, multiply, jnp.zeros(shape, x_MI.dtype))
  return _within(out_MO[:rows], sizes_E)


def blocked_outer(gradient_MO: Array, x_MI: Array, sizes_E: Array) -> Array:
  """The gradient of the kernels in a loop over blocks of rows."""
  blocks = _blocks(x_MI.shape[0], sizes_E)
  padded_MO, padded_MI = (
    jnp.pad(rows, ((0, blocks.size), (0, 0))) for rows in (gradient_MO, x_MI)
  )

  def add(index: Array, out_EOI: Array) -> Array:
    start, expert = blocks.start[index], blocks.expert[index]
    is_row = (start + jnp.arange(blocks.size) < blocks.end[index])[:, None]
    left, right = (
      jnp.where(is_row, jax.lax.dynamic_slice_in_dim(rows, start, blocks.size), 0)
      for rows in (padded_MO, padded_MI)
    )
    product = jax.lax.dot_general(
      left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    total = jax.lax.dynamic_index_in_dim(out_EOI, expert, keepdims=False) + product
    return jax.lax.dynamic_update_index_in_dim(out_EOI, total, expert, axis=0)

  shape = (sizes_E.shape[0], gradient_MO.shape[1], x_MI.shape[1])
  return _over_blocks(blocks, add, jnp.zeros(shape, jnp.float32))
