"""The user's one YAML file, checked whole before anything heavy is imported.

Reading with dotted overrides, every fault in one message; writing, comparing and
claiming an output folder.
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
from raft_jax.config import (
  methods,
  strict_yaml,
  validate,
)
from raft_jax.config import (
  reference as config_reference,
)
from raft_jax.config.schema import Adaptive as Adaptive
from raft_jax.config.schema import Anchor as Anchor
from raft_jax.config.schema import Balance as Balance
from raft_jax.config.schema import Config as Config
from raft_jax.config.schema import Drift as Drift
from raft_jax.config.schema import Engine as Engine
from raft_jax.config.schema import Evaluate as Evaluate
from raft_jax.config.schema import Export as Export
from raft_jax.config.schema import Extract as Extract
from raft_jax.config.schema import Freeze as Freeze
from raft_jax.config.schema import Fusion as Fusion
from raft_jax.config.schema import Ifeval as Ifeval
from raft_jax.config.schema import Judge as Judge
from raft_jax.config.schema import Lora as Lora
from raft_jax.config.schema import Mmlu as Mmlu
from raft_jax.config.schema import Model as Model
from raft_jax.config.schema import Prune as Prune
from raft_jax.config.schema import Recadam as Recadam
from raft_jax.config.schema import Section
from raft_jax.config.schema import Servers as Servers
from raft_jax.config.schema import Tasks as Tasks
from raft_jax.config.schema import Train as Train
from raft_jax.config.schema import VerdictJudge as VerdictJudge
from raft_jax.config.schema import Watch as Watch
from raft_jax.config.schema import Writer as Writer
from raft_jax.storage import atomic


RENAMED = {"train.measure_every": "train.gradient_stats_every"}
"""Keys and sections that have a new name, by the old one. `load` refuses the old names;
the config of an output folder is read with the new ones."""


def load(
  path: str | os.PathLike[str],
  overrides: Sequence[str] = (),
  *,
  without_data: bool = False,
) -> Config:
  """Reads and checks a run's YAML file.

  Args:
    path: the file.
    overrides: `train.batch_size=8`, or `--train.batch_size 8` as two items; values
      follow the rules of the file, and a later one wins.
    without_data: the files of questions may be absent.

  Raises:
    errors.UserError: names every fault at once, each with file:line, key and remedy.
  """
  draft = strict_yaml.Draft()
  tree = draft.read(_read_text(path), "", lambda line: f"{path}:{line}")
  if isinstance(tree, dict):
    draft.tree = tree
  elif not draft.problems:
    what = "is empty" if tree is None else "is not a list of `key: value` lines"
    raise errors.UserError(f"{path}: {what}; start from a file in configs/")
  return _checked(draft, str(path), overrides, without_data)


def from_tree(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
  """Checks a config that `Config.model_dump(mode="json")` gave, with overrides.

  Raises:
    errors.UserError: as `load`.
  """
  draft = strict_yaml.Draft()
  draft.tree = tree
  return _checked(draft, "config", overrides)


def _checked(
  draft: strict_yaml.Draft,
  path: str,
  overrides: Sequence[str],
  without_data: bool = False,
) -> Config:
  for key, text in _pairs(overrides):
    draft.override(key, text)
  config = None
  if not draft.problems or draft.tree:
    config = _validate(draft, path, without_data)
  if draft.problems:
    raise errors.UserError(_message(draft.problems))
  assert config is not None
  return config


def _read_text(path: str | os.PathLike[str]) -> str:
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


def _validate(draft: strict_yaml.Draft, path: str, without_data: bool) -> Config | None:
  """The checked config; faults go to `draft.problems`."""

  def note(key: str, what: str) -> None:
    where = draft.place(key.split("."), path)
    draft.problems.append(strict_yaml.Problem(where, key, what))

  for key, what in () if without_data else validate.missing_files(draft.tree):
    note(key, what)
  for old, new in RENAMED.items():
    if _has(draft.tree, old):
      where = draft.place(old.split("."), path)
      what = f"{old} is now {new}; rename it"
      draft.problems.append(strict_yaml.Problem(where, "", what))
  tree, method = draft.tree, None
  name = tree.get("method", Config.model_fields["method"].default)
  try:
    method = methods.get(name) if isinstance(name, str) else None
  except errors.UserError as e:
    note("method", str(e))
  if method is not None:
    tree = methods.under(method.settings, tree)
  try:
    # JSON's strict mode takes a list for a tuple and 1 for 1.0, but no "8" for 8.
    config = Config.model_validate_json(json.dumps(tree), strict=True)
  except pydantic.ValidationError as e:
    faults = e.errors(include_url=False)
    for fault in faults:
      key = ".".join(map(str, fault["loc"]))
      # A list with a bad item is also reported as too short.
      parent = any(
        f["loc"][:-1][: len(fault["loc"])] == fault["loc"]
        for f in faults
        if f is not fault
      )
      if not parent and key not in draft.unread and key not in RENAMED:
        where = draft.place(fault["loc"], path)
        draft.problems.append(strict_yaml.Problem(where, key, _explain(fault)))
    return None
  needs = method.needs if method else {}
  for key, what in itertools.chain(_missing(config, needs), validate.find(config)):
    note(key, what)
  return config


def _has(tree: Any, key: str) -> bool:
  """Whether a tree holds a dotted key."""
  for part in key.split("."):
    if not isinstance(tree, dict) or part not in tree:
      return False
    tree = tree[part]
  return True


def _with_new_names(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Dotted keys and their values, with the names of `RENAMED` replaced."""
  renamed = {}
  for key, value in flat.items():
    for old, new in RENAMED.items():
      if _under(key, [old]):
        key = new + key.removeprefix(old)
    renamed[key] = value
  return renamed


