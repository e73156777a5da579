"""One layer of the decoder: a token mixer and a feed-forward, with their parameters.

Shapes as in `transformer`; I is the width of all heads together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from raft_jax.models import (
  experts,
  gated_delta,
  hybrid,
  kv_cache,
  layer_functions,
  rotary,
)

if TYPE_CHECKING:
  from raft_jax.models import transformer

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def rms_norm(x: Array, scale: Array, config: transformer.DecoderConfig) -> Array:
  """The norm of a network; `scale` has its width."""
  return layer_functions.rms_norm(
    x,
    scale,
    eps=config.rms_eps,
    offset=config.norm_offset,
    rounds_last=config.norm_rounds_last,
  )


def times(x: Array, factor: float) -> Array:
  """A multiple of activations; the factor is not rounded to their dtype."""
  if factor == 1.0:
    return x
  return (x.astype(jnp.float32) * factor).astype(x.dtype)


class LayerInputs(NamedTuple):
  """What a layer reads beside its input and its parameters.

  Attributes:
    rotation: cosine and sine of the layer's rotary embedding.
    mask_BTS: True where a query may attend to a key.
    cache: keys and values of all layers; None without a cache.
    layer: index of this layer in the cache.
    column: first column of the cache that this pass writes.
    attention: implementation of attention.
    query_factor: factor [B, T, 1, 1] of the queries, or None.
    counted_BT: tokens that count in the load of the experts; None: it is not measured.
    columns: the tokens as Gated DeltaNet reads them; None: no layer does.
    per_layer_BTP: the layer's embedding of each token, from `layer_inputs`, or None.
  """

  rotation: rotary.Rotation
  mask_BTS: Array
  cache: kv_cache.Cache | None
  layer: Array | int
  column: Array | int
  attention: layer_functions.Implementation
  query_factor: Array | None = None
  counted_BT: Array | None = None
  columns: gated_delta.Columns | None = None
  per_layer_BTP: Array | None = None


class LayerOutputs(NamedTuple):
  """What a layer makes: the input of the next one, the cache, the experts' load."""

  x_BTD: Array
  cache: kv_cache.Cache | None
  load: experts.Load | None


