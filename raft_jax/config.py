"""The user's one YAML file, checked whole before anything heavy is imported.

Sections mirror the rooms of the package; every key has a default but `model`, `data`
and `output`. Values marked [P] are printed in the RAFT paper (arXiv 2606.00147), [R]
come from a published summary of it on a co-author's account, [O] are ours.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic
import yaml

from raft_jax import errors

Positive = Annotated[int, pydantic.Field(gt=0)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**31)]  # a 32-bit key for jax and grain
Probability = Annotated[float, pydantic.Field(ge=0.0, le=1.0)]


class Section(pydantic.BaseModel):
  """Immutable, and a misspelt key is an error."""

  model_config = pydantic.ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True
  )


class Model(Section):
  """The model to fine-tune; also the frozen teacher."""

  source: str
  """A hub name, a folder, or `pkg://PACKAGE/FILE` (a file of an installed package)."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the activations. Parameters and optimizer state are always float32 [P: bf16]."""
  remat: bool = False
  """Recompute each layer in the backward pass instead of keeping its activations."""
  unroll: Annotated[int, pydantic.Field(ge=0)] = 1
  """Layers per iteration of the scan over layers; 0 means all of them."""


class Data(Section):
  """Where the questions are and how long they may be."""

  questions: str
  """For training: JSONL or Parquet {id?, domain?, question or messages, answer}."""
  validation: str | None = None
  """Questions for the loss while training, in the same form."""
  test: str | None = None
  """Held-out questions for `evaluate`, in the same form."""
  limit: Positive | None = None
  """Use only the first N questions."""
  max_prompt_tokens: Positive = 256
  """Budget of a question in its chat template."""
  max_answer_tokens: Positive = 256
  """Budget of an answer with its end-of-turn token."""
  max_teacher_tokens: Positive = 768
  """Budget of the teacher's context (answer and question), without the rollout."""
  too_long: Literal["error", "skip"] = "error"
  """What to do with a row over a budget; rows are never truncated."""
  buckets: Positive = 2
  """Number of padded widths a run may compile for."""
  reject_threshold: Probability = 0.01
  """A larger share of unreadable rows stops the run."""


class Engine(Section):
  """Who generates text. `model: null` means the model to be trained."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  """The built-in sampler, vLLM in this process, or a server with OpenAI's API."""
  model: str | None = None
  """A source, or the server's name for it; null means the model to be trained."""
  max_new_tokens: Positive = 256
  """Longest reply; a reply cut off there is not used."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Of sampling; 0 takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens that hold this mass."""
  batch_size: Positive = 16
  """Requests at a time; finished calls are kept after each batch."""


class Fusion(Engine):
  """Who writes one answer from the original and the rewrite."""

  rounds: Positive = 3
  """Most answers written for one question [O]."""
  accept_at: Probability = 0.8
  """Stop at the first round whose mean judge score reaches this [R]."""


class Judge(Section):
  """A language model, or `encoder`: the sentence encoder's cosine mapped to 0..1."""

  engine: Literal["encoder", "jax", "vllm", "openai"] = "encoder"
  """`encoder`: the cosine of `refine.encoder` mapped to 0..1; others ask a model."""
  model: str | None = None
  """As `refine.rewriter.model`; an `encoder` judge has none."""
  max_new_tokens: Positive = 64
  """Longest verdict."""
  batch_size: Positive = 16
  """Verdicts at a time."""


class Refine(Section):
  """Stage 1: rewrite, filter, fuse and judge the answers."""

  rewriter: Engine = Engine()
  encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
  """Sentence encoder: a hub name, a folder, or `pkg://PACKAGE/FOLDER`."""
  similarity_threshold: Annotated[float, pydantic.Field(ge=-1.0, le=1.0)] = 0.8
  """Least cosine of answer and rewrite; below it the original answer is kept [R]."""
  fusion: Fusion = Fusion()
  judges: Annotated[tuple[Judge, ...], pydantic.Field(min_length=1)] = (Judge(),)
  """Each scores every fused answer; their mean decides."""
  seed: Seed = 0
  """Of all sampling in this stage."""
  records_per_shard: Positive = 1024
  """Refined records per file."""


