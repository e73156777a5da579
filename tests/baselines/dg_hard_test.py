"""DG-Hard against eigenvectors and the exact threshold in float64, and at its ends."""

import jax
import numpy as np
import pytest
from scipy import integrate, optimize

from raft_jax.baselines import dg_hard
from tests.helpers import tiny_decoder

SHAPE = (24, 40)


def pair(seed=0, rank=3, noise=1e-3):
  """A weight, and the same after a change of low rank with noise on it."""
  rng = np.random.default_rng(seed)
  base = rng.normal(size=SHAPE)
  left, right = rng.normal(size=(SHAPE[0], rank)), rng.normal(size=(rank, SHAPE[1]))
  change = 0.01 * left @ right + noise * rng.normal(size=SHAPE)
  return base.astype(np.float32), (base + change).astype(np.float32)


def threshold(base, tuned, *, scale=1.0, keep_vectors=True):
  return dg_hard.threshold_tensor(base, tuned, scale=scale, keep_vectors=keep_vectors)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_change_is_projected_on_its_large_singular_directions(transposed):
  base, tuned = pair()
  change = tuned.astype(np.float64) - base
  # Left singular vectors are the eigenvectors of the Gram matrix.
  square_M, vector_MM = np.linalg.eigh(change @ change.T)
  size_M = np.sqrt(square_M)
  beta = 24 / 40
  least = (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * np.median(size_M)
  kept_MR = vector_MM[:, size_M >= least]
  assert kept_MR.shape[1] == 3  # the rank that was planted
  expected = base + kept_MR @ kept_MR.T @ change
  if transposed:
    actual = threshold(base.T, tuned.T).T
  else:
    actual = threshold(base, tuned)
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  assert np.abs(actual - tuned).max() > 1e-3
  assert actual.dtype == np.float32


@pytest.mark.parametrize("beta", [0.01, 0.375, 1.0])
def test_the_factor_is_that_of_noise_of_unknown_size(beta):
  """Gavish and Donoho's equations 11 and 12: λ(β) / √(median of Marchenko-Pastur)."""
  low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2

  def density(t):
    return np.sqrt((high - t) * (t - low)) / (2 * np.pi * beta * t)

  def below(x):
    return integrate.quad(density, low, x)[0]

  median = optimize.brentq(lambda x: below(x) - 0.5, low + 1e-9, high - 1e-9)
  root = np.sqrt(beta**2 + 14 * beta + 1)
  exact = np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root)) / np.sqrt(median)
  shape = (round(beta * 1000), 1000)
  assert dg_hard.noise_factor(shape) == pytest.approx(exact, abs=0.03)
  assert dg_hard.noise_factor(shape[::-1]) == dg_hard.noise_factor(shape)


def test_both_ends_are_bits_of_the_models():
  base, tuned = pair()
  np.testing.assert_array_equal(threshold(base, tuned, scale=0.0), tuned)
  np.testing.assert_array_equal(threshold(base, tuned, scale=1e9), base)
  np.testing.assert_array_equal(threshold(base, base), base)  # a median of 0


def test_vectors_keep_their_change_unless_they_should_not():
  base, tuned = np.ones(5, np.float32), np.full(5, 2, np.float32)
  np.testing.assert_array_equal(threshold(base, tuned), tuned)
  np.testing.assert_array_equal(threshold(base, tuned, keep_vectors=False), base)


@pytest.fixture(name="trees", scope="module")
def _trees():
  base = tiny_decoder.random_params()
  leaves, structure = jax.tree.flatten(base)
  rng = np.random.default_rng(1)
  moved = [leaf + 0.01 * rng.normal(size=leaf.shape).astype("f") for leaf in leaves]
  return base, jax.tree.unflatten(structure, moved)


def test_every_layers_matrix_is_decomposed_on_its_own(trees):
  base, tuned = trees
  edited = dg_hard.threshold(base, tuned, scale=0.7, keep_vectors=True)
  ranks = []
  for layer in range(len(base["layers"]["up"])):
    before, after = (tree["layers"]["up"][layer] for tree in (base, tuned))
    alone = threshold(np.asarray(before), np.asarray(after), scale=0.7)
    actual = np.asarray(edited["layers"]["up"][layer])
    np.testing.assert_array_equal(actual, alone)
    ranks.append(np.linalg.matrix_rank(actual - np.asarray(before), tol=1e-4))
  assert min(ranks) > 0
  assert max(ranks) < min(base["layers"]["up"].shape[1:])
  norms = [tree["layers"]["attn_norm"] for tree in (edited, tuned)]
  np.testing.assert_array_equal(*norms)


def test_a_scale_of_0_is_the_tuned_model(trees):
  base, tuned = trees
  edited = dg_hard.threshold(base, tuned, scale=0.0, keep_vectors=True)
  jax.tree.map(np.testing.assert_array_equal, edited, tuned)
  with pytest.raises(ValueError, match="scale=-1"):
    dg_hard.threshold(base, tuned, scale=-1, keep_vectors=True)
