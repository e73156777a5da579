"""Strict reading of YAML 1.2: plain values, the line of each key, and all faults.

A duplicate key, an alias or a tag is a fault. Nothing is executed or guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import yaml


class Problem(NamedTuple):
  where: str  # "file:line" or "command line"
  key: str
  what: str


class _Loader(yaml.SafeLoader):
  """Reads scalars as YAML 1.2: `1e-5` is a number; `no`, `12:30` and dates are text."""

  yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

  def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
    if self.check_event(yaml.AliasEvent):
      mark = self.peek_event().start_mark
      raise yaml.composer.ComposerError(None, None, "* refers to an anchor", mark)
    return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
  """Quotes a text only if `_Loader` would read it as something else."""

  yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

  def represent_str(self, text: str) -> yaml.ScalarNode:
    # PyYAML's other styles drop line breaks such as U+0085.
    style = None if text.isprintable() else '"'
    return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

_WORDS = {
  "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
  "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
  "int": ("[-+]?[0-9]+", list("-+0123456789")),
  "float": (
    r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?",
    list("-+.0123456789"),
  ),
}
for _name, (_pattern, _first) in _WORDS.items():
  for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
      f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first
    )

_BOOLS = {"true": True, "false": False}


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(text)
  return value


_SCALARS: dict[str, Callable[[str], Any]] = {
  "tag:yaml.org,2002:null": lambda text: None,
  "tag:yaml.org,2002:bool": lambda text: _BOOLS[text.lower()],
  "tag:yaml.org,2002:int": int,
  "tag:yaml.org,2002:float": _finite,
  "tag:yaml.org,2002:str": str,
}


class Draft:
  """The values read so far, the place of each key, and the faults."""

  def __init__(self) -> None:
    self.tree: Any = {}
    self.places: dict[str, str] = {}
    self.problems: list[Problem] = []
    self.unread: set[str] = set()  # keys whose value could not be read

  def read(self, text: str, key: str, place: Callable[[int], str]) -> Any:
    """The plain value of a YAML text; `place` turns a line into file:line."""
    try:
      node = _Loader(text).get_single_node()
    except (yaml.YAMLError, RecursionError) as e:
      mark = getattr(e, "problem_mark", None)
      what = getattr(e, "problem", None) or str(e).splitlines()[0]
      line = mark.line + 1 if mark else 1
      return self._unread(place(line), key, f"not valid YAML: {what}; quote odd text")
    return None if node is None else self._plain(node, key, place)

  def _plain(self, node: yaml.Node, key: str, place: Callable[[int], str]) -> Any:
    where = self.places[key] = place(node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode) and node.tag.endswith(",2002:map"):
      return self._mapping(node, key, place)
    if isinstance(node, yaml.SequenceNode) and node.tag.endswith(",2002:seq"):
      return [
        self._plain(item, f"{key}.{i}", place) for i, item in enumerate(node.value)
      ]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
      return self._unread(where, key, f"the tag {node.tag} is not allowed; delete it")
    try:
      return _SCALARS[node.tag](node.value)
    except (ValueError, KeyError):
      what = f"{node.value[:40]!r} is not a finite number, true or false"
      return self._unread(where, key, what)

  def _unread(self, where: str, key: str, what: str) -> None:
    self.problems.append(Problem(where, key, what))
    self.unread.add(key)

  def _mapping(self, node: yaml.MappingNode, key: str, place: Callable[[int], str]):
    result: dict[str, Any] = {}
    first: dict[str, str] = {}
    for name_node, value_node in node.value:
      name = str(name_node.value) if isinstance(name_node, yaml.ScalarNode) else "?"
      child = f"{key}.{name}" if key else name
      where = place(name_node.start_mark.line + 1)
      if name in first:
        what = f"is given twice (first at {first[name]}); keep one"
        self.problems.append(Problem(where, child, what))
      first.setdefault(name, where)
      result[name] = self._plain(value_node, child, place)
      self.places[child] = where
    return result

  def override(self, key: str, text: str) -> None:
    """Sets a dotted key to a value, which is read like one in the file."""
    where = "command line"
    value = self.read(text, key, lambda line: where)
    self.places[key] = where
    *parents, last = key.split(".")
    node = self.tree
    for depth, part in enumerate(parents, start=1):
      if isinstance(node, dict):
        if part not in node:
          self.places[".".join(parents[:depth])] = where
        node = node.setdefault(part, {})
      elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        node = node[int(part)]
      else:
        node = None
    if isinstance(node, dict):
      node[last] = value
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
      node[int(last)] = value
    else:
      what = f"there is no {'.'.join(parents)} to put it in; give that key whole"
      self.problems.append(Problem(where, key, what))

  def place(self, loc: Sequence[str | int], default: str) -> str:
    """The place of a key, or else that of its closest parent."""
    for end in range(len(loc), 0, -1):
      dotted = ".".join(map(str, loc[:end]))
      if dotted in self.places:
        return self.places[dotted]
    return default


def dump(tree: dict[str, Any]) -> str:
  """The tree as YAML, keys in order; `Draft.read` gives the same tree back."""
  return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
