"""What a run will make of its data: rows, rejects, lengths, repeats and one example."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax import errors
from raft_jax.config import data_layout, schema
from raft_jax.curation import near_duplicates, refined_folder
from raft_jax.data import token_rows, training_set
from raft_jax.hf import chat
from raft_jax.storage import question_files, records, sealed_folder
from raft_jax.storage import rejects as rejects_lib

SHARES = (0.5, 0.9, 0.99, 1.0)
"""The percentiles of lengths; the last is the longest row."""

NEAR = 0.8
"""Jaccard index from which two texts are near duplicates."""

NEAR_ROWS = 50_000
"""Near duplicates are sought among at most so many rows (about 1 ms each)."""


class QuestionSet(NamedTuple):
  """Rows of one source, as a run with these settings reads them.

  Attributes:
    name: "questions", "validation" or "test", as in the config, or "refined".
    formats: the format of each file.
    examples: the readable ones.
    rows: their tokens by index of the example, without those the template refuses.
    rejects: the rows that are not used.
    used: the number of rows that are used.
    stop: the error at which the run stops on this source, or None.
  """

  name: str
  address: str
  formats: Mapping[str, str]
  examples: list[training_set.Example]
  rows: dict[int, token_rows.Row]
  rejects: list[rejects_lib.Reject]
  used: int
  stop: str | None

  @property
  def total(self) -> int:
    """Rows of the source, used or not."""
    return self.used + len(self.rejects)


# --- Reading --------------------------------------------------------------------------


def read(
  name: str, data: schema.Data, tokenizer: chat.ChatTokenizer, *, context: str
) -> QuestionSet:
  """Reads the source that a key of `data` names, and goes on after every bad row.

  Args:
    name: "questions", "validation" or "test".
    context: form of the teacher's context.

  Raises:
    errors.UserError: the source cannot be read at all, or has no usable row.
  """
  address, learned = getattr(data, name), name == "questions"
  contents = question_files.read(
    address,
    layout=data_layout.layout(data),
    limit=data.limit if learned else None,
    unusable="skip",
  )
  stop = _fault(
    lambda: question_files.check_rejects(
      address,
      len(contents.questions),
      contents.rejects,
      data.unusable,
      data.reject_threshold,
      None,
    )
  )
  questions = contents.questions
  calls: list[rejects_lib.Reject] = []
  if not learned:
    questions, calls = question_files.text_answers(contents)
  examples = [
    training_set.Example(contents.places[q.id], q.messages, q.reply) for q in questions
  ]
  found = measure(name, address, examples, data, tokenizer, context=context)
  return found._replace(
    formats=contents.formats,
    rejects=[*contents.rejects, *calls, *found.rejects],
    stop=stop or found.stop,
  )


def measure(
  name: str,
  address: str,
  examples: list[training_set.Example],
  data: schema.Data,
  tokenizer: chat.ChatTokenizer,
  *,
  context: str,
) -> QuestionSet:
  """Tokenises examples and applies the budgets, as a run does."""
  limits = token_rows.budgets(data)
  places = [example.place for example in examples]
  tokenised = token_rows.tokenise(
    [(example.messages, example.answer) for example in examples],
    tokenizer,
    context,
    limits,
    places,
  )
  stop = _fault(lambda: token_rows.choose(tokenised, data, places))
  return QuestionSet(
    name=name,
    address=address,
    formats={},
    examples=examples,
    rows={row.row_id: row for row in (*tokenised.rows, *tokenised.over)},
    rejects=token_rows.unused(tokenised, limits, places),
    used=len(tokenised.rows),
    stop=stop,
  )


def read_refined(
  config: schema.Config, tokenizer: chat.ChatTokenizer, context: str
) -> tuple[QuestionSet | None, list[str]]:
  """The run's refined records if it has some to learn from, and why there are none."""
  folder = pathlib.Path(config.output) / refined_folder.FOLDER
  if config.data.answers == "original":
    return None, []
  if not (folder / sealed_folder.MANIFEST).exists():
    return None, [
      "refine: has not run; the lengths are those of the original answers, so inspect "
      f"again after it (data.answers={config.data.answers} learns what it writes)"
    ]
  try:
    examples = training_set.read_refined(config, tokenizer)
  except errors.UserError as error:
    return None, [f"refined answers: {error}"]
  found = measure(
    "refined", str(folder), examples, config.data, tokenizer, context=context
  )
  return found, []


def _fault(check: Callable[[], Any]) -> str | None:
  try:
    check()
  except errors.UserError as error:
    return str(error)
  return None


# --- Figures --------------------------------------------------------------------------


class Reason(NamedTuple):
  """Rejects of one kind and reason: their number, the first reason and places."""

  rows: int
  kind: str
  reason: str
  places: list[rejects_lib.Place]


