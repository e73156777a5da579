"""Which batches of a run are packed, and into what room (`train.packing`)."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax.data import batching, packing
from raft_jax.models import transformer
from raft_jax.training import programs, run_plan

MEASURED = 1000
"""Batches at the start of a run by which the rooms are chosen."""

Shape = tuple[int, ...]


class Parts(NamedTuple):
  """The parts of the rows that a model reads: tokens of each, and padded widths."""

  length_BS: np.ndarray
  widths: Shape


class Rooms(NamedTuple):
  """Of one model: how its rows are split, and the room of each shape of batch."""

  groups: packing.Groups
  by_shape: Mapping[Shape, packing.Room]


class Packer(NamedTuple):
  """How a run packs its batches; `teacher` is None if it reads no rows of a batch."""

  student: Rooms
  teacher: Rooms | None


def make(plan: run_plan.RunPlan, dataset: Any) -> Packer:
  """Chooses the rooms by the first batches of a run."""
  devices = plan.mesh.shape["data"] * plan.mesh.shape["fsdp"]
  batches = [(dataset[step], step) for step in range(min(MEASURED, len(dataset)))]
  student = _rooms(
    plan.decoder,
    packing.Groups(devices, plan.settings.micro_batches),
    [student_parts(plan, *batch) for batch in batches],
    head=plan.settings.cross_entropy,
  )
  # Contexts that depend on the rollouts are known too late.
  if plan.programs.score_teacher is None or plan.siblings is not None:
    return Packer(student, None)
  teacher = _rooms(
    plan.teacher_decoder or plan.decoder,
    packing.Groups(devices, 1),
    [teacher_parts(plan, *batch) for batch in batches],
    head=False,
  )
  return Packer(student, teacher)


def _rooms(
  decoder: transformer.DecoderConfig,
  groups: packing.Groups,
  parts: Sequence[Parts],
  *,
  head: bool,
) -> Rooms:
  by_shape: dict[Shape, list[np.ndarray]] = collections.defaultdict(list)
  for length_BS, widths in parts:
    by_shape[widths].append(length_BS)
  widest, attention = max(map(sum, by_shape)), attention_share(decoder)
  rooms = {
    widths: packing.choose_room(
      lengths,
      widths,
      groups,
      head=head,
      lane_widths={sum(widths), 2 * sum(widths), widest},
      attention=attention,
    )
    for widths, lengths in by_shape.items()
  }
  return Rooms(groups, rooms)


def attention_share(decoder: transformer.DecoderConfig) -> float:
  """What attention to one column costs a token, as a share of its other products."""
  vocabulary = decoder.vocab_size * decoder.d_model
  copies = 1 if decoder.tie_embeddings else 2
  kernels = transformer.parameter_count(decoder) - copies * vocabulary
  # A score and a share of a value: two products of each head's width.
  return 2 * decoder.n_layers * decoder.n_heads * decoder.head_dim / kernels


def packed(
  packer: Packer, plan: run_plan.RunPlan, batch: batching.Batch, step: int
) -> batching.Batch:
  """The batch, with the places in lanes of the rows that its models read."""
  batch = batch._replace(
    packing=_pack(packer.student, student_parts(plan, batch, step))
  )
  if packer.teacher is None:
    return batch
  parts = teacher_parts(plan, batch, step)
  return batch._replace(teacher_packing=_pack(packer.teacher, parts))


def _pack(rooms: Rooms, parts: Parts) -> batching.Packing | None:
  room = rooms.by_shape.get(parts.widths)
  return None if room is None else packing.pack(*parts, room, rooms.groups)


def student_parts(plan: run_plan.RunPlan, batch: batching.Batch, step: int) -> Parts:
  """[prompt | answer | trajectory], as `sequences.student_pass` reads a row."""
  answer_length_B, answer_width = batch.answer_length_B, batch.answer_BA.shape[1]
  if not plan.settings.cross_entropy:
    answer_length_B, answer_width = np.zeros_like(answer_length_B), 0
  length_B, width = _trajectory(plan, batch, step)
  if plan.settings.on_answers:
    length_B, width = np.zeros_like(length_B), 0
  return Parts(
    np.stack([batch.prompt_length_B, answer_length_B, length_B], axis=1),
    (batch.prompt_BP.shape[1], answer_width, width),
  )


def teacher_parts(plan: run_plan.RunPlan, batch: batching.Batch, step: int) -> Parts:
  """[context | trajectory], as `sequences.teacher_hidden` reads a row."""
  length_B, width = _trajectory(plan, batch, step)
  return Parts(
    np.stack([batch.teacher_length_B, length_B], axis=1),
    (batch.teacher_BC.shape[1], width),
  )


def _trajectory(
  plan: run_plan.RunPlan, batch: batching.Batch, step: int
) -> tuple[np.ndarray, int]:
  """Tokens and padded width of the trajectories; of a rollout, the most it may have."""
  if plan.programs.roll_out is None:
    return np.zeros_like(batch.answer_length_B), 0
  rollouts = plan.rollouts
  if programs.rolls_out(rollouts.share, seed=rollouts.seed, step=step):
    width = rollouts.max_new_tokens
    return np.full_like(batch.answer_length_B, width), width
  return batch.answer_length_B, batch.answer_BA.shape[1]
