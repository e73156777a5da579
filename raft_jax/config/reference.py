"""The keys of a run's file as a list: names, types, defaults and meanings, for help."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from raft_jax.config import schema

_REQUIRED = object()


class Key(NamedTuple):
  name: str  # dotted; [] for each item of a list
  type: str  # "" for a section
  default: str
  meaning: str


@functools.cache
def every_key() -> tuple[Key, ...]:
  """Every section and key of the file, in its order."""
  tree = schema.Config.model_json_schema()
  return tuple(_walk(tree, tree["$defs"], "", {}))


def _walk(
  tree: dict[str, Any], definitions: dict[str, Any], prefix: str, defaults: Any
) -> Iterator[Key]:
  for name, field in tree["properties"].items():
    default = defaults.get(name, field.get("default", _REQUIRED))
    meaning = " ".join(field.get("description", "").split())
    key = f"{prefix}{name}"
    inner = field.get("items", _unless_null(field))
    if "$ref" not in inner:
      shown = "required" if default is _REQUIRED else _yaml_word(default)
      yield Key(key, _type_text(field), shown, meaning)
      continue
    section = definitions[inner["$ref"].rsplit("/", 1)[-1]]
    if "items" in field:
      yield Key(key, "list of sections", f"{len(default)} with defaults", meaning)
      yield from _walk(section, definitions, f"{key}[].", {})
    else:
      meaning = meaning or " ".join(section.get("description", "").split())
      optional = ("section, or null", "null") if default is None else ("", "")
      yield Key(key, *optional, meaning)
      given = default if isinstance(default, dict) else {}
      yield from _walk(section, definitions, f"{key}.", given)


def _unless_null(field: dict[str, Any]) -> dict[str, Any]:
  """What a value may be beside null."""
  options = [
    option for option in field.get("anyOf", ()) if option.get("type") != "null"
  ]
  return options[0] if options else field


def _yaml_word(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _type_text(field: dict[str, Any]) -> str:
  if "anyOf" in field:
    return f"{_type_text(_unless_null(field))}, or null"
  if "items" in field:
    return f"list of {_type_text(field['items'])}"
  if "enum" in field:
    return f"one of {', '.join(field['enum'])}"
  bounds = [
    f"{sign} {field[name]:g}"
    for name, sign in (
      ("exclusiveMinimum", ">"),
      ("minimum", ">="),
      ("exclusiveMaximum", "<"),
      ("maximum", "<="),
    )
    if name in field and abs(field[name]) < 2**31
  ]
  if field["type"] == "array":
    return f"list of {_type_text(field['items'])}"
  if field["type"] == "object":
    return "mapping"
  names = {"integer": "int", "number": "float", "string": "text", "boolean": "bool"}
  return f"{names[field['type']]} {' and '.join(bounds)}".strip()
