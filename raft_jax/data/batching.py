"""Questions to batches: token rows, padded widths, and an order that is a function.

The whole set is tokenised once (a few thousand rows). A batch is a pure function of
(rows, seed, step), so a run's position is its step number, on any number of hosts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from raft_jax import errors
from raft_jax.hf import chat, teacher_prompts
from raft_jax.storage import records, rejects

# Numpy's or a device's: the same for all who read a batch.
Array = Any

WIDTH_MULTIPLE = 16
READ_THREADS = 2  # collating is light; more would only fight over Python's lock
PREFETCH = 8


Conversation = tuple[Sequence[records.Message], str]
"""A conversation up to the user's turn, and its answer."""


Widths = tuple[int, int, int]
"""Of a prompt, an answer and a teacher's context, in tokens."""


class Row(NamedTuple):
  """Token ids of one example; `row_id` is its place in the sequence it came from."""

  prompt: tuple[int, ...]
  answer: tuple[int, ...]
  teacher: tuple[int, ...]
  row_id: int


class Batch(NamedTuple):
  """int32 arrays, right-padded with the pad id; lengths count the tokens that are real.

  B batch, P prompt width, A answer width, C teacher-context width. Made of numpy
  arrays; inside a training step they are the devices'.
  """

  prompt_BP: Array
  prompt_length_B: Array
  answer_BA: Array
  answer_length_B: Array
  teacher_BC: Array
  teacher_length_B: Array
  row_id_B: Array


def encode_rows(
  examples: Sequence[Conversation],
  *,
  tokenizer: chat.ChatTokenizer,
  teacher_context: str,
  max_prompt_tokens: int,
  max_answer_tokens: int,
  max_teacher_tokens: int,
  too_long: str,
  unusable: str,
  places: Sequence[rejects.Place],
) -> tuple[list[Row], list[rejects.Reject]]:
  """Tokenises (messages, answer) pairs; never truncates.

  Args:
    examples: conversation up to a user turn, and the answer to learn.
    tokenizer: tokenizer and chat template.
    teacher_context: "chat", "paper" or "none", see `teacher_prompts.teacher_ids`.
    max_prompt_tokens: budget of a row's prompt; the next two, of its answer with its
      end token and of the teacher's context without the rollout.
    too_long: "error" refuses a row over a budget, "skip" sets it aside.
    unusable: the same of a row that the chat template refuses.
    places: where the examples are.

  Returns:
    The rows, and those set aside.

  Raises:
    errors.UserError: a row is refused, which is named, or no row is left.
  """
  if len(places) != len(examples):
    raise ValueError(f"{len(examples)} examples but {len(places)} places")
  limits = (max_prompt_tokens, max_answer_tokens, max_teacher_tokens)
  rows: list[Row] = []
  over: list[Row] = []
  aside: dict[int, rejects.Reject] = {}
  for row_id, (messages, answer) in enumerate(examples):
    try:
      prompt, learned, teacher = teacher_prompts.row_ids(
        tokenizer, messages, answer, teacher_context
      )
    except errors.UserError as error:  # of the chat template
      aside[row_id] = rejects.Reject(places[row_id], str(error), "refused")
      continue
    row = Row(tuple(prompt), tuple(learned), tuple(teacher), row_id)
    fits = all(have <= limit for have, limit in zip(_lengths(row), limits))
    (rows if fits else over).append(row)
  if aside and unusable == "error":
    first = next(iter(aside.values()))
    raise errors.UserError(
      f"{first} ({len(aside)} of {len(examples)} rows are refused), or set "
      "data.unusable=skip to set such rows aside"
    )
  if over and too_long == "error":
    raise errors.UserError(_over_budget(over, limits, places, len(examples)))
  for row in over:
    reason = "is too long: " + _exceeded(row, limits)
    aside[row.row_id] = rejects.Reject(places[row.row_id], reason, "too_long")
  found = [aside[row_id] for row_id in sorted(aside)]
  if not rows:
    budgets = "raise data.max_prompt_tokens, data.max_answer_tokens or "
    remedy = f"; {budgets}data.max_teacher_tokens" if over else ""
    raise errors.UserError(
      f"data: no row is left of {len(examples)} ({len(over)} over a budget); the first "
      f"is {found[0] if found else 'missing'}{remedy}"
    )
  return rows, found


def _lengths(row: Row) -> Widths:
  return len(row.prompt), len(row.answer), len(row.teacher)


_KINDS = ("prompt", "answer", "teacher")


def _exceeded(row: Row, limits: Sequence[int]) -> str:
  return ", ".join(
    f"{kind} of {have} tokens > data.max_{kind}_tokens={limit}"
    for kind, have, limit in zip(_KINDS, _lengths(row), limits)
    if have > limit
  )


def _over_budget(
  over: Sequence[Row],
  limits: Sequence[int],
  places: Sequence[rejects.Place],
  total: int,
) -> str:
  first = over[0]
  needed = [max(column) for column in zip(*map(_lengths, over))]
  remedy = ", ".join(
    f"data.max_{kind}_tokens={need}"
    for kind, need, limit in zip(_KINDS, needed, limits)
    if need > limit
  )
  return (
    f"{places[first.row_id]} is too long: {_exceeded(first, limits)} ({len(over)} of "
    f"{total} rows are over a budget); set {remedy} to fit all, or data.too_long=skip "
    "to leave them out"
  )


