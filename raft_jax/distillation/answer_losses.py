"""The cross-entropy of every token of the answers, and the weight of each.

Shapes: B rows, A answer width, D model width, V vocabulary, K logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from raft_jax import vocab_head
from raft_jax.data import batching
from raft_jax.distillation import sequences, token_weights
from raft_jax.models import sharding


class TokenRule(NamedTuple):
  """How a step weighs the answers' tokens by what the model thinks of them now.

  Attributes:
    name: "eaft", "dft" or "talr"; see `token_weights` for the other values.
    top_k: logits that `eaft` reads.
    temperature: of `talr`; None: the median of the batch's rows.
  """

  name: str
  exponent: float
  top_k: int
  max_entropy: float
  floor: float
  temperature: float | None


def with_weights(
  hidden_BAD: Array,
  embedding_VD: Array,
  batch: batching.Batch,
  *,
  rule: TokenRule | None,
  softcap: float | None,
  median: Array | None = None,
) -> tuple[Array, Array | None]:
  """The loss of every answer token, and its weight beside that of the mean.

  With a packing of the batch, the head reads the answers' tokens alone, and both are 0
  at padding.

  Args:
    hidden_BAD: the student's hidden states that predict the answers.
    embedding_VD: the student's output embedding.
    batch: rows; without a rule, their own token weights count.
    rule: how tokens are weighed.
    softcap: the decoder's bound of the logits, or None.
    median: of the whole batch's row losses, if `needs_median`; None: these rows are
      the whole batch.

  Returns:
    Nats [B, A], and weights [B, A], or None if all are 1.
  """
  hidden, tokens = hidden_BAD, batch.answer_BA
  index_GK = None if batch.packing is None else batch.packing.answer_GK
  if index_GK is not None:
    hidden, tokens = (sequences.pick(x, index_GK) for x in (hidden, tokens))

  def in_rows(x: Array) -> Array:
    if index_GK is None:
      return x
    return sequences.put_back(x, index_GK, batch.answer_BA.shape)

  if rule is not None and rule.name == "eaft":
    nll, top_logits = vocab_head.cross_entropy_with_top_k(
      hidden,
      embedding_VD,
      tokens,
      rule.top_k,
      partition=sharding.spec(("batch", "vocab")),
      softcap=softcap,
    )
    weight = token_weights.eaft(
      top_logits, exponent=rule.exponent, max_entropy=rule.max_entropy
    )
    return in_rows(nll), in_rows(weight)
  nll_BA = in_rows(
    vocab_head.cross_entropy(hidden, embedding_VD, tokens, softcap=softcap)
  )
  if rule is None:
    return nll_BA, batch.token_weight_BA
  if rule.name == "dft":
    return nll_BA, token_weights.dft(nll_BA, exponent=rule.exponent)
  if rule.name != "talr":
    raise ValueError(f"no function for the rule {rule.name!r} of token_weights")
  temperature: Any = median if rule.temperature is None else rule.temperature
  if temperature is None:
    row_loss_B = mean_by_row(nll_BA, batch.answer_length_B)
    temperature = median_of_rows(row_loss_B, batch.answer_length_B)
  return nll_BA, token_weights.talr(nll_BA, temperature, floor=rule.floor)


def needs_median(rule: TokenRule | None) -> bool:
  """Whether the weights of tokens follow the median of the batch's row losses."""
  return rule is not None and rule.name == "talr" and rule.temperature is None


def median_of_rows(row_loss_B: Array, length_B: Array) -> Array:
  """The median of the losses of rows that have an answer; a scalar."""
  return token_weights.median_loss(sharding.everywhere(row_loss_B), length_B > 0)


def mean_by_row(nll_BA: Array, length_B: Array) -> Array:
  """[B]: the mean over the tokens of each answer."""
  valid_BA = sequences.length_mask(length_B, nll_BA.shape[1])
  return jnp.sum(jnp.where(valid_BA, nll_BA, 0), axis=1) / jnp.maximum(length_B, 1)
