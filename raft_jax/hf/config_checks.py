"""Fields of a model's config.json that are checked when they are read."""

from __future__ import annotations

from typing import Any

from raft_jax import errors
from raft_jax.hf import family_row

SECTIONS = ("rope_parameters", "rope_scaling", "auto_map", "per_layer_config")
"""Fields of a config.json that are JSON objects, if they are there."""
ROPE_SECTIONS = ("full_attention", "sliding_attention")
"""Fields of `rope_parameters` that are JSON objects, if they are there."""


def sections(fields: family_row.Fields, place: str) -> None:
  """Raises UserError for a field that should be a JSON object and is not."""
  rope = fields.get("rope_parameters")
  inner = rope if isinstance(rope, dict) else {}
  for names, values in ((SECTIONS, fields), (ROPE_SECTIONS, inner)):
    for name in names:
      if not isinstance(values.get(name) or {}, dict):
        raise errors.UserError(
          f"{place}: {name} is {values[name]!r}, not a JSON object; fetch the file "
          "again"
        )


def number(
  fields: family_row.Fields, place: str, name: str, kind: type, default: Any = None
) -> Any:
  """A positive number of the config; `default` stands for one that is left out.

  Raises:
    UserError: it is something else.
  """
  value = fields.get(name)
  value = default if value is None else value
  is_number = isinstance(value, int if kind is int else int | float)
  if not is_number or isinstance(value, bool) or not 0 < value < 2**63:
    raise errors.UserError(
      f"{place}: {name} is {value!r}, not a positive number; fetch the file again"
    )
  return kind(value)


def heads(count: int, kv_heads: int, width: int, place: str) -> None:
  """Raises UserError unless the numbers and the width of heads fit together."""
  if count % kv_heads or width % 2:
    raise errors.UserError(
      f"{place}: {count} heads, {kv_heads} key/value heads of width {width} do not fit "
      "together; fetch the file again"
    )


def lists(fields: family_row.Fields, layers: int, place: str) -> None:
  """Raises UserError if a list by layer is too short."""
  for name in ("layer_types", "no_rope_layers"):
    items = fields.get(name)
    if items is not None and (not isinstance(items, list) or len(items) < layers):
      raise errors.UserError(
        f"{place}: {name} does not name each of the {layers} layers; fetch the file "
        "again"
      )
