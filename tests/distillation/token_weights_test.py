"""Token weights against float64 numpy, written from the papers' formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import losses
from raft_jax.distillation import token_weights

B, T, V = 4, 7, 60
LENGTHS = np.array([7, 1, 4, 6])
MASK = np.arange(T) < LENGTHS[:, None]


def drawn(scale=3.0):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, scale, (B, T, V)).astype(np.float32)
  targets = rng.integers(0, V, (B, T))
  base = np.abs(rng.normal(1.0, 0.8, (B, T))).astype(np.float32)
  return logits, targets, base


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def row_means(loss):
  return (np.where(MASK, loss, 0).sum(1) / LENGTHS).astype(np.float64)


def entropy_of_top(logits, k):
  log_q = log_softmax(np.sort(logits, axis=-1)[..., -k:])
  return -(np.exp(log_q) * log_q).sum(-1)


# Rule -> (weights of float64 losses, ours), both of (logits, loss, base loss).
def rules():
  def theirs_talr(logits, loss, base):
    ascending = np.sort(row_means(loss))
    temperature = max(ascending[(B - 1) // 2], 1e-6)
    return np.maximum(np.maximum(np.exp(-loss), 1e-6) ** (1 / temperature), 0.01)

  def ours_talr(logits, loss, base):
    mean_B = losses.mean_weights(MASK) * B * loss
    temperature = token_weights.median_loss(mean_B.sum(1), jnp.array(LENGTHS) > 0)
    return token_weights.talr(loss, temperature)

  def theirs_flow(logits, loss, base):
    mean_B = row_means(base)
    return np.exp(-mean_B / np.sort(mean_B)[(B - 1) // 2])[:, None] * np.ones((B, T))

  def ours_flow(logits, loss, base):
    mean_B = jnp.where(MASK, base, 0).sum(1) / LENGTHS
    temperature = token_weights.median_loss(mean_B, jnp.array(LENGTHS) > 0)
    return jnp.broadcast_to(token_weights.flow(mean_B, temperature)[:, None], (B, T))

  return {
    "eaft": (
      lambda logits, loss, base: entropy_of_top(logits, 20) / 3.0,
      lambda logits, loss, base: token_weights.eaft(jax.lax.top_k(logits, 20)[0]),
    ),
    "eaft squared, of 5": (
      lambda logits, loss, base: (entropy_of_top(logits, 5) / 1.5) ** 2,
      lambda logits, loss, base: token_weights.eaft(
        jax.lax.top_k(logits, 5)[0], exponent=2.0, max_entropy=1.5
      ),
    ),
    "dft": (
      lambda logits, loss, base: np.exp(-loss),
      lambda logits, loss, base: token_weights.dft(loss),
    ),
    "talr": (theirs_talr, ours_talr),
    "stm": (
      lambda logits, loss, base: np.where(np.exp(np.float64(base)) <= 2.5, 1.0, 0.0),
      lambda logits, loss, base: token_weights.stm(base),
    ),
    "flow": (theirs_flow, ours_flow),
  }


@pytest.mark.parametrize("name", rules())
def test_weights_loss_and_gradient_equal_the_formula(name):
  """The gradient is w (p - y) / N; a w that is not constant would add to it."""
  theirs, ours = rules()[name]
  logits, targets, base = drawn()
  log_p = log_softmax(logits)
  loss = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  weights = theirs(logits, loss, base)
  assert np.ptp(weights[MASK]) > 0.05  # the case tells weights apart

  def total(logits):
    own = losses.cross_entropy(logits, targets)
    weight = ours(logits, own, base)
    assert weight.dtype == jnp.float32
    scale = losses.mean_weights(MASK, per="token")
    return losses.weighted_sum(own, scale * weight), weight

  (value, weight), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
  np.testing.assert_allclose(np.where(MASK, weight - weights, 0), 0, atol=2e-6)
  count = MASK.sum()
  np.testing.assert_allclose(value, (MASK * weights * loss).sum() / count, rtol=1e-5)
  one_hot = np.arange(V) == targets[..., None]
  expected = (MASK * weights)[..., None] * (np.exp(log_p) - one_hot) / count
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_base_losses_have_no_gradient():
  base = jnp.array([0.2, 0.9, 3.0])
  for weigh in (
    lambda x: token_weights.flow(x, token_weights.median_loss(x, x > 0)),
    token_weights.stm,
    token_weights.dft,
    lambda x: token_weights.talr(x, token_weights.median_loss(x, x > 0)),
  ):
    gradient = jax.grad(lambda x, weigh=weigh: weigh(x).sum())(base)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_null_settings_are_exactly_one(dtype):
  """Also for certain tokens, whose loss rounding may leave below 0, and for p = 0."""
  loss = jnp.array([-1e-6, 0.0, 1e-9, 0.7, 13.0, 200.0], dtype)
  top = jnp.array([[0.0, -1e4], [1.0, 1.0], [3.0, -jnp.inf]], dtype)
  for weights in (
    token_weights.eaft(top, exponent=0.0),
    token_weights.dft(loss, exponent=0.0),
    token_weights.talr(loss, 0.3, floor=1.0),
    token_weights.stm(loss, max_perplexity=1e300),
    token_weights.flow(loss, 1e30),
  ):
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, 1.0)


def test_certain_and_impossible_tokens():
  """p = 1 exactly, and a p that float32 cannot hold: e^-200."""
  loss = jnp.array([0.0, 200.0])
  np.testing.assert_array_equal(token_weights.dft(loss), [1.0, 0.0])
  np.testing.assert_array_equal(token_weights.stm(loss), [1.0, 0.0])
  np.testing.assert_array_equal(token_weights.flow(loss, 1.0), [1.0, 0.0])
  # The floor, and without one the least probability: (1e-6)^(1/2) = 1e-3.
  np.testing.assert_allclose(token_weights.talr(loss, 2.0), [1.0, 0.01], rtol=1e-6)
  np.testing.assert_allclose(
    token_weights.talr(loss, 2.0, floor=0.0), [1.0, 1e-3], rtol=1e-5
  )
  # The least temperature does not divide by 0.
  np.testing.assert_allclose(token_weights.talr(loss, 1e-6), [1.0, 0.01], rtol=1e-6)


def test_entropy_of_certain_uniform_and_single_tokens():
  certain = jnp.array([1e4, 0.0, -1e4])
  assert token_weights.eaft(certain) == 0
  masked = jnp.array([2.0, 2.0, -jnp.inf])
  np.testing.assert_allclose(token_weights.eaft(masked), np.log(2) / 3, rtol=1e-6)
  uniform = jnp.zeros(20)
  np.testing.assert_allclose(token_weights.eaft(uniform), np.log(20) / 3, rtol=1e-6)
  assert token_weights.eaft(uniform, max_entropy=np.log(20.0)) <= 1 + 1e-6
  assert token_weights.eaft(jnp.array([5.0])) == 0  # of one token
  # A fraction of a certain token's entropy of 0 is 0, never NaN.
  assert token_weights.eaft(certain, exponent=0.5) == 0


def test_a_perplexity_on_the_threshold_is_learned():
  on = jnp.array([np.log(2.5)], jnp.float32)
  below, above = np.nextafter(on, 0), np.nextafter(np.nextafter(on, 9), 9)
  weights = [float(token_weights.stm(jnp.array(x))[0]) for x in (below, on, above)]
  assert weights == [1.0, 1.0, 0.0]


def test_the_median_skips_empty_sequences_and_takes_the_lower_middle():
  median = functools.partial(token_weights.median_loss, jnp.array([4.0, 1.0, 3.0, 9.0]))
  assert median(jnp.array([True, True, True, True])) == 3
  assert median(jnp.array([True, True, False, False])) == 1
  assert median(jnp.array([True, True, True, False])) == 3
  assert median(jnp.array([False, False, False, True])) == 9
  assert median(jnp.zeros(4, bool)) == 1  # nothing is weighed with it
  zero = token_weights.median_loss(jnp.zeros(3), jnp.ones(3, bool))
  np.testing.assert_allclose(zero, 1e-6)


def test_without_any_token_loss_and_gradient_are_zero():
  logits, targets, _ = drawn()

  def total(logits):
    own = losses.cross_entropy(logits, targets)
    nothing = losses.mean_weights(jnp.zeros((B, T), bool))
    return losses.weighted_sum(own, nothing * token_weights.dft(own))

  value, gradient = jax.value_and_grad(total)(logits)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_losses_are_weighed_in_float32():
  loss = jnp.array([0.3, 1.7], jnp.bfloat16)
  exact = np.exp(-np.asarray(loss, np.float64))
  np.testing.assert_allclose(token_weights.dft(loss), exact, rtol=1e-6)
  top = jnp.array([1.0, 0.5, -2.0], jnp.bfloat16)
  log_q = log_softmax(np.asarray(top, np.float64))
  entropy = -(np.exp(log_q) * log_q).sum()
  np.testing.assert_allclose(token_weights.eaft(top), entropy / 3, rtol=1e-6)
