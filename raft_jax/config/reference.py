"""The config keys as a list of names, types, defaults and meanings, for `--help`.

A section with the key `engine` is a role: a language model that writes or judges. Roles
share most of their keys, which `engine_keys` lists once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from raft_jax.config import schema

_REQUIRED = object()


class Key(NamedTuple):
  name: str  # dotted; [] for each item of a list
  type: str  # "" for a section that is never null
  default: str
  meaning: str


@functools.cache
def every_key() -> tuple[Key, ...]:
  """All sections and keys of the file, in order."""
  tree = schema.Config.model_json_schema()
  return tuple(_walk(tree, tree["$defs"], "", {}))


@functools.cache
def roles() -> tuple[str, ...]:
  """The sections of language models, in the order of the file."""
  names = [key.name for key in every_key()]
  return tuple(
    name.removesuffix(".engine") for name in names if _leaf(name) == "engine"
  )


@functools.cache
def engine_keys() -> tuple[Key, ...]:
  """The keys that roles share; the meaning names the roles that lack a key."""
  names = {key.name for key in every_key()}
  result = []
  for key in _shared():
    without = [role for role in roles() if f"{role}.{_leaf(key.name)}" not in names]
    listed = ", ".join(f"`{role}`" for role in without)
    note = f" Not a key of {listed}." if without else ""
    result.append(key._replace(meaning=key.meaning + note))
  return tuple(result)


def reference_keys() -> tuple[Key, ...]:
  """All keys, without those of a role that are the same in `engine_keys`."""
  shared = {key._replace(name=_leaf(key.name)) for key in _shared()}
  return tuple(
    key
    for key in every_key()
    if key.name.rpartition(".")[0] not in roles()
    or key._replace(name=_leaf(key.name)) not in shared
  )


def _shared() -> Iterator[Key]:
  return _walk(schema.Engine.model_json_schema(), {}, "<role>.", {})


def _leaf(name: str) -> str:
  return name.rpartition(".")[2]


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
    role = " Takes the engine keys." if "engine" in section["properties"] else ""
    if "items" in field:
      yield Key(
        key, "list of sections", f"{len(default)} with defaults", meaning + role
      )
      yield from _walk(section, definitions, f"{key}[].", {})
    else:
      meaning = meaning or " ".join(section.get("description", "").split())
      optional = ("section, or null", "null") if default is None else ("", "")
      yield Key(key, *optional, meaning + role)
      given = default if isinstance(default, dict) else {}
      yield from _walk(section, definitions, f"{key}.", given)


def _unless_null(field: dict[str, Any]) -> dict[str, Any]:
  """The schema of a value that is not null."""
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
