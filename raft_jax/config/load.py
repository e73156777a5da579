"""The config of a run: read from YAML with overrides, checked, written, compared.

All faults of a file are reported in one message, before anything heavy is imported.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import itertools
import json
import os
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from raft_jax import errors
from raft_jax.config import methods, schema, strict_yaml, validate
from raft_jax.config import reference as config_reference


def load(
  path: str | os.PathLike[str],
  overrides: Sequence[str] = (),
  *,
  without_data: bool = False,
) -> schema.Config:
  """Reads and checks a run's YAML file.

  Args:
    path: the file.
    overrides: `train.batch_size=8`, or `--train.batch_size 8` as two items. Values are
      written as in the file; of several for one key, the last one counts.
    without_data: whether the files of questions may be absent.

  Raises:
    errors.UserError: lists all faults, each with file:line, key and remedy.
  """
  draft = strict_yaml.Draft()
  tree = draft.read(read_text(path), "", lambda line: f"{path}:{line}")
  if isinstance(tree, dict):
    draft.tree = tree
  elif not draft.problems:
    what = "is empty" if tree is None else "is not a list of `key: value` lines"
    raise errors.UserError(f"{path}: {what}; start from a file in configs/")
  return _checked(draft, str(path), overrides, without_data)


def from_tree(
  tree: dict[str, Any], overrides: Sequence[str] = (), place: str = "config"
) -> schema.Config:
  """Checks a tree in the form of `Config.model_dump(mode="json")`, with overrides.

  Args:
    place: where the tree stands, for messages.

  Raises:
    errors.UserError: as `load`.
  """
  draft = strict_yaml.Draft()
  draft.tree = tree
  return _checked(draft, place, overrides)


def _checked(
  draft: strict_yaml.Draft,
  path: str,
  overrides: Sequence[str],
  without_data: bool = False,
) -> schema.Config:
  for key, text in _pairs(overrides):
    draft.override(key, text)
  config = None
  if not draft.problems or draft.tree:
    config = _validate(draft, path, without_data)
  if draft.problems:
    raise errors.UserError(_message(draft.problems))
  assert config is not None
  return config


def read_text(path: str | os.PathLike[str]) -> str:
  """The text of a config file.

  Raises:
    errors.UserError: the file cannot be read or is not UTF-8.
  """
  try:
    return pathlib.Path(path).read_bytes().decode("utf-8-sig")
  except OSError as e:
    raise errors.UserError(
      f"{path}: cannot read the config: {e.strerror}; check --config"
    ) from e
  except UnicodeDecodeError as e:
    raise errors.UserError(f"{path}: is not UTF-8; save the config as UTF-8") from e


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
  items = iter(overrides)
  for item in items:
    key, equals, text = item.partition("=")
    if not equals and key.startswith("--"):
      following = next(items, None)
      if following is None:
        raise errors.UserError(
          f"command line: {item}: has no value; write {item} VALUE"
        )
      text = following
    elif not equals or not key.strip("-"):
      raise errors.UserError(
        f"command line: {item!r} is not an override; write key=value, "
        f"e.g. train.batch_size=8"
      )
    yield key.removeprefix("--"), text


def _validate(
  draft: strict_yaml.Draft, path: str, without_data: bool
) -> schema.Config | None:
  """The config, or None; adds the faults to `draft.problems`."""

  def note(key: str, what: str) -> None:
    where = draft.place(key.split("."), path)
    draft.problems.append(strict_yaml.Problem(where, key, what))

  for key, what in () if without_data else validate.missing_files(draft.tree):
    note(key, what)
  tree, method = draft.tree, None
  name = tree.get("method", schema.Config.model_fields["method"].default)
  try:
    method = methods.get(name) if isinstance(name, str) else None
  except errors.UserError as e:
    note("method", str(e))
  if method is not None:
    tree = methods.merge(method.settings, tree)
  try:
    # JSON's strict mode accepts a list for a tuple and 1 for 1.0, but not "8" for 8.
    config = schema.Config.model_validate_json(json.dumps(tree), strict=True)
  except pydantic.ValidationError as e:
    faults = e.errors(include_url=False)
    for fault in faults:
      key = ".".join(map(str, fault["loc"]))
      # pydantic reports a list with a bad item also as too short.
      has_inner_fault = any(
        f["loc"][:-1][: len(fault["loc"])] == fault["loc"]
        for f in faults
        if f is not fault
      )
      if not has_inner_fault and key not in draft.unread:
        where = draft.place(fault["loc"], path)
        draft.problems.append(strict_yaml.Problem(where, key, _explain(fault)))
    return None
  needs = method.needs if method else {}
  for key, what in itertools.chain(
    _missing(flat(_tree(config)), needs), validate.conflicts(config)
  ):
    note(key, what)
  return config


def _missing(
  set_values: Mapping[str, Any], needs: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
  """The keys that the method needs and that are not set."""
  for key, meaning in needs.items():
    if set_values.get(key) is None:
      method = set_values["method"]
      yield key, f"method {method!r} needs it: {meaning}; set it"


def _message(problems: list[strict_yaml.Problem]) -> str:
  lines = [f"{p.where}: {p.key + ': ' if p.key else ''}{p.what}" for p in problems]
  if len(lines) == 1:
    return lines[0]
  return f"{len(lines)} faults in the config\n  " + "\n  ".join(lines)


_MUST = {
  "int_type": "must be a whole number",
  "float_type": "must be a number",
  "string_type": "must be text",
  "bool_type": "must be true or false",
  "tuple_type": "must be a list",
  "model_type": "must be a section of `key: value` lines",
  "too_short": "must not be empty",
}


def _explain(fault: Any) -> str:
  """What is wrong with one value, and what would be right."""
  if not fault["loc"]:  # the file is not JSON, e.g. half a surrogate pair
    return str(fault["msg"])
  section = _section(fault["loc"][:-1])
  name = str(fault["loc"][-1])
  if fault["type"] == "extra_forbidden":
    return f"unknown key; {_suggest(name, fault['loc'][:-1], section)}"
  if fault["type"] == "missing":
    field = section.model_fields[name]
    meaning = (field.description or str(field.annotation.__doc__)).rstrip(".")
    return f"is required: {meaning}; add it"
  if name == "api_key_env":  # the value may be the key itself: do not print it
    return "must be the name of an environment variable, which holds the key"
  must = _MUST.get(fault["type"], fault["msg"].replace("Input should be", "must be"))
  if fault["input"] == "encoder" and name == "engine":
    must += " (only a judge can be the encoder)"
  return f"{must}, got {json.dumps(fault['input'], ensure_ascii=False)[:60]}"


def _section(loc: Sequence[str | int]) -> type[schema.Section]:
  section: type[schema.Section] = schema.Config
  for part in loc:
    if isinstance(part, str):
      annotation: Any = section.model_fields[part].annotation
      section = next(iter(typing.get_args(annotation)), annotation)
  return section


RENAMED = {
  "train.measure_every": "train.gradient_stats_every",
  "train.tensorboard": "train.trackers=[tensorboard]",
  "watch": "validation",
}
"""Old name of a key or section -> its present name."""


def _suggest(
  name: str, parents: Sequence[str | int], section: type[schema.Section]
) -> str:
  prefix = "".join(f"{part}." for part in parents)
  if f"{prefix}{name}" in RENAMED:
    return f"it is now called `{RENAMED[f'{prefix}{name}']}`"
  similar = difflib.get_close_matches(name, section.model_fields, n=1)
  if similar:
    return f"did you mean `{prefix}{similar[0]}`?"
  last = {key.name.rsplit(".", 1)[-1] for key in config_reference.every_key()}
  word = next(iter(difflib.get_close_matches(name, last, n=1, cutoff=0.8)), None)
  elsewhere = [
    key.name
    for key in config_reference.every_key()
    if key.name.rsplit(".", 1)[-1] == word
  ]
  if elsewhere:
    return f"did you mean `{'` or `'.join(elsewhere)}`?"
  here = f"`{prefix[:-1]}` has" if parents else "there are"
  return f"{here} {', '.join(section.model_fields)}"


def non_defaults(config: schema.Config) -> dict[str, Any]:
  """The values that differ from those of the method and the schema, and the method.

  `from_tree` makes the same config of them. With another `method`, it makes that
  method's config with the user's own values.
  """
  settings = methods.get(config.method).settings
  return _non_defaults(config, settings) | {"method": config.method}


def _non_defaults(section: schema.Section, preset: Mapping[str, Any]) -> dict[str, Any]:
  tree = {}
  dumped = section.model_dump(mode="json")
  for name, field in type(section).model_fields.items():
    value = getattr(section, name)
    default = preset.get(name, field.default)
    if isinstance(value, schema.Section):
      below = _non_defaults(value, default if isinstance(default, dict) else {})
      if below or default is None:  # a section that the user opened may be empty
        tree[name] = below
    elif value != default:
      tree[name] = dumped[name]
  return tree


# --- Writing and comparing ------------------------------------------------------------


def dump(config: schema.Config) -> str:
  """YAML of all keys, defaults included; `load` reads the same config from it."""
  return strict_yaml.dump(config.model_dump(mode="json"))


def _tree(config: schema.Config | dict[str, Any]) -> dict[str, Any]:
  return config.model_dump(mode="json") if isinstance(config, schema.Config) else config


def digest(config: schema.Config | dict[str, Any]) -> str:
  """sha256 (hex) of the values; the order of the keys does not matter."""
  text = json.dumps(_tree(config), sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def values(config: schema.Config, keys: Sequence[str]) -> dict[str, Any]:
  """Dotted key -> value, for these keys and all keys of these sections."""
  return {k: v for k, v in flat(_tree(config)).items() if matches(k, keys)}


ABSENT = "(absent)"


def diff(
  old: schema.Config | dict[str, Any], new: schema.Config | dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Dotted key -> (old value, new value) where they differ; ABSENT: no such key."""
  a, b = flat(_tree(old)), flat(_tree(new))
  pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in a | b}
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def changes(
  recorded: dict[str, Any], config: schema.Config
) -> dict[str, tuple[Any, Any]]:
  """As `diff`, for a recorded config that may be older than some of the keys.

  A key that it does not have was at its present default then.
  """
  given = flat(non_defaults(config))
  return {
    key: (old, new)
    for key, (old, new) in diff(recorded, config).items()
    if old != ABSENT or key in given
  }


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Dotted key -> value of every leaf of a tree."""
  if isinstance(tree, (dict, list)) and tree:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = [
      flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in items
    ]
    return {key: value for part in parts for key, value in part.items()}
  return {prefix: tree}


def matches(name: str, keys: Sequence[str]) -> bool:
  """Whether a dotted name is one of `keys` or below one; `*` stands for any index."""
  return any(
    fnmatch.fnmatchcase(name, key) or fnmatch.fnmatchcase(name, f"{key}.*")
    for key in keys
  )