class Train(Section):
  """Stage 2: cross-entropy beside on-policy distillation."""

  epochs: Positive = 3
  """Passes over the questions [P]."""
  max_steps: Positive | None = None
  """Stop after this many steps even if epochs are left."""
  batch_size: Positive = 16
  """Questions per step, over all devices [P]."""
  micro_batches: Positive = 1
  """Split the batch; the result equals the unsplit step."""
  learning_rate: Annotated[float, pydantic.Field(ge=0.0)] = 5e-6
  """Its peak, after the warm-up and before the cosine to 0 [R]."""
  weight_decay: Annotated[float, pydantic.Field(ge=0.0)] = 0.01
  """Of AdamW [P]."""
  warmup_ratio: Probability = 0.03
  """Share of the steps with a linearly rising learning rate [O]."""
  clip: Annotated[float, pydantic.Field(gt=0.0)] | None = 1.0
  """Largest norm of the whole gradient; null for no clipping [O]."""
  loss_mean: Literal["sequence", "token"] = "sequence"
  """Mean over sequences of the mean over tokens, or over all tokens alike."""
  seed: Seed = 0
  """Of the order of the questions and of the rollouts."""
  checkpoint_every: Positive = 100
  """Steps between checkpoints."""
  keep_checkpoints: Positive = 2
  """Older checkpoints are deleted."""
  measure_every: Annotated[int, pydantic.Field(ge=0)] = 20
  """Every N steps: each loss's gradient norm, their cosine, and the time of each phase;
  costs one more backward pass. 0 turns it off."""
  tensorboard: bool = False
  """Write TensorBoard events too; metrics.jsonl is always written."""


class Rollout(Section):
  """The answers the model being trained samples, on which it is distilled."""

  max_new_tokens: Positive = 256
  """Longest rollout [O]."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Of sampling; 0 takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens that hold this mass."""


class Distill(Section):
  """The distillation loss."""

  top_k: Positive = 512
  """Tokens compared at each position: the teacher's most probable [P]."""
  temperature: Annotated[float, pydantic.Field(gt=0.0)] = 1.5
  """Divides both models' logits in the loss; not the sampling temperature [R]."""
  direction: Literal["forward", "reverse", "jsd"] = "forward"
  """`forward` is KL(teacher, student), `reverse` the other way, `jsd` between [R]."""
  beta: Annotated[float, pydantic.Field(gt=0.0, lt=1.0)] = 0.5
  """Mixture weight of `jsd`."""
  tail: Literal["renormalize", "bucket"] = "renormalize"
  """The tokens outside the top K: left out, or one more class [P]."""
  scale_by_t2: bool = True
  """Multiply the loss by the squared temperature [P]."""
  teacher_context: Literal["chat", "paper", "none"] = "chat"
  """How the teacher sees the answer: in a chat turn, as raw text [P], or not at all."""
  trajectory: Literal["rollout", "answer"] = "rollout"
  """Where teacher and student are compared: the student's rollout, or the answer."""
  skip_first: Annotated[int, pydantic.Field(ge=0)] = 0
  """Rollout tokens at the start that the distillation loss leaves out."""
  mask_eos: bool = False
  """Leave the rollout's end-of-turn token out of the distillation loss."""


class Balance(Section):
  """The weight of the distillation loss beside the cross-entropy."""

  mode: Literal["ema", "fixed", "schedule", "gradient_norm"] = "ema"
  """`ema`: the ratio of both losses' moving averages [P]; the others see `weight`."""
  decay: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.9
  """Of the moving averages [P]."""
  eps: Annotated[float, pydantic.Field(gt=0.0)] = 1e-8
  """Added to the divisor [O]."""
  max_weight: Annotated[float, pydantic.Field(gt=0.0)] | None = 100.0
  """Upper bound of the weight; null for none [O]."""
  weight: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """`fixed`: the weight; `schedule`: its value at the end; `gradient_norm`: the target
  ratio of the two gradients' norms."""
  start: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
  """`schedule`: the weight at step 0, from which it moves linearly."""