def widths(rows: Sequence[Row], buckets: int, *, batch_size: int = 16) -> list[Widths]:
  """At most `buckets` padded widths (P, A, C), ascending; the last holds every row.

  A batch is as wide as its widest row, so bucket i of n stands at the lengths that
  about i/n of random batches stay within: the (i/n)^(1/batch_size) quantile of rows.
  """
  lengths = np.array([_lengths(row) for row in rows])
  shares = np.arange(1, buckets + 1) / buckets
  found = np.quantile(lengths, shares ** (1 / batch_size), axis=0, method="higher")
  return sorted({(rounded(p), rounded(a), rounded(c)) for p, a, c in found})


def rounded(length: int) -> int:
  """The least width that holds so many tokens."""
  return -(-int(length) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def dataset(
  rows: Sequence[Row],
  *,
  batch_size: int,
  seed: int,
  pad_id: int,
  widths: Sequence[Widths],
  epochs: int | None = None,
  steps: int | None = None,
  replayed: Sequence[Row] = (),
  replays: int = 0,
  group: int = 1,
) -> grain.MapDataset[Batch]:
  """All batches of a run; element n is the batch of step n, whoever asks and when.

  Each epoch is shuffled anew and gives len(rows) // batch_size batches; the few rows
  over are other ones in each epoch, and no batch mixes two epochs.

  Args:
    batch_size: rows of each batch, without the replayed ones.
    epochs: passes over the rows.
    steps: exact number of batches if `epochs` is None, else an upper bound.
    replayed: rows of another kind, as many as are replayed at once or more; they are
      passed over as often as it takes, in an order of their own.
    replays: how many of them follow the others in every batch.
    group: copies of each row, one after another; copy g of row id i has the id
      i * group + g, which makes its randomness its own.

  Raises:
    errors.UserError: there are fewer rows than one batch takes.
  """
  if epochs is None and steps is None:
    raise ValueError("give epochs, steps or both")
  if len(rows) < batch_size:
    raise errors.UserError(
      f"train.batch_size={batch_size} needs as many rows, and there are {len(rows)}: "
      f"set train.batch_size={max(1, len(rows))} or less, or give more questions"
    )

  if len(replayed) < replays:
    raise errors.UserError(
      f"replay.questions: {len(replayed)} rows are fewer than the {replays} of one "
      "batch; give more of them, or lower replay.share"
    )
  per_epoch = len(rows) // batch_size
  wanted = [n for n in (steps, epochs and epochs * per_epoch) if n is not None]
  total = min(wanted)
  batches = _orders(len(rows), batch_size, total, seed)
  # Another seed, or sets of one size would always meet in the same pairs.
  others = _orders(len(replayed), replays, total, seed ^ 1) if replays else None

  def collate(step: int) -> Batch:
    chosen = [rows[i] for i in batches[step]]
    if others is not None:
      chosen += [replayed[i] for i in others[step]]
    if group > 1:
      chosen = [
        row._replace(row_id=row.row_id * group + copy)
        for row in chosen
        for copy in range(group)
      ]
    return _collate(chosen, pad_id, widths)

  return grain.MapDataset.range(total).map(collate)


def _orders(
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


def replays(batch_size: int, share: float) -> int:
  """How many replayed rows make up `share` of a batch, beside `batch_size` others.

  Raises:
    errors.UserError: that is no whole number; names the nearest shares that are.
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


def ending_with(
  batch: Batch,
  rows: Sequence[Row],
  *,
  pad_id: int,
  widths: Sequence[Widths],
) -> Batch:
  """The batch with other rows in the place of its last ones, as wide as they need."""
  kept = [
    Row(
      tuple(batch.prompt_BP[i, : batch.prompt_length_B[i]].tolist()),
      tuple(batch.answer_BA[i, : batch.answer_length_B[i]].tolist()),
      tuple(batch.teacher_BC[i, : batch.teacher_length_B[i]].tolist()),
      int(batch.row_id_B[i]),
    )
    for i in range(len(batch.row_id_B) - len(rows))
  ]
  return _collate([*kept, *rows], pad_id, widths)


def in_order(
  rows: Sequence[Row], batch_size: int, *, pad_id: int, width: Widths
) -> list[Batch]:
  """Every row once, in batches of one shape; the last is filled up with its first."""
  batches = []
  for start in range(0, len(rows), batch_size):
    part = rows[start : start + batch_size]
    filled = [part[i % len(part)] for i in range(batch_size)]
    batches.append(_collate(filled, pad_id, [width]))
  return batches


def _collate(rows: Sequence[Row], pad_id: int, widths: Sequence[Widths]) -> Batch:
  """Pads to the smallest of the ascending widths that holds every row."""
  needed = [max(column) for column in zip(*map(_lengths, rows))]
  for triple in widths:
    if all(need <= width for need, width in zip(needed, triple)):
      break
  else:
    raise ValueError(f"rows of lengths {needed} fit none of the widths {widths}")
  return Batch(
    *_pad([row.prompt for row in rows], triple[0], pad_id),
    *_pad([row.answer for row in rows], triple[1], pad_id),
    *_pad([row.teacher for row in rows], triple[2], pad_id),
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
  """Batches of steps start_step, start_step + 1, ..., read ahead in threads."""
  if not 0 <= start_step <= len(batches):
    raise ValueError(f"step {start_step} is outside a run of {len(batches)} steps")
  if start_step == len(batches):  # a finished run; grain has no empty slice
    return iter(())
  tail = batches.slice(slice(start_step, len(batches)))
  options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH)
  return iter(tail.to_iter_dataset(options))
