"""Importance of attention heads and feed-forward units, and masks made of it (DAS).

Ke et al., *Continual Pre-training of Language Models*, ICLR 2023, arXiv 2302.03241: a
unit whose gate moves the model's answers much is one that the model needs, and its
parameters are updated less.

A gate multiplies what a unit gives to the next projection; as the projection is linear
that is the same as multiplying its columns, so that no layer knows of gates.

Shapes: L layers, H query heads, N key/value heads, h head width, F units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raft_jax import losses, vocab_head
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.models import sharding, transformer


class Units(NamedTuple):
  """One number for each unit: a gate, or an importance in 0..1."""

  heads_LH: Array
  units_LF: Array


def ones(config: transformer.DecoderConfig) -> Units:
  """Open gates."""
  layers = config.n_layers
  return Units(jnp.ones((layers, config.n_heads)), jnp.ones((layers, config.d_ff)))


def gated(
  params: transformer.Params, gates: Units, head_dim: int
) -> transformer.Params:
  """The model whose heads and units are multiplied by their gates."""
  layers = params["layers"]
  columns_LI = jnp.repeat(gates.heads_LH, head_dim, axis=-1)
  return {
    **params,
    "layers": {
      **layers,
      "o": layers["o"] * columns_LI[:, None, :],
      "down": layers["down"] * gates.units_LF[:, None, :],
    },
  }


def dropped(key: Array, gates: Units, rate: float) -> Units:
  """Gates of which a share `rate` is closed, the others opened to keep the mean."""

  def drop(gate: Array, key: Array) -> Array:
    return gate * jax.random.bernoulli(key, 1 - rate, gate.shape) / (1 - rate)

  heads, units = jax.random.split(key)
  return Units(drop(gates.heads_LH, heads), drop(gates.units_LF, units))


def disagreement(
  gates: Units,
  params: transformer.Params,
  batch: batching.Batch,
  key: Array,
  *,
  settings: objective.Settings,
  rate: float,
) -> Array:
  """KL of two passes that drop different units, mean over rows of means over tokens.

  .. math:: L = KL(f^1(x) \\| f^2(x))

  at every answer token, over the first pass's top K with the rest as one class. It asks
  for nothing that the model was trained on: what the passes disagree about is what the
  model knows.

  Args:
    gates: where the gradient is taken; open ones.
    params: the base model's.
    batch: rows; the prompts and answers are read.
    key: of the two draws.
    settings: of the run.
    rate: share of units that a pass drops.
  """
  nothing = objective.Trajectory(
    jnp.zeros((len(batch.row_id_B), 0), jnp.int32),
    jnp.zeros(len(batch.row_id_B), jnp.int32),
  )
  decoder = settings.decoder

  def read(key: Array) -> tuple[Array, Array]:
    own = gated(params, dropped(key, gates, rate), decoder.head_dim)
    hidden_BAD, _ = objective.student_hidden(own, batch, nothing, settings)
    return hidden_BAD, transformer.output_embedding(own).astype(settings.dtype)

  first, second = (read(own) for own in jax.random.split(key))
  options: dict[str, Any] = {"softcap": decoder.logit_softcap, "return_logsumexp": True}
  top_k = min(settings.top_k, decoder.vocab_size)
  spread = sharding.spec(("batch", "vocab"))
  _, ids_BAK, _ = vocab_head.topk(*first, top_k, spread=spread, **options)
  (p_BAK, p_sum_BA), (q_BAK, q_sum_BA) = (
    vocab_head.gather(*one, ids_BAK, **options) for one in (first, second)
  )
  # As both sides carry the gradient, and `losses` has none for a teacher: KL(p || q) is
  # that of p as the student of reverse KL, plus that of q as the student of forward KL.
  kl = functools.partial(losses.divergence_on_support, temperature=1.0)
  as_first = kl(
    p_BAK, q_BAK, kind="reverse", student_logsumexp=p_sum_BA, teacher_logsumexp=q_sum_BA
  )
  as_second = kl(
    q_BAK, p_BAK, kind="forward", student_logsumexp=q_sum_BA, teacher_logsumexp=p_sum_BA
  )
  answer_BA = objective.columns(batch.answer_length_B, batch.answer_BA.shape[1])
  return losses.masked_mean(
    as_first + as_second - jax.lax.stop_gradient(as_second), answer_BA
  )


def importance(
  params: transformer.Params,
  batches: Iterable[batching.Batch],
  *,
  settings: objective.Settings,
  rate: float,
  seed: int,
) -> Units:
  """How much each unit matters, in 0..1.

  .. math::
    I = |\\tanh(\\mathrm{standardised}(\\hat I))|, \\quad
    \\hat I = \\frac1N \\sum_n |\\partial L_n / \\partial g|

  standardised among the units of each layer.

  Args:
    params: the base model's.
    batches: rows, each batch one n of the sum.
    settings: of the run.
    rate: share of units that a pass drops.
    seed: of the draws.
  """

  @jax.jit
  def slopes(total, params, batch, key):
    gradient = jax.grad(disagreement)(
      ones(settings.decoder), params, batch, key, settings=settings, rate=rate
    )
    return jax.tree.map(lambda t, g: t + jnp.abs(g), total, gradient)

  total = jax.tree.map(jnp.zeros_like, ones(settings.decoder))
  for number, batch in enumerate(batches):
    total = slopes(
      total, params, batch, jax.random.fold_in(jax.random.key(seed), number)
    )
  return jax.tree.map(squashed, total)


def squashed(values_LU: Array) -> Array:
  """|tanh| of the values, standardised in each layer; 0 where all are the same."""
  gap_LU = values_LU - jnp.mean(values_LU, axis=-1, keepdims=True)
  spread_L1 = jnp.std(values_LU, axis=-1, keepdims=True)
  safe_L1 = jnp.where(spread_L1 > 0, spread_L1, 1.0)
  return jnp.abs(jnp.tanh(jnp.where(spread_L1 > 0, gap_LU / safe_L1, 0.0)))


def masks(found: Units, config: transformer.DecoderConfig) -> dict[str, Array]:
  """Kernel -> 1 - I, in the shape that multiplies its update.

  Rows of q by head, rows of k and v by the most important of the heads that they serve,
  columns of o by head; rows of gate and up and columns of down by unit; biases as their
  kernels. The rest of the model is left as it is.
  """
  free = jax.tree.map(lambda values: 1 - values, found)
  shared_LN = jnp.min(
    free.heads_LH.reshape(config.n_layers, config.n_kv_heads, -1), axis=-1
  )
  heads_LI = jnp.repeat(free.heads_LH, config.head_dim, axis=-1)
  keys_LI = jnp.repeat(shared_LN, config.head_dim, axis=-1)
  return {
    **{"q": heads_LI[..., None], "k": keys_LI[..., None], "v": keys_LI[..., None]},
    **{"q_bias": heads_LI, "k_bias": keys_LI, "v_bias": keys_LI},
    "o": heads_LI[:, None, :],
    "gate": free.units_LF[..., None],
    "up": free.units_LF[..., None],
    "down": free.units_LF[:, None, :],
  }


def soften(config: transformer.DecoderConfig) -> optax.GradientTransformationExtraArgs:
  """Multiplies updates by 1 - I; its state is I, zeros until it is set.

  Stands after Adam, which would undo a factor on the gradient.
  """

  def init(params):
    del params
    return jax.tree.map(jnp.zeros_like, ones(config))

  def update(updates, state, params=None, **extra):
    del params, extra
    layers = dict(updates["layers"])
    for name, mask in masks(state, config).items():
      if name in layers:
        layers[name] = layers[name] * mask.astype(layers[name].dtype)
    return {**updates, "layers": layers}, state

  return optax.GradientTransformationExtraArgs(init, update)
