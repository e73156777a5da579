"""Networks whose layers are of two kinds: attention, and Gated DeltaNet.

A layer has the parameters of its kind, so not every leaf has a row for each layer: a
leaf is stacked over the layers that have it, in their order, and `layers_of` names
them. The scan runs over periods of layers (three linear ones and one with attention),
and a rest that is not a whole period follows it. Where all layers have attention,
nothing here is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax.models import gated_delta

if TYPE_CHECKING:
  from raft_jax.models import transformer

ATTENTION = frozenset(
  ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm")
)
"""Parameters that only a layer with attention has."""
POST_NORMS = frozenset(("attn_post_norm", "mlp_post_norm"))
PRE_NORMS = frozenset(("attn_norm", "mlp_norm"))


def linear_layers(config: transformer.DecoderConfig) -> tuple[int, ...]:
  """Numbers of the layers without attention."""
  return config.delta.layers if config.delta else ()


def attention_layers(config: transformer.DecoderConfig) -> tuple[int, ...]:
  """Numbers of the layers with attention."""
  linear = set(linear_layers(config))
  return tuple(layer for layer in range(config.n_layers) if layer not in linear)


def layers_of(config: transformer.DecoderConfig, name: str) -> tuple[int, ...]:
  """Numbers of the layers that have the parameter, in order of its stack's rows.

  A linear layer has norms before its mixer and its feed-forward, and none after them;
  the config's norms are those of the layers with attention.
  """
  if name in gated_delta.AXES:
    return linear_layers(config)
  if name in PRE_NORMS and not config.pre_norms:
    return linear_layers(config)
  if name in ATTENTION | POST_NORMS:
    return attention_layers(config)
  return tuple(range(config.n_layers))


def joined(
  attention: dict[str, Array],
  linear: dict[str, Array],
  config: transformer.DecoderConfig,
) -> dict[str, Array]:
  """One dict of stacks from those of the layers of each kind."""
  numbers = (*attention_layers(config), *linear_layers(config))
  order = np.argsort(numbers)
  both = {
    name: jnp.concatenate([attention[name], linear[name]])[order]
    for name in attention.keys() & linear.keys()
  }
  return {**attention, **linear, **both}


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
  linear = linear_layers(config)
  same = linear if layer in linear else attention_layers(config)
  return same.index(layer)


def period(config: transformer.DecoderConfig) -> int:
  """The least number of layers after which their kinds repeat."""
  linear = set(linear_layers(config))
  kinds = [layer in linear for layer in range(config.n_layers)]
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

  linear = set(linear_layers(config))

  def one_period(carry: Any, inputs: Any) -> tuple[Any, Any]:
    (trees, number), outputs = inputs, []
    for layer in range(size):
      rows = sum((layer in linear) == (other in linear) for other in range(size))
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
