"""Logical axes of the decoder's parameters, and parameters gathered before a loop."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from raft_jax.models import (
  experts,
  gated_delta,
  hybrid,
  layer_inputs,
  quantised,
  sharding,
  transformer,
)


def axes(config: transformer.DecoderConfig) -> transformer.Params:
  """Logical axis names of every parameter, for `sharding.tree`."""
  wide, queries = ("layers", "embed"), ("layers", "heads")
  keys, up = ("layers", "kv_heads"), ("layers", "mlp", "embed")
  layers: dict[str, tuple[str, ...]] = {
    "q": (*queries, "embed"),
    "k": (*keys, "embed"),
    "v": (*keys, "embed"),
    "o": ("layers", "embed", "heads"),
    "up": up,
    "down": ("layers", "embed", "mlp"),
  }
  if config.gated_mlp:
    layers["gate"] = up
  if config.n_experts:
    shapes = experts.shapes(config) | experts.shared_shapes(config)
    layers |= {name: experts.AXES[name] for name in shapes}
    if config.parallel_experts:
      norms = ("shared_post_norm", "experts_norm", "experts_post_norm")
      layers |= dict.fromkeys(norms, wide)
  if config.activation == "xielu":
    layers |= dict.fromkeys(("xielu_p", "xielu_n"), ("layers", "width"))
  if config.pre_norms or config.delta is not None:
    layers |= {"attn_norm": wide, "mlp_norm": wide}
  if config.post_norms:
    layers |= {"attn_post_norm": wide, "mlp_post_norm": wide}
  if config.qkv_bias:
    layers |= {"q_bias": queries, "k_bias": keys, "v_bias": keys}
  if config.o_bias:
    layers["o_bias"] = wide
  if config.attention_sinks:
    layers["sinks"] = queries
  if config.qk_norm == "head":
    layers |= dict.fromkeys(("q_norm", "k_norm"), ("layers", "head_dim"))
  if config.qk_norm == "projection":
    layers |= {"q_norm": queries, "k_norm": keys}
  if config.keys_are_values:
    del layers["v"]
  if config.layer_scales:
    layers["layer_scale"] = ("layers", "width")
  if config.global_attention is not None:
    own = axes(hybrid.global_config(config))["layers"]
    layers |= {hybrid.GLOBAL + name: own[name] for name in hybrid.ATTENTION & {*own}}
  if config.per_layer_inputs:
    gate, out = ("layers", "mlp", "embed"), ("layers", "embed", "mlp")
    layers |= {"per_layer_gate": gate, "per_layer_out": out, "per_layer_norm": wide}
  if config.kv_sharing is not None:
    layers |= {
      hybrid.KV_SHARED + name: own
      for name, own in layers.items()
      if name.removeprefix(hybrid.GLOBAL) not in hybrid.KEYS_VALUES
    }
  if config.delta is not None:
    layers |= {name: ("layers", *names) for name, names in gated_delta.AXES.items()}
  names: transformer.Params = {
    "embed": ("vocab", "embed"),
    "final_norm": ("embed",),
    "layers": layers,
  }
  if not config.tie_embeddings:
    names["head"] = ("vocab", "embed")
  if config.per_layer_inputs:
    names |= layer_inputs.AXES
  return names


def gathered_head(params: transformer.Params, dtype: str) -> Array:
  """The output embedding in `dtype`, gathered over `fsdp` once, before a loop."""
  embedding_VD = transformer.output_embedding(params).astype(dtype)
  return sharding.gathered(embedding_VD, "vocab", "embed")


def gathered(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  dtype: str,
  *,
  apart: bool = False,
) -> transformer.Params:
  """All parameters gathered over `fsdp` once, before a loop; kernels in `dtype`.

  Parameters from another mesh than the program's `sharding.decode_mesh` move to it.

  Quantised kernels stay quantised: each product in the loop restores its own.
  Vectors keep their dtype, because a norm adds its offset to the scale in float32; so
  do routers, which choose experts in float32.

  Args:
    apart: whether each layer has its own arrays: "layers" and the adapters are then
      tuples with one tree for each layer.
  """
  mesh, own = jax.sharding.get_abstract_mesh(), sharding.mesh_of(params["embed"])
  put = sharding.gathered if own.shape == mesh.shape else sharding.moved

  def gather(leaf: Any, names: tuple[str, ...]) -> Any:
    if quantised.is_quantised(leaf):
      return quantised.placed(leaf, put)
    is_kernel = len(names) - ("layers" in names) > 1
    rounds = is_kernel and "routes" not in names
    return put(leaf.astype(dtype) if rounds else leaf, *names)

  base_axes = axes(config)
  base = {name: params[name] for name in base_axes}
  adapters = {name: params[name] for name in params if name not in base_axes}
  if apart:
    # Before gathering, so that a gathered stack never exists beside its layers.
    base["layers"] = transformer.unstack(base["layers"], config)
    layer_axes = {name: names[1:] for name, names in base_axes["layers"].items()}
    base_axes["layers"] = tuple(
      {name: layer_axes[name] for name in layer} for layer in base["layers"]
    )
    adapters = {
      name: transformer.unstack(tree, config) for name, tree in adapters.items()
    }
  base = jax.tree.map(gather, base, base_axes, is_leaf=quantised.is_quantised)
  return {**base, **jax.tree.map(sharding.everywhere, adapters)}
