"""Batches whose rows share lanes, a fixed number of them in each."""

from collections.abc import Sequence

import numpy as np

from raft_jax.data import batching, packing


def packed(
  batch: batching.Batch,
  steps: int,
  groups: packing.Groups,
  *,
  per_lane: int,
  answers: bool = True,
) -> batching.Batch:
  """The batch, packed for student and teacher.

  Args:
    steps: width of the trajectories.
    per_lane: rows of a lane, which is as wide as all of them.
    answers: whether the student reads the answers.
  """
  rows = len(batch.row_id_B)
  length_B, answer_width = np.full(rows, steps), batch.answer_BA.shape[1] * answers

  def lay(
    lengths: Sequence[np.ndarray],
    widths: Sequence[int],
    groups: packing.Groups,
    answer_width: int | None,
  ) -> batching.Packing:
    own = rows // groups.total
    room = packing.Room(
      own // per_lane, per_lane * sum(widths), answer_width and own * answer_width
    )
    laid = packing.pack(np.stack(lengths, axis=1), widths, room, groups)
    assert laid is not None
    return laid

  return batch._replace(
    packing=lay(
      [batch.prompt_length_B, batch.answer_length_B * answers, length_B],
      [batch.prompt_BP.shape[1], answer_width, steps],
      groups,
      answer_width or None,
    ),
    teacher_packing=lay(
      [batch.teacher_length_B, length_B],
      [batch.teacher_BC.shape[1], steps],
      groups._replace(micro_batches=1),
      None,
    ),
  )
