"""One decoder for all families; the differences between models are in its config.

Flax NNX defines the layer (`block`). Outside, parameters are a plain nested dict of
arrays with the layers stacked on axis 0, and `forward` is a pure function of it.
Kernels keep Hugging Face's [out, in] layout, so that loading and export copy bytes.

Shapes: B rows, T tokens, S keys, D model width, H query heads, N key/value heads,
h head width, F feed-forward width, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from raft_jax.models import (
  block,
  gated_delta,
  hybrid,
  kv_cache,
  layer_functions,
  layer_inputs,
  layer_rotations,
  rotary,
  sharding,
)

Params = dict[str, Any]
"""Nested dict of arrays; see `shapes`."""


ACTIVATION_AXES = ("batch", "tokens", "width")
"""Logical axes of the activations between layers."""
UNLIMITED = 2**30
"""A window longer than any distance."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The architecture of a network. The defaults are Llama's.

  Attributes:
    rms_eps: added to the mean square in RMS normalisation.
    rope_theta: base of the rotary frequencies.
    max_positions: longest sequence that the model was made for.
    tie_embeddings: whether the output head is the input embedding.
    ropes: the rotary embeddings; empty: a plain one with base `rope_theta`. All of them
      rotate the same width of a head.
    layer_ropes: each layer's index into `ropes`; empty: the first one for all layers.
    windows: number of positions that each layer attends to, the current one included;
      0: all positions; empty: all positions in all layers.
    qkv_bias: whether the projections to queries, keys and values have biases.
    qk_norm: RMS norm of queries and keys: None, over each "head" with one scale for all
      heads, or over the whole "projection".
    pre_norms: whether there are norms before attention and feed-forward.
    post_norms: whether the outputs of attention and feed-forward are normalised before
      they are added.
    norm_offset: added to the scale of every norm.
    norm_rounds_last: whether a norm multiplies by its scale before it rounds to the
      dtype of the activations, not after.
    activation: a key of `block.ACTIVATIONS`, or "xielu", which has two learned numbers
      in each layer.
    gated_mlp: whether the feed-forward network multiplies the activation of one
      projection by another one, and does not apply it to the only one.
    embed_scale: factor of the input embeddings.
    residual_scale: factor of the outputs of attention and feed-forward before they are
      added.
    hidden_scale: factor of the last hidden states, and thus of the logits.
    query_scale: factor of the attention scores; None: head_dim ** -0.5.
    query_growth: beta and length of `rotary.query_factor`, or None.
    rope_interleaved: whether neighbouring dimensions of a head rotate together.
    attention_softcap: c in c * tanh(scores / c), or None.
    logit_softcap: c in c * tanh(logits / c), or None; applied by the caller.
    n_experts: number of experts in the feed-forward of each layer, of width `d_ff`; 0:
      a dense feed-forward.
    experts_per_token: number of experts that the router chooses for a token.
    experts_normalized: whether the weights of the chosen experts sum to 1.
    expert_biases: whether the router and the projections of the experts have biases.
    shared_d_ff: width of an expert that every token goes through beside the chosen
      ones, multiplied by the sigmoid of a projection of its own; 0: there is none.
    parallel_experts: whether a dense feed-forward of width `shared_d_ff` stands beside
      the experts, instead of a shared one, each with norms of its own; the router's
      input is then normed and scaled, and so are the weights of the experts scaled.
    gate_limit: bound of both factors of the gated activation, which is then
      `layer_functions.clamped_gate`; None: `activation` without a bound.
    o_bias: whether the projection of the attended values has a bias.
    attention_sinks: whether each head has a score of no key, to which attention goes.
    attention_gate: whether the projection to queries also gives, after the query of
      each head, a gate, whose sigmoid multiplies the head's output.
    keys_are_values: whether values are what keys are before their norm and rotation.
    value_norm: whether values have an RMS norm over each head, without a scale.
    layer_scales: whether the output of each layer is multiplied by a stored number,
      which training never changes.
    delta: the layers that have Gated DeltaNet instead of attention; None: none.
    global_attention: the layers whose attention has heads of another shape; None: none.
      `n_kv_heads`, `head_dim`, `ropes` and `keys_are_values` are those of the others.
    kv_sharing: the layers that attend to the keys and values of an earlier layer; None:
      none. `d_ff` is that of the others.
    per_layer_inputs: width of the embedding of each token that each layer reads beside
      its input; 0: there is none.
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
  gated_mlp: bool = True
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  hidden_scale: float = 1.0
  query_scale: float | None = None
  query_growth: tuple[float, int] | None = None
  rope_interleaved: bool = False
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  n_experts: int = 0
  experts_per_token: int = 0
  experts_normalized: bool = False
  expert_biases: bool = False
  shared_d_ff: int = 0
  parallel_experts: bool = False
  gate_limit: float | None = None
  o_bias: bool = False
  attention_sinks: bool = False
  attention_gate: bool = False
  keys_are_values: bool = False
  value_norm: bool = False
  layer_scales: bool = False
  delta: gated_delta.DeltaConfig | None = None
  global_attention: hybrid.GlobalAttention | None = None
  kv_sharing: hybrid.KvSharing | None = None
  per_layer_inputs: int = 0

  @property
  def reads_key_positions(self) -> bool:
    """Whether some layer needs the positions of its keys."""
    return any(self.windows) or any(rope.long_divisors for rope in self.ropes)


