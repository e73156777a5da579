"""How fast a step was: tokens a second, and the share of the devices' peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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


def peak_flops(device_kind: str) -> float | None:
  """FLOP/s of a device, or None if `PEAK_FLOPS` does not have it."""
  return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def model_flops(
  tokens: Mapping[str, float], active: int, *, trains_weights: bool
) -> dict[str, float]:
  """FLOPs of each phase by the usual rule, which counts products with parameters.

  Per active parameter and token 2 forward, and in the update 6 with the backward pass
  (4 if the weights get no gradient). Kaplan et al., "Scaling Laws for Neural Language
  Models", arXiv 2001.08361, 2.1.

  Args:
    tokens: that each of rollout, teacher and update read.
    active: parameters that multiply a token.
    trains_weights: whether the model's own weights get a gradient (not with LoRA).
  """
  update = 3 if trains_weights else 2
  return {
    phase: 2.0 * active * count * (update if phase == "update" else 1)
    for phase, count in tokens.items()
  }


def of_step(
  meter: Meter, tokens: Mapping[str, float], seconds: float
) -> dict[str, float]:
  """`tokens_per_s`, of the update's tokens; `mfu` if the devices' peak is known.

  MFU (model FLOPs utilization; Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B)
  is the share of the peak that `model_flops` would take, here without attention.

  Args:
    tokens: that each of rollout, teacher and update read, without padding.
  """
  values = {"tokens_per_s": float(tokens["update"] / seconds)}
  if meter.peak is not None:
    flops = model_flops(tokens, meter.active, trains_weights=meter.trains_weights)
    values["mfu"] = float(sum(flops.values()) / (seconds * meter.peak))
  return values
