"""A config as a YAML file in which a comment says why each value was chosen."""

from __future__ import annotations

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import schema, strict_yaml
from raft_jax.data import inspection


class Choice(NamedTuple):
  """A value, and why."""

  value: Any
  why: str


Choices = dict[str, Choice]
"""Dotted key -> its value."""


def check_absent(path: pathlib.Path) -> None:
  """Raises UserError if the file to write exists or cannot be made."""
  if os.path.lexists(path):
    raise errors.UserError(
      f"--write: {path} exists and is not overwritten; name another file, or delete it"
    )
  if not path.parent.is_dir():
    raise errors.UserError(f"--write: there is no folder {path.parent}; make it first")


def write(
  path: pathlib.Path,
  config: schema.Config,
  choices: Choices,
  sets: Sequence[inspection.QuestionSet],
) -> None:
  """Writes a config with the chosen values; its other keys stay.

  Raises:
    errors.UserError: the file exists.
  """
  lines = header(sets, has_test=config.data.test is not None)
  text = as_yaml(config, choices, lines)
  try:
    with path.open("x", encoding="utf-8") as file:
      file.write(text)
  except FileExistsError:
    check_absent(path)


def header(sets: Sequence[inspection.QuestionSet], *, has_test: bool) -> list[str]:
  """The first lines of the file."""
  rows = ", ".join(f"{found.used:,} rows of {found.name}" for found in sets)
  lines = [
    f"Written by `inspect` for {rows}.",
    "Every comment says why; change what you know better.",
  ]
  if not has_test:
    lines.append("`evaluate` needs data.test: a file of questions that are held out.")
  return lines


def merged(config: schema.Config, values: Mapping[str, Any]) -> dict[str, Any]:
  """The keys that the config sets, with other values, in the order of the schema."""
  draft = strict_yaml.Draft()
  draft.tree = config_load.non_defaults(config)
  for key, value in values.items():
    *parents, last = key.split(".")
    node = draft.tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return _ordered(draft.tree, config.model_dump(mode="json"))


def _ordered(tree: dict[str, Any], like: Any) -> dict[str, Any]:
  names = list(like) if isinstance(like, dict) else []
  ordered = sorted(tree, key=lambda k: names.index(k) if k in names else len(names))
  return {
    name: _ordered(tree[name], like.get(name) if isinstance(like, dict) else None)
    if isinstance(tree[name], dict)
    else tree[name]
    for name in ordered
  }


def as_yaml(
  config: schema.Config, choices: Choices, header_lines: Sequence[str]
) -> str:
  """The file: the config's keys and the chosen ones, each of them below a comment."""
  values = {key: choice.value for key, choice in choices.items()}
  tree = merged(config, values)
  config_load.from_tree(tree)  # it must load
  text = strict_yaml.dump(tree)
  draft = strict_yaml.Draft()
  draft.read(text, "", str)
  given = config_load.flat(config_load.non_defaults(config))
  comments: dict[int, str] = {}
  said = ""
  for key, choice in choices.items():
    why = "" if choice.why == said else choice.why
    said = choice.why
    if key in given and given[key] != choice.value:
      why = f"{why or 'as above'} (was {given[key]})"
    comments[int(draft.places[key])] = why
  lines = [part for line in header_lines for part in _comment(line)] + [""]
  for number, line in enumerate(text.splitlines(), start=1):
    indent = " " * (len(line) - len(line.lstrip()))
    if comments.get(number):
      lines += _comment(comments[number], indent)
    lines.append(line)
  return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
  mark = f"{indent}# "
  return textwrap.wrap(text, 88, initial_indent=mark, subsequent_indent=mark)
