"""One decoder for all families: what differs between models is data in the config.

Flax NNX defines the layer; outside this module parameters are a plain nested dict of
arrays with the layers stacked on axis 0, and `forward` is a pure function of it.
Kernels keep Hugging Face's [out, in] layout, so that loading and export copy bytes.

Shapes: B rows, T tokens, S keys, D model width, H query heads, N key/value heads,
h head width, F feed-forward width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Params = dict[str, Any]
"""Nested dict of arrays; see `shapes`."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Everything that shapes the network.

  Attributes:
    rms_eps: added to the mean square in RMS normalisation.
    rope_theta: base of the rotary frequencies.
    max_positions: longest sequence the model was made for.
    tie_embeddings: the output head is the input embedding.
  """

  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  rms_eps: float
  rope_theta: float
  max_positions: int
  tie_embeddings: bool


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """Root mean square normalisation over the last axis, computed in float32.

  Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
  """
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * inverse).astype(x.dtype) * scale.astype(x.dtype)


def rotary_angles(positions_BT: Array, config: DecoderConfig) -> tuple[Array, Array]:
  """Cosine and sine [B, T, 1, h/2] of the rotary embedding, float32.

  Su et al., "RoFormer", arXiv 2104.09864.
  """
  exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
  inverse_frequency = 1.0 / (config.rope_theta**exponent)
  angle = positions_BT[..., None].astype(jnp.float32) * inverse_frequency
  return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def rotate(x_BTHh: Array, cos: Array, sin: Array) -> Array:
  """Applies the rotary embedding; halves of a head are rotated against each other."""
  first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTHh.dtype)


class Block(nnx.Module):
  """One pre-norm transformer layer."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    d, f = config.d_model, config.d_ff
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def kernel(out: int, inp: int) -> nnx.Param:
      return nnx.Param(jax.random.normal(rngs.params(), (out, inp)) * inp**-0.5)

    self.config = config
    self.attn_norm = nnx.Param(jnp.ones(d))
    self.q, self.k, self.v = kernel(heads, d), kernel(kv, d), kernel(kv, d)
    self.o = kernel(d, heads)
    self.mlp_norm = nnx.Param(jnp.ones(d))
    self.gate, self.up, self.down = kernel(f, d), kernel(f, d), kernel(d, f)

  def __call__(self, x_BTD, angles, mask_BTS, cache, layer, cache_index):
    c = self.config
    attended, cache = self.attend(
      rms_norm(x_BTD, self.attn_norm[...], c.rms_eps),
      angles,
      mask_BTS,
      cache,
      layer,
      cache_index,
    )
    x_BTD = x_BTD + attended
    normed = rms_norm(x_BTD, self.mlp_norm[...], c.rms_eps)
    gated = jax.nn.silu(project(normed, self.gate)) * project(normed, self.up)
    return x_BTD + project(gated, self.down), cache

  def attend(self, x_BTD, angles, mask_BTS, cache, layer, cache_index):
    c = self.config
    batch, length, _ = x_BTD.shape
    q_BTHh = project(x_BTD, self.q).reshape(batch, length, c.n_heads, c.head_dim)
    k_BTNh = project(x_BTD, self.k).reshape(batch, length, c.n_kv_heads, c.head_dim)
    v_BTNh = project(x_BTD, self.v).reshape(batch, length, c.n_kv_heads, c.head_dim)
    q_BTHh, k_BTNh = rotate(q_BTHh, *angles), rotate(k_BTNh, *angles)
    if cache is not None:
      # Written in place at [layer, :, cache_index:]: the cache travels as the scan's
      # carry, so that a decode step moves one token's worth of it, not all.
      start = (layer, 0, cache_index, 0, 0)
      cache = {
        "k": jax.lax.dynamic_update_slice(
          cache["k"], k_BTNh[None].astype(cache["k"].dtype), start
        ),
        "v": jax.lax.dynamic_update_slice(
          cache["v"], v_BTNh[None].astype(cache["v"].dtype), start
        ),
      }
      k_BTNh = cache["k"][layer].astype(x_BTD.dtype)
      v_BTNh = cache["v"][layer].astype(x_BTD.dtype)
    out_BTHh = jax.nn.dot_product_attention(
      q_BTHh, k_BTNh, v_BTNh, mask=mask_BTS[:, None]
    )
    return project(out_BTHh.reshape(batch, length, -1), self.o), cache


