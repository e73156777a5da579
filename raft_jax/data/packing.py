"""Several rows of a batch in one sequence, so that less padding is computed.

The rows of a batch stay what they are: the student reads them as
[prompt | answer | trajectory], each part padded to the width of the batch. This module
says where each of their tokens is computed instead: in a lane, a sequence that several
rows share. The losses do not change but for rounding.

Shapes: B rows of T columns. Micro-batches and devices split a batch into G groups; a
group has N lanes of L columns, and room for K tokens of answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from raft_jax.data import batching


class Room(NamedTuple):
  """The lanes of one shape of batch.

  Attributes:
    lanes: of each group.
    width: columns of a lane.
    answers: tokens of answers in each group; None if the head reads none.
  """

  lanes: int
  width: int
  answers: int | None


class Groups(NamedTuple):
  """How a batch is split: into blocks of rows over devices, and these over time.

  Of M micro-batches, rows i, i + M, ... of a block form one.
  """

  devices: int
  micro_batches: int

  @property
  def total(self) -> int:
    return self.devices * self.micro_batches

  def rows(self, batch: int) -> list[np.ndarray]:
    """The rows of each group, in the order of the device's micro-batches."""
    blocks = np.arange(batch).reshape(self.devices, -1, self.micro_batches)
    return [
      blocks[d, :, m] for d in range(self.devices) for m in range(blocks.shape[2])
    ]


def pack(
  length_BS: np.ndarray,
  widths: Sequence[int],
  room: Room,
  groups: Groups,
) -> batching.Packing | None:
  """Lays the rows of a batch into lanes; None if there is too little room.

  Args:
    length_BS: tokens of each part of each row; part 1 is the answer, if the head reads
      answers.
    widths: padded width of each part.
  """
  total = sum(widths)
  starts = np.cumsum([0, *widths[:-1]])
  batch = len(length_BS)
  token_GNL = np.full((groups.total, room.lanes, room.width), -1, np.int32)
  place_BT = np.zeros((batch, total), np.int32)
  answer_GK = None
  if room.answers is not None:
    answer_GK = np.full((groups.total, room.answers), -1, np.int32)
  for group, rows in enumerate(groups.rows(batch)):
    lanes = assign(length_BS[rows].sum(axis=1), room.width)
    if len(lanes) > room.lanes:
      return None
    for lane, members in enumerate(lanes):
      end = 0
      for member in members:
        row = rows[member]
        columns = np.concatenate(
          [start + np.arange(n) for start, n in zip(starts, length_BS[row])]
        )
        begin, end = end, end + len(columns)
        token_GNL[group, lane, begin:end] = member * total + columns
        place_BT[row, columns] = lane * room.width + np.arange(begin, end)
    if answer_GK is not None:
      tokens = [
        member * widths[1] + np.arange(length_BS[row, 1])
        for member, row in enumerate(rows)
      ]
      flat = np.concatenate(tokens)
      if len(flat) > answer_GK.shape[1]:
        return None
      answer_GK[group, : len(flat)] = flat
  return batching.Packing(token_GNL, place_BT, answer_GK)


def assign(length_B: np.ndarray, width: int) -> list[list[int]]:
  """Rows of each lane: the longest row first, into the first lane that has room."""
  lanes: list[list[int]] = []
  left: list[int] = []
  for row in np.argsort(-length_B, kind="stable"):
    length = int(length_B[row])
    lane = next((i for i, room in enumerate(left) if room >= length), len(lanes))
    if lane == len(lanes):
      lanes.append([])
      left.append(width)
    lanes[lane].append(int(row))
    left[lane] -= length
  return lanes


def choose_room(
  lengths: Sequence[np.ndarray],
  widths: Sequence[int],
  groups: Groups,
  *,
  head: bool,
  lane_widths: Iterable[int],
  attention: float,
) -> Room:
  """The room in which batches of one shape cost least.

  A batch that needs more room is computed row by row, at the cost of its padded rows.

  Args:
    lengths: of batches, as `pack` takes them.
    widths: padded widths of their parts.
    head: whether the head reads answers, which are then part 1.
    lane_widths: to choose from; each holds every row.
    attention: what attention to one column costs a token, as a share of all else.
  """
  parts = [[batch[rows] for rows in groups.rows(len(batch))] for batch in lengths]
  rows, total = len(parts[0][0]), sum(widths)

  def cost(columns: int, width: int) -> float:
    return columns * (1 + attention * width)

  choices = []
  for width in lane_widths:
    needs = [
      max(len(assign(part.sum(axis=1), width)) for part in batch) for batch in parts
    ]
    for lanes in range(1, rows + 1):
      packed = cost(lanes * width, width) * sum(need <= lanes for need in needs)
      plain = cost(rows * total, total) * sum(need > lanes for need in needs)
      choices.append((packed + plain, width, lanes, needs))
  _, width, lanes, needs = min(choices, key=lambda choice: choice[:3])
  if not head:
    return Room(lanes, width, None)
  fitting = [batch for batch, need in zip(parts, needs) if need <= lanes]
  most = max((int(p[:, 1].sum()) for batch in fitting for p in batch), default=1)
  return Room(lanes, width, batching.padded_width(most))