class Mesh(Section):
  """Devices per axis; one axis may be -1, meaning all that are left."""

  data: int = 1
  """Copies of the model, each reading a share of the batch."""
  fsdp: int = -1
  """Shares of parameters and batch."""
  tensor: int = 1
  """Shares of every matrix product."""


class Evaluate(Section):
  """Scores on `data.test`, beside the base model's."""

  limit: Positive | None = None
  """Use only the first N test questions."""
  max_new_tokens: Positive = 64
  """Longest answer."""
  batch_size: Positive = 16
  """Questions answered at a time."""
  samples: Annotated[int, pydantic.Field(ge=0)] = 8
  """Answers shown in the report."""


class Config(Section):
  """The whole file."""

  model: Model
  data: Data
  refine: Refine = Refine()
  method: str = "raft"
  """RAFT, or the name of a method it is compared with."""
  train: Train = Train()
  rollout: Rollout = Rollout()
  distill: Distill = Distill()
  balance: Balance = Balance()
  mesh: Mesh = Mesh()
  evaluate: Evaluate = Evaluate()
  output: str
  """Folder for everything a run writes; each run needs its own."""


# Reading: strict YAML, dotted overrides, every fault in one message


class _Problem(NamedTuple):
  where: str  # "file:line" or "command line"
  key: str
  what: str


class _Loader(yaml.SafeLoader):
  """YAML 1.2's scalars: `1e-5` is a number; `no`, `12:30` and dates are text."""

  yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

  def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
    if self.check_event(yaml.AliasEvent):
      mark = self.peek_event().start_mark
      raise yaml.composer.ComposerError(None, None, "* refers to an anchor", mark)
    return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
  """Quotes a text exactly where `_Loader` would read something else."""

  yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

  def represent_str(self, text: str) -> yaml.ScalarNode:
    # PyYAML's other styles fold line breaks such as U+0085 away.
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


class _Draft:
  """What was read so far: plain values, where each key stands, what is wrong."""

  def __init__(self) -> None:
    self.tree: Any = {}
    self.places: dict[str, str] = {}
    self.problems: list[_Problem] = []
    self.unread: set[str] = set()  # keys whose value could not be read at all

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
    self.problems.append(_Problem(where, key, what))
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
        self.problems.append(_Problem(where, child, what))
      first.setdefault(name, where)
      result[name] = self._plain(value_node, child, place)
      self.places[child] = where
    return result

  def override(self, key: str, text: str) -> None:
    """Sets one dotted key to a value read by the rules of the file."""
    where = "command line"
    value = self.read(text, key, lambda line: where)
    *parents, last = key.split(".")
    node = self.tree
    for part in parents:
      if isinstance(node, dict):
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
      self.problems.append(_Problem(where, key, what))

  def place(self, loc: Sequence[str | int], otherwise: str) -> str:
    """Where a key stands, else its closest parent."""
    for end in range(len(loc), 0, -1):
      dotted = ".".join(map(str, loc[:end]))
      if dotted in self.places:
        return self.places[dotted]
    return otherwise


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
  """Reads and checks a run's YAML file.

  Args:
    path: the file.
    overrides: `train.batch_size=8`, or `--train.batch_size 8` as two items; values
      follow the rules of the file, and a later one wins.

  Raises:
    errors.UserError: names every fault at once, each with file:line, key and remedy.
  """
  draft = _Draft()
  tree = draft.read(_read_text(path), "", lambda line: f"{path}:{line}")
  if isinstance(tree, dict):
    draft.tree = tree
  elif not draft.problems:
    what = "is empty" if tree is None else "is not a list of `key: value` lines"
    raise errors.UserError(f"{path}: {what}; start from a file in configs/")
  for key, text in _pairs(overrides):
    draft.override(key, text)
  config = None
  if not draft.problems or draft.tree:
    config = _validate(draft, str(path))
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


