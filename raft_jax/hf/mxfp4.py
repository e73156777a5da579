"""MXFP4 weights, read: 4-bit floats that share a power of two among 32.

Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0: values
are E2M1, scales E8M0. gpt-oss stores the kernels of its experts so: `NAME_blocks` holds
two values in a byte, [E, out, groups, 16], and `NAME_scales` the exponents, [E, out,
groups]. Every value is a bfloat16 exactly, unless its exponent is out of range.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raft_jax.hf import tensor_layout

VALUES = np.array(
  [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)
"""The value of each 4-bit code, float32."""
GROUP = 32
"""Values that share a scale."""
BIAS = 127
"""Of the exponents."""


def decoded(
  stored: Mapping[str, tensor_layout.Stored],
) -> dict[str, tensor_layout.Stored]:
  """The tensors with each pair of blocks and scales as one tensor [E, in, out].

  The pair `NAME_blocks` and `NAME_scales` becomes `NAME`, whose axes are those of an
  unquantised file. It is decoded when it is read.
  """
  result = dict(stored)
  for name in stored:
    kernel = name.removesuffix("_blocks")
    scales = stored.get(f"{kernel}_scales")
    blocks = stored[name]
    if kernel == name or scales is None or blocks.shape != (*scales.shape, GROUP // 2):
      continue  # reported as an unexpected tensor
    del result[name], result[f"{kernel}_scales"]
    result[kernel] = _tensor(blocks, scales)
  return result


def _tensor(
  blocks: tensor_layout.Stored, scales: tensor_layout.Stored
) -> tensor_layout.Stored:
  experts, outputs, groups = scales.shape

  def read(index: tensor_layout.Index) -> np.ndarray:
    """A block [experts, inputs, outputs]; whole groups are decoded."""
    first, stop, _ = index[1].indices(groups * GROUP)
    near = slice(first // GROUP, -(-stop // GROUP))
    theirs = (index[0], index[2], near)
    values = decode(blocks.read((*theirs, slice(None))), scales.read(theirs))
    inside = slice(first - near.start * GROUP, stop - near.start * GROUP)
    return values[..., inside].swapaxes(1, 2)

  return tensor_layout.Stored((experts, groups * GROUP, outputs), read)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Bytes [..., groups, 16] and exponents [..., groups] to float32 [..., inputs]."""
  values = np.empty((*blocks.shape[:-1], GROUP), np.float32)
  values[..., 0::2] = VALUES[blocks & 15]  # the lower half of a byte comes first
  values[..., 1::2] = VALUES[blocks >> 4]
  values = np.ldexp(values, scales[..., None].astype(np.int32) - BIAS)
  return values.reshape(*blocks.shape[:-2], -1)
