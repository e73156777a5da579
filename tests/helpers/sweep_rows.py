"""Runs as `sweep.json` has them, with scores that a test chooses."""

from typing import Any


def run(
  name: str,
  method: str,
  *,
  base: dict[str, Any],
  trained: dict[str, Any],
  drift: dict[str, Any],
  overrides: dict[str, Any],
  retention: dict[str, Any] | None = None,
  items: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """A run named GROUP-WORDS."""
  return {
    "name": name,
    "group": name.split("-")[0],
    "method": method,
    "set": overrides,
    "config_digest": "00",
    "scores": {
      "scores": {"base": base, "trained": trained},
      "drift": drift,
      "weight_distance": {"mean": 0.001},
      "retention": retention or {},
    },
    "items": items or {},
  }
