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

from raft_jax import errors, methods, schema, strict_yaml
from raft_jax.schema import Anchor as Anchor
from raft_jax.schema import Balance as Balance
from raft_jax.schema import Config as Config
from raft_jax.schema import Engine as Engine
from raft_jax.schema import Evaluate as Evaluate
from raft_jax.schema import Export as Export
from raft_jax.schema import Freeze as Freeze
from raft_jax.schema import Fusion as Fusion
from raft_jax.schema import Judge as Judge
from raft_jax.schema import Lora as Lora
from raft_jax.schema import Mmlu as Mmlu
from raft_jax.schema import Model as Model
from raft_jax.schema import Recadam as Recadam
from raft_jax.schema import Section
from raft_jax.schema import Train as Train


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

  for key, what in () if without_data else _missing_files(draft.tree):
    note(key, what)
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
      parent = any(f["loc"][:-1][: len(fault["loc"])] == fault["loc"] for f in faults)
      if not parent and key not in draft.unread:
        where = draft.place(fault["loc"], path)
        draft.problems.append(strict_yaml.Problem(where, key, _explain(fault)))
    return None
  needs = method.needs if method else {}
  for key, what in itertools.chain(_missing(config, needs), _conflicts(config)):
    note(key, what)
  return config


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
  section = _section(fault["loc"][:-1])
  name = str(fault["loc"][-1])
  if fault["type"] == "extra_forbidden":
    return f"unknown key; {_suggest(name, fault['loc'][:-1], section)}"
  if fault["type"] == "missing":
    field = section.model_fields[name]
    meaning = (field.description or str(field.annotation.__doc__)).rstrip(".")
    return f"is required: {meaning}; add it"
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
  last = {key.name.rsplit(".", 1)[-1] for key in schema.every_key()}
  word = next(iter(difflib.get_close_matches(name, last, n=1, cutoff=0.8)), None)
  elsewhere = [
    key.name for key in schema.every_key() if key.name.rsplit(".", 1)[-1] == word
  ]
  if elsewhere:
    return f"did you mean `{'` or `'.join(elsewhere)}`?"
  here = f"`{prefix[:-1]}` has" if parents else "there are"
  return f"{here} {', '.join(section.model_fields)}"


QUESTION_FILES = (
  *("data.questions", "data.test"),
  *("anchor.questions", "replay.questions"),
)


