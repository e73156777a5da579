"""Networks whose layers are of several kinds: attention, and others.

Another kind is Gated DeltaNet ("linear" layers), or attention whose heads have another
shape ("global" layers, `GlobalAttention`). The last layers may attend to the keys and
values of earlier ones (`KvSharing`). A layer has the parameters of its kind, so not
every leaf has a row for each layer: a leaf is stacked over the layers that have it, in
their order, and `layers_of` names them. The scan runs over periods of layers (three
linear ones and one with attention), and a rest that is not a whole period follows it;
the layers that share keys and values have a scan of their own. Where all layers are of
one kind, they have one scan without periods, and not `scan`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
KEYS_VALUES = frozenset(("k", "v", "k_bias", "v_bias", "k_norm"))
"""Those that a layer lacks which attends to the keys and values of another."""
GLOBAL = "global_"
"""Begins the names of what global layers have in place of other layers' attention."""
KV_SHARED = "kv_shared_"
"""Begins the names of all parameters of layers that share keys and values.

They have stacks of their own, because a scan over a part of a stack copies that part.
"""
DATA = frozenset(("rope", "window", "per_layer"))
"""Names of what `transformer.forward` hands to each layer beside its parameters."""
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


@dataclasses.dataclass(frozen=True)
class KvSharing:
  """The last layers, which have no keys and values of their own.

  Each attends to those of the last layer of its kind before all of them (transformers'
  `num_kv_shared_layers`). Linear layers share none.

  Attributes:
    first: number of the first of these layers.
    d_ff: as in `DecoderConfig`, for these layers.
  """

  first: int
  d_ff: int


class Kind(NamedTuple):
  """What distinguishes a layer's parameters from those of plain attention.

  Attributes:
    shares_kv: whether it is one of the layers of `KvSharing`.
    linear: whether it has Gated DeltaNet.
    is_global: whether it is one of the layers of `GlobalAttention`.
  """

  shares_kv: bool
  linear: bool
  is_global: bool

  def config(self, config: transformer.DecoderConfig) -> transformer.DecoderConfig:
    """The config of one such layer."""
    if self.shares_kv:
      assert config.kv_sharing is not None
      config = dataclasses.replace(config, d_ff=config.kv_sharing.d_ff)
    return global_config(config) if self.is_global else config

  def named(self, name: str) -> str:
    """The name in the network of a parameter of such a layer."""
    name = GLOBAL + name if self.is_global and name in ATTENTION else name
    return KV_SHARED + name if self.shares_kv else name


def kind_of(names: Collection[str]) -> Kind:
  """The kind of a layer with parameters of these names."""
  shares_kv = any(name.startswith(KV_SHARED) for name in names)
  own = {name.removeprefix(KV_SHARED) for name in names}
  return Kind(shares_kv, "delta_o" in own, "global_q" in own)


def kinds(config: transformer.DecoderConfig) -> dict[Kind, tuple[int, ...]]:
  """The numbers of the layers of each kind that the network has."""
  found: dict[Kind, tuple[int, ...]] = {}
  second = set(second_layers(config))
  for layer in range(config.n_layers):
    is_second = layer in second
    linear, is_global = (
      is_second and own is not None for own in (config.delta, config.global_attention)
    )
    kind = Kind(layer >= first_sharing(config), linear, is_global)
    found[kind] = (*found.get(kind, ()), layer)
  return {kind: found[kind] for kind in sorted(found)}


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
  """What a layer has, under the names that layers with plain attention have for it."""
  return {
    name.removeprefix(KV_SHARED).removeprefix(GLOBAL): value
    for name, value in tree.items()
  }


def is_hybrid(config: transformer.DecoderConfig) -> bool:
  """Whether the layers are of several kinds."""
  own = config.delta, config.global_attention, config.kv_sharing
  return any(part is not None for part in own)


def first_sharing(config: transformer.DecoderConfig) -> int:
  """Number of the first layer that shares keys and values; that of layers if none."""
  return config.kv_sharing.first if config.kv_sharing else config.n_layers


def second_layers(config: transformer.DecoderConfig) -> tuple[int, ...]:
  """Numbers of the linear or global layers."""
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
  every = tuple(range(config.n_layers))
  if name in DATA:
    return every
  first = first_sharing(config)
  part = every[first:] if name.startswith(KV_SHARED) else every[:first]
  name = name.removeprefix(KV_SHARED)
  layers = every
  if name in gated_delta.AXES or name.startswith(GLOBAL):
    layers = second_layers(config)
  elif name in ATTENTION:
    layers = first_layers(config)
  elif config.delta is not None and name in PRE_NORMS and not config.pre_norms:
    layers = second_layers(config)
  elif config.delta is not None and name in POST_NORMS:
    layers = first_layers(config)
  return tuple(layer for layer in layers if layer in part)