class Decoder(nnx.Module):
  """Names and shapes of all parameters; `forward` computes with them."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    def stack(count: int, kind: hybrid.Kind) -> block.Block:
      @nnx.split_rngs(splits=count)
      @nnx.vmap(in_axes=0, out_axes=0)
      def layers(rngs: nnx.Rngs) -> block.Block:
        return block.Block(kind.config(config), kind=kind, rngs=rngs)

      return layers(rngs)

    def norm(width: int) -> nnx.Param:
      return nnx.Param(jnp.full(width, 1.0 - config.norm_offset, jnp.float32))

    vocabulary = (config.vocab_size, config.d_model)
    self.embed = nnx.Param(jax.random.normal(rngs.params(), vocabulary) * 0.02)
    for place, (kind, layers) in enumerate(hybrid.kinds(config).items()):
      setattr(self, f"stack_{place}", stack(len(layers), kind))
    self.final_norm = norm(config.d_model)
    if not config.tie_embeddings:
      self.head = nnx.Param(jax.random.normal(rngs.params(), vocabulary) * 0.02)
    if config.per_layer_inputs:
      for name, shape in layer_inputs.shapes(config).items():
        value = jax.random.normal(rngs.params(), shape) * shape[-1] ** -0.5
        setattr(self, name, norm(*shape) if len(shape) == 1 else nnx.Param(value))


def init(key: Array, config: DecoderConfig) -> Params:
  """Random float32 parameters, for tests and for training from scratch."""
  params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key))))
  stacks = [params.pop(f"stack_{n}") for n in range(len(hybrid.kinds(config)))]
  return {**params, "layers": hybrid.joined(stacks, config)}


def shapes(config: DecoderConfig) -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
  return jax.eval_shape(lambda: init(jax.random.key(0), config))


def parameter_count(config: DecoderConfig) -> int:
  """Number of parameters of a network."""
  return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))


def output_embedding(params: Params) -> Array:
  """The [V, D] matrix whose rows score the vocabulary."""
  return params["head"] if "head" in params else params["embed"]


@functools.lru_cache
def _block_definition(config: DecoderConfig, kind: hybrid.Kind) -> Any:
  return nnx.split(
    nnx.eval_shape(lambda: block.Block(config, kind=kind, rngs=nnx.Rngs(0)))
  )


def _apply_block(
  config: DecoderConfig,
  layer_params: Params,
  lora: Params,
  x_BTD: Array,
  inputs: block.LayerInputs,
) -> block.LayerOutputs:
  kind = hybrid.kind_of(layer_params)
  definition, state = _block_definition(kind.config(config), kind)
  state = jax.tree.map(lambda leaf: leaf, state)
  nnx.replace_by_pure_dict(state, hybrid.plain(layer_params))
  return nnx.merge(definition, state)(x_BTD, hybrid.plain(lora), inputs)


class Compute(NamedTuple):
  """How a forward pass is computed, whatever the network.

  Attributes:
    dtype: type of the activations.
    remat: whether the backward pass recomputes the whole of each layer; see `_stored`.
    unroll: layers per iteration of the scan over layers; 0: all.
    attention: implementation of attention.
  """

  dtype: str = "float32"
  remat: bool = False
  unroll: int = 1
  attention: layer_functions.Implementation = "xla"


FLOAT32 = Compute()
"""Float32 activations, one scan over the layers, nothing computed twice."""


def forward(
  params: Params,
  config: DecoderConfig,
  tokens_BT: Array,
  positions_BT: Array,
  mask_BTS: Array,
  *,
  cache: kv_cache.Cache | None = None,
  column: Array | int = 0,
  reach_B: Array | None = None,
  branches: Sequence[int] = (),
  compute: Compute = FLOAT32,
) -> tuple[Array, kv_cache.Cache | None]:
  """Runs the decoder up to the final norm; `vocab_head` computes with the head.

  Args:
    params: tree as `shapes(config)`, or from `param_sharding.gathered`; float32 leaves
      are cast layer by layer. Under "lora" there may be adapters, stacked like the
      kernels: name of a kernel -> the adapter that `layer_functions.project` takes.
    tokens_BT: int32 ids.
    positions_BT: int32 rotary positions; they may differ from the columns.
    mask_BTS: True where a query may attend to a key. S is the length of the cache, or T
      without a cache.
    cache: keys and values of earlier passes; `kv_cache.init` makes an empty one.
    column: first column of the cache that this pass writes; it writes T columns.
    reach_B: int32, the length that each row may reach while its cache is filled; read
      if the rotary embedding depends on it. None: the present length.
    branches: widths of the parts of a row, if it has several: a trunk, which each of
      the others continues without seeing the rest, as the mask must say, too. Layers
      without a mask, `gated_delta`'s, read it.
    compute: how the pass is computed.

  Returns:
    hidden_BTD in `compute.dtype`, and the updated cache (None without one).
  """
  hidden_BTD, cache, _ = run(
    params,
    config,
    tokens_BT,
    positions_BT,
    mask_BTS,
    cache=cache,
    column=column,
    reach_B=reach_B,
    branches=branches,
    compute=compute,
  )
  return hidden_BTD, cache


def run(
  params: Params,
  config: DecoderConfig,
  tokens_BT: Array,
  positions_BT: Array,
  mask_BTS: Array,
  *,
  cache: kv_cache.Cache | None = None,
  column: Array | int = 0,
  reach_B: Array | None = None,
  branches: Sequence[int] = (),
  compute: Compute = FLOAT32,
  counted_BT: Array | None = None,
) -> block.LayerOutputs:
  """`forward` that also measures how the router spreads tokens over experts.

  Args:
    counted_BT: tokens that count in the load; None: it is not measured.

  Returns:
    What `forward` returns, and the load of each layer (None in a dense model).
  """
  x_BTD = _embed(params, config, tokens_BT, compute.dtype)
  key_positions_BS, cache = kv_cache.write_positions(cache, positions_BT, column)
  turns = layer_rotations.of_pass(
    config, positions_BT, key_positions_BS, mask_BTS, reach_B
  )
  query_factor = None
  if config.query_growth:
    query_factor = rotary.query_factor(positions_BT, *config.query_growth)
  columns = None
  if config.delta is not None:
    columns = gated_delta.columns(_valid(mask_BTS, column), branches)
  of_all_layers = block.LayerInputs(
    turns.rotation,
    mask_BTS,
    cache=None,
    layer=0,
    column=column,
    attention=compute.attention,
    query_factor=query_factor,
    counted_BT=counted_BT,
    columns=columns,
  )
  data = _layer_data(params, config, tokens_BT, x_BTD)

  def layer(carry, stacked):
    (x_BTD, kv), (layer_params, lora, index, data) = carry, stacked
    kind = hybrid.kind_of(layer_params)
    inputs = _inputs_of_layer(of_all_layers, turns, kind, data)._replace(
      cache=kv_cache.of_global(kv) if kind.is_global and kv is not None else kv,
      layer=0 if cache is None else index,
    )
    x_BTD, written, load = _apply_block(config, layer_params, lora, x_BTD, inputs)
    if kind.is_global and kv is not None and written is not None:
      written = kv_cache.with_global(kv, written)
    written = None if kind.shares_kv else written  # it has read only
    return (sharding.constrain(x_BTD, *ACTIVATION_AXES), written), load

  apply = layer if cache is not None else _stored(layer, config, compute)

  def body(carry, stacked):
    (x_BTD, written), load = apply(carry, stacked)
    # Handed on as it is, what layers share is stored once for the backward pass.
    return (x_BTD, carry[1] if written is None else written), load

  kv = kv_cache.of_layers(cache, config, tokens_BT.shape, compute.dtype)
  (x_BTD, kv), load = _through_layers(
    body, (x_BTD, kv), params, config, data, compute.unroll
  )
  if cache is not None and kv is not None:
    cache = {**cache, **kv}
  normed_BTD = block.rms_norm(x_BTD, params["final_norm"], config)
  return block.LayerOutputs(block.times(normed_BTD, config.hidden_scale), cache, load)


def _stored(
  layer: Callable[..., Any], config: DecoderConfig, compute: Compute
) -> Callable[..., Any]:
  """The layer, with what the backward pass keeps of it.

  Nothing with `compute.remat`, else the products with parameters. The rest is cheap to
  compute again: on a CPU, an update of SmolLM2-135M kept a third of the memory and took
  0.92 of the time. Mixtures of experts and Gated DeltaNet keep everything, since their
  products would be computed twice.
  """
  if compute.remat:
    return jax.checkpoint(layer)
  if config.n_experts or config.delta is not None:
    return layer
  products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(layer, policy=products)


def _embed(
  params: Params, config: DecoderConfig, tokens_BT: Array, dtype: str
) -> Array:
  """The input of the first layer, [B, T, D]."""
  x_BTD = params["embed"][tokens_BT].astype(dtype)
  x_BTD = sharding.constrain(x_BTD, *ACTIVATION_AXES)
  if config.embed_scale != 1.0:
    x_BTD = x_BTD * jnp.asarray(config.embed_scale, dtype)
  return x_BTD


def _inputs_of_layer(
  of_all_layers: block.LayerInputs,
  turns: layer_rotations.Turns,
  kind: hybrid.Kind,
  data: dict[str, Array],
) -> block.LayerInputs:
  """A layer's own rotation, window and embeddings in the inputs of all layers."""
  rotation, mask_BTS = turns.rotation, of_all_layers.mask_BTS
  if kind.is_global and turns.of_global is not None:
    rotation = turns.of_global
  if "rope" in data:
    rotation = jax.tree.map(lambda table: table[data["rope"]], turns.tables)
  if "window" in data:
    mask_BTS = mask_BTS & (turns.distance_BTS < data["window"])
  return of_all_layers._replace(
    rotation=rotation, mask_BTS=mask_BTS, per_layer_BTP=data.get("per_layer")
  )


