"""Weights of an answer's tokens in the cross-entropy: which tokens a model learns from.

.. math::
  L = \\frac1N \\sum_t w_t \\, (-\\log p_t), \\quad p_t = p_\\theta(y_t | x, y_{<t})

N is the number of tokens, not the sum of the weights. Each rule below gives w_t from
values that a training step has already, or from losses of the base model that were
measured once. No weight has a gradient. The functions see arrays only and need jax
only, so all of them can be used in another JAX stack::

  loss, top_logits = vocab_head.cross_entropy_with_top_k(hidden, head, targets, k=20)
  weights = losses.mean_weights(mask) * token_weights.eaft(top_logits)
  total = losses.weighted_sum(loss, weights)

Cost: `dft`, `talr`, `stm` and `flow` add some operations per token. `eaft` adds a top-K
search in the pass of the head that computes the loss.
"""

import math

import jax
import jax.numpy as jnp

LEAST_PROBABILITY = 1e-6
"""`talr` treats tokens that are less probable as having this probability."""
LEAST_TEMPERATURE = 1e-6
"""Nats; the lower bound of `median_loss`."""


def eaft(
  top_logits: jax.Array, *, exponent: float = 1.0, max_entropy: float = 3.0
) -> jax.Array:
  """Entropy-adaptive weights: tokens count where the model itself is uncertain.

  .. math::
    w_t = (H_t / H_{max})^\\alpha, \\quad H_t = -\\sum_{a \\in S} q_a \\log q_a, \\quad
    q = \\mathrm{softmax}(u_t)_{|S}

  with S the model's own top K tokens. The default H_max of 3 nats is about log 20, the
  largest entropy of the 20 tokens of the published setting. EAFT, arXiv 2601.02151.

  Args:
    top_logits: The current model's K largest logits at each token, `[..., K]`.
    exponent: α >= 0; with 0 all weights are 1.
    max_entropy: H_max in nats, > 0: the entropy that gives the weight 1.

  Returns:
    Weights, `[...]`, float32, >= 0.
  """
  log_q = jax.nn.log_softmax(_constant(top_logits), axis=-1)
  # A logit of -inf has q = 0, and 0 times -inf would be NaN.
  terms = jnp.where(jnp.isneginf(log_q), 0.0, jnp.exp(log_q) * log_q)
  return (-jnp.sum(terms, axis=-1) / max_entropy) ** exponent


def dft(loss: jax.Array, *, exponent: float = 1.0) -> jax.Array:
  """Dynamic fine-tuning: each token counts by its own probability.

  .. math:: w_t = p_t^\\alpha

  DFT, arXiv 2508.05629, with α = 1.

  Args:
    loss: -log p of each token under the current model, nats, `[...]`.
    exponent: α >= 0; with 0 all weights are 1.

  Returns:
    Weights in [0, 1], `[...]`, float32.
  """
  return jnp.exp(-exponent * _loss(loss))


def talr(
  loss: jax.Array, temperature: jax.typing.ArrayLike, *, floor: float = 0.01
) -> jax.Array:
  """Token-adaptive loss reweighting: improbable tokens count less, down to a floor.

  .. math:: w_t = \\max(\\max(p_t, 10^{-6})^{1/\\tau}, w_{min})

  TALR, arXiv 2509.20758. There τ is `median_loss` of the batch, taken anew each step.

  Args:
    loss: -log p of each token under the current model, nats, `[...]`.
    temperature: τ in nats, > 0, a scalar.
    floor: w_min in [0, 1]; with 1 all weights are 1.

  Returns:
    Weights in [w_min, 1], `[...]`, float32.
  """
  bounded = jnp.minimum(_loss(loss), -math.log(LEAST_PROBABILITY))
  return jnp.maximum(jnp.exp(-bounded / _constant(temperature)), floor)


def stm(base_loss: jax.Array, *, max_perplexity: float = 2.5) -> jax.Array:
  """Selective token masking: tokens that surprise the base model are not learned.

  .. math:: w_t = 1 \\text{ if } 1 / p^0_t \\le s, \\text{ else } 0

  STM, arXiv 2501.14315.

  Args:
    base_loss: -log p of each token under the base model, nats, `[...]`.
    max_perplexity: s, > 0.

  Returns:
    Weights, 0 or 1, `[...]`, float32.
  """
  # Compared as logarithms: the perplexity of a very improbable token overflows.
  learned = _loss(base_loss) <= math.log(max_perplexity)
  return learned.astype(jnp.float32)


def flow(base_sequence_loss: jax.Array, temperature: jax.typing.ArrayLike) -> jax.Array:
  """One weight for a whole answer: answers that are easy for the base model count more.

  .. math:: w_i = \\exp(-l_i / \\tau)

  FLOW, arXiv 2502.02797. There τ is `median_loss` of the data set.

  Args:
    base_sequence_loss: l_i, the mean of -log p over the answer's tokens under the base
      model, nats, `[...]`.
    temperature: τ in nats, > 0, a scalar.

  Returns:
    Weights in [0, 1], `[...]`, float32.
  """
  return jnp.exp(-_loss(base_sequence_loss) / _constant(temperature))


def median_loss(sequence_loss: jax.Array, counted: jax.Array) -> jax.Array:
  """The temperature of `talr` and `flow`: the median of the sequences' mean losses.

  Of an even number it is the lower of the two in the middle, as in the published code
  of TALR.

  Args:
    sequence_loss: Mean of -log p over the tokens of each sequence, nats, `[N]`.
    counted: Whether a sequence has tokens, `[N]`, bool.

  Returns:
    The median in nats, a scalar, float32, at least 1e-6; 1 if no sequence counts.
  """
  count = jnp.sum(counted)
  ascending = jnp.sort(jnp.where(counted, _constant(sequence_loss), jnp.inf))
  median = ascending[jnp.maximum(count - 1, 0) // 2]
  return jnp.where(count > 0, jnp.maximum(median, LEAST_TEMPERATURE), 1.0)


def _loss(loss: jax.typing.ArrayLike) -> jax.Array:
  """A loss without gradient; rounding may leave that of a certain token below 0."""
  return jnp.maximum(_constant(loss), 0.0)


def _constant(x: jax.typing.ArrayLike) -> jax.Array:
  x = jax.lax.stop_gradient(jnp.asarray(x))
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
