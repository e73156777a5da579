"""Questions and answers as rows of token ids, within the budgets of `data`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.hf import chat, teacher_prompts
from raft_jax.models import transformer
from raft_jax.runtime import interrupts
from raft_jax.storage import records, rejects

Conversation = tuple[Sequence[records.Message], str | records.Message]
"""A conversation up to a user's turn, and its answer: a text, or a whole turn."""

Widths = tuple[int, int, int]
"""Tokens of a prompt, an answer and a teacher's context."""


class Row(NamedTuple):
  """Token ids of one example; `row_id` is its index among the examples."""

  prompt: tuple[int, ...]
  answer: tuple[int, ...]
  teacher: tuple[int, ...]
  row_id: int


class Tokenised(NamedTuple):
  """Rows within the budgets, rows over one, and by row id those that the template
  refuses."""

  rows: list[Row]
  over: list[Row]
  refused: dict[int, rejects.Reject]


def budgets(data: schema.Data) -> Widths:
  """The most tokens of a prompt, of an answer with its end token, and of a teacher's
  context without the rollout."""
  return data.max_prompt_tokens, data.max_answer_tokens, data.max_teacher_tokens


def lengths(row: Row) -> Widths:
  """Tokens of a row's prompt, answer and teacher's context."""
  return len(row.prompt), len(row.answer), len(row.teacher)


def fits(row: Row, limits: Iterable[int]) -> bool:
  """Whether no part of a row is over its budget."""
  return all(length <= limit for length, limit in zip(lengths(row), limits))


def encode(
  examples: Sequence[Conversation],
  data: schema.Data,
  *,
  tokenizer: chat.ChatTokenizer,
  teacher_context: str,
  places: Sequence[rejects.Place],
) -> tuple[list[Row], list[rejects.Reject]]:
  """Tokenises examples; never truncates one.

  Args:
    data: its budgets; `too_long` says what to do with a row over a budget ("error", or
      "skip" to set it aside), and `unusable` the same for a row that the chat template
      refuses.
    teacher_context: "chat", "paper" or "none"; see `teacher_prompts.teacher_ids`.
    places: where the examples are.

  Returns:
    The rows, and those set aside.

  Raises:
    errors.UserError: names the first row that is refused, or no row is left.
  """
  limits = budgets(data)
  tokenised = tokenise(examples, tokenizer, teacher_context, limits, places)
  return choose(tokenised, data, places)


def tokenise(
  examples: Sequence[Conversation],
  tokenizer: chat.ChatTokenizer,
  teacher_context: str,
  limits: Widths,
  places: Sequence[rejects.Place],
) -> Tokenised:
  """Tokenises every example that the template does not refuse."""
  if len(places) != len(examples):
    raise ValueError(f"{len(examples)} examples but {len(places)} places")
  rows: list[Row] = []
  over: list[Row] = []
  refused: dict[int, rejects.Reject] = {}
  for row_id, (messages, answer) in enumerate(examples):
    interrupts.check()
    try:
      ids = teacher_prompts.row_ids(tokenizer, messages, answer, teacher_context)
    except errors.UserError as error:
      refused[row_id] = rejects.Reject(places[row_id], str(error), "refused")
      continue
    prompt, learned, teacher = map(tuple, ids)
    row = Row(prompt, learned, teacher, row_id)
    (rows if fits(row, limits) else over).append(row)
  return Tokenised(rows, over, refused)


def choose(
  tokenised: Tokenised, data: schema.Data, places: Sequence[rejects.Place]
) -> tuple[list[Row], list[rejects.Reject]]:
  """The rows to use, and those set aside; arguments and errors as for `encode`."""
  rows, over, refused = tokenised
  if refused and data.unusable == "error":
    raise errors.UserError(
      f"{next(iter(refused.values()))} ({len(refused)} of {len(places)} rows are "
      "refused), or set data.unusable=skip to set such rows aside"
    )
  limits = budgets(data)
  if over and data.too_long == "error":
    raise errors.UserError(_over_budget(over, limits, places))
  set_aside = unused(tokenised, limits, places)
  if not rows:
    keys = "data.max_prompt_tokens, data.max_answer_tokens or data.max_teacher_tokens"
    raise errors.UserError(
      f"data: no row is left of {len(places)} ({len(over)} over a budget); the first "
      f"is {set_aside[0] if set_aside else 'missing'}"
      f"{f'; raise {keys}' if over else ''}"
    )
  return rows, set_aside


def unused(
  tokenised: Tokenised, limits: Widths, places: Sequence[rejects.Place]
) -> list[rejects.Reject]:
  """The rows that are over a budget or refused by the template, in order."""
  by_id = tokenised.refused | {
    row.row_id: rejects.Reject(
      places[row.row_id], "is too long: " + _exceeded(row, limits), "too_long"
    )
    for row in tokenised.over
  }
  return [by_id[row_id] for row_id in sorted(by_id)]


PARTS = ("prompt", "answer", "teacher")
"""The parts of a row, in the order of `Widths`."""


def _exceeded(row: Row, limits: Sequence[int]) -> str:
  return ", ".join(
    f"{part} of {length} tokens > data.max_{part}_tokens={limit}"
    for part, length, limit in zip(PARTS, lengths(row), limits)
    if length > limit
  )


def _over_budget(
  over: Sequence[Row], limits: Sequence[int], places: Sequence[rejects.Place]
) -> str:
  first = over[0]
  needed = [max(column) for column in zip(*map(lengths, over))]
  remedy = ", ".join(
    f"data.max_{part}_tokens={length}"
    for part, length, limit in zip(PARTS, needed, limits)
    if length > limit
  )
  return (
    f"{places[first.row_id]} is too long: {_exceeded(first, limits)} ({len(over)} of "
    f"{len(places)} rows are over a budget); set {remedy} to fit all, or "
    "data.too_long=skip to leave them out"
  )


def check_positions(
  longest: Mapping[str, int], source: str, decoder: transformer.DecoderConfig
) -> None:
  """Checks that the longest rows fit into the positions of a model.

  Args:
    longest: tokens of the longest row, with its answer, by the config keys that set it.
    source: the model's name.
    decoder: the model's network.

  Raises:
    errors.UserError: a row is too long.
  """
  for keys, tokens in longest.items():
    if tokens > decoder.max_positions:
      raise errors.UserError(
        f"{keys}: the longest row has {tokens} tokens with its answer, but {source} "
        f"was made for {decoder.max_positions}; lower these keys (with "
        "data.too_long=skip if questions then exceed data.max_*_tokens)"
      )
