"""A config that fits the data and this machine, with the reason for every value.

Budgets come from the lengths of the rows, batch and steps from their number, and what
saves memory from the memory of a step (`step_memory`).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.data import batching, inspection, token_rows
from raft_jax.hf import load as hf_load
from raft_jax.models import sharding, transformer
from raft_jax.planning import commented_config
from raft_jax.runtime import interrupts
from raft_jax.training import plan_checks, run_plan, step_memory

Choice = commented_config.Choice
Choices = commented_config.Choices

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


def choose(config: schema.Config, sets: Sequence[inspection.QuestionSet]) -> Choices:
  """Every value that depends on the data or the machine.

  Raises:
    errors.UserError: there is no usable row.
  """
  source = config.model.source
  decoder = hf_load.load_config(source)
  teacher = config.distill.source
  teacher_decoder = None if teacher is None else hf_load.load_config(teacher)
  learned = inspection.learned(sets)
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
  batch, why = batch_size(
    config.model, config.replay, config.rollout, decoder, mesh, rows
  )
  if batch is None:
    batch = config.train.batch_size
  choices["train.batch_size"] = Choice(batch, why)
  choices |= memory(config, choices, decoder, teacher_decoder, mesh)
  lora = config.lora is not None or "lora" in choices
  given = config_load.flat(config_load.non_defaults(config))
  return choices | steps(
    config.train, given, decoder, lora=lora, rows=rows, batch=batch
  )


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
  limits = [choices[f"data.max_{part}_tokens"].value for part in token_rows.PARTS]
  return sum(token_rows.fits(row, limits) for row in found.rows.values())


# --- Batch and memory -----------------------------------------------------------------


def batch_size(
  model: schema.Model,
  replay: schema.Replay | None,
  rollout: schema.Rollout,
  decoder: transformer.DecoderConfig,
  mesh: Mesh,
  rows: int,
) -> tuple[int | None, str]:
  """The largest batch, up to the paper's 16, that gives a pass enough steps.

  None if none of the sizes suits the mesh and the share of replayed rows.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  fitting = []
  for size in sorted({16, 8, 4, 2, 1, parts}, reverse=True):
    try:
      layout = plan_checks.batch_layout(size, replay, rollout, distils=True)
      plan_checks.check(
        model,
        decoder,
        mesh,
        top_k=None,
        rows=layout.rows,
        micro_batches=1,
        rollout_tensor=None,
      )
    except errors.UserError:
      continue
    fitting.append(size)
  if not fitting:
    return None, "as given: a share of replayed rows depends on it"
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
) -> Choices:
  """What a step needs to fit into memory: the first rung of `ladder` that does."""
  room = device_bytes(mesh)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  batch = choices["train.batch_size"].value
  kept: dict[str, Any] = {}
  why, fault = "", None
  for keys in ladder(batch, parts, lora=config.lora is not None):
    interrupts.check()
    values = {key: choice.value for key, choice in choices.items()} | keys
    try:
      trial = config_load.from_tree(commented_config.merged(config, values))
      plan = run_plan.make_budget_plan(trial, decoder, teacher_decoder, mesh)
    except errors.UserError as error:  # as LoRA where a method needs all parameters
      fault = error
      continue
    kept = keys
    if room is None:
      why = "the memory of these devices is not known; see `python -m raft_jax.plan`"
      break
    needed, fits = step_needs(plan, room)
    why = f"a step takes {needed} of the {room / GIB:.1f} GiB here"
    if fits:
      break
    why += ". IT DOES NOT FIT: lower the budgets or take another machine"
  if not kept and fault is not None:
    raise fault
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
  if sharding.platform(mesh) == "cpu":
    return float(step_memory.host_bytes())
  limits = [
    (device.memory_stats() or {}).get("bytes_limit", math.nan)
    for device in mesh.local_devices
  ]
  return None if math.isnan(sum(limits)) else float(sum(limits))


# --- Steps and learning rate ----------------------------------------------------------


def steps(
  train: schema.Train,
  given: Container[str],
  decoder: transformer.DecoderConfig,
  *,
  lora: bool,
  rows: int,
  batch: int,
) -> Choices:
  """Passes, learning rate, checkpoints.

  Args:
    given: keys that the config sets; passes and learning rate then stay.
  """
  per_epoch = max(rows // batch, 1)
  epochs = train.epochs
  if "train.epochs" not in given and rows > 20_000:
    epochs = 1
  total = min(per_epoch * epochs, train.max_steps or per_epoch * epochs)
  warm_up = math.ceil(train.warmup_ratio * total)
  why = f"{per_epoch:,} steps a pass, {total:,} in all, {warm_up} of them warm-up"
  found = {"train.epochs": Choice(epochs, why)}
  if "train.learning_rate" not in given:
    found["train.learning_rate"] = learning_rate(decoder, lora=lora)
  every = min(100, max(1, total // 4))
  why = "after an interruption, at most so many steps are computed again"
  return found | {"train.checkpoint_every": Choice(every, why)}


def learning_rate(decoder: transformer.DecoderConfig, *, lora: bool) -> Choice:
  """A rate to start from, for a model of this size."""
  count = sum(leaf.size for leaf in jax.tree.leaves(transformer.shapes(decoder)))
  rate = PUBLISHED_RATE * max(1.0, math.sqrt(PUBLISHED_SIZE / count))
  rate = min(rate, 1e-4) * (LORA_RATES if lora else 1)
  rate = float(f"{min(rate, 1e-3):.0e}")
  low = " with LoRA" if lora else ""
  return Choice(
    rate,
    f"a start for {count / 1e6:,.0f} million parameters{low} (5e-6 is published for "
    "models of billions; smaller ones take more); try half and double of it",
  )