def _valid(mask_BTS: Array, column: Array | int) -> Array:
  """[B, T]: the tokens of this pass that are no padding, which attend to themselves."""
  length = mask_BTS.shape[1]
  own = jax.lax.dynamic_slice_in_dim(mask_BTS, column, length, axis=2)
  return jnp.diagonal(own, axis1=1, axis2=2)


def _through_layers(
  body: Callable[..., Any],
  carry: Any,
  params: Params,
  config: DecoderConfig,
  data: dict[str, Array],
  unroll: int,
) -> tuple[Any, Any]:
  """Applies `body` layer by layer: a scan, or a loop over unstacked parameters.

  Returns the last carry and, stacked, what each layer returned beside its own.

  Args:
    data: by name, stacked over the layers: what each reads beside its parameters.
  """
  layers, count = params["layers"], config.n_layers
  lora: Any = params.get("lora", {})
  if hybrid.is_hybrid(config) and not isinstance(layers, tuple):
    return hybrid.scan(body, carry, (layers, lora, data), config, unroll)
  if not isinstance(layers, tuple):
    stacked = layers, lora, jnp.arange(count), data
    return jax.lax.scan(body, carry, stacked, unroll=unroll or count)
  rows = [hybrid.cache_row(config, layer) for layer in range(count)]
  unstacked = zip(layers, lora or ({},) * count, rows, unstack(data, config))
  outputs = []
  for of_layer in unstacked:
    carry, output = body(carry, of_layer)
    outputs.append(output)
  return carry, hybrid.stack_rows(outputs)