def _validate(draft: _Draft, path: str) -> Config | None:
  """The checked config; faults go to `draft.problems`."""
  for key, what in _missing_files(draft.tree):
    draft.problems.append(_Problem(draft.place(key.split("."), path), key, what))
  try:
    # JSON's strict mode takes a list for a tuple and 1 for 1.0, but no "8" for 8.
    config = Config.model_validate_json(json.dumps(draft.tree), strict=True)
  except pydantic.ValidationError as e:
    faults = e.errors(include_url=False)
    for fault in faults:
      key = ".".join(map(str, fault["loc"]))
      # A list with a bad item is also reported as too short.
      parent = any(f["loc"][:-1][: len(fault["loc"])] == fault["loc"] for f in faults)
      if not parent and key not in draft.unread:
        where = draft.place(fault["loc"], path)
        draft.problems.append(_Problem(where, key, _explain(fault)))
    return None
  for key, what in _conflicts(config):
    draft.problems.append(_Problem(draft.place(key.split("."), path), key, what))
  return config


def _message(problems: list[_Problem]) -> str:
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
    meaning = section.model_fields[name].description or "a section"
    return f"is required: {meaning}"
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
  last = {key.name.rsplit(".", 1)[-1] for key in _keys()}
  word = next(iter(difflib.get_close_matches(name, last, n=1, cutoff=0.8)), None)
  elsewhere = [key.name for key in _keys() if key.name.rsplit(".", 1)[-1] == word]
  if elsewhere:
    return f"did you mean `{'` or `'.join(elsewhere)}`?"
  here = f"`{prefix[:-1]}` has" if parents else "there are"
  return f"{here} {', '.join(section.model_fields)}"