def _missing_files(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
  for key in QUESTION_FILES:
    section, name = key.split(".")
    values = tree.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    if isinstance(value, str) and not pathlib.Path(value).is_file():
      yield (
        key,
        f"{value!r} is not a file (looked in {pathlib.Path.cwd()}); give a .jsonl or "
        f".parquet file",
      )


def _conflicts(config: Config) -> Iterator[tuple[str, str]]:
  """Values that are right each by itself, but not together. Needs no model."""
  for key, text in (("model.source", config.model.source), ("output", config.output)):
    if not text.strip():
      yield key, "is empty; give a name"
  # os.path, unlike pathlib, says no where a name is too long to be looked up.
  if os.path.exists(config.output) and not os.path.isdir(config.output):
    yield "output", f"{config.output} is not a folder; choose another output"
  sizes = config.mesh.model_dump()
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      yield f"mesh.{axis}", f"must be a number of devices or -1, got {size}"
  if list(sizes.values()).count(-1) > 1:
    yield "mesh", "only one axis may be -1 (all devices that are left)"
  if config.train.batch_size % config.train.micro_batches:
    yield (
      "train.micro_batches",
      f"must divide train.batch_size={config.train.batch_size}, "
      f"got {config.train.micro_batches}",
    )
  if config.balance.mode == "gradient_norm" and not config.train.measure_every:
    yield "train.measure_every", "must be above 0 for balance.mode=gradient_norm"
  if config.balance.mode == "gradient_norm" and not config.balance.weight:
    yield "balance.weight", "must be above 0 for balance.mode=gradient_norm"
  yield from _parts(config)
  yield from _unused(config)
  yield from _engines(config.refine)
  seen = set()
  for i, judge in enumerate(config.refine.judges):
    if judge.engine == "encoder" and judge.model is not None:
      yield (
        f"refine.judges.{i}.model",
        "an encoder judge uses refine.encoder; delete this line",
      )
    if judge in seen:
      yield f"refine.judges.{i}", "is the same judge again; delete it or change it"
    seen.add(judge)


def _engines(refine: schema.Refine) -> Iterator[tuple[str, str]]:
  """Keys of other engines than the one a role names, and keys that its own needs."""
  roles: list[tuple[str, schema.Asked]] = [
    ("refine.rewriter", refine.rewriter),
    ("refine.fusion", refine.fusion),
    *((f"refine.judges.{i}", judge) for i, judge in enumerate(refine.judges)),
  ]
  for place, role in roles:
    for engine, keys in schema.ENGINE_KEYS.items():
      for key in keys:
        default = type(role).model_fields[key].default
        if role.engine != engine and getattr(role, key) != default:
          yield (
            f"{place}.{key}",
            f"is read with engine: {engine} only; set that or delete it",
          )
    if role.engine == "openai":
      if not (role.base_url or "").startswith(("http://", "https://")):
        yield (
          f"{place}.base_url",
          "must be the server's address, like http://localhost:8000/v1",
        )
      if not role.model:
        yield f"{place}.model", "is required with engine: openai: its name there"


def _parts(config: Config) -> Iterator[tuple[str, str]]:
  """Parts of methods that do not go together."""
  distill, anchor = config.distill, config.anchor
  if not config.train.cross_entropy:
    if distill.teacher == "none":
      yield (
        "train.cross_entropy",
        "without it and with distill.teacher=none no loss is left; set one of the two",
      )
    if config.balance.mode in ("ema", "gradient_norm"):
      yield (
        "balance.mode",
        f"{config.balance.mode} weighs distillation against the cross-entropy, which "
        "train.cross_entropy=false leaves out; set fixed or schedule",
      )
  if distill.teacher == "live" and distill.teacher_context == "none":
    yield (
      "distill.teacher_context",
      "none shows the live teacher what the student sees: its loss is 0; set another",
    )
  if distill.source is not None and distill.teacher != "base":
    yield "distill.source", "is read with distill.teacher=base only; delete this line"
  if anchor is not None:
    if anchor.importance != "none" and anchor.questions is None:
      yield "anchor.questions", "anchor.importance needs general questions; name a file"
    if config.recadam is not None:
      yield "anchor", "recadam has a pull of its own; delete one of the two sections"
  if config.prune is not None and config.export.adapter:
    yield "export.adapter", "an adapter cannot hold a pruned change; delete one of both"
  freeze = config.freeze
  if freeze is not None and (freeze.mode == "names") != bool(freeze.names):
    yield "freeze.names", "goes with freeze.mode=names, and that with names; change one"
  if config.lora is not None:
    for name, what in (
      ("anchor", "pulls to the base model's parameters"),
      ("recadam", "pulls to the base model's parameters"),
      ("freeze", "names the base model's parameters"),
      ("soft_mask", "masks the base model's parameters"),
    ):
      if getattr(config, name) is not None:
        yield name, f"{what}, and `lora` trains none of these; delete one of the two"


def _unused(config: Config) -> Iterator[tuple[str, str]]:
  """Keys somebody set that this run would never read."""
  distill, balance = config.distill, config.balance
  if distill.direction != "jsd" and distill.beta != schema.Distill().beta:
    yield (
      "distill.beta",
      "is read with distill.direction=jsd only; set that or delete it",
    )
  if balance.mode != "schedule" and balance.start != Balance().start:
    yield (
      "balance.start",
      "is read with balance.mode=schedule only; set that or delete it",
    )
  if balance.mode == "ema" and balance.weight != Balance().weight:
    yield (
      "balance.weight",
      "is not read with balance.mode=ema; change that or delete it",
    )
  if config.export.adapter and config.lora is None:
    yield "export.adapter", "needs a `lora` section; add it, or delete this line"
  length = config.rollout.max_new_tokens
  if distill.trajectory == "rollout" and distill.skip_first >= length:
    yield (
      "distill.skip_first",
      f"leaves no token of rollout.max_new_tokens={length}; make it smaller",
    )


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
  a, b = _flat(_tree(old)), _flat(_tree(new))
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
  for key in keys:
    if not any(_under(name, [key]) for name in _flat(_tree(config))):
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
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(dump(config), encoding="utf-8")
    os.replace(temporary, path)
  except OSError as e:
    raise errors.UserError(
      f"output: cannot write {path}: {e.strerror}; choose another output"
    ) from e


def _claim_path(config: Config, stage: str) -> pathlib.Path:
  return pathlib.Path(config.output) / "config" / f"{stage}.yaml"


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
  # Where nothing but claims was left, no run came further than its first checks.
  if not path.exists() or [item.name for item in present] == ["config"]:
    return
  draft = strict_yaml.Draft()
  old = draft.read(_read_text(path), "", lambda line: f"{path}:{line}")
  if draft.problems or not isinstance(old, dict):
    raise errors.UserError(
      f"{path}: damaged; delete it if {output} was made with this config, else choose "
      "another output"
    )
  changes = {k: v for k, v in diff(old, config).items() if _under(k, keys)}
  if changes:
    shown = "; ".join(f"{key}: {a} -> {b}" for key, (a, b) in changes.items())
    raise errors.UserError(
      f"output: {output} holds a {stage} run of another config ({shown}); choose "
      f"another output, put the old values back, or delete the folder"
    )


def _under(name: str, keys: Sequence[str]) -> bool:
  """Whether a dotted name is one of `keys` or inside one; `*` stands for any index."""
  return any(
    fnmatch.fnmatchcase(name, key) or fnmatch.fnmatchcase(name, f"{key}.*")
    for key in keys
  )


# The command line of every stage
