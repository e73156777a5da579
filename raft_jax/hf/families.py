"""The supported families of models: tensor names, layouts and config fields.

To add a family, add a row to the table of its kind, which loading and export use.
"""

from __future__ import annotations

from raft_jax.hf import (
  dense_families,
  gemma4_families,
  hybrid_families,
  moe_families,
)

FAMILIES = {
  **dense_families.FAMILIES,
  **gemma4_families.FAMILIES,
  **moe_families.FAMILIES,
  **hybrid_families.FAMILIES,
}
"""`model_type` -> family."""