class Decoder(nnx.Module):
  """Names and shapes of all parameters; `forward` computes with them."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=config.n_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Block:
      return Block(config, rngs=rngs)

    vocabulary = (config.vocab_size, config.d_model)
    self.embed = nnx.Param(jax.random.normal(rngs.params(), vocabulary) * 0.02)
    self.layers = stack(rngs)
    self.final_norm = nnx.Param(jnp.ones(config.d_model))
    if not config.tie_embeddings:
      self.head = nnx.Param(jax.random.normal(rngs.params(), vocabulary) * 0.02)


def project(x_BTI: Array, kernel_OI: Array | nnx.Param) -> Array:
  """Linear map by a Hugging Face kernel [out, in], in the dtype of the activations."""
  return jnp.einsum("...i,oi->...o", x_BTI, kernel_OI[...].astype(x_BTI.dtype))


def init(key: Array, config: DecoderConfig) -> Params:
  """Random float32 parameters, for tests and for training from nothing."""
  return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key))))


def shapes(config: DecoderConfig) -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
  return jax.eval_shape(lambda: init(jax.random.key(0), config))


def axes(config: DecoderConfig) -> Params:
  """Logical axis names of every parameter, for `sharding.tree`."""
  names: Params = {
    "embed": ("vocab", "embed"),
    "final_norm": ("embed",),
    "layers": {
      "attn_norm": ("layers", "embed"),
      "q": ("layers", "heads", "embed"),
      "k": ("layers", "kv_heads", "embed"),
      "v": ("layers", "kv_heads", "embed"),
      "o": ("layers", "embed", "heads"),
      "mlp_norm": ("layers", "embed"),
      "gate": ("layers", "mlp", "embed"),
      "up": ("layers", "mlp", "embed"),
      "down": ("layers", "embed", "mlp"),
    },
  }
  if not config.tie_embeddings:
    names["head"] = ("vocab", "embed")
  return names


def output_embedding(params: Params) -> Array:
  """The [V, D] matrix whose rows score the vocabulary."""
  return params["head"] if "head" in params else params["embed"]


def init_cache(
  config: DecoderConfig, batch: int, length: int, dtype: str = "float32"
) -> dict[str, Array]:
  """Empty key/value cache {"k", "v"}, each [L, B, S, N, h]."""
  shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
  return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


@functools.lru_cache
def _block_definition(config: DecoderConfig) -> Any:
  return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))


def _apply_block(config: DecoderConfig, layer_params: Params, *args):
  definition, state = _block_definition(config)
  state = jax.tree.map(lambda leaf: leaf, state)
  nnx.replace_by_pure_dict(state, layer_params)
  return nnx.merge(definition, state)(*args)


def forward(
  params: Params,
  config: DecoderConfig,
  tokens_BT: Array,
  positions_BT: Array,
  mask_BTS: Array,
  *,
  cache: dict[str, Array] | None = None,
  cache_index: Array | int = 0,
  dtype: str = "float32",
  remat: bool = False,
  unroll: int = 1,
) -> tuple[Array, dict[str, Array] | None]:
  """Runs the decoder up to the final norm; the head is `vocab_head`'s business.

  Args:
    params: tree as `shapes(config)`; float32 masters are cast layer by layer.
    tokens_BT: int32 ids.
    positions_BT: int32 rotary positions, which need not follow the column.
    mask_BTS: True where a query may attend to a key; S = T without a cache, else the
      cache's length.
    cache: from `init_cache`; this call's keys and values are written at columns
      `cache_index` .. `cache_index + T`.
    dtype: of the activations.
    remat: recompute each layer in the backward pass.
    unroll: layers per iteration of the scan; 0 means all.

  Returns:
    hidden_BTD in `dtype`, and the updated cache (None without one).
  """
  x_BTD = params["embed"][tokens_BT].astype(dtype)
  angles = rotary_angles(positions_BT, config)

  def layer(carry, inputs):
    x_BTD, cache = carry
    layer_params, index = inputs
    x_BTD, cache = _apply_block(
      config, layer_params, x_BTD, angles, mask_BTS, cache, index, cache_index
    )
    return (x_BTD, cache), None

  body = jax.checkpoint(layer) if remat else layer
  (x_BTD, cache), _ = jax.lax.scan(
    body,
    (x_BTD, cache),
    (params["layers"], jnp.arange(config.n_layers)),
    unroll=unroll or config.n_layers,
  )
  return rms_norm(x_BTD, params["final_norm"], config.rms_eps), cache


def positions(valid_BT: Array) -> Array:
  """Position of each valid token within its row, wherever the padding sits."""
  return jnp.maximum(jnp.cumsum(valid_BT, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_mask(valid_BT: Array) -> Array:
  """[B, T, T]: a query sees the valid keys up to its own column."""
  length = valid_BT.shape[-1]
  return jnp.tril(jnp.ones((length, length), bool)) & valid_BT[:, None, :]