def joined(
  stacks: Sequence[Mapping[str, Array]], config: transformer.DecoderConfig
) -> dict[str, Array]:
  """One dict of stacks from those of the layers of each kind, in order of `kinds`."""
  parts: dict[str, list[Array]] = {}
  layers: dict[str, tuple[int, ...]] = {}
  for (kind, numbers), stack in zip(kinds(config).items(), stacks, strict=True):
    for plain_name, leaf in stack.items():
      name = kind.named(plain_name)
      parts[name] = [*parts.get(name, ()), leaf]
      layers[name] = (*layers.get(name, ()), *numbers)
  return {
    name: leaves[0]
    if len(leaves) == 1
    else jnp.concatenate(leaves)[np.argsort(layers[name])]
    for name, leaves in parts.items()
  }


def of_layer(
  stacked: Any, config: transformer.DecoderConfig, layer: int, start: int = 0
) -> dict[str, Any]:
  """The rows of one layer in a dict of stacks, or of trees of stacks, by parameter.

  Args:
    start: the stacks begin with this layer.
  """
  parts = {}
  for name, tree in stacked.items():
    layers = [number for number in layers_of(config, name) if number >= start]
    if layer in layers:
      parts[name] = jax.tree.map(operator.itemgetter(layers.index(layer)), tree)
  return parts


def cache_row(config: transformer.DecoderConfig, layer: int) -> int:
  """The row in the cache of the layer's kind that it writes and reads, or only reads.

  The second are layers that share keys and values.
  """
  second = second_layers(config)
  same = second if layer in second else first_layers(config)
  same = tuple(other for other in same if other < first_sharing(config))
  return same.index(layer) if layer in same else len(same) - 1


def period(
  config: transformer.DecoderConfig, start: int = 0, stop: int | None = None
) -> int:
  """The least number of layers after which their kinds repeat, in a range of layers."""
  second = set(second_layers(config))
  found = [layer in second for layer in range(config.n_layers)][start:stop]
  return next(
    size for size in range(1, len(found) + 1) if found[size:] == found[:-size]
  )


def scan(
  body: Callable[..., Any],
  carry: Any,
  stacks: tuple[Any, Any, Any],
  config: transformer.DecoderConfig,
  unroll: int,
) -> tuple[Any, Any]:
  """Applies `body` layer by layer, in a scan over periods of layers.

  The layers that share keys and values have a scan of their own. Returns the last carry
  and, stacked over layers, what each returned beside its own.

  Args:
    body: as in `transformer.forward`; takes the parameters of one layer, its adapters,
      its row in the cache of its kind, and its data.
    stacks: parameters, adapters and data of all layers, by name.
    unroll: layers per iteration, rounded down to whole periods; 0: all.
  """
  first, outputs = first_sharing(config), []
  for start, stop in ((0, first), (first, config.n_layers)):
    if start < stop:
      carry, of_layers = _scan_range(body, carry, stacks, config, unroll, start, stop)
      outputs.append(of_layers)
  return carry, _concatenated(outputs)


def _scan_range(
  body: Callable[..., Any],
  carry: Any,
  stacks: tuple[Any, Any, Any],
  config: transformer.DecoderConfig,
  unroll: int,
  start: int,
  stop: int,
) -> tuple[Any, Any]:
  """`scan` of the layers from `start` to `stop`, which all share keys or all do not."""
  size = period(config, start, stop)
  count = (stop - start) // size
  whole = start + count * size

  def in_scan(stack: Any, name: str) -> Any:
    """Stacks of layers as [periods, rows of a period, ...]."""
    layers = layers_of(config, name)
    first = sum(layer < start for layer in layers)
    rows = sum(start <= layer < start + size for layer in layers)
    return jax.tree.map(
      lambda leaf: leaf[first : first + rows * count].reshape(
        count, rows, *leaf.shape[1:]
      ),
      stack,
    )

  second = set(second_layers(config))

  def one_period(carry: Any, inputs: Any) -> tuple[Any, Any]:
    (trees, number), outputs = inputs, []
    for layer in range(start, start + size):
      row = cache_row(config, layer)
      if start < first_sharing(config):  # each period has rows of its own
        same = range(start, start + size)
        rows = sum((layer in second) == (other in second) for other in same)
        row = number * rows + row
      layer_params, lora, data = (of_layer(t, config, layer, start) for t in trees)
      carry, output = body(carry, (layer_params, lora, row, data))
      outputs.append(output)
    return carry, stack_rows(outputs)

  trees = tuple(
    {
      name: in_scan(stack, name)
      for name, stack in tree.items()
      if any(start <= layer < stop for layer in layers_of(config, name))
    }
    for tree in stacks
  )
  carry, of_periods = jax.lax.scan(
    one_period,
    carry,
    (trees, jnp.arange(count)),
    unroll=max(1, unroll // size) if unroll else count,
  )
  rest = []
  for layer in range(whole, stop):
    layer_params, lora, data = (of_layer(tree, config, layer) for tree in stacks)
    row = cache_row(config, layer)
    carry, output = body(carry, (layer_params, lora, row, data))
    rest.append(output)
  outputs = jax.tree.map(
    lambda leaf: leaf.reshape(count * size, *leaf.shape[2:]), of_periods
  )
  return carry, _concatenated([outputs, stack_rows(rest)] if rest else [outputs])


def _concatenated(trees: Sequence[Any]) -> Any:
  """One tree of stacks from several, whose rows follow each other."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def stack_rows(trees: Sequence[Any]) -> Any:
  """One tree from several of the same kind, stacked on a new first axis."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
