"""Products of sorted rows, against float64 numpy."""

import functools

import jax
import numpy as np
import pytest

from raft_jax.models import grouped_product

# Rows 87 to 99 are of no group. Groups end inside blocks, and two are empty.
SIZES = np.array([0, 37, 1, 40, 0, 9], np.int32)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
  "product", [grouped_product.blocked_product, grouped_product.ragged_product]
)
def test_both_products_are_those_of_each_group(product, axis):
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(6, 7, 5))
  x = rng.normal(size=(100, kernel.shape[axis]))
  group = np.repeat(np.arange(7), [*SIZES, 13])
  padded = np.concatenate([kernel, np.zeros((1, 7, 5))])
  want = np.einsum("mo,moi->mi" if axis == 1 else "mi,moi->mo", x, padded[group])
  f = jax.jit(functools.partial(product, axis=axis))
  ours = f(np.float32(x), np.float32(kernel), SIZES)
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "outer", [grouped_product.blocked_outer, grouped_product.ragged_outer]
)
def test_both_gradients_of_kernels_are_those_of_each_group(outer):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(100, 7)), rng.normal(size=(100, 5))
  is_in = np.repeat(np.arange(7), [*SIZES, 13])[:, None] == np.arange(6)
  want = np.einsum("me,mo,mi->eoi", is_in, left, right)
  ours = jax.jit(outer)(np.float32(left), np.float32(right), SIZES)
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "count"), [(1, 8), (8, 2), (600, 2), (5000, 3)])
def test_blocks_cover_every_row_of_a_group_once(rows, count):
  rng = np.random.default_rng(0)
  make = jax.jit(functools.partial(grouped_product._blocks, rows))
  for sizes in (
    rng.multinomial(rows, np.ones(count) / count),
    np.eye(count, dtype=int)[-1] * rows,
    np.zeros(count, int),
  ):
    blocks = jax.tree.map(np.asarray, make(np.int32(sizes)))
    assert blocks.used <= blocks.most
    covered = [
      (int(blocks.expert[i]), row)
      for i in range(int(blocks.used))
      for row in range(
        int(blocks.start[i]),
        min(int(blocks.start[i]) + blocks.size, int(blocks.end[i])),
      )
    ]
    want = zip(np.repeat(np.arange(count), sizes).tolist(), range(sizes.sum()))
    assert covered == list(want)
