"""What a model is tested on: questions, benchmarks and tasks, read and tokenized."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raft_jax import errors
from raft_jax.config import data_layout, schema
from raft_jax.data import token_rows
from raft_jax.evaluation import answer_choice, benchmarks, scoring
from raft_jax.hf import chat
from raft_jax.models import transformer
from raft_jax.storage import journal, question_files, records
from raft_jax.storage import rejects as rejects_lib

if TYPE_CHECKING:
  from raft_jax.evaluation import lm_eval_tasks


Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> their sentence embeddings."""


class QuestionSet(NamedTuple):
  """Questions of the domain with their tokens, and the rows that were left out."""

  questions: list[records.Question]
  rows: list[token_rows.Row]
  rejects: Sequence[rejects_lib.Reject] = ()


class Ifeval(NamedTuple):
  items: list[benchmarks.Instructions]
  prompts: list[list[int]]
  checkers: Any


class Mmlu(NamedTuple):
  items: list[benchmarks.Choice]
  prompts: list[list[int]]
  letters: list[int]


class OpenEnded(NamedTuple):
  items: list[benchmarks.Request]
  prompts: list[list[int]]


ScoreTasks = Callable[[scoring.EvalModel, journal.Journal], "lm_eval_tasks.TaskScores"]
"""Scores a model on the tasks of lm-evaluation-harness."""


class General(NamedTuple):
  """Tests of general abilities; None for those that the config does not name.

  Attributes:
    drift: token ids of general prompts.
  """

  ifeval: Ifeval | None
  mmlu: Mmlu | None
  drift: list[list[int]] | None
  open_ended: OpenEnded | None
  score_tasks: ScoreTasks | None = None


class TestSets(NamedTuple):
  """Everything that `evaluate` tests a model on.

  Attributes:
    choices: the test questions as multiple choice; `with_choices` adds them.
  """

  test: QuestionSet
  validation: QuestionSet | None
  general: General
  choices: answer_choice.Choices | None = None

  @property
  def rejects(self) -> list[rejects_lib.Reject]:
    """The rows of the domain's questions that were left out."""
    sets = (self.test, self.validation)
    return [reject for found in sets if found is not None for reject in found.rejects]


def read(
  data: schema.Data,
  settings: schema.Evaluate,
  tokenizer: chat.ChatTokenizer,
  decoder: transformer.DecoderConfig,
  *,
  source: str,
) -> TestSets:
  """Reads and checks all test sets; needs no weights.

  Args:
    source: the model's, for error messages.

  Raises:
    UserError: a file or a row is invalid, or too long for the model.
  """
  test = read_test(data, tokenizer, settings.limit)
  if settings.choice is not None:
    answers = [question.answer for question in test.questions]
    answer_choice.check(answers, settings.choice)
  validation = read_validation(data, tokenizer, settings.limit)
  general = read_general(settings, tokenizer)
  token_rows.check_positions(lengths(settings, test, general), source, decoder)
  score_tasks = read_tasks(settings.tasks, decoder)
  return TestSets(test, validation, general._replace(score_tasks=score_tasks))


# --- Questions of the domain ----------------------------------------------------------


def read_test(
  data: schema.Data, tokenizer: chat.ChatTokenizer, limit: int | None
) -> QuestionSet:
  """Reads the first `limit` questions of `data.test`."""
  if data.test is None:
    raise errors.UserError(
      "data.test: not set, so there is nothing to evaluate on; name a file of"
      " held-out questions"
    )
  return _read_questions(data, tokenizer, data.test, limit)


def read_validation(
  data: schema.Data, tokenizer: chat.ChatTokenizer, limit: int | None
) -> QuestionSet | None:
  """Reads the first `limit` questions of `data.validation`, if it is set."""
  if data.validation is None:
    return None
  return _read_questions(data, tokenizer, data.validation, limit)


