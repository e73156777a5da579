"""A frozen model whose kernels are quantised, as LoRA's base and teacher.

Quantised are the projections of all layers. Embeddings, the head, norms, biases,
convolutions and the other vectors stay as they are.
"""

from __future__ import annotations

import jax

from raft_jax import errors
from raft_jax.models import lora, param_sharding, quantised, transformer


def kernel_axes(config: transformer.DecoderConfig) -> dict[str, tuple[str, str]]:
  """Logical axes [O, I] of the kernels that are quantised, by their names."""
  axes = param_sharding.axes(config)["layers"]
  return {name: axes[name][1:] for name in lora.ALL_KERNELS if name in axes}


def quantise(
  params: transformer.Params, config: transformer.DecoderConfig, form: str | None
) -> transformer.Params:
  """The model with quantised kernels; with form None, the model itself."""
  if form is None:
    return params
  kernels = {
    name: quantised.quantise(params["layers"][name], form, axes)
    for name, axes in kernel_axes(config).items()
  }
  return {**params, "layers": {**params["layers"], **kernels}}


def shapes(
  config: transformer.DecoderConfig, form: str | None, dtype: str = "float32"
) -> transformer.Params:
  """The tree of `quantise` as `jax.ShapeDtypeStruct` leaves; allocates nothing.

  Args:
    dtype: of what is not quantised.
  """

  def make(params: transformer.Params) -> transformer.Params:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return quantise(params, config, form)

  return jax.eval_shape(make, transformer.shapes(config))


def axes(config: transformer.DecoderConfig, form: str | None) -> transformer.Params:
  """Logical axis names of every array of that tree, for `sharding.tree`."""
  axes = param_sharding.axes(config)
  if form is None:
    return axes
  layers = shapes(config, form)["layers"]
  kernels = {name: quantised.logical_axes(layers[name]) for name in kernel_axes(config)}
  return {**axes, "layers": {**axes["layers"], **kernels}}


def check(config: transformer.DecoderConfig, form: str | None, source: str) -> None:
  """Checks that the kernels of a model can be quantised.

  Raises:
    errors.UserError: they are those of experts, or not of whole blocks.
  """
  if form is None:
    return
  if config.n_experts:
    raise errors.UserError(
      f"lora.base: {source} is a mixture of experts, whose kernels are not quantised; "
      "delete this line"
    )
  layers = transformer.shapes(config)["layers"]
  uneven = [
    name for name in kernel_axes(config) if layers[name].shape[-1] % quantised.BLOCK
  ]
  if form == "nf4" and uneven:
    raise errors.UserError(
      f"lora.base: nf4 needs a multiple of {quantised.BLOCK} inputs, and the kernels "
      f"{', '.join(uneven)} of {source} have others; use int8"
    )


def is_quantised(params: transformer.Params) -> bool:
  """Whether some kernel of a model is quantised."""
  return any(quantised.is_quantised(leaf) for leaf in params["layers"].values())
