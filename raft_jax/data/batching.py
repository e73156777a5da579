"""Batches of token rows, each a pure function of the rows, the seed and the step.

The whole set is tokenised once (a few thousand rows). The position of a run is its step
number, on any number of hosts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from raft_jax import errors
from raft_jax.data import token_rows

Array = Any
"""An array of numpy, or of a device."""

WIDTH_MULTIPLE = 16
READ_THREADS = 2  # collating is cheap; more threads would only contend for the GIL
PREFETCH = 8


class Packing(NamedTuple):
  """Where the tokens of rows are computed; int32 arrays, made by `packing`.

  A group has N lanes of L columns. Places are counted within a group: tokens of rows
  through its rows of T columns, places in lanes through its lanes.

  Attributes:
    token_GNL: the token at each place of the lanes; -1: padding.
    place_BT: the place of each token; 0 for padding.
    answer_GK: the tokens of the answers, counted through the group's answers, for the
      head; -1: none. None if the head does not read answers.
  """

  token_GNL: Array
  place_BT: Array
  answer_GK: Array | None = None


class Batch(NamedTuple):
  """int32 arrays, right-padded with the pad id; lengths count the real tokens.

  B batch, P prompt width, A answer width, C teacher-context width.

  Attributes:
    token_weight_BA: float32, the weight of each answer token in the cross-entropy, if
      it is known before training; see `with_token_weights`.
    packing: where the student computes the rows; None: each by itself.
    teacher_packing: the same of the teacher.
  """

  prompt_BP: Array
  prompt_length_B: Array
  answer_BA: Array
  answer_length_B: Array
  teacher_BC: Array
  teacher_length_B: Array
  row_id_B: Array
  token_weight_BA: Array | None = None
  packing: Packing | None = None
  teacher_packing: Packing | None = None


def widths(
  rows: Sequence[token_rows.Row], buckets: int, *, batch_size: int = 16
) -> list[token_rows.Widths]:
  """At most `buckets` padded widths (P, A, C), ascending; the last holds every row.

  A batch is as wide as its widest row. Bucket i of n is therefore wide enough for about
  i/n of random batches: it is the (i/n)^(1/batch_size) quantile of the rows' lengths.
  """
  row_lengths = np.array([token_rows.lengths(row) for row in rows])
  shares = np.arange(1, buckets + 1) / buckets
  quantiles = np.quantile(
    row_lengths, shares ** (1 / batch_size), axis=0, method="higher"
  )
  return sorted(
    {(padded_width(p), padded_width(a), padded_width(c)) for p, a, c in quantiles}
  )


def padded_width(length: int) -> int:
  """The smallest width that holds `length` tokens, a multiple of WIDTH_MULTIPLE."""
  return -(-int(length) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def dataset(
  rows: Sequence[token_rows.Row],
  *,
  batch_size: int,
  seed: int,
  pad_id: int,
  widths: Sequence[token_rows.Widths],
  epochs: int | None = None,
  steps: int | None = None,
  replayed: Sequence[token_rows.Row] = (),
  replays_per_batch: int = 0,
  copies: int = 1,
) -> grain.MapDataset[Batch]:
  """All batches of a run; element n is the batch of step n.

  Each epoch is shuffled anew and gives len(rows) // batch_size batches. The remaining
  rows differ from epoch to epoch, and no batch mixes two epochs.

  Args:
    batch_size: rows of each batch, without the replayed ones.
    epochs: passes over the rows.
    steps: exact number of batches if `epochs` is None, else an upper bound.
    replayed: rows of another kind, which are repeated as often as needed, in their own
      order.
    replays_per_batch: number of them after the other rows of every batch.
    copies: copies of each row, one after another. Copy g of row id i has the id
      i * copies + g, so that each copy has its own randomness.

  Raises:
    errors.UserError: there are fewer rows than one batch needs.
  """
  if epochs is None and steps is None:
    raise ValueError("give epochs, steps or both")
  _check_counts(len(rows), batch_size, len(replayed), replays_per_batch)
  per_epoch = len(rows) // batch_size
  total = min(n for n in (steps, epochs and epochs * per_epoch) if n is not None)
  batches = _shuffled_batches(len(rows), batch_size, total, seed)
  replay_batches = None
  if replays_per_batch:
    # With the same seed, sets of equal size would always meet in the same pairs.
    replay_batches = _shuffled_batches(
      len(replayed), replays_per_batch, total, seed ^ 1
    )

  def collate(step: int) -> Batch:
    chosen = [rows[i] for i in batches[step]]
    if replay_batches is not None:
      chosen += [replayed[i] for i in replay_batches[step]]
    if copies > 1:
      chosen = [
        row._replace(row_id=row.row_id * copies + number)
        for row in chosen
        for number in range(copies)
      ]
    return _collate(chosen, pad_id, widths)

  return grain.MapDataset.range(total).map(collate)


def _check_counts(
  rows: int, batch_size: int, replayed: int, replays_per_batch: int
) -> None:
  if rows < batch_size:
    raise errors.UserError(
      f"train.batch_size={batch_size} needs as many rows, and there are {rows}: "
      f"set train.batch_size={max(1, rows)} or less, or give more questions"
    )
  if replayed < replays_per_batch:
    raise errors.UserError(
      f"replay.questions: {replayed} rows are fewer than the {replays_per_batch} of "
      "one batch; give more of them, or lower replay.share"
    )


def _shuffled_batches(
  rows: int, batch_size: int, total: int, seed: int
) -> grain.MapDataset[np.ndarray]:
  """`total` batches of row numbers, shuffled anew for each pass over the rows."""
  return (
    grain.MapDataset.range(rows)
    .seed(seed)
    .shuffle()
    .batch(batch_size, drop_remainder=True)
    .repeat(-(-total // (rows // batch_size)))
    .slice(slice(0, total))
  )


def count_replays(batch_size: int, share: float) -> int:
  """The number of replayed rows that are `share` of a batch with `batch_size` others.

  Raises:
    errors.UserError: it is not a whole number; names the nearest shares that give one.
  """
  exact = share * batch_size / (1 - share)
  count = round(exact)
  if abs(exact - count) < 1e-6 * batch_size:
    return count
  near = [n / (n + batch_size) for n in (math.floor(exact), math.ceil(exact))]
  raise errors.UserError(
    f"replay.share: {share:g} of a batch, beside train.batch_size={batch_size}, is "
    f"{exact:.2f} rows; set {near[0]:.6g} or {near[1]:.6g}, or another train.batch_size"
  )


def replace_last_rows(
  batch: Batch,
  rows: Sequence[token_rows.Row],
  *,
  pad_id: int,
  widths: Sequence[token_rows.Widths],
) -> Batch:
  """The batch with `rows` in place of its last ones, padded to the width they need."""
  kept = [
    token_rows.Row(
      tuple(batch.prompt_BP[i, : batch.prompt_length_B[i]].tolist()),
      tuple(batch.answer_BA[i, : batch.answer_length_B[i]].tolist()),
      tuple(batch.teacher_BC[i, : batch.teacher_length_B[i]].tolist()),
      int(batch.row_id_B[i]),
    )
    for i in range(len(batch.row_id_B) - len(rows))
  ]
  return _collate([*kept, *rows], pad_id, widths)


def with_token_weights(batch: Batch, weights: Mapping[int, np.ndarray]) -> Batch:
  """The batch with the weight of each token of its answers.

  Args:
    weights: float32, one for each token of an answer, by row id.
  """
  weight_BA = np.zeros(batch.answer_BA.shape, np.float32)
  for line, row_id in zip(weight_BA, batch.row_id_B):
    row_weights = weights[int(row_id)]
    line[: len(row_weights)] = row_weights
  return batch._replace(token_weight_BA=weight_BA)


def sequential_batches(
  rows: Sequence[token_rows.Row],
  batch_size: int,
  *,
  pad_id: int,
  width: token_rows.Widths,
) -> list[Batch]:
  """Every row once, in order and in batches of one shape.

  The last batch is filled up with its own first rows.
  """
  batches = []
  for start in range(0, len(rows), batch_size):
    part = rows[start : start + batch_size]
    filled = [part[i % len(part)] for i in range(batch_size)]
    batches.append(_collate(filled, pad_id, [width]))
  return batches


def _collate(
  rows: Sequence[token_rows.Row], pad_id: int, widths: Sequence[token_rows.Widths]
) -> Batch:
  """Pads to the smallest of the ascending widths that holds every row."""
  needed = [max(column) for column in zip(*map(token_rows.lengths, rows))]
  for triple in widths:
    if all(need <= width for need, width in zip(needed, triple)):
      break
  else:
    raise ValueError(f"rows of lengths {needed} fit none of the widths {widths}")
  prompt_BP, prompt_length_B = _pad([row.prompt for row in rows], triple[0], pad_id)
  answer_BA, answer_length_B = _pad([row.answer for row in rows], triple[1], pad_id)
  teacher_BC, teacher_length_B = _pad([row.teacher for row in rows], triple[2], pad_id)
  return Batch(
    prompt_BP,
    prompt_length_B,
    answer_BA,
    answer_length_B,
    teacher_BC,
    teacher_length_B,
    np.array([row.row_id for row in rows], np.int32),
  )


def _pad(
  tokens: Sequence[tuple[int, ...]], width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  padded = np.full((len(tokens), width), pad_id, np.int32)
  for line, ids in zip(padded, tokens):
    line[: len(ids)] = ids
  return padded, np.array([len(ids) for ids in tokens], np.int32)


def iterate(
  batches: grain.MapDataset[Batch], *, start_step: int = 0
) -> Iterator[Batch]:
  """The batches from `start_step` on, read ahead in threads."""
  if not 0 <= start_step <= len(batches):
    raise ValueError(f"step {start_step} is outside a run of {len(batches)} steps")
  if start_step == len(batches):  # the run is finished; grain has no empty slice
    return iter(())
  tail = batches.slice(slice(start_step, len(batches)))
  options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH)
  return iter(tail.to_iter_dataset(options))
