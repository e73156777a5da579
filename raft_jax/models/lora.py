"""LoRA: a frozen model, and beside its kernels low-rank updates that are trained.

.. math:: W x + \\frac{\\alpha}{r} B A x

with A [r, in] random and B [out, r] zero at first, so that training starts at the base
model. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv
2106.09685. In the tree: {"lora": {"q": {"a": [L, r, in], "b": [L, out, r]}, ...}}, to
which the frozen tree adds each kernel's "scale" [L].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raft_jax import errors
from raft_jax.hf import families
from raft_jax.models import partition, transformer

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
"""Names of a layer's linear projections in our tree."""


def targets(family: families.Family, names: Sequence[str]) -> tuple[str, ...]:
  """The kernels in our tree that names of Hugging Face modules mean.

  `q_proj` to `down_proj` are known in every family; one that fuses some of them (Phi's
  `qkv_proj`) also knows the fused name, which means all of its parts.

  Raises:
    errors.UserError: for a name that the model does not have.
  """
  known = {f"{kernel}_proj": {kernel} for kernel in KERNELS}
  for module, kernels in _modules(family).items():
    known[module.rsplit(".", 1)[-1]] = set(kernels)
  unknown = [name for name in names if name not in known]
  if unknown:
    raise errors.UserError(
      f"lora.targets: no projection {unknown[0]!r} in this model; it has "
      f"{', '.join(known)}"
    )
  wanted = set().union(*(known[name] for name in names))
  return tuple(kernel for kernel in KERNELS if kernel in wanted)


def _modules(family: families.Family) -> dict[str, tuple[str, ...]]:
  """Module `model.layers.{}.self_attn.q_proj` -> its kernels, in order of its rows."""
  modules: dict[str, tuple[str, ...]] = {}
  for path, name in family.names.items():
    kernel = path.removeprefix("layers/")
    if kernel in KERNELS:
      module = name.hf.removesuffix(".weight")
      modules[module] = (*modules.get(module, ()), kernel)
  return modules


def split(
  config: transformer.DecoderConfig,
  kernels: Sequence[str],
  *,
  rank: int,
  alpha: float,
  key: Array,
) -> partition.Split:
  """Trains adapters of rank `rank` for `kernels` (from `targets`), and nothing else."""
  start = functools.partial(init, key, config, kernels, rank)
  axes = transformer.axes(config)["layers"]

  def freeze(base: transformer.Params) -> transformer.Params:
    # Made from a parameter, so that it lies on the same devices.
    scale_L = jnp.full_like(base["layers"]["q"][:, 0, 0], alpha / rank, jnp.float32)
    return {**base, "lora": {name: {"scale": scale_L} for name in kernels}}

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
  """Adapters that change nothing: B is 0.

  A is uniform within 1 / sqrt(in), as in the code of the paper's authors (loralib) and
  in PEFT; the paper's text has a Gaussian.
  """
  adapters = {}
  for name in kernels:
    layers, out, inp = transformer.shapes(config)["layers"][name].shape
    a_key = jax.random.fold_in(key, KERNELS.index(name))
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
  # Rounded once, as where the kernel is float32 and a forward pass casts the sum.
  return (kernel_LOI.astype(jnp.float32) + update_LOI).astype(kernel_LOI.dtype)


def merge(params: transformer.Params) -> transformer.Params:
  """The same model without adapters: each is added to its kernel."""
  whole = {name: value for name, value in params.items() if name != "lora"}
  merged = {
    name: _merged(whole["layers"][name], adapter)
    for name, adapter in params.get("lora", {}).items()
  }
  return {**whole, "layers": {**whole["layers"], **merged}}


# --- As the PEFT library stores it ----------------------------------------------------


def peft_config(
  family: families.Family, kernels: Sequence[str], *, rank: int, alpha: float
) -> dict[str, Any]:
  """The content of `adapter_config.json`, but for the base model's name."""
  parts = _adapted(family, kernels)
  # Parts that are fused into one module stack their ranks; alpha grows with them, so
  # that the scale alpha / rank stays.
  stacked = {name: len(own) for name, own in parts.items() if len(own) > 1}
  whole_alpha = int(alpha) if float(alpha).is_integer() else alpha
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": rank,
    "lora_alpha": whole_alpha,
    "target_modules": list(parts),
    "rank_pattern": {name: rank * count for name, count in stacked.items()},
    "alpha_pattern": {name: whole_alpha * count for name, count in stacked.items()},
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }


def _adapted(
  family: families.Family, kernels: Sequence[str]
) -> dict[str, tuple[str, ...]]:
  """Last part of a module's name -> those of its kernels that have an adapter."""
  found = {
    module.rsplit(".", 1)[-1]: tuple(part for part in parts if part in kernels)
    for module, parts in _modules(family).items()
  }
  return {module: parts for module, parts in found.items() if parts}


def peft_tensors(
  family: families.Family,
  config: transformer.DecoderConfig,
  adapters: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, np.ndarray]]:
  """Name and float32 value of every tensor of `adapter_model.safetensors`.

  In a module that fuses kernels their A's lie one below the other, and the B's in
  blocks, each in the rows of its kernel and the columns of its A.
  """
  rows = {
    name: leaf.shape[1]
    for name, leaf in transformer.shapes(config)["layers"].items()
    if name in KERNELS
  }
  for module, parts in _modules(family).items():
    host = {
      name: {half: np.asarray(leaf) for half, leaf in adapters[name].items()}
      for name in parts
      if name in adapters
    }
    if not host:
      continue
    for layer in range(config.n_layers):
      place = f"base_model.model.{module.format(layer)}"
      a_RI = np.concatenate([adapter["a"][layer] for adapter in host.values()])
      b_OR = np.zeros((sum(rows[name] for name in parts), len(a_RI)), np.float32)
      row = column = 0
      for name in parts:
        if name in host:
          own = host[name]["b"][layer]
          b_OR[row : row + rows[name], column : column + own.shape[1]] = own
          column += own.shape[1]
        row += rows[name]
      yield f"{place}.lora_A.weight", a_RI
      yield f"{place}.lora_B.weight", b_OR
