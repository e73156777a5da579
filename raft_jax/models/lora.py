"""LoRA: trainable low-rank updates beside the kernels of a frozen model.

.. math:: W x + \\frac{\\alpha}{r} B A x

A [r, in] starts random and B [out, r] starts at zero, so training starts at the base
model. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv
2106.09685. The trainable tree is {"lora": {"q": {"a": [L, r, in], "b": [L, out, r]},
...}}; the frozen tree adds each kernel's "scale" [L].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax import errors
from raft_jax.models import hybrid, param_sharding, partition, transformer

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
"""Names of a layer's linear projections in the parameter tree."""
DELTA_KERNELS = tuple(
  f"delta_{name}" for name in ("q", "k", "v", "gate", "b", "a", "o")
)
"""The projections of a layer of Gated DeltaNet."""
GLOBAL_KERNELS = tuple(hybrid.GLOBAL + name for name in ("q", "k", "v", "o"))
"""The projections of attention in global layers."""
PER_LAYER_KERNELS = ("per_layer_gate", "per_layer_out")
"""The projections to and from the width of a layer's own embeddings."""
KV_SHARED_KERNELS = tuple(
  hybrid.KV_SHARED + name
  for name in (*KERNELS, *GLOBAL_KERNELS, *PER_LAYER_KERNELS)
  if name.removeprefix(hybrid.GLOBAL) not in hybrid.KEYS_VALUES
)
"""The projections of layers that share keys and values."""
ALL_KERNELS = (
  *KERNELS,
  *DELTA_KERNELS,
  *GLOBAL_KERNELS,
  *PER_LAYER_KERNELS,
  *KV_SHARED_KERNELS,
)


def split(
  config: transformer.DecoderConfig,
  kernels: Sequence[str],
  *,
  rank: int,
  alpha: float,
  key: Array,
) -> partition.Split:
  """The split that trains adapters of these kernels and nothing else.

  Passed over are kernels of kinds of layers that the model lacks, and `global_v` where
  the values of global layers are their keys.

  Raises:
    errors.UserError: it lacks embeddings of layers, whose projections are named.
  """
  own = transformer.shapes(config)["layers"]
  if not own.keys() >= set(PER_LAYER_KERNELS) & set(kernels):
    raise errors.UserError(
      "lora.targets: the layers of this model have no embeddings of their own, whose "
      "projections are named; name others"
    )
  kernels = [name for name in kernels if name in own]
  start = functools.partial(init, key, config, kernels, rank)
  axes = param_sharding.axes(config)["layers"]

  def freeze(base: transformer.Params) -> transformer.Params:
    scales: dict[int, Array] = {}
    # The first array of each kernel, which may be quantised.
    stacks = {
      name: jax.tree.leaves(base["layers"][name])[0] for name in ("q", *kernels)
    }
    for stack in stacks.values():
      if len(stack) not in scales:
        # Derived from a parameter, so that it is on the same devices.
        of_layers = stack[:, *(0,) * (stack.ndim - 1)]
        scales[len(stack)] = jnp.full_like(of_layers, alpha / rank, jnp.float32)
    adapters = {name: {"scale": scales[len(stacks[name])]} for name in kernels}
    return {**base, "lora": adapters}

  return partition.Split(
    shapes=jax.eval_shape(start),
    axes={
      "lora": {
        name: {
          "a": ("layers", "rank", axes[name][2]),
          "b": ("layers", axes[name][1], "rank"),
        }
        for name in kernels
      }
    },
    start=lambda base: start(),
    freeze=freeze,
    trains_base=False,
  )


def init(
  key: Array, config: transformer.DecoderConfig, kernels: Sequence[str], rank: int
) -> transformer.Params:
  """New adapters, which do not change the model because B is 0.

  A is uniform within 1 / sqrt(in), as in the paper authors' code (loralib) and in PEFT;
  the text of the paper has a Gaussian.
  """
  adapters = {}
  for name in kernels:
    layers, out, inp = transformer.shapes(config)["layers"][name].shape
    a_key = jax.random.fold_in(key, ALL_KERNELS.index(name))
    bound = inp**-0.5
    adapters[name] = {
      "a": jax.random.uniform(a_key, (layers, rank, inp), minval=-bound, maxval=bound),
      "b": jnp.zeros((layers, out, rank)),
    }
  return {"lora": adapters}


@jax.jit
def _merged(kernel_LOI: Array, adapter: transformer.Params) -> Array:
  b_LOr = adapter["b"] * adapter["scale"][:, None, None]
  update_LOI = jnp.einsum(
    "lor,lri->loi", b_LOr, adapter["a"], precision=jax.lax.Precision.HIGHEST
  )
  # Rounded once, as when a forward pass casts the sum of float32 kernels.
  return (kernel_LOI.astype(jnp.float32) + update_LOI).astype(kernel_LOI.dtype)


def merge(params: transformer.Params) -> transformer.Params:
  """The same model without adapters: each adapter is added to its kernel."""
  base = {name: value for name, value in params.items() if name != "lora"}
  merged = {
    name: _merged(base["layers"][name], adapter)
    for name, adapter in params.get("lora", {}).items()
  }
  return {**base, "layers": {**base["layers"], **merged}}