def _missing(config: Config, needs: Mapping[str, str]) -> Iterator[tuple[str, str]]:
  """Keys without which the method is not what its name says."""
  values = _flat(_tree(config))
  for key, meaning in needs.items():
    if values.get(key) is None:
      yield key, f"method {config.method!r} needs it: {meaning}; set it"


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
  if not fault["loc"]:  # of the whole file: it is no JSON, as half a surrogate pair
    return str(fault["msg"])
  section = _section(fault["loc"][:-1])
  name = str(fault["loc"][-1])
  if fault["type"] == "extra_forbidden":
    return f"unknown key; {_suggest(name, fault['loc'][:-1], section)}"
  if fault["type"] == "missing":
    field = section.model_fields[name]
    meaning = (field.description or str(field.annotation.__doc__)).rstrip(".")
    return f"is required: {meaning}; add it"
  if name == "api_key_env":  # what stands there may be the key
    return "must be the name of an environment variable, which holds the key"
  must = _MUST.get(fault["type"], fault["msg"].replace("Input should be", "must be"))
  if fault["input"] == "encoder" and name == "engine":
    must += " (only a judge can be the encoder)"
  return f"{must}, got {json.dumps(fault['input'], ensure_ascii=False)[:60]}"


def _section(loc: Sequence[str | int]) -> type[Section]:
  section: type[Section] = Config
  for part in loc:
    if isinstance(part, str):
      annotation: Any = section.model_fields[part].annotation
      section = next(iter(typing.get_args(annotation)), annotation)
  return section


def _suggest(name: str, parents: Sequence[str | int], section: type[Section]) -> str:
  prefix = "".join(f"{part}." for part in parents)
  near = difflib.get_close_matches(name, section.model_fields, n=1)
  if near:
    return f"did you mean `{prefix}{near[0]}`?"
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


def own(config: Config) -> dict[str, Any]:
  """The values that are not the method's or the defaults: the least file for a config.

  With another `method` in it, `load` gives that method with the same values of the
  user's own.
  """
  return _own(config, methods.get(config.method).settings) | {"method": config.method}


def _own(section: Section, preset: Mapping[str, Any]) -> dict[str, Any]:
  tree = {}
  dumped = section.model_dump(mode="json")
  for name, field in type(section).model_fields.items():
    value = getattr(section, name)
    given = preset.get(name, field.default)
    if isinstance(value, Section):
      below = _own(value, given if isinstance(given, dict) else {})
      if below or given is None:  # a section that the user opened may be empty
        tree[name] = below
    elif value != given:
      tree[name] = dumped[name]
  return tree


# Writing, comparing, claiming


def dump(config: Config) -> str:
  """YAML of every key, defaults included; `load` reads the same config from it."""
  return strict_yaml.dump(config.model_dump(mode="json"))


def _tree(config: Config | dict[str, Any]) -> dict[str, Any]:
  return config.model_dump(mode="json") if isinstance(config, Config) else config


