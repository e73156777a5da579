"""How fast a step was: tokens a second, and the share of the devices' peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from raft_jax.models import experts, transformer

PEAK_FLOPS = {
  "A100": 312e12,
  "H100": 989e12,
  "H200": 989e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}
"""Part of a device's name in JAX, the more special name first -> FLOP/s of its dense
products in bfloat16, from the makers' data sheets."""


class Meter(NamedTuple):
  """What the speed of a step is measured by.

  Attributes:
    active: parameters of the model that multiply a token.
    trains_weights: whether the model's own weights get a gradient (not with LoRA).
    peak: FLOP/s of all devices together; None if they are not in `PEAK_FLOPS`.
  """

  active: int
  trains_weights: bool
  peak: float | None


def make_meter(
  decoder: transformer.DecoderConfig, mesh: Mesh, *, trains_weights: bool
) -> Meter:
  """The meter of a run on a mesh."""
  count = transformer.parameter_count(decoder)
  peak = peak_flops(mesh.devices.flat[0].device_kind)
  return Meter(
    active=experts.active_parameters(decoder, count),
    trains_weights=trains_weights,
    peak=None if peak is None else peak * mesh.size,
  )


def peak_flops(device_kind: str) -> float | None:
  """FLOP/s of a device, or None if `PEAK_FLOPS` does not have it."""
  return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def of_step(
  meter: Meter, tokens: Mapping[str, float], seconds: float
) -> dict[str, float]:
  """`tokens_per_s`, of the update's tokens; `mfu` if the devices' peak is known.

  MFU (model FLOPs utilization; Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B)
  counts 2 FLOPs a parameter and token forward, and 6 with the backward pass (4 if the
  weights get no gradient). Padding, recomputation and attention do not count.

  Args:
    tokens: that each of rollout, teacher and update read, without padding.
  """
  values = {"tokens_per_s": float(tokens["update"] / seconds)}
  if meter.peak is not None:
    forward = sum(count for phase, count in tokens.items() if phase != "update")
    update = (3 if meter.trains_weights else 2) * tokens["update"]
    flops = 2.0 * meter.active * (forward + update)
    values["mfu"] = float(flops / (seconds * meter.peak))
  return values