def _missing_files(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
  data = tree.get("data")
  for name in ("questions", "validation", "test"):
    value = data.get(name) if isinstance(data, dict) else None
    if isinstance(value, str) and not pathlib.Path(value).is_file():
      yield (
        f"data.{name}",
        f"{value!r} is not a file (looked in {pathlib.Path.cwd()}); give a .jsonl or "
        f".parquet file",
      )


def _conflicts(config: Config) -> Iterator[tuple[str, str]]:
  """Values that are right each by itself, but not together. Needs no model."""
  for key, text in (("model.source", config.model.source), ("output", config.output)):
    if not text.strip():
      yield key, "is empty; give a name"
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
  yield from _unused(config)
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


def _unused(config: Config) -> Iterator[tuple[str, str]]:
  """Keys somebody set that this run would never read."""
  distill, balance = config.distill, config.balance
  if distill.direction != "jsd" and distill.beta != Distill().beta:
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
  length = config.rollout.max_new_tokens
  if distill.trajectory == "rollout" and distill.skip_first >= length:
    yield (
      "distill.skip_first",
      f"leaves no token of rollout.max_new_tokens={length}; make it smaller",
    )


# Writing, comparing, claiming


def dump(config: Config) -> str:
  """YAML of every key, defaults included; `load` reads the same config from it."""
  return _yaml(config.model_dump(mode="json"))


def _yaml(tree: dict[str, Any]) -> str:
  return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _tree(config: Config | dict[str, Any]) -> dict[str, Any]:
  return config.model_dump(mode="json") if isinstance(config, Config) else config


def digest(config: Config | dict[str, Any]) -> str:
  """sha256 (hex) of the values, whatever the order of the keys."""
  text = json.dumps(_tree(config), sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


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


def claim_output(config: Config, stage: str, keys: Sequence[str]) -> None:
  """Records the config in output/config/<stage>.yaml, or refuses a foreign folder.

  Call it in one process only, holding the folder's lock if there is one.

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
  path = output / "config" / f"{stage}.yaml"
  try:
    _check_claim(output, path, config, stage, keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(dump(config), encoding="utf-8")
    os.replace(temporary, path)
  except OSError as e:
    raise errors.UserError(
      f"output: cannot write {path}: {e.strerror}; choose another output"
    ) from e


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
  if not path.exists():
    return
  draft = _Draft()
  old = draft.read(_read_text(path), "", lambda line: f"{path}:{line}")
  if draft.problems or not isinstance(old, dict):
    raise errors.UserError(f"{path}: damaged; choose another output or delete {output}")
  changes = {k: v for k, v in diff(old, config).items() if _under(k, keys)}
  if changes:
    shown = "; ".join(f"{key}: {a} -> {b}" for key, (a, b) in changes.items())
    raise errors.UserError(
      f"output: {output} holds a {stage} run of another config ({shown}); choose "
      f"another output, put the old values back, or delete the folder"
    )


def _under(name: str, keys: Sequence[str]) -> bool:
  return any(name == key or name.startswith(f"{key}.") for key in keys)


# The command line of every stage


def run(
  stage: str,
  main: Callable[[Config], None],
  description: str,
  argv: Sequence[str] | None = None,
) -> None:
  """Runs `python -m raft_jax.<stage> --config FILE [key=value ...] [--print-config]`.

  Bad input is a message on stderr and exit code 2, Ctrl-C a hint and exit code 130;
  neither shows a traceback.
  """
  parser = argparse.ArgumentParser(
    prog=f"python -m raft_jax.{stage}",
    usage="%(prog)s --config FILE [key=value ...] [--print-config]",
    description=description,
    epilog=_help_table(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--config", metavar="FILE", help="the run's YAML file")
  parser.add_argument(
    "--print-config", action="store_true", help="print every key's value and stop"
  )
  options, overrides = parser.parse_known_args(argv)
  try:
    if options.config is None:
      raise errors.UserError(
        f"--config is missing; e.g. {parser.prog} --config configs/quickstart.yaml"
      )
    config = load(options.config, overrides)
    if options.print_config:
      print(dump(config), end="")
    else:
      main(config)
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted; run the same command again to continue", file=sys.stderr)
    sys.exit(130)


# The reference


class _Key(NamedTuple):
  name: str  # dotted; [] for each item of a list
  type: str  # "" for a section
  default: str
  meaning: str


@functools.cache
def _keys() -> tuple[_Key, ...]:
  schema = Config.model_json_schema()
  return tuple(_walk(schema, schema["$defs"], "", {}))


def _walk(
  schema: dict[str, Any], definitions: dict[str, Any], prefix: str, defaults: Any
) -> Iterator[_Key]:
  for name, field in schema["properties"].items():
    default = defaults.get(name, field.get("default", ABSENT))
    meaning = " ".join(field.get("description", "").split())
    key = f"{prefix}{name}"
    inner = field.get("items", field)
    if "$ref" not in inner:
      shown = "required" if default == ABSENT else _yaml_word(default)
      yield _Key(key, _type_text(field), shown, meaning)
      continue
    section = definitions[inner["$ref"].rsplit("/", 1)[-1]]
    if "items" in field:
      yield _Key(key, "list of sections", f"{len(default)} with defaults", meaning)
      yield from _walk(section, definitions, f"{key}[].", {})
    else:
      meaning = meaning or " ".join(section.get("description", "").split())
      yield _Key(key, "", "", meaning)
      given = default if isinstance(default, dict) else {}
      yield from _walk(section, definitions, f"{key}.", given)


def _yaml_word(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _type_text(field: dict[str, Any]) -> str:
  if "anyOf" in field:
    inner = [option for option in field["anyOf"] if option["type"] != "null"]
    return f"{_type_text(inner[0])}, or null"
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
  names = {"integer": "int", "number": "float", "string": "text", "boolean": "bool"}
  return f"{names[field['type']]} {' and '.join(bounds)}".strip()


def _help_table() -> str:
  lines = ["every key, its type and default:"]
  for key in _keys():
    head = f"  {key.name}" + (f"  {key.type} = {key.default}" if key.type else "")
    lines += [head] if key.type else ["", head]
    indent = "      "
    lines += textwrap.wrap(
      key.meaning, 84, initial_indent=indent, subsequent_indent=indent
    )
  return "\n".join(lines)


def reference() -> str:
  """A Markdown table of all keys; the README holds it verbatim."""
  rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
  for key in _keys():
    name = f"`{key.name}`" if key.type else f"**`{key.name}`**"
    default = f"`{key.default}`" if key.default not in ("", "required") else key.default
    meaning = key.meaning.replace("|", "\\|")
    rows.append(f"| {name} | {key.type} | {default} | {meaning} |")
  return "\n".join(rows) + "\n"
