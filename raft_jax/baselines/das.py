"""Importance of attention heads and feed-forward units, and masks made from it (DAS).

Ke et al., *Continual Pre-training of Language Models*, ICLR 2023, arXiv 2302.03241: if
the gate of a unit changes the model's answers much, the model needs the unit, and the
unit's parameters are updated less.

A gate multiplies the input that a unit gives to the next projection. The projection is
linear, so multiplying its columns does the same, and no layer has to know about gates.

Shapes: L layers, H query heads, N key/value heads, h head width, F units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raft_jax import losses, vocab_head
from raft_jax.data import batching
from raft_jax.distillation import objective, sequences
from raft_jax.models import sharding, transformer


class Units(NamedTuple):
  """One number per unit: a gate, or an importance in 0..1."""

  heads_LH: Array
  units_LF: Array


def ones(decoder: transformer.DecoderConfig) -> Units:
  """Open gates."""
  layers = decoder.n_layers
  return Units(jnp.ones((layers, decoder.n_heads)), jnp.ones((layers, decoder.d_ff)))


def gated(
  params: transformer.Params, gates: Units, head_dim: int
) -> transformer.Params:
  """The model with its heads and units multiplied by their gates."""
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
  """Gates of which a share `rate` is closed and the rest scaled to keep the mean."""

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
  """KL divergence of two passes that drop different units.

  .. math:: L = KL(f^1(x) \\| f^2(x))

  at every answer token, over the top K of the first pass with the rest as one class;
  the mean over rows of the mean over tokens. It needs none of the data that the model
  was pretrained on: how much the passes disagree shows what the model knows.

  Args:
    gates: open gates, with respect to which the gradient is taken.
    params: the base model's.
    batch: rows, of which prompts and answers are read.
    key: key of the two draws.
    settings: settings of the run.
    rate: share of units that a pass drops.
  """
  no_rollout = sequences.empty_trajectory(len(batch.row_id_B))
  decoder = settings.decoder

  def run_pass(key: Array) -> tuple[Array, Array]:
    model = gated(params, dropped(key, gates, rate), decoder.head_dim)
    hidden_BAD, _ = sequences.student_hidden(
      model, decoder, batch, no_rollout, settings.compute
    )
    embedding_VD = transformer.output_embedding(model)
    return hidden_BAD, embedding_VD.astype(settings.compute.dtype)

  first, second = (run_pass(pass_key) for pass_key in jax.random.split(key))
  softcap = decoder.logit_softcap
  top_k = min(settings.top_k, decoder.vocab_size)
  partition = sharding.spec(("batch", "vocab"))
  _, ids_BAK = vocab_head.topk(*first, top_k, partition=partition, softcap=softcap)
  (p_BAK, p_sum_BA), (q_BAK, q_sum_BA) = (
    vocab_head.gather_with_logsumexp(*head, ids_BAK, softcap=softcap)
    for head in (first, second)
  )
  # Both sides need a gradient, and `losses` gives none to a teacher. The gradient of
  # KL(p || q) is that of reverse KL with p as the student, plus that of forward KL with
  # q as the student.
  kl = functools.partial(losses.divergence_on_support, temperature=1.0)
  as_first = kl(
    p_BAK, q_BAK, kind="reverse", student_logsumexp=p_sum_BA, teacher_logsumexp=q_sum_BA
  )
  as_second = kl(
    q_BAK, p_BAK, kind="forward", student_logsumexp=q_sum_BA, teacher_logsumexp=p_sum_BA
  )
  answer_BA = sequences.length_mask(batch.answer_length_B, batch.answer_BA.shape[1])
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
    batches: each batch is one n of the sum.
    settings: settings of the run.
    rate: share of units that a pass drops.
    seed: seed of the draws.
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
  """|tanh| of the values standardised within each layer; 0 if all values are equal."""
  gap_LU = values_LU - jnp.mean(values_LU, axis=-1, keepdims=True)
  spread_L1 = jnp.std(values_LU, axis=-1, keepdims=True)
  safe_L1 = jnp.where(spread_L1 > 0, spread_L1, 1.0)
  return jnp.abs(jnp.tanh(jnp.where(spread_L1 > 0, gap_LU / safe_L1, 0.0)))


def masks(importance: Units, decoder: transformer.DecoderConfig) -> dict[str, Array]:
  """Kernel -> 1 - I, in the shape that multiplies the kernel's update.

  Heads scale the rows of q and the columns of o; the most important of the heads that a
  key/value head serves scales the rows of k and v. Units scale the rows of gate and up
  and the columns of down. Biases go with their kernels. Other parameters have no mask.
  """
  free = jax.tree.map(lambda values: 1 - values, importance)
  shared_LN = jnp.min(
    free.heads_LH.reshape(decoder.n_layers, decoder.n_kv_heads, -1), axis=-1
  )
  heads_LI = jnp.repeat(free.heads_LH, decoder.head_dim, axis=-1)
  keys_LI = jnp.repeat(shared_LN, decoder.head_dim, axis=-1)
  return {
    "q": heads_LI[..., None],
    "k": keys_LI[..., None],
    "v": keys_LI[..., None],
    "q_bias": heads_LI,
    "k_bias": keys_LI,
    "v_bias": keys_LI,
    "o": heads_LI[:, None, :],
    "gate": free.units_LF[..., None],
    "up": free.units_LF[..., None],
    "down": free.units_LF[:, None, :],
  }


def soften(decoder: transformer.DecoderConfig) -> optax.GradientTransformationExtraArgs:
  """Multiplies updates by 1 - I. The state is I, which is 0 until it is set.

  Stands after Adam, which would undo a factor on the gradient.
  """

  def init(params):
    del params
    return jax.tree.map(jnp.zeros_like, ones(decoder))

  def update(updates, state, params=None, **extra):
    del params, extra
    layers = dict(updates["layers"])
    for name, mask in masks(state, decoder).items():
      if name in layers:
        layers[name] = layers[name] * mask.astype(layers[name].dtype)
    return {**updates, "layers": layers}, state

  return optax.GradientTransformationExtraArgs(init, update)
