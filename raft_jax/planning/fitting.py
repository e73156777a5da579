"""A config that fits the data and this machine, with the reason for every value.

Budgets come from the lengths of the rows, batch and steps from their number, and what
saves memory from the memory of a step (`step_memory`).
"""

from __future__ import annotations

import math
import os
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import schema, strict_yaml
from raft_jax.data import batching, inspection, token_rows
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import sharding, transformer
from raft_jax.runtime import interrupts
from raft_jax.training import run_plan, step_memory

GIB = 2.0**30

OUTLIER = 1.5
"""A budget holds every row, unless the longest has so many times the tokens that 99 %
of the rows need."""

STEPS_PER_EPOCH = 16
"""The least number of steps in a pass over the rows, if the batch can be smaller."""

ROOM = 0.8
"""Share of the memory that a step may take."""

PUBLISHED_RATE = 5e-6
LORA_RATES = 40
PUBLISHED_SIZE = 8e9
"""Smaller models bear a higher learning rate than models of this size, roughly with the
inverse root of their parameters."""


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
  sets: Sequence[inspection.QuestionSet],
  tokenizer: chat.ChatTokenizer,
) -> None:
  """Writes a config that fits; the values of `config` that fit any data stay.

  Raises:
    errors.UserError: the file exists, or there is no usable row.
  """
  choices = choose(config, sets, tokenizer)
  text = as_yaml(config, choices, header(config, sets))
  try:
    with path.open("x", encoding="utf-8") as file:
      file.write(text)
  except FileExistsError:
    check_absent(path)


def choose(
  config: schema.Config,
  sets: Sequence[inspection.QuestionSet],
  tokenizer: chat.ChatTokenizer,
) -> Choices:
  """Every value that depends on the data or the machine."""
  source = config.model.source
  decoder = hf_load.load_config(source)
  teacher = config.distill.source
  teacher_decoder = None if teacher is None else hf_load.load_config(teacher)
  learned = next(s for s in reversed(sets) if s.name in ("questions", "refined"))
  refines = config.data.answers != "original" and learned.name == "questions"
  refine = config.refine if refines else None
  choices = budgets(sets, decoder.max_positions, refine)
  rows = usable_rows(learned, choices)
  if not rows:
    raise errors.UserError(
      f"--write: {source} reads {decoder.max_positions} tokens, and no row fits"
    )
  if any(reject.kind != "too_long" for found in sets for reject in found.rejects):
    why = "some rows cannot be used; they are listed in rejects.jsonl"
    choices["data.unusable"] = Choice("skip", why)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  batch, why = batch_size(config, decoder, mesh, rows)
  choices["train.batch_size"] = Choice(batch, why)
  choices |= memory(config, choices, decoder, teacher_decoder, mesh, tokenizer)
  return choices | steps(config, choices, decoder, rows, batch)


# --- Budgets --------------------------------------------------------------------------


