"""The parameters that a run trains, and those that stay frozen.

The trainable tree has gradients, optimizer state and checkpoints. The frozen tree is an
argument of every program and is never differentiated or copied. `combine` joins both to
the tree that `transformer.forward` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.models import param_sharding, transformer


class Split(NamedTuple):
  """How a model is split into a trainable and a frozen tree.

  Attributes:
    shapes: the trainable tree, as `jax.ShapeDtypeStruct` leaves; float32.
    axes: logical axis names of the trainable tree, for `sharding.tree`.
    start: base model's parameters -> the trainable tree at step 0, in new buffers,
      because a step donates them.
    freeze: base model's parameters -> the frozen tree, in the same buffers; None if
      nothing is frozen.
    trains_base: whether some parameters of the base model are trained, and therefore
      needed in float32.
  """

  shapes: transformer.Params
  axes: transformer.Params
  start: Callable[[transformer.Params], transformer.Params]
  freeze: Callable[[transformer.Params], transformer.Params] | None
  trains_base: bool


def everything(config: transformer.DecoderConfig) -> Split:
  """Full fine-tuning: all parameters are trained."""
  return Split(
    shapes=transformer.shapes(config),
    axes=param_sharding.axes(config),
    start=lambda base: jax.tree.map(jnp.copy, base),
    freeze=None,
    trains_base=True,
  )


def combine(
  frozen: transformer.Params, trained: transformer.Params
) -> transformer.Params:
  """The parameters that `forward` reads, from two trees that share no leaf."""
  combined = dict(frozen)
  for name, value in trained.items():
    if name in combined:
      if not (isinstance(value, dict) and isinstance(combined[name], dict)):
        raise ValueError(f"{name} is both frozen and trained")
      value = combine(combined[name], value)
    combined[name] = value
  return combined
