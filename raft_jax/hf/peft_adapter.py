"""LoRA adapters as PEFT names and stores them: target modules, config, tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from raft_jax import errors
from raft_jax.hf import decoder_config, family_row, tensor_layout
from raft_jax.models import hybrid, lora, transformer


def targets(family: family_row.Family, names: Sequence[str]) -> tuple[str, ...]:
  """Kernels of the parameter tree for the names of Hugging Face modules.

  Every family knows `q_proj` to `down_proj`. A family that fuses some of them (Phi's
  `qkv_proj`) also knows the fused name, which stands for all of its parts. Of a family
  without gates, `gate_proj` is passed over, since it is one of the default names. These
  are the projections of the layers with attention; those of linear layers have the
  names of their modules (`in_proj_qkv`, or `linear_attn.q_proj` where both have a
  `q_proj`).

  Raises:
    errors.UserError: the model has no module of a name, or none of all names, or it is
      one of experts.
  """
  of_experts = [
    f"{kernel}_proj"
    for kernel in lora.KERNELS
    if (name := family.names.get(f"layers/{kernel}")) and name.of_experts
  ]
  if named := [name for name in names if name in of_experts]:
    raise errors.UserError(
      f"lora.targets: {', '.join(named)} of this model are kernels of experts, for "
      "which there are no low-rank updates; name q_proj, k_proj, v_proj and o_proj, or "
      "train without `lora`"
    )
  modules = _modules(family)
  own = {kernel for kernels in modules.values() for kernel in kernels}
  kernels_by_name = {f"{kernel}_proj": {kernel} & own for kernel in lora.KERNELS}
  for (module, _), kernels in modules.items():
    kernels_by_name.setdefault(_target(family, module), set()).update(kernels)
  unknown = [name for name in names if name not in kernels_by_name]
  targeted = set().union(*(kernels_by_name.get(name, ()) for name in names))
  if unknown or not targeted:
    known = (name for name, kernels in kernels_by_name.items() if kernels)
    raise errors.UserError(
      f"lora.targets: no projection {[*unknown, *names][0]!r} in this model; it has "
      f"{', '.join(known)}"
    )
  return tuple(kernel for kernel in lora.ALL_KERNELS if kernel in targeted)


def _modules(family: family_row.Family) -> dict[tuple[str, str], tuple[str, ...]]:
  """Module `model.layers.{}.self_attn.q_proj` -> its kernels, in order of its rows.

  Beside the name stands how the names of its kernels begin, if it is that of layers of
  another kind (`hybrid`), which have kernels of their own.
  """
  modules: dict[tuple[str, str], tuple[str, ...]] = {}
  for path, name in family.names.items():
    kernel = path.removeprefix("layers/")
    if kernel in lora.ALL_KERNELS and not name.of_experts:
      (plain,) = hybrid.plain({kernel: None})
      module = name.hf.removesuffix(".weight"), kernel.removesuffix(plain)
      modules[module] = (*modules.get(module, ()), kernel)
  return modules


def _last_part(module: str) -> str:
  return module.rsplit(".", 1)[-1]


def _target(family: family_row.Family, module: str) -> str:
  """A module's name for PEFT, which adapts every module whose name ends with it."""
  last = _last_part(module)
  modules = {name.hf.removesuffix(".weight") for name in family.names.values()}
  if [_last_part(other) for other in modules].count(last) == 1:
    return last
  return ".".join(module.split(".")[-2:])


def config(
  family: family_row.Family, kernels: Sequence[str], *, rank: int, alpha: float
) -> dict[str, Any]:
  """The content of `adapter_config.json`, without the base model's name."""
  adapted = [
    (module, own)
    for (module, _), parts in _modules(family).items()
    if (own := [part for part in parts if part in kernels])
  ]
  # Adapters of kernels that are fused into one module are stacked, and so are their
  # ranks; alpha grows with the rank, so that alpha / rank stays the same.
  stacked = {
    _target(family, module): len(parts) for module, parts in adapted if len(parts) > 1
  }
  modules = list(dict.fromkeys(module for module, _ in adapted))
  target_modules: str | list[str] = [_target(family, module) for module in modules]
  if family.wrapped:  # an image encoder has modules of the same names
    target_modules = "|".join(
      re.escape(module).replace(r"\{\}", r"\d+") for module in modules
    )
  json_alpha = int(alpha) if float(alpha).is_integer() else alpha
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": rank,
    "lora_alpha": json_alpha,
    "target_modules": target_modules,
    "rank_pattern": {name: rank * count for name, count in stacked.items()},
    "alpha_pattern": {name: json_alpha * count for name, count in stacked.items()},
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }


def tensors(
  family: family_row.Family,
  decoder: transformer.DecoderConfig,
  adapters: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, np.ndarray]]:
  """Name and float32 value of every tensor of `adapter_model.safetensors`.

  In a module that fuses kernels, the A matrices are stacked by rows. The B matrices are
  blocks: each covers the rows of its kernel and the columns of its A.
  """
  rows = {
    name: leaf.shape[1]
    for name, leaf in transformer.shapes(decoder)["layers"].items()
    if name in lora.ALL_KERNELS
  }
  groups = decoder_config.row_groups(family, decoder)
  for (module, _), parts in _modules(family).items():
    on_host = {
      name: {half: np.asarray(leaf) for half, leaf in adapters[name].items()}
      for name in parts
      if name in adapters
    }
    if not on_host:
      continue
    for row, layer in enumerate(hybrid.layers_of(decoder, next(iter(on_host)))):
      prefix = f"base_model.model.{module.format(layer)}"
      a_RI = np.concatenate([adapter["a"][row] for adapter in on_host.values()])
      blocks, column = [], 0
      for name in parts:
        block_OR = np.zeros((rows[name], len(a_RI)), np.float32)
        if name in on_host:
          part = on_host[name]["b"][row]
          block_OR[:, column : column + part.shape[1]] = part
          column += part.shape[1]
        blocks.append(block_OR)
      b_OR = tensor_layout.joined_rows(blocks, groups.get(f"layers/{parts[0]}", 1))
      yield f"{prefix}.lora_A.weight", a_RI
      yield f"{prefix}.lora_B.weight", b_OR