class Block(nnx.Module):
  """One transformer layer; a linear one has Gated DeltaNet in place of attention.

  A layer that shares keys and values reads them from the cache, and has none.
  """

  def __init__(
    self, config: transformer.DecoderConfig, *, kind: hybrid.Kind, rngs: nnx.Rngs
  ):
    d, f = config.d_model, config.d_ff

    def kernel(out: int, inp: int) -> nnx.Param:
      return nnx.Param(jax.random.normal(rngs.params(), (out, inp)) * inp**-0.5)

    def norm(width: int) -> nnx.Param:
      return nnx.Param(jnp.full(width, 1.0 - config.norm_offset, jnp.float32))

    self.config, self.kind, linear = config, kind, kind.linear
    if linear:
      self.init_delta(kernel)
    else:
      self.init_attention(kernel, norm)
    if config.n_experts:
      self.init_experts(rngs)
      if config.parallel_experts:
        self.shared_post_norm = norm(d)
        self.experts_norm, self.experts_post_norm = norm(d), norm(d)
    else:
      if config.gated_mlp:
        self.gate = kernel(f, d)
      self.up, self.down = kernel(f, d), kernel(d, f)
    if config.activation == "xielu":
      self.xielu_p, self.xielu_n = nnx.Param(jnp.zeros(1)), nnx.Param(jnp.zeros(1))
    if config.pre_norms or linear:
      self.attn_norm, self.mlp_norm = norm(d), norm(d)
    if config.post_norms and not linear:
      self.attn_post_norm, self.mlp_post_norm = norm(d), norm(d)
    if config.layer_scales:
      self.layer_scale = nnx.Param(jnp.ones(1))
    if config.per_layer_inputs:
      p = config.per_layer_inputs
      self.per_layer_gate, self.per_layer_out = kernel(p, d), kernel(d, p)
      self.per_layer_norm = norm(d)

  def init_attention(
    self,
    kernel: Callable[[int, int], nnx.Param],
    norm: Callable[[int], nnx.Param],
  ) -> None:
    """The parameters of attention."""
    config, d = self.config, self.config.d_model
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    queries = 2 * heads if config.attention_gate else heads
    self.q = kernel(queries, d)
    if not self.kind.shares_kv:
      self.k = kernel(kv, d)
      if not config.keys_are_values:
        self.v = kernel(kv, d)
    self.o = kernel(d, heads)
    if config.qkv_bias:
      self.q_bias = nnx.Param(jnp.zeros(heads))
      if not self.kind.shares_kv:
        self.k_bias, self.v_bias = nnx.Param(jnp.zeros(kv)), nnx.Param(jnp.zeros(kv))
    if config.o_bias:
      self.o_bias = nnx.Param(jnp.zeros(d))
    if config.attention_sinks:
      self.sinks = nnx.Param(jnp.zeros(config.n_heads))
    if config.qk_norm is not None:
      by_head = config.qk_norm == "head"
      self.q_norm = norm(config.head_dim if by_head else heads)
      if not self.kind.shares_kv:
        self.k_norm = norm(config.head_dim if by_head else kv)

  def init_experts(self, rngs: nnx.Rngs) -> None:
    """Makes the parameters of a mixture of experts."""
    shapes = experts.shapes(self.config) | experts.shared_shapes(self.config)
    for name, shape in shapes.items():
      value = jnp.ones(shape) if name.endswith("scale") else jnp.zeros(shape)
      if not name.endswith(("bias", "scale")):
        value = jax.random.normal(rngs.params(), shape) * shape[-1] ** -0.5
      setattr(self, name, nnx.Param(value))

  def init_delta(self, kernel: Callable[[int, int], nnx.Param]) -> None:
    """The parameters of Gated DeltaNet, with decays like those of published models."""
    assert self.config.delta is not None
    shapes = gated_delta.shapes(self.config.delta, self.config.d_model)
    for name, shape in shapes.items():
      if len(shape) == 1:
        setattr(self, name, nnx.Param(jnp.ones(shape)))
      elif len(shape) == 2:
        setattr(self, name, kernel(*shape))
      else:
        flat = kernel(shape[0], shape[-1])
        setattr(self, name, nnx.Param(flat[...][:, None]))

  def __call__(
    self, x_BTD: Array, lora: transformer.Params, inputs: LayerInputs
  ) -> LayerOutputs:
    """The mixer, then the feed-forward, each added to its input."""
    mixer = self.mix if self.kind.linear else self.attend
    attended, cache = mixer(self.norm(x_BTD, "attn_norm"), lora, inputs)
    scale = self.config.residual_scale
    x_BTD = x_BTD + times(self.norm(attended, "attn_post_norm"), scale)
    fed, load = self.feed_forward(x_BTD, lora, inputs)
    x_BTD = x_BTD + times(self.norm(fed, "mlp_post_norm"), scale)
    if self.config.per_layer_inputs:
      embedded = self.embedded(x_BTD, lora, inputs)
      x_BTD = x_BTD + self.norm(embedded, "per_layer_norm")
    if self.config.layer_scales:
      # It is no parameter of the published models (a buffer in transformers).
      layer_scale = jax.lax.stop_gradient(self.layer_scale[...])
      x_BTD = x_BTD * layer_scale.astype(x_BTD.dtype)
    return LayerOutputs(x_BTD, cache, load)

  def feed_forward(
    self, x_BTD: Array, lora: transformer.Params, inputs: LayerInputs
  ) -> tuple[Array, experts.Load | None]:
    """The dense feed-forward or the mixture of experts, and the experts' load.

    Their norm is applied here, because not all parts may read what it gives.
    """
    before_BTD, x_BTD = x_BTD, self.norm(x_BTD, "mlp_norm")
    if self.config.n_experts:
      return self.mixture(before_BTD, x_BTD, inputs)
    if self.config.gated_mlp:
      gate = layer_functions.project(x_BTD, self.gate, lora.get("gate"))
      up = layer_functions.project(x_BTD, self.up, lora.get("up"))
      units = self.gated(gate, up)
    else:
      units = self.activate(layer_functions.project(x_BTD, self.up, lora.get("up")))
    return layer_functions.project(units, self.down, lora.get("down")), None

  def mixture(
    self, before_BTD: Array, x_BTD: Array, inputs: LayerInputs
  ) -> tuple[Array, experts.Load | None]:
    """The mixture of experts, what stands beside it, and the experts' load.

    Args:
      before_BTD: the input before its norm.
    """
    c = self.config
    weights = {name: getattr(self, name)[...] for name in experts.shapes(c)}
    routed_BTD, own_BTD = None, x_BTD
    if c.parallel_experts:
      # In float32 like the router, which a rounded input may lead to another expert.
      scale = weights.pop("router_scale").astype(jnp.float32) * c.d_model**-0.5
      before_32 = before_BTD.astype(jnp.float32)
      routed_BTD = layer_functions.rms_norm(before_32, scale, eps=c.rms_eps)
      own_BTD = self.norm(before_BTD, "experts_norm")
    fed_BTD, load = experts.mixture(
      own_BTD,
      weights,
      per_token=c.experts_per_token,
      normalized=c.experts_normalized,
      gating=self.gated,
      routed_BTD=routed_BTD,
      counted_BT=inputs.counted_BT,
    )
    fed_BTD = self.norm(fed_BTD, "experts_post_norm")
    if c.shared_d_ff:
      fed_BTD += self.norm(self.shared_expert(x_BTD), "shared_post_norm")
    return fed_BTD, load

  def embedded(
    self, x_BTD: Array, lora: transformer.Params, inputs: LayerInputs
  ) -> Array:
    """The layer's own embedding of each token, as far as its gate lets it through."""
    assert inputs.per_layer_BTP is not None
    name, out_name = "per_layer_gate", "per_layer_out"
    gate_BTP = layer_functions.project(x_BTD, self.per_layer_gate, lora.get(name))
    units_BTP = self.activate(gate_BTP) * inputs.per_layer_BTP
    return layer_functions.project(units_BTP, self.per_layer_out, lora.get(out_name))

  def shared_expert(self, x_BTD: Array) -> Array:
    """The output of the expert, or the dense part, that every token goes through."""
    shapes = experts.shared_shapes(self.config)
    kernels = {name: getattr(self, name)[...] for name in shapes}
    gate = layer_functions.project(x_BTD, kernels["shared_gate"])
    up = layer_functions.project(x_BTD, kernels["shared_up"])
    out_BTD = layer_functions.project(self.gated(gate, up), kernels["shared_down"])
    if "shared_router" not in kernels:
      return out_BTD
    score_BT1 = layer_functions.project(x_BTD, kernels["shared_router"])
    return jax.nn.sigmoid(score_BT1) * out_BTD

  def gated(self, gate: Array, up: Array) -> Array:
    """What the feed-forward computes between its projections."""
    if self.config.gate_limit is not None:
      return layer_functions.clamped_gate(gate, up, self.config.gate_limit)
    return self.activate(gate) * up

  def activate(self, x: Array) -> Array:
    if self.config.activation == "xielu":
      return layer_functions.xielu(x, self.xielu_p[...], self.xielu_n[...])
    return ACTIVATIONS[self.config.activation](x)

  def norm(self, x: Array, name: str) -> Array:
    """Applies the norm of that name, if the layer has it, to parts of its width."""
    if not hasattr(self, name):
      return x
    scale = getattr(self, name)[...]
    parts = x.reshape(*x.shape[:-1], -1, scale.shape[-1])
    parts = x if parts.shape[-2] == 1 else parts
    return rms_norm(parts, scale, self.config).reshape(x.shape)

  def projected(self, x_BTD: Array, name: str, lora: transformer.Params) -> Array:
    """All heads of queries, keys or values beside each other, without a norm."""
    x = layer_functions.project(x_BTD, getattr(self, name), lora.get(name))
    if self.config.qkv_bias:
      x = x + getattr(self, f"{name}_bias")[...].astype(x.dtype)
    return x

  def heads(self, x_BTI: Array, name: str, count: int) -> Array:
    """Queries, keys or values [B, T, count, h] from what `projected` gives."""
    x = self.norm(x_BTI, f"{name}_norm").reshape(*x_BTI.shape[:-1], count, -1)
    if name == "v" and self.config.value_norm:
      x = layer_functions.rms_norm(x, None, eps=self.config.rms_eps)
    return x

  def gated_queries(
    self, x_BTD: Array, lora: transformer.Params
  ) -> tuple[Array, Array]:
    """Queries [B, T, H, h] and the gates of the heads' outputs [B, T, H * h]."""
    c, outer = self.config, x_BTD.shape[:-1]
    both = layer_functions.project(x_BTD, self.q, lora.get("q"))
    q, gate = jnp.split(both.reshape(*outer, c.n_heads, -1), 2, axis=-1)
    q_BTI = self.norm(q.reshape(*outer, -1), "q_norm")
    return q_BTI.reshape(q.shape), gate.reshape(*outer, -1)

  def mix(
    self, x_BTD: Array, lora: transformer.Params, inputs: LayerInputs
  ) -> tuple[Array, kv_cache.Cache | None]:
    """Gated DeltaNet, and the cache with the state after this call's last token."""
    delta, cache = self.config.delta, inputs.cache
    assert delta is not None
    assert inputs.columns is not None
    state = None if cache is None else kv_cache.read_state(cache, inputs.layer)
    weights = {name: getattr(self, name).get_value() for name in gated_delta.AXES}
    out_BTD, state = gated_delta.mix(delta, weights, lora, x_BTD, inputs.columns, state)
    if cache is not None:
      cache = kv_cache.write_state(cache, state, inputs.layer)
    return out_BTD, cache

  def attend(
    self, x_BTD: Array, lora: transformer.Params, inputs: LayerInputs
  ) -> tuple[Array, kv_cache.Cache | None]:
    """Self-attention, and the cache with this call's keys and values."""
    c = self.config
    if c.attention_gate:
      q_BTHh, gate_BTI = self.gated_queries(x_BTD, lora)
    else:
      q_BTI, gate_BTI = self.projected(x_BTD, "q", lora), None
      q_BTHh = self.heads(q_BTI, "q", c.n_heads)
    if not self.kind.shares_kv:
      k_BTI = self.projected(x_BTD, "k", lora)
      k_BTNh = self.heads(k_BTI, "k", c.n_kv_heads)
      v_BTI = k_BTI if c.keys_are_values else self.projected(x_BTD, "v", lora)
      v_BTNh = self.heads(v_BTI, "v", c.n_kv_heads)
    rotate = functools.partial(rotary.rotate, interleaved=c.rope_interleaved)
    q_BTHh = rotate(q_BTHh, *inputs.rotation)
    if not self.kind.shares_kv:
      k_BTNh = rotate(k_BTNh, *inputs.rotation)
    if inputs.query_factor is not None:
      q_BTHh = q_BTHh * inputs.query_factor.astype(q_BTHh.dtype)
    cache = inputs.cache
    if cache is not None:
      if not self.kind.shares_kv:
        cache = kv_cache.write_layer(
          cache, k_BTNh, v_BTNh, layer=inputs.layer, column=inputs.column
        )
      k_BTNh = cache["k"][inputs.layer].astype(x_BTD.dtype)
      v_BTNh = cache["v"][inputs.layer].astype(x_BTD.dtype)
    out_BTHh = layer_functions.attention(
      q_BTHh,
      k_BTNh,
      v_BTNh,
      inputs.mask_BTS,
      scale=c.query_scale,
      softcap=c.attention_softcap,
      sinks_H=self.sinks[...] if c.attention_sinks else None,
      implementation=inputs.attention,
    )
    out_BTI = out_BTHh.reshape(*x_BTD.shape[:-1], -1)
    if gate_BTI is not None:
      out_BTI = out_BTI * jax.nn.sigmoid(gate_BTI)
    out_BTD = layer_functions.project(out_BTI, self.o, lora.get("o"))
    if c.o_bias:
      out_BTD = out_BTD + self.o_bias[...].astype(out_BTD.dtype)
    return out_BTD, cache