def digest(config: Config | dict[str, Any]) -> str:
  """sha256 (hex) of the values, whatever the order of the keys."""
  text = json.dumps(_tree(config), sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def values(config: Config, keys: Sequence[str]) -> dict[str, Any]:
  """Dotted key -> value of these keys and of all keys in these sections."""
  return {k: v for k, v in _flat(_tree(config)).items() if _under(k, keys)}


ABSENT = "(absent)"


def diff(
  old: Config | dict[str, Any], new: Config | dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Dotted key -> (old value, new value) where they differ; ABSENT for no such key."""
  a, b = (_with_new_names(_flat(_tree(tree))) for tree in (old, new))
  pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in a | b}
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if isinstance(tree, (dict, list)) and tree:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = [
      _flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in items
    ]
    return {key: value for part in parts for key, value in part.items()}
  return {prefix: tree}


def check_output(config: Config, stage: str, keys: Sequence[str]) -> None:
  """Refuses a folder that holds something else than this run; writes nothing.

  Args:
    config: the run's.
    stage: "refine", "train", ...
    keys: dotted keys or sections that decide the stage's result; between two runs into
      the same folder they may not change. All other keys may.

  Raises:
    errors.UserError: the folder is not ours, or was made with other values of `keys`.
  """
  names = _flat(_tree(config))
  for key in keys:
    # The keys of a section that is null here are none of its own.
    if not any(_under(name, [key]) or _under(key, [name]) for name in names):
      raise ValueError(f"no config key {key!r}")
  output = pathlib.Path(config.output)
  try:
    _check_claim(output, _claim_path(config, stage), config, stage, keys)
  except OSError as e:
    raise errors.UserError(
      f"output: cannot use {output}: {e.strerror}; choose another output"
    ) from e


def claim_output(config: Config, stage: str, keys: Sequence[str]) -> None:
  """Records the config in output/config/<stage>.yaml, after `check_output`.

  Call it in one process only, holding the folder's lock if there is one, and when the
  stage is about to write: a run that never began should not bind the next one.

  Raises:
    errors.UserError: as `check_output`, or the folder cannot be written.
  """
  check_output(config, stage, keys)
  path = _claim_path(config, stage)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary:
      temporary.write_text(dump(config), encoding="utf-8")
  except OSError as e:
    raise errors.UserError(
      f"output: cannot write {path}: {e.strerror}; choose another output"
    ) from e


def _claim_path(config: Config, stage: str) -> pathlib.Path:
  return pathlib.Path(config.output) / "config" / f"{stage}.yaml"


MADE = {
  "train": ("checkpoints and best in it", ("checkpoints/[0-9]*", "best/[0-9]*")),
  "refine": ("refined in it", ("refined/*",)),
}
"""What binds a folder to a stage's config, in words and as patterns; without it the
stage begins anew. The other stages have one config for the whole folder."""


def _check_claim(
  output: pathlib.Path,
  path: pathlib.Path,
  config: Config,
  stage: str,
  keys: Sequence[str],
) -> None:
  if not output.exists():
    return
  present = [item for item in output.iterdir() if not item.name.startswith(".")]
  if present and not path.parent.is_dir():
    raise errors.UserError(
      f"output: {output} is not empty (e.g. {present[0].name}) and no run of raft_jax "
      f"made it; choose another output or empty the folder"
    )
  # Where nothing but claims was left, no run came further than its first checks; nor
  # where a stage has left nothing of what it makes.
  if not path.exists() or [item.name for item in present] == ["config"]:
    return
  words, patterns = MADE.get(stage, ("the folder", ("config",)))
  if not any(found for pattern in patterns for found in output.glob(pattern)):
    return
  draft = strict_yaml.Draft()
  old = draft.read(_read_text(path), "", lambda line: f"{path}:{line}")
  if draft.problems or not isinstance(old, dict):
    raise errors.UserError(
      f"{path}: damaged; delete it if {output} was made with this config, else choose "
      "another output"
    )
  # A key that is younger than the folder had there what is now its default.
  given = _flat(own(config))
  changes = {
    k: (a, b)
    for k, (a, b) in diff(old, config).items()
    if _under(k, keys) and not (a == ABSENT and k not in given)
  }
  if changes:
    shown = "; ".join(f"{key}: {a} -> {b}" for key, (a, b) in changes.items())
    raise errors.UserError(
      f"output: {output} holds a {stage} run of another config ({shown}); choose "
      f"another output, put the old values back, or delete {words}"
    )


def _under(name: str, keys: Sequence[str]) -> bool:
  """Whether a dotted name is one of `keys` or inside one; `*` stands for any index."""
  return any(
    fnmatch.fnmatchcase(name, key) or fnmatch.fnmatchcase(name, f"{key}.*")
    for key in keys
  )


# The command line of every stage
