"""Networks whose layers are of two kinds: attention, and another one.

The other kind is Gated DeltaNet ("linear" layers), or attention whose heads have
another shape ("global" layers, `GlobalAttention`). A layer has the parameters of its
kind, so not every leaf has a row for each layer: a leaf is stacked over the layers that
have it, in their order, and `layers_of` names them. The scan runs over periods of
layers (three linear ones and one with attention), and a rest that is not a whole period
follows it. Where all layers are of one kind, nothing here is used.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax.models import gated_delta, rotary

if TYPE_CHECKING:
  from raft_jax.models import transformer

ATTENTION = frozenset(
  ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm")
)
"""Parameters that only a layer with attention has."""
GLOBAL = "global_"
"""Begins the names of what global layers have in place of other layers' attention."""
POST_NORMS = frozenset(("attn_post_norm", "mlp_post_norm"))
PRE_NORMS = frozenset(("attn_norm", "mlp_norm"))


@dataclasses.dataclass(frozen=True)
class GlobalAttention:
  """The layers that attend to all positions, with heads of their own shape.

  Attributes:
    layers: their numbers, in ascending order.
    n_kv_heads, head_dim: as in `DecoderConfig`, for these layers.
    rope: their rotary embedding.
    keys_are_values: as in `DecoderConfig`, for these layers.
  """

  layers: tuple[int, ...]
  n_kv_heads: int
  head_dim: int
  rope: rotary.Rope
  keys_are_values: bool = False


def global_config(config: transformer.DecoderConfig) -> transformer.DecoderConfig:
  """The config whose attention is that of the global layers."""
  own = config.global_attention
  assert own is not None
  return dataclasses.replace(
    config,
    n_kv_heads=own.n_kv_heads,
    head_dim=own.head_dim,
    keys_are_values=own.keys_are_values,
    ropes=(own.rope,),
    global_attention=None,
  )


def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
  """What a global layer has, under the names that other layers have for it."""
  return {name.removeprefix(GLOBAL): value for name, value in tree.items()}


def is_hybrid(config: transformer.DecoderConfig) -> bool:
  """Whether the layers are of two kinds."""
  return config.delta is not None or config.global_attention is not None


def second_layers(config: transformer.DecoderConfig) -> tuple[int, ...]:
  """Numbers of the layers of the second kind: linear or global ones."""
  second = config.delta or config.global_attention
  return second.layers if second else ()


def first_layers(config: transformer.DecoderConfig) -> tuple[int, ...]:
  """Numbers of the other layers, which have the config's own attention."""
  second = set(second_layers(config))
  return tuple(layer for layer in range(config.n_layers) if layer not in second)


def layers_of(config: transformer.DecoderConfig, name: str) -> tuple[int, ...]:
  """Numbers of the layers that have the parameter, in order of its stack's rows.

  A linear layer has norms before its mixer and its feed-forward, and none after them;
  the config's norms are those of the layers with attention.
  """
  if name in gated_delta.AXES or name.startswith(GLOBAL):
    return second_layers(config)
  if name in ATTENTION:
    return first_layers(config)
  if config.delta is not None:
    if name in PRE_NORMS and not config.pre_norms:
      return second_layers(config)
    if name in POST_NORMS:
      return first_layers(config)
  return tuple(range(config.n_layers))


def joined(
  first: dict[str, Array],
  second: dict[str, Array],
  config: transformer.DecoderConfig,
) -> dict[str, Array]:
  """One dict of stacks from those of the layers of each kind."""
  if config.global_attention is not None:
    second = {
      GLOBAL + name if name in ATTENTION else name: leaf
      for name, leaf in second.items()
    }
  order = np.argsort((*first_layers(config), *second_layers(config)))
  both = {
    name: jnp.concatenate([first[name], second[name]])[order]
    for name in first.keys() & second.keys()
  }
  return {**first, **second, **both}


def of_layer(
  stacked: Any, config: transformer.DecoderConfig, layer: int
) -> dict[str, Any]:
  """The rows of one layer in a dict of stacks, or of trees of stacks, by parameter."""
  parts = {}
  for name, tree in stacked.items():
    layers = layers_of(config, name)
    if layer in layers:
      parts[name] = jax.tree.map(operator.itemgetter(layers.index(layer)), tree)
  return parts


def cache_row(config: transformer.DecoderConfig, layer: int) -> int:
  """The layer's row in the cache of its kind."""
  second = second_layers(config)
  same = second if layer in second else first_layers(config)
  return same.index(layer)


def period(config: transformer.DecoderConfig) -> int:
  """The least number of layers after which their kinds repeat."""
  second = set(second_layers(config))
  kinds = [layer in second for layer in range(config.n_layers)]
  return next(
    size for size in range(1, len(kinds) + 1) if kinds[size:] == kinds[:-size]
  )


def scan(
  body: Callable[..., Any],
  carry: Any,
  stacks: tuple[Any, Any, Any],
  config: transformer.DecoderConfig,
  unroll: int,
) -> tuple[Any, Any]:
  """Applies `body` layer by layer, in a scan over periods of layers.

  Returns the last carry and, stacked over layers, what each returned beside its own.

  Args:
    body: as in `transformer.forward`; takes the parameters of one layer, its adapters,
      its row in the cache of its kind, and its data.
    stacks: parameters, adapters and data of all layers, by name.
    unroll: layers per iteration, rounded down to whole periods; 0: all.
  """
  size = period(config)
  count = config.n_layers // size
  whole = count * size

  def in_scan(stack: Any, name: str) -> Any:
    """Stacks [L, ...] as [periods, rows of a period, ...]."""
    rows = sum(layer < size for layer in layers_of(config, name))
    return jax.tree.map(
      lambda leaf: leaf[: rows * count].reshape(count, rows, *leaf.shape[1:]), stack
    )

  second = set(second_layers(config))

  def one_period(carry: Any, inputs: Any) -> tuple[Any, Any]:
    (trees, number), outputs = inputs, []
    for layer in range(size):
      rows = sum((layer in second) == (other in second) for other in range(size))
      row = number * rows + cache_row(config, layer)
      layer_params, lora, data = (of_layer(tree, config, layer) for tree in trees)
      carry, output = body(carry, (layer_params, lora, row, data))
      outputs.append(output)
    return carry, stack_rows(outputs)

  trees = tuple(
    {name: in_scan(stack, name) for name, stack in tree.items()} for tree in stacks
  )
  carry, of_periods = jax.lax.scan(
    one_period,
    carry,
    (trees, jnp.arange(count)),
    unroll=max(1, unroll // size) if unroll else count,
  )
  rest = []
  for layer in range(whole, config.n_layers):
    layer_params, lora, data = (of_layer(tree, config, layer) for tree in stacks)
    row = cache_row(config, layer)
    carry, output = body(carry, (layer_params, lora, row, data))
    rest.append(output)
  outputs = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), of_periods)
  if rest:
    outputs = jax.tree.map(
      lambda *leaves: jnp.concatenate(leaves), outputs, stack_rows(rest)
    )
  return carry, outputs


def stack_rows(trees: Sequence[Any]) -> Any:
  """One tree from several of the same kind, stacked on a new first axis."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