def _read_questions(
  data: schema.Data, tokenizer: chat.ChatTokenizer, path: str, limit: int | None
) -> QuestionSet:
  file = question_files.read(
    path,
    layout=data_layout.layout(data),
    limit=limit,
    unusable=data.unusable,
    reject_threshold=data.reject_threshold,
  )
  questions, calls = question_files.text_answers(file)
  if not questions:
    raise errors.UserError(f"{calls[0]}; the file has no other answers, so give others")
  rows, too_long = token_rows.encode(
    [(question.messages, question.reply) for question in questions],
    data,
    tokenizer=tokenizer,
    teacher_context="none",
    places=[file.places[question.id] for question in questions],
  )
  rejects = [*file.rejects, *calls, *too_long]
  rejects_lib.report(rejects)
  return QuestionSet([questions[row.row_id] for row in rows], rows, rejects)


def with_choices(
  sets: TestSets,
  settings: schema.Choice | None,
  tokenizer: chat.ChatTokenizer,
  decoder: transformer.DecoderConfig,
  embed: Embed,
  *,
  source: str,
) -> TestSets:
  """Adds the multiple-choice questions, if the config wants them; needs no weights.

  Args:
    source: the model's, for error messages.

  Raises:
    UserError: no question has enough options, or one is too long for the model.
  """
  if settings is None:
    return sets
  questions, rows, _ = sets.test
  vectors_NE = embed([question.answer for question in questions])
  choices = answer_choice.build(questions, rows, tokenizer, vectors_NE, settings)
  longest = max(
    *(len(row.prompt) + len(row.answer) for row in choices.rows),
    *map(len, choices.prompts),
  )
  key = f"evaluate.choice.others={settings.others}, data.max_*_tokens"
  token_rows.check_positions({key: longest}, source, decoder)
  if choices.left_out:
    print(
      f"evaluate.choice: {choices.left_out} of {len(questions)} test questions are left"
      f" out, because fewer than {settings.others} other answers differ enough"
      f" (near_duplicate={settings.near_duplicate:g})",
      file=sys.stderr,
    )
  return sets._replace(choices=choices)


# --- General abilities ----------------------------------------------------------------


def read_general(settings: schema.Evaluate, tokenizer: chat.ChatTokenizer) -> General:
  """Reads the benchmarks that the config names, but not the harness' tasks."""
  return General(
    mmlu=read_mmlu(settings.mmlu, tokenizer),
    open_ended=read_open_ended(settings.open_ended, tokenizer),
    ifeval=read_ifeval(settings.ifeval, tokenizer, section="evaluate"),
    drift=read_drift(settings.drift, tokenizer, section="evaluate"),
  )


def read_open_ended(
  settings: schema.OpenEnded, tokenizer: chat.ChatTokenizer
) -> OpenEnded | None:
  """Reads the open-ended requests, if the config names some."""
  if settings.prompts is None:
    return None
  requests = benchmarks.read(
    benchmarks.Request,
    settings.prompts,
    key="evaluate.open_ended.prompts",
    limit=settings.limit,
  )
  return OpenEnded(requests, _prompt_ids(tokenizer, requests))


def read_ifeval(
  settings: schema.Ifeval, tokenizer: chat.ChatTokenizer, *, section: str
) -> Ifeval | None:
  """Reads the prompts of IFEval, if the config names some, and loads its checkers.

  Args:
    section: "evaluate" or "validation", for error messages.
  """
  if settings.items is None:
    return None
  checkers = benchmarks.load_checkers(settings.nltk_data, key=f"{section}.ifeval")
  items = benchmarks.read(
    benchmarks.Instructions,
    settings.items,
    key=f"{section}.ifeval.items",
    split="train",  # the hub's dataset has no other split
    limit=settings.limit,
  )
  benchmarks.check_instructions(items, checkers, key=f"{section}.ifeval.items")
  return Ifeval(items, _prompt_ids(tokenizer, items), checkers)


def read_drift(
  settings: schema.Drift, tokenizer: chat.ChatTokenizer, *, section: str
) -> list[list[int]] | None:
  """Reads the general prompts for the drift, if the config names some.

  Args:
    section: "evaluate" or "validation", for error messages.
  """
  if settings.prompts is None:
    return None
  prompts = benchmarks.read(
    benchmarks.Prompt,
    settings.prompts,
    key=f"{section}.drift.prompts",
    limit=settings.limit,
  )
  return _prompt_ids(tokenizer, prompts)


