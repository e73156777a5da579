"""Embeddings of each token that a layer reads beside its input.

A second table has, for each token of the vocabulary, an embedding for each layer. A
projection of the first layer's input is added to it (transformers/models/gemma4).

Shapes as in `transformer`; P is the width of these embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from raft_jax.models import block, sharding

if TYPE_CHECKING:
  from raft_jax.models import transformer

AXES = {
  "per_layer_embed": ("vocab", "embed"),
  # Not over `tensor`: a shard would have whole layers, which all need at once.
  "per_layer_proj": ("width", "embed"),
  "per_layer_proj_norm": ("head_dim",),
}
"""Logical axes of the parameters outside the layers."""


def shapes(config: transformer.DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters outside the layers.

  The table has a column for each L, P, as in the files. Were it stacked over the
  layers, the scan over them would copy [V, P] of each to read B T rows.
  """
  width = config.n_layers * config.per_layer_inputs
  return {
    "per_layer_embed": (config.vocab_size, width),
    "per_layer_proj": (width, config.d_model),
    "per_layer_proj_norm": (config.per_layer_inputs,),
  }


def make(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  tokens_BT: Array,
  x_BTD: Array,
) -> Array:
  """The embeddings [L, B, T, P] of all layers.

  For all of them at once: they are as wide as L P / D activations between layers (six
  in Gemma 4 E2B, four in E4B), and one product makes them, not L small ones.

  Args:
    x_BTD: input of the first layer.
  """
  count, width = config.n_layers, config.per_layer_inputs
  dtype = x_BTD.dtype
  rows_BTC = params["per_layer_embed"][tokens_BT].astype(dtype)
  rows_BTC = sharding.constrain(rows_BTC, "batch", "tokens", "width")
  rows_BTC = rows_BTC * jnp.asarray(width**0.5, dtype)
  rows_LBTP = jnp.moveaxis(rows_BTC.reshape(*tokens_BT.shape, count, width), 2, 0)
  kernel_LPD = params["per_layer_proj"].astype(dtype).reshape(count, width, -1)
  context_LBTP = jnp.einsum("btd,lpd->lbtp", x_BTD, kernel_LPD)
  context_LBTP = block.times(context_LBTP, config.d_model**-0.5)
  context_LBTP = block.rms_norm(context_LBTP, params["per_layer_proj_norm"], config)
  return block.times(context_LBTP + rows_LBTP, 2.0**-0.5)