def budgets(
  sets: Sequence[inspection.QuestionSet],
  positions: int,
  refine: schema.Refine | None,
) -> Choices:
  """Budgets of tokens for all sources.

  Args:
    positions: tokens that the model reads.
    refine: if `refine` is still to write answers, its settings.
  """
  tables = [inspection.lengths(found) for found in sets if found.rows]
  tokens = {
    part: np.concatenate([table[part] for table in tables])
    for part in ("prompt", "answer")
  }
  tokens["teacher"] = np.concatenate(
    [
      inspection.lengths(found)["teacher"]
      for found in sets
      if found.rows and found.name in ("questions", "refined")
    ]
  )
  points = {part: point(values) for part, values in tokens.items()}
  spare = batching.WIDTH_MULTIPLE if refine else 0
  prompt = min(_wide(points["prompt"]), positions // 2)
  answer = min(_wide(points["answer"]) + spare, positions - prompt)
  ninety_nine = inspection.percentiles(tokens["answer"])[2]
  new = min(_wide(ninety_nine), answer, positions // 2)
  teacher = min(_wide(points["teacher"]) + spare, positions - new)
  limits = {"prompt": prompt, "answer": answer, "teacher": teacher}
  named = {"prompt": "prompts", "answer": "answers", "teacher": "teacher's contexts"}
  choices: Choices = {}
  for part, limit in limits.items():
    _, _, most, longest = inspection.percentiles(tokens[part])
    why = f"99 % of the {named[part]} have at most {most} tokens, the longest {longest}"
    if spare and part != "prompt":
      why += f"; {spare} more for rewritten answers"
    choices[f"data.max_{part}_tokens"] = Choice(limit, why)
  over = sum(
    not token_rows.fits(row, limits.values())
    for found in sets
    for row in found.rows.values()
  )
  if over:
    why = f"{over:,} rows are longer than these budgets and are set aside"
    choices["data.too_long"] = Choice("skip", why)
  elif refine:
    why = "a refined answer may be longer than these budgets; its row is set aside"
    choices["data.too_long"] = Choice("skip", why)
  why = f"99 % of the answers have at most {ninety_nine} tokens with their end token"
  choices["rollout.max_new_tokens"] = Choice(new, why)
  if refine:
    why = "as long as an answer may be; a reply that is cut off is not used"
    for role in ("rewriter", "fusion"):
      if getattr(refine, role).max_new_tokens > answer:
        choices[f"refine.{role}.max_new_tokens"] = Choice(answer, why)
  return choices


def point(tokens: np.ndarray) -> int:
  """The length of the longest row, or if that is an outlier, of 99 % of the rows."""
  _, _, most, longest = inspection.percentiles(tokens)
  return longest if longest <= OUTLIER * most else most


def _wide(length: int) -> int:
  return batching.padded_width(length)


def usable_rows(found: inspection.QuestionSet, choices: Choices) -> int:
  """The number of rows within the chosen budgets."""
  limits = [
    choices[f"data.max_{part}_tokens"].value for part in ("prompt", "answer", "teacher")
  ]
  return sum(token_rows.fits(row, limits) for row in found.rows.values())


# --- Batch and memory -----------------------------------------------------------------


def batch_size(
  config: schema.Config, decoder: transformer.DecoderConfig, mesh: Mesh, rows: int
) -> tuple[int, str]:
  """The largest batch, up to the paper's 16, that gives a pass enough steps."""
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  fitting = []
  for size in sorted({16, 8, 4, 2, 1, parts}, reverse=True):
    try:
      layout = run_plan.batch_layout(size, config.replay, config.rollout, distils=True)
      run_plan.check(
        config.model, decoder, mesh, top_k=None, rows=layout.rows, micro_batches=1
      )
    except errors.UserError:
      continue
    fitting.append(size)
  if not fitting:
    return config.train.batch_size, "as given: a share of replayed rows depends on it"
  enough = [size for size in fitting if rows // size >= STEPS_PER_EPOCH]
  size = max(enough) if enough else min(fitting)
  return size, f"{rows:,} rows give {rows // size:,} steps a pass"


def ladder(batch: int, parts: int, *, lora: bool) -> Iterator[dict[str, Any]]:
  """Ever more that saves memory: recomputing, small pieces, few trained parameters."""
  pieces = batch // parts if batch % parts == 0 else 1
  yield {"model.remat": False, "train.micro_batches": 1}
  yield {"model.remat": True, "train.micro_batches": 1}
  if pieces > 1:
    yield {"model.remat": True, "train.micro_batches": pieces}
  if not lora:
    yield {"model.remat": True, "train.micro_batches": pieces, "lora": {}}


def memory(
  config: schema.Config,
  choices: Choices,
  decoder: transformer.DecoderConfig,
  teacher_decoder: transformer.DecoderConfig | None,
  mesh: Mesh,
  tokenizer: chat.ChatTokenizer,
) -> Choices:
  """What a step needs to fit into memory: the first rung of `ladder` that does."""
  room = device_bytes(mesh)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  batch = choices["train.batch_size"].value
  kept: dict[str, Any] = {}
  why = ""
  for keys in ladder(batch, parts, lora=config.lora is not None):
    interrupts.check()
    values = {key: choice.value for key, choice in choices.items()} | keys
    try:
      trial = config_load.from_tree(merged(config, values))
    except errors.UserError:  # as LoRA with a method that needs all parameters
      continue
    plan = plan_of(trial, decoder, teacher_decoder, mesh, tokenizer)
    kept = keys
    if room is None:
      why = "the memory of these devices is not known; see `python -m raft_jax.plan`"
      break
    needed, fits = step_needs(plan, room)
    why = f"a step takes {needed} of the {room / GIB:.1f} GiB here"
    if fits:
      break
    why += ". IT DOES NOT FIT: lower the budgets or take another machine"
  choices = {key: Choice(value, why) for key, value in kept.items()}
  if "lora" in choices:
    choices["lora"] = Choice({}, "all parameters do not fit; " + why)
  return choices


def step_needs(plan: run_plan.RunPlan, room: float) -> tuple[str, bool]:
  """The bytes of a step in words, and whether they fit.

  Compiles the step only where a rough estimate does not decide.
  """
  rough = step_memory.rough_bytes(plan)
  if rough < room / 3:
    return f"about {rough / GIB:.1f} GiB", True
  state = (plan.abstract_state, step_memory.reference_shapes(plan))
  least = step_memory.bytes_per_device(state) * len(plan.mesh.local_devices)
  if least > room:
    return f"more than {least / GIB:.1f} GiB", False
  needed = step_memory.step_bytes(plan)
  return f"{needed / GIB:.1f} GiB", needed <= ROOM * room


def device_bytes(mesh: Mesh) -> float | None:
  """Memory of the local devices, or None if they do not tell."""
  if run_plan.platform(mesh) == "cpu":
    return float(step_memory.host_bytes())
  limits = [
    (device.memory_stats() or {}).get("bytes_limit", math.nan)
    for device in mesh.local_devices
  ]
  return None if math.isnan(sum(limits)) else float(sum(limits))


def plan_of(
  config: schema.Config,
  decoder: transformer.DecoderConfig,
  teacher_decoder: transformer.DecoderConfig | None,
  mesh: Mesh,
  tokenizer: chat.ChatTokenizer,
) -> run_plan.RunPlan:
  """The plan of a run whose rows are as long as the budgets allow."""
  distils = run_plan.uses_distillation(config.distill, config.balance)
  layout = run_plan.batch_layout(
    config.train.batch_size, config.replay, config.rollout, distils=distils
  )
  prompt, answer, teacher = map(_wide, token_rows.budgets(config.data))
  return run_plan.make_plan(
    config,
    decoder,
    teacher_decoder,
    mesh,
    batch_rows=layout.rows,
    widest=(prompt, answer, teacher),
    total_steps=1,
    eos_ids=tokenizer.eos_ids,
    pad_id=tokenizer.pad_id,
  )


# --- Steps and learning rate ----------------------------------------------------------


def steps(
  config: schema.Config,
  choices: Choices,
  decoder: transformer.DecoderConfig,
  rows: int,
  batch: int,
) -> Choices:
  """Passes, learning rate, checkpoints. The first two stay if the config has them."""
  given = config_load.flat(config_load.non_defaults(config))
  train = config.train
  per_epoch = max(rows // batch, 1)
  epochs = train.epochs
  if "train.epochs" not in given and rows > 20_000:
    epochs = 1
  total = min(per_epoch * epochs, train.max_steps or per_epoch * epochs)
  warm_up = math.ceil(train.warmup_ratio * total)
  why = f"{per_epoch:,} steps a pass, {total:,} in all, {warm_up} of them warm-up"
  found = {"train.epochs": Choice(epochs, why)}
  if "train.learning_rate" not in given:
    lora = config.lora is not None or "lora" in choices
    found["train.learning_rate"] = learning_rate(decoder, lora=lora)
  every = min(100, max(1, total // 4))
  why = "after an interruption, at most so many steps are computed again"
  return found | {"train.checkpoint_every": Choice(every, why)}


def learning_rate(decoder: transformer.DecoderConfig, *, lora: bool) -> Choice:
  """A rate to start from, for a model of this size."""
  count = parameters(decoder)
  rate = PUBLISHED_RATE * max(1.0, math.sqrt(PUBLISHED_SIZE / count))
  rate = min(rate, 1e-4) * (LORA_RATES if lora else 1)
  rate = float(f"{min(rate, 1e-3):.0e}")
  low = " with LoRA" if lora else ""
  return Choice(
    rate,
    f"a start for {count / 1e6:,.0f} million parameters{low} (5e-6 is published for "
    "models of billions; smaller ones take more); try half and double of it",
  )


def parameters(decoder: transformer.DecoderConfig) -> int:
  """The number of the model's parameters."""
  leaves: list[Any] = []

  def visit(tree: Any) -> None:
    if isinstance(tree, Mapping):
      for branch in tree.values():
        visit(branch)
    else:
      leaves.append(tree)

  visit(transformer.shapes(decoder))
  return sum(leaf.size for leaf in leaves)


# --- The file -------------------------------------------------------------------------


def header(config: schema.Config, sets: Sequence[inspection.QuestionSet]) -> list[str]:
  """The first lines of the file."""
  rows = ", ".join(f"{found.used:,} rows of {found.name}" for found in sets)
  lines = [
    f"Written by `inspect` for {rows}.",
    "Every comment says why; change what you know better.",
  ]
  if config.data.test is None:
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
