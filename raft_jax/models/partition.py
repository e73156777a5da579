"""Which parameters a run trains: its trainable tree, and a frozen one beside it.

The trainable tree gets gradients, optimizer state and checkpoints. The frozen tree is
an argument of every program, never differentiated and never copied. `combine` makes of
both what `transformer.forward` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.models import transformer


class Split(NamedTuple):
  """How a model is divided.

  Attributes:
    shapes: the trainable tree, as `jax.ShapeDtypeStruct` leaves; float32.
    axes: its logical axis names, for `sharding.tree`.
    start: base model's parameters -> the trainable tree at step 0, in buffers of its
      own: a step donates them.
    freeze: base model's parameters -> the frozen tree, in the same buffers; None where
      nothing is frozen.
    trains_base: some of the base model's own parameters are trained, so that they are
      wanted in float32.
  """

  shapes: transformer.Params
  axes: transformer.Params
  start: Callable[[transformer.Params], transformer.Params]
  freeze: Callable[[transformer.Params], transformer.Params] | None
  trains_base: bool


def everything(config: transformer.DecoderConfig) -> Split:
  """Full fine-tuning: all is trained, nothing frozen."""
  return Split(
    shapes=transformer.shapes(config),
    axes=transformer.axes(config),
    start=lambda base: jax.tree.map(jnp.copy, base),
    freeze=None,
    trains_base=True,
  )


def combine(
  frozen: transformer.Params, trained: transformer.Params
) -> transformer.Params:
  """The parameters that `forward` reads, of two trees that share no leaf."""
  whole = dict(frozen)
  for name, value in trained.items():
    if name in whole:
      if not (isinstance(value, dict) and isinstance(whole[name], dict)):
        raise ValueError(f"{name} is both frozen and trained")
      value = combine(whole[name], value)
    whole[name] = value
  return whole
