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
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from raft_jax.models import rotary, sharding

Params = dict[str, Any]
"""Nested dict of arrays; see `shapes`."""


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
PLACED = ("batch", "tokens", "width")
"""Logical axes of the activations between layers."""
Implementation = Literal["xla", "cudnn"]
"""Of `jax.nn.dot_product_attention`."""
UNLIMITED = 2**30
"""A window that no distance reaches."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Everything that shapes the network. The defaults are Llama's.

  Attributes:
    rms_eps: added to the mean square in RMS normalisation.
    rope_theta: base of the rotary frequencies.
    max_positions: longest sequence the model was made for.
    tie_embeddings: the output head is the input embedding.
    ropes: the rotary embeddings; none: a plain one at `rope_theta`. All turn the same
      width of a head.
    layer_ropes: each layer's index into `ropes`; none: the first for all.
    windows: how many positions each layer sees, its own included; 0: all; none: all for
      all layers.
    qkv_bias: the projections to queries, keys and values have biases.
    qk_norm: width of the RMS norm on queries and keys: of each "head" with one scale
      for all heads, or of the whole "projection".
    pre_norms: norms before attention and feed-forward.
    post_norms: norms after attention and feed-forward, before they are added.
    norm_offset: added to the scale of every norm.
    norm_rounds_last: a norm's scale multiplies before, not after, its result is rounded
      to the dtype of the activations.
    activation: a key of `ACTIVATIONS`.
    embed_scale: multiplies the embeddings on their way in.
    query_scale: multiplies the scores; None: head_dim ** -0.5.
    attention_softcap: c in c * tanh(scores / c), or None.
    logit_softcap: c in c * tanh(logits / c), or None; the head is not this module's.
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
  ropes: tuple[rotary.Rope, ...] = ()
  layer_ropes: tuple[int, ...] = ()
  windows: tuple[int, ...] = ()
  qkv_bias: bool = False
  qk_norm: str | None = None
  pre_norms: bool = True
  post_norms: bool = False
  norm_offset: float = 0.0
  norm_rounds_last: bool = False
  activation: str = "silu"
  embed_scale: float = 1.0
  query_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None

  @property
  def reads_key_positions(self) -> bool:
    """Whether a layer needs to know where its keys stand."""
    return any(self.windows) or any(rope.long_divisors for rope in self.ropes)


def rms_norm(x: Array, scale: Array, config: DecoderConfig) -> Array:
  """Root mean square normalisation over the last axis, computed in float32.

  Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + config.rms_eps)
  if config.norm_rounds_last:
    return (normed * (config.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)
  return normed.astype(x.dtype) * (config.norm_offset + scale).astype(x.dtype)


def attention(
  q_BTHh: Array,
  k_BSNh: Array,
  v_BSNh: Array,
  mask_BTS: Array,
  config: DecoderConfig,
  implementation: Implementation = "xla",
) -> Array:
  """Softmax attention; query heads share key/value heads in consecutive groups.

  Args:
    implementation: of `jax.nn.dot_product_attention`, which has none for a softcap.
  """
  cap = config.attention_softcap
  if cap is None:
    return jax.nn.dot_product_attention(
      *(q_BTHh, k_BSNh, v_BSNh),
      mask=mask_BTS[:, None],
      scale=config.query_scale,
      implementation=implementation,
    )
  batch, length, heads, width = q_BTHh.shape
  q_BTNGh = q_BTHh.reshape(batch, length, config.n_kv_heads, -1, width)
  scores_BNGTS = jnp.einsum(
    "btngh,bsnh->bngts", q_BTNGh, k_BSNh, preferred_element_type=jnp.float32
  )
  scores_BNGTS *= width**-0.5 if config.query_scale is None else config.query_scale
  scores_BNGTS = cap * jnp.tanh(scores_BNGTS / cap)
  # Finite, so that a row of padding that sees nothing gets no NaN.
  lowest = jnp.finfo(jnp.float32).min
  scores_BNGTS = jnp.where(mask_BTS[:, None, None], scores_BNGTS, lowest)
  share_BNGTS = jax.nn.softmax(scores_BNGTS, axis=-1).astype(v_BSNh.dtype)
  out_BTNGh = jnp.einsum("bngts,bsnh->btngh", share_BNGTS, v_BSNh)
  return out_BTNGh.reshape(batch, length, heads, width)


class Block(nnx.Module):
  """One transformer layer."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    d, f = config.d_model, config.d_ff
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def kernel(out: int, inp: int) -> nnx.Param:
      return nnx.Param(jax.random.normal(rngs.params(), (out, inp)) * inp**-0.5)

    def norm(width: int) -> nnx.Param:
      return nnx.Param(jnp.full(width, 1.0 - config.norm_offset))

    self.config = config
    self.q, self.k, self.v = kernel(heads, d), kernel(kv, d), kernel(kv, d)
    self.o = kernel(d, heads)
    self.gate, self.up, self.down = kernel(f, d), kernel(f, d), kernel(d, f)
    if config.pre_norms:
      self.attn_norm, self.mlp_norm = norm(d), norm(d)
    if config.post_norms:
      self.attn_post_norm, self.mlp_post_norm = norm(d), norm(d)
    if config.qkv_bias:
      self.q_bias = nnx.Param(jnp.zeros(heads))
      self.k_bias, self.v_bias = nnx.Param(jnp.zeros(kv)), nnx.Param(jnp.zeros(kv))
    if config.qk_norm == "head":
      self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
    if config.qk_norm == "projection":
      self.q_norm, self.k_norm = norm(heads), norm(kv)

  def __call__(self, x_BTD, lora, *args):
    attended, cache = self.attend(self.norm(x_BTD, "attn_norm"), lora, *args)
    x_BTD = x_BTD + self.norm(attended, "attn_post_norm")
    normed = self.norm(x_BTD, "mlp_norm")
    gate = project(normed, self.gate, lora.get("gate"))
    up = project(normed, self.up, lora.get("up"))
    gated = ACTIVATIONS[self.config.activation](gate) * up
    down = project(gated, self.down, lora.get("down"))
    return x_BTD + self.norm(down, "mlp_post_norm"), cache

  def norm(self, x: Array, name: str) -> Array:
    """The norm of that name, over as much of the last axis as it is wide; or none."""
    if not hasattr(self, name):
      return x
    scale = getattr(self, name)[...]
    parts = x.reshape(*x.shape[:-1], -1, scale.shape[-1])
    parts = x if parts.shape[-2] == 1 else parts
    return rms_norm(parts, scale, self.config).reshape(x.shape)

  def heads(self, x_BTD: Array, name: str, count: int, lora: Params) -> Array:
    """Queries, keys or values [B, T, count, h]."""
    x = project(x_BTD, getattr(self, name), lora.get(name))
    if self.config.qkv_bias:
      x = x + getattr(self, f"{name}_bias")[...].astype(x.dtype)
    x = self.norm(x, f"{name}_norm")
    return x.reshape(*x.shape[:-1], count, self.config.head_dim)

  def attend(
    self,
    x_BTD,
    lora,
    rotation,
    mask_BTS,
    cache,
    layer,
    cache_index,
    implementation,
  ):
    c = self.config
    q_BTHh = self.heads(x_BTD, "q", c.n_heads, lora)
    k_BTNh = self.heads(x_BTD, "k", c.n_kv_heads, lora)
    v_BTNh = self.heads(x_BTD, "v", c.n_kv_heads, lora)
    q_BTHh, k_BTNh = rotary.rotate(q_BTHh, *rotation), rotary.rotate(k_BTNh, *rotation)
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
    out_BTHh = attention(q_BTHh, k_BTNh, v_BTNh, mask_BTS, c, implementation)
    out_BTI = out_BTHh.reshape(*x_BTD.shape[:-1], -1)
    return project(out_BTI, self.o, lora.get("o")), cache


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
    self.final_norm = nnx.Param(jnp.full(config.d_model, 1.0 - config.norm_offset))
    if not config.tie_embeddings:
      self.head = nnx.Param(jax.random.normal(rngs.params(), vocabulary) * 0.02)


def project(
  x_BTI: Array, kernel_OI: Array | nnx.Param, adapter: Params | None = None
) -> Array:
  """Linear map by a Hugging Face kernel [out, in], in the dtype of the activations.

  With an adapter {"a": [r, in], "b": [out, r], "scale": []} that of kernel + scale b a,
  a sum that is never formed (Hu et al., "LoRA", arXiv 2106.09685).
  """
  out_BTO = jnp.einsum("...i,oi->...o", x_BTI, kernel_OI[...].astype(x_BTI.dtype))
  if adapter is None:
    return out_BTO
  adapter = {name: leaf.astype(x_BTI.dtype) for name, leaf in adapter.items()}
  low_BTr = jnp.einsum("...i,ri->...r", x_BTI, adapter["a"]) * adapter["scale"]
  return out_BTO + jnp.einsum("...r,or->...o", low_BTr, adapter["b"])


def init(key: Array, config: DecoderConfig) -> Params:
  """Random float32 parameters, for tests and for training from nothing."""
  return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key))))


def shapes(config: DecoderConfig) -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
  return jax.eval_shape(lambda: init(jax.random.key(0), config))


def axes(config: DecoderConfig) -> Params:
  """Logical axis names of every parameter, for `sharding.tree`."""
  wide, queries = ("layers", "embed"), ("layers", "heads")
  keys, up = ("layers", "kv_heads"), ("layers", "mlp", "embed")
  layers: dict[str, tuple[str, ...]] = {
    "q": (*queries, "embed"),
    "k": (*keys, "embed"),
    "v": (*keys, "embed"),
    "o": ("layers", "embed", "heads"),
    "gate": up,
    "up": up,
    "down": ("layers", "embed", "mlp"),
  }
  if config.pre_norms:
    layers |= {"attn_norm": wide, "mlp_norm": wide}
  if config.post_norms:
    layers |= {"attn_post_norm": wide, "mlp_post_norm": wide}
  if config.qkv_bias:
    layers |= {"q_bias": queries, "k_bias": keys, "v_bias": keys}
  if config.qk_norm == "head":
    layers |= dict.fromkeys(("q_norm", "k_norm"), ("layers", "head_dim"))
  if config.qk_norm == "projection":
    layers |= {"q_norm": queries, "k_norm": keys}
  names: Params = {
    "embed": ("vocab", "embed"),
    "final_norm": ("embed",),
    "layers": layers,
  }
  if not config.tie_embeddings:
    names["head"] = ("vocab", "embed")
  return names


def output_embedding(params: Params) -> Array:
  """The [V, D] matrix whose rows score the vocabulary."""
  return params["head"] if "head" in params else params["embed"]


def gathered_head(params: Params, dtype: str) -> Array:
  """`output_embedding` in `dtype`, whole over `fsdp`: for loops over its products."""
  embedding_VD = output_embedding(params).astype(dtype)
  return sharding.gathered(embedding_VD, "vocab", "embed")


def gathered(
  params: Params, config: DecoderConfig, dtype: str, *, apart: bool = False
) -> Params:
  """All parameters whole over `fsdp`, kernels in `dtype`: for a loop that reads them.

  Vectors keep their type: what a norm adds to its scale is added in float32.

  Args:
    apart: each layer's as arrays of their own: "layers" is then a tuple of trees, and
      so are adapters.
  """

  def gather(leaf: Array, names: tuple[str, ...]) -> Array:
    is_kernel = len(names) - ("layers" in names) > 1
    return sharding.gathered(leaf.astype(dtype) if is_kernel else leaf, *names)

  whole = axes(config)
  base = {name: params[name] for name in whole}
  small = {name: params[name] for name in params if name not in whole}  # adapters
  if apart:
    # Before they are gathered: the stack is never whole beside its layers.
    base["layers"] = _apart(base["layers"], config)
    own = {name: names[1:] for name, names in whole["layers"].items()}
    whole["layers"] = (own,) * config.n_layers
    small = {name: _apart(tree, config) for name, tree in small.items()}
  base = jax.tree.map(gather, base, whole)
  return {**base, **jax.tree.map(sharding.everywhere, small)}


def _apart(stacked: Any, config: DecoderConfig) -> tuple[Any, ...]:
  """What is stacked along the layers, one tree a layer."""
  return tuple(
    jax.tree.map(operator.itemgetter(index), stacked)
    for index in range(config.n_layers)
  )


def init_cache(
  config: DecoderConfig, batch: int, length: int, dtype: str = "float32"
) -> dict[str, Array]:
  """Empty key/value cache {"k", "v"}, each [L, B, S, N, h].

  Where the config reads key positions, also {"positions"}, int32 [B, S].
  """
  shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
  cache = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
  if config.reads_key_positions:
    cache["positions"] = jnp.zeros((batch, length), jnp.int32)
  return cache


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
  reach_B: Array | None = None,
  dtype: str = "float32",
  remat: bool = False,
  unroll: int = 1,
  implementation: Implementation = "xla",
) -> tuple[Array, dict[str, Array] | None]:
  """Runs the decoder up to the final norm; the head is `vocab_head`'s business.

  Args:
    params: tree as `shapes(config)`; float32 masters are cast layer by layer. Under
      "lora" it may hold adapters: name of a kernel -> `project`'s, stacked like it.
      Or what `gathered` makes of it.
    tokens_BT: int32 ids.
    positions_BT: int32 rotary positions, which need not follow the column.
    mask_BTS: True where a query may attend to a key; S = T without a cache, else the
      cache's length.
    cache: from `init_cache`; this call's keys and values are written at columns
      `cache_index` .. `cache_index + T`.
    reach_B: int32, the length that a row whose cache is being filled may come to; read
      where the rotary embedding depends on a row's length. None: as long as it is.
    dtype: of the activations.
    remat: recompute each layer in the backward pass.
    unroll: layers per iteration of the scan; 0 means all.
    implementation: of attention.

  Returns:
    hidden_BTD in `dtype`, and the updated cache (None without one).
  """
  x_BTD = params["embed"][tokens_BT].astype(dtype)
  x_BTD = sharding.constrain(x_BTD, *PLACED)
  if config.embed_scale != 1.0:
    x_BTD = x_BTD * jnp.asarray(config.embed_scale, dtype)
  keys, cache = _key_positions(positions_BT, cache, cache_index)
  ropes = config.ropes or (rotary.Rope(config.rope_theta),)
  reach_B = _reach(keys, mask_BTS, reach_B) if config.reads_key_positions else None
  rotations = [
    rotary.rotation(rope, positions_BT, config.head_dim, reach_B) for rope in ropes
  ]
  tables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rotations)
  distance_BTS = positions_BT[:, :, None] - keys[:, None, :]

  def layer(carry, inputs):
    x_BTD, kv = carry
    layer_params, lora, index, own = inputs
    rotation, seen_BTS = rotations[0], mask_BTS
    if "rope" in own:
      rotation = jax.tree.map(lambda table: table[own["rope"]], tables)
    if "window" in own:
      seen_BTS = mask_BTS & (distance_BTS < own["window"])
    x_BTD, kv = _apply_block(
      *(config, layer_params, x_BTD, lora, rotation, seen_BTS),
      *(kv, index, cache_index, implementation),
    )
    return (sharding.constrain(x_BTD, *PLACED), kv), None

  body = jax.checkpoint(layer) if remat else layer
  kv = None if cache is None else {"k": cache["k"], "v": cache["v"]}
  x_BTD, kv = _through_layers(body, (x_BTD, kv), params, config, unroll)
  if cache is not None and kv is not None:
    cache = {**cache, **kv}
  return rms_norm(x_BTD, params["final_norm"], config), cache


def _through_layers(
  body: Callable[..., Any],
  carry: Any,
  params: Params,
  config: DecoderConfig,
  unroll: int,
) -> Any:
  """What `body` makes of `carry` layer by layer, stacked or apart (see `gathered`)."""
  layers, own, count = params["layers"], _layer_data(config), config.n_layers
  lora: Any = params.get("lora", {})
  if not isinstance(layers, tuple):
    stacked = layers, lora, jnp.arange(count), own
    return jax.lax.scan(body, carry, stacked, unroll=unroll or count)[0]
  for apart in zip(layers, lora or ({},) * count, range(count), _apart(own, config)):
    carry, _ = body(carry, apart)
  return carry


def _layer_data(config: DecoderConfig) -> dict[str, Array]:
  """What differs between layers, each [L]: the scan's body stays one."""
  data = {}
  if config.layer_ropes:
    data["rope"] = jnp.array(config.layer_ropes)
  if any(config.windows):
    data["window"] = jnp.array([window or UNLIMITED for window in config.windows])
  return data


def _key_positions(
  positions_BT: Array, cache: dict[str, Array] | None, cache_index: Array | int
) -> tuple[Array, dict[str, Array] | None]:
  """Position of every key [B, S], and the cache with this call's written."""
  if cache is None or "positions" not in cache:
    return positions_BT, cache
  keys_BS = jax.lax.dynamic_update_slice(
    cache["positions"], positions_BT.astype(jnp.int32), (0, cache_index)
  )
  return keys_BS, {**cache, "positions": keys_BS}


def _reach(keys_BS: Array, mask_BTS: Array, reach_B: Array | None) -> Array:
  """Length of each row in positions: padding, which nobody sees, does not count."""
  seen_BS = jnp.any(mask_BTS, axis=1)
  length_B = jnp.max(jnp.where(seen_BS, keys_BS, 0), axis=1) + 1
  return length_B if reach_B is None else jnp.maximum(length_B, reach_B)


def positions(valid_BT: Array) -> Array:
  """Position of each valid token within its row, wherever the padding sits."""
  return jnp.maximum(jnp.cumsum(valid_BT, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_mask(valid_BT: Array) -> Array:
  """[B, T, T]: a query sees the valid keys up to its own column."""
  length = valid_BT.shape[-1]
  return jnp.tril(jnp.ones((length, length), bool)) & valid_BT[:, None, :]
