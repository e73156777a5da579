"""Kernels in 8 or 4 bits, which a product restores where it reads them.

- int8: q = round(w / s) with s = max |w| / 127 of each output, restored as s q.
- nf4: each block of 64 inputs is divided by its largest magnitude s, and each number
  is replaced by the nearest of 16 levels, restored as s LEVELS[q]. Dettmers et al.,
  "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, without the second
  quantisation of s.

No gradient reaches a quantised kernel. A product keeps the codes for its backward pass
and restores the kernel there again, so restored kernels are never in memory together.

Shapes: O outputs, I inputs, I / 64 blocks; leading axes stack layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax.models import sharding

BLOCK = 64
"""Inputs that have a scale in common in nf4."""
LEVELS = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
  *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution; NF4 in appendix E of arXiv 2305.14314."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codes", "scale"),
  meta_fields=("axes",),
)
@dataclasses.dataclass(frozen=True)
class QuantisedKernel:
  """A kernel [..., O, I], or whatever belongs to its arrays, such as their shardings.

  Attributes:
    codes: int8 [..., O, I]; of nf4 uint8 [..., O, I / 64, 32], of which each byte has
      the codes of the inputs i (low half) and i + 32 (high half) of a block.
    scale: float32 [..., O]; of nf4 [..., O, I / 64].
    axes: logical axes of the kernel [O, I], for `sharding`.
  """

  codes: Any
  scale: Any
  axes: tuple[str, str]


def is_quantised(node: Any) -> bool:
  """Whether a node of a tree is a quantised kernel; an `is_leaf` for `jax.tree`."""
  return isinstance(node, QuantisedKernel)


def quantise(kernel_OI: Array, form: str, axes: tuple[str, str]) -> QuantisedKernel:
  """Quantises a kernel [..., O, I].

  Args:
    form: "int8" or "nf4".
    axes: logical axes of the kernel [O, I].

  Raises:
    ValueError: of nf4, if I is not a multiple of 64.
  """
  values = kernel_OI.astype(jnp.float32)
  if form == "int8":
    scale = jnp.max(jnp.abs(values), axis=-1) / 127
    codes = jnp.round(values / _divisor(scale)).astype(jnp.int8)
    return QuantisedKernel(codes, scale, axes)
  if values.shape[-1] % BLOCK:
    raise ValueError(f"{values.shape[-1]} inputs are not whole blocks of {BLOCK}")
  blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
  scale = jnp.max(jnp.abs(blocks), axis=-1)
  levels = np.array(LEVELS, np.float32)
  between = (levels[1:] + levels[:-1]) / 2
  nearest = jnp.searchsorted(between, blocks / _divisor(scale), method="compare_all")
  low, high = jnp.split(nearest.astype(jnp.uint8), 2, axis=-1)
  return QuantisedKernel(low | high << 4, scale, axes)


def _divisor(scale: Array) -> Array:
  """What to divide by: 1 where all numbers are 0."""
  return jnp.where(scale > 0, scale, 1)[..., None]


def restore(kernel: QuantisedKernel, dtype: Any = jnp.float32) -> Array:
  """The kernel [..., O, I], computed in float32 and rounded to `dtype`."""
  if kernel.codes.dtype == jnp.int8:
    values = kernel.codes.astype(jnp.float32) * kernel.scale[..., None]
    return values.astype(dtype)
  halves = [
    (_level(codes) * kernel.scale[..., None]).astype(dtype)
    for codes in (kernel.codes & 15, kernel.codes >> 4)
  ]
  blocks = jnp.concatenate(halves, axis=-1)
  return blocks.reshape(*blocks.shape[:-2], -1)


def _level(codes: Array) -> Array:
  """`LEVELS[codes]` as a tree of selections, which needs no look-up in memory."""
  values: list[Any] = [np.float32(level) for level in LEVELS]
  for bit in range(4):
    is_set = (codes & (1 << bit)) != 0
    values = [
      jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2])
    ]
  return values[0]


@jax.custom_vjp
def product(x_BTI: Array, kernel: QuantisedKernel) -> Array:
  """`x` times the transposed kernel, in the dtype of x; the kernel is a constant."""
  # The barrier ties the kernel to x. Otherwise XLA could restore kernels before a loop
  # that reads them, or once for both passes, and would keep them all.
  x_BTI, kernel = jax.lax.optimization_barrier((x_BTI, kernel))
  kernel, dtype = gathered(kernel), x_BTI.dtype
  if kernel.codes.dtype != jnp.int8:
    return jnp.einsum("...i,oi->...o", x_BTI, restore(kernel, dtype))
  # Codes are exact in bfloat16. XLA:GPU reads them within the product, and would first
  # write a kernel that is multiplied by its scale.
  codes_OI = kernel.codes.astype(dtype)
  sums = jnp.einsum("...i,oi->...o", x_BTI, codes_OI, preferred_element_type="float32")
  return (sums * kernel.scale).astype(dtype)


def _product_of_gradient(
  kernel: QuantisedKernel, gradient_BTO: Array
) -> tuple[Array, None]:
  gradient_BTO, kernel = jax.lax.optimization_barrier((gradient_BTO, kernel))
  kernel_OI = restore(gathered(kernel), gradient_BTO.dtype)
  return jnp.einsum("...o,oi->...i", gradient_BTO, kernel_OI), None


product.defvjp(
  lambda x_BTI, kernel: (product(x_BTI, kernel), kernel), _product_of_gradient
)


# --- Sharding -------------------------------------------------------------------------


def logical_axes(kernel: QuantisedKernel) -> QuantisedKernel:
  """Logical axes of the arrays of a kernel; an axis of blocks is that of the inputs."""
  of_codes: tuple[str, ...] = kernel.axes
  of_scale: tuple[str, ...] = kernel.axes[:1]
  if kernel.codes.dtype != jnp.int8:
    of_codes, of_scale = (*kernel.axes, "width"), kernel.axes
  stacked = ("layers",) * (len(kernel.codes.shape) - len(of_codes))
  return QuantisedKernel(
    codes=(*stacked, *of_codes), scale=(*stacked, *of_scale), axes=kernel.axes
  )


def gathered(kernel: QuantisedKernel) -> QuantisedKernel:
  """The kernel gathered over `fsdp` as codes, which are smaller than the kernel."""
  return placed(kernel, sharding.gathered)


def placed(kernel: QuantisedKernel, put: Callable[..., jax.Array]) -> QuantisedKernel:
  """The kernel whose codes and scales went through `put(array, *logical axes)`."""
  axes = logical_axes(kernel)
  return QuantisedKernel(
    codes=put(kernel.codes, *axes.codes),
    scale=put(kernel.scale, *axes.scale),
    axes=kernel.axes,
  )