def read_mmlu(settings: schema.Mmlu, tokenizer: chat.ChatTokenizer) -> Mmlu | None:
  """Reads the questions of MMLU, if the config names some, and adds the examples."""
  if settings.items is None:
    return None
  source = settings.items
  if settings.examples is None and benchmarks.is_file(source) and settings.shots:
    raise errors.UserError(
      "evaluate.mmlu.examples: not set; name the file of solved questions (MMLU's dev"
      " set), or set evaluate.mmlu.shots=0"
    )
  items = benchmarks.read(
    benchmarks.Choice,
    source,
    key="evaluate.mmlu.items",
    limit=settings.limit,
  )
  examples = benchmarks.read(
    benchmarks.Choice,
    settings.examples or source,
    key="evaluate.mmlu.examples",
    split="dev",
  )
  prompts = benchmarks.mmlu_prompts(items, examples, shots=settings.shots)
  ids = [chat.document_ids(tokenizer, prompt) for prompt in prompts]
  letters = []
  for letter in benchmarks.LETTERS:
    *before, last = chat.document_ids(tokenizer, f"{prompts[0]} {letter}")
    if before != ids[0]:
      raise errors.UserError(
        f"evaluate.mmlu: the model's tokenizer has no token {' ' + letter!r}, by which"
        " answers are compared; leave evaluate.mmlu.items out"
      )
    letters.append(last)
  return Mmlu(items, ids, letters)


def read_tasks(
  settings: schema.Tasks, decoder: transformer.DecoderConfig
) -> ScoreTasks | None:
  """Loads the harness' tasks that the config names."""
  if not settings.names:
    return None
  try:
    from raft_jax.evaluation import lm_eval_tasks
  except ImportError as error:
    raise errors.UserError(f"evaluate.tasks: needs {benchmarks.EXTRA}") from error
  tasks = lm_eval_tasks.read(settings, decoder.max_positions)
  return functools.partial(lm_eval_tasks.score, tasks)


def _prompt_ids(
  tokenizer: chat.ChatTokenizer,
  items: Sequence[benchmarks.Instructions | benchmarks.Prompt],
) -> list[list[int]]:
  turns = [records.user_turn(item.prompt) for item in items]
  return [chat.prompt_ids(tokenizer, turn) for turn in turns]


# --- Lengths --------------------------------------------------------------------------


def lengths(
  settings: schema.Evaluate, test: QuestionSet, general: General
) -> dict[str, int]:
  """The most tokens of prompt and answer, by the keys that decide them."""
  new = settings.max_new_tokens
  tokens = {
    f"evaluate.max_new_tokens={new}, data.max_*_tokens": max(
      len(row.prompt) + max(len(row.answer), new) for row in test.rows
    )
  }
  tokens |= general_lengths(
    settings, section="evaluate", ifeval=general.ifeval, drift=general.drift
  )
  if general.drift is not None:
    new = settings.drift.max_new_tokens
    key = f"evaluate.drift.max_new_tokens={new}, data.max_prompt_tokens"
    tokens[key] = max(len(row.prompt) for row in test.rows) + new
  if general.mmlu is not None:
    key = f"evaluate.mmlu.shots={settings.mmlu.shots}"
    tokens[key] = max(map(len, general.mmlu.prompts))
  if general.open_ended is not None:
    new = settings.open_ended.max_new_tokens
    key = f"evaluate.open_ended.max_new_tokens={new}"
    tokens[key] = max(map(len, general.open_ended.prompts)) + new
  return tokens


def general_lengths(
  settings: schema.Evaluate | schema.Validation,
  *,
  section: str,
  ifeval: Ifeval | None,
  drift: list[list[int]] | None,
) -> dict[str, int]:
  """As `lengths`, for the tests that `evaluate` and `validation` have in common."""
  tokens = {}
  if ifeval is not None:
    new = settings.ifeval.max_new_tokens
    key = f"{section}.ifeval.max_new_tokens={new}"
    tokens[key] = max(map(len, ifeval.prompts)) + new
  if drift is not None:
    new = settings.drift.max_new_tokens
    tokens[f"{section}.drift.max_new_tokens={new}"] = max(map(len, drift)) + new
  return tokens