def _layer_data(
  params: Params, config: DecoderConfig, tokens_BT: Array, x_BTD: Array
) -> dict[str, Array]:
  """Arrays [L, ...] of what differs between layers, so that one scan serves all."""
  data = {}
  if config.layer_ropes:
    data["rope"] = jnp.array(config.layer_ropes)
  if any(config.windows):
    data["window"] = jnp.array([window or UNLIMITED for window in config.windows])
  if config.per_layer_inputs:
    data["per_layer"] = layer_inputs.make(params, config, tokens_BT, x_BTD)
  return data


def unstack(stacked: Any, config: DecoderConfig) -> tuple[Any, ...]:
  """A tree of stacked leaves as one tree for each layer."""
  if hybrid.is_hybrid(config):
    return tuple(
      hybrid.of_layer(stacked, config, layer) for layer in range(config.n_layers)
    )
  return tuple(
    jax.tree.map(operator.itemgetter(index), stacked)
    for index in range(config.n_layers)
  )


def positions(valid_BT: Array) -> Array:
  """Position of each valid token within its row, wherever the padding is."""
  return jnp.maximum(jnp.cumsum(valid_BT, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_mask(valid_BT: Array) -> Array:
  """Mask [B, T, T]: each query attends to the valid keys up to its own column."""
  length = valid_BT.shape[-1]
  return jnp.tril(jnp.ones((length, length), bool)) & valid_BT[:, None, :]
