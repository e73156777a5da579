"""FAPM against its formula and a sort, in float64 numpy, and at both of its ends."""

import jax
import numpy as np
import pytest

from raft_jax.baselines import fapm
from tests.helpers import tiny_decoder


def pair(shape, seed=0):
  rng = np.random.default_rng(seed)
  base = rng.normal(size=shape).astype(np.float32)
  return base, (base + 0.01 * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.29, 0.5])
def test_the_best_scored_changes_are_kept(keep):
  base, tuned = pair((10, 10))
  kept = fapm.prune_tensor(base, tuned, keep) == tuned
  wide, delta = base.astype(np.float64), tuned.astype(np.float64) - base
  score = np.abs(delta) - np.abs(wide).mean() * np.abs(delta) / np.abs(wide)
  best = np.argsort(-score.ravel())[: round(100 * keep)]
  expected = np.zeros(100, bool)
  expected[best] = True
  np.testing.assert_array_equal(kept, expected.reshape(10, 10))


def test_the_others_are_the_bases_bits():
  base, tuned = pair((7, 11))
  pruned = fapm.prune_tensor(base, tuned, 0.1)
  assert ((pruned == base) | (pruned == tuned)).all()
  assert (pruned == tuned).sum() == 7  # floor of 7.7


def test_scores_below_0_are_taken_where_there_are_no_better():
  """Every |W0| but one is below the mean; 2 of 4 are kept all the same."""
  base = np.array([0.1, -0.1, 0.2, 9.0], np.float32)
  tuned = base + np.array([0.1, 0.2, 0.1, 0.0], np.float32)
  # mean 2.35; S = 0.1 (1 - 23.5), 0.2 (1 - 23.5), 0.1 (1 - 11.75), 0
  pruned = fapm.prune_tensor(base, tuned, 0.5)
  np.testing.assert_array_equal(pruned, [base[0], base[1], tuned[2], base[3]])


def test_weights_that_were_0_come_last_and_ties_by_place():
  base = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], np.float32)
  tuned = base + np.array([5.0, 0.5, 5.0, 0.5, 0.5, 5.0], np.float32)

  def kept(keep):
    return np.flatnonzero(fapm.prune_tensor(base, tuned, keep) == tuned).tolist()

  # All the ones score 0.5 (1 - 0.5 / 1).
  assert kept(0.17) == [1]
  assert kept(0.4) == [1, 3]
  assert kept(0.5) == [1, 3, 4]
  assert kept(0.67) == [0, 1, 3, 4]


@pytest.fixture(name="trees", scope="module")
def _trees():
  base = tiny_decoder.random_params()
  leaves, structure = jax.tree.flatten(base)
  rng = np.random.default_rng(1)
  moved = [leaf + 0.01 * rng.normal(size=leaf.shape).astype("f") for leaf in leaves]
  return base, jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("keep", [0.1, 0.25])
def test_every_tensor_of_the_checkpoint_keeps_exactly_its_share(trees, keep):
  base, tuned = trees
  pruned = fapm.prune(base, tuned, keep)

  def count(path, before, after):
    parts = [(before, after)]
    if path[0].key == "layers":
      parts = list(zip(before, after))
    for one, other in parts:
      assert np.count_nonzero(one != other) == int(one.size * keep), path

  jax.tree_util.tree_map_with_path(count, base, pruned)


def test_keep_1_is_the_tuned_model_and_keep_0_the_base(trees):
  base, tuned = trees
  jax.tree.map(np.testing.assert_array_equal, fapm.prune(base, tuned, 1.0), tuned)
  jax.tree.map(np.testing.assert_array_equal, fapm.prune(base, tuned, 0.0), base)


def test_a_share_out_of_range_is_refused(trees):
  with pytest.raises(ValueError, match=r"keep=1\.1"):
    fapm.prune(*trees, 1.1)