def reasons(rejects: Sequence[rejects_lib.Reject], places: int = 3) -> list[Reason]:
  """Rejects by reason, the most frequent first. Numbers and quoted words may differ."""
  groups: dict[tuple[str, str], list[rejects_lib.Reject]] = {}
  for reject in rejects:
    words = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "*", reject.reason)
    groups.setdefault((reject.kind, words), []).append(reject)
  return [
    Reason(len(group), kind, group[0].reason, [r.place for r in group[:places]])
    for (kind, _), group in sorted(groups.items(), key=lambda item: -len(item[1]))
  ]


def learned(sets: Sequence[QuestionSet]) -> QuestionSet:
  """The set that a run learns from: the refined one where there is one."""
  return next(s for s in reversed(sets) if s.name in ("questions", "refined"))


def lengths(found: QuestionSet) -> dict[str, np.ndarray]:
  """Tokens of the prompt, the answer and the teacher's context of every row."""
  table = np.array([token_rows.lengths(row) for row in found.rows.values()], int)
  return dict(zip(token_rows.PARTS, table.reshape(-1, 3).T))


def percentiles(tokens: np.ndarray) -> list[int]:
  """For each of `SHARES`, the least length that this share of rows does not pass."""
  return [int(n) for n in np.quantile(tokens, SHARES, method="inverted_cdf")]


def beyond(tokens: np.ndarray, budget: int) -> tuple[int, float]:
  """The number and the share of lengths over a budget."""
  over = int((tokens > budget).sum())
  return over, over / max(len(tokens), 1)


# --- Repeats --------------------------------------------------------------------------

Pair = tuple[rejects_lib.Place, rejects_lib.Place]
"""The places of a row and of the earlier row that it repeats."""

Repeats = dict[tuple[str, str], list[Pair]]
"""(set of the earlier row, set of the later row) -> the repeats."""


def same_questions(sets: Sequence[QuestionSet]) -> Repeats:
  """Rows whose conversation before the answer is that of an earlier row, to the byte.

  A row is listed once for each set that has its conversation.
  """
  found: Repeats = {}
  firsts: dict[str, dict[bytes, rejects_lib.Place]] = {}
  for later in sets:
    firsts[later.name] = {}
    for example in later.examples:
      key = records.canonical_json(records.keyed(example.messages))
      for earlier, places in firsts.items():
        if key in places:
          pair = (example.place, places[key])
          found.setdefault((earlier, later.name), []).append(pair)
      firsts[later.name].setdefault(key, example.place)
  return found


def near_repeats(sets: Sequence[QuestionSet]) -> Repeats | None:
  """Rows whose question and answer nearly repeat those of an earlier row.

  Rows are compared with rows that repeat no other, so these are the least there are.

  Returns:
    The repeats; None if there are too many rows to look.
  """
  rows = [(s.name, example) for s in sets for example in s.examples]
  if len(rows) > NEAR_ROWS:
    return None
  matches = near_duplicates.find([_text(example) for _, example in rows], NEAR)
  found: Repeats = {}
  for (name, example), match in zip(rows, matches):
    if match is not None:
      earlier, first = rows[match.earlier]
      found.setdefault((earlier, name), []).append((example.place, first.place))
  return found


def _text(example: training_set.Example) -> str:
  return "\n".join(map(records.as_text, (*example.messages, example.answer)))


def repeats(sets: Sequence[QuestionSet]) -> tuple[Repeats, Repeats | None]:
  """The same questions, and the near repeats that are not among them."""
  same, near = same_questions(sets), near_repeats(sets)
  return same, None if near is None else beside(near, same)


def beside(near: Repeats, same: Repeats) -> Repeats:
  """The near repeats of rows that are not among the same questions of the two sets."""
  result: Repeats = {}
  for names, pairs in near.items():
    known = {place for place, _ in same.get(names, ())}
    if others := [pair for pair in pairs if pair[0] not in known]:
      result[names] = others
  return result


# --- One example ----------------------------------------------------------------------


class Example(NamedTuple):
  """A row as the models read it, control tokens spelled out.

  Attributes:
    prompt: what the student reads.
    learned: what it learns, the end token included.
    teacher: what the teacher reads before the text that it scores.
  """

  place: rejects_lib.Place
  prompt: str
  learned: str
  teacher: str


def example(
  sets: Sequence[QuestionSet], tokenizer: chat.ChatTokenizer, row_id: str | None
) -> Example | None:
  """The row with this id, or else the first; None if there is none.

  Raises:
    errors.UserError: no row has the id, or the row has no tokens.
  """
  decode = functools.partial(
    tokenizer.hf_tokenizer.decode, clean_up_tokenization_spaces=False
  )
  for found in sets:
    for index, row in sorted(found.rows.items()):
      place = found.examples[index].place
      if row_id in (None, place.id):
        parts = (row.prompt, row.answer, row.teacher)
        return Example(place, *(str(decode(list(ids))) for ids in parts))
  if row_id is None:
    return None
  for reject in itertools.chain.from_iterable(found.rejects for found in sets):
    if reject.place.id == row_id:
      raise errors.UserError(f"--row: it is not used: {reject}")
  raise errors.UserError(
    f"--row: no row has the id {row_id!r}; ids stand in the files, or in front of the "
    "places that this command prints"
  )
