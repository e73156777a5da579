"""What a model is examined on: test questions, benchmarks, and their tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.evaluation import benchmarks, intervals, scoring
from raft_jax.hf import chat
from raft_jax.models import transformer
from raft_jax.storage import journal, question_files, records
from raft_jax.storage import rejects as rejects_lib

if TYPE_CHECKING:
  from raft_jax.evaluation import lm_eval_tasks


class Domain(NamedTuple):
  """The test questions that fit the budgets, their tokens, and the other questions."""

  questions: list[records.Question]
  rows: list[batching.Row]
  rejects: Sequence[rejects_lib.Reject] = ()


class Ifeval(NamedTuple):
  items: list[benchmarks.Instructions]
  prompts: list[list[int]]
  checkers: Any


class Mmlu(NamedTuple):
  items: list[benchmarks.Choice]
  prompts: list[list[int]]
  letters: list[int]


class General(NamedTuple):
  """General abilities to measure; None where the config names no items."""

  ifeval: Ifeval | None
  mmlu: Mmlu | None
  drift: list[list[int]] | None
  requests: list[benchmarks.Request]


class Exam(NamedTuple):
  """All that `evaluate` asks a model; `tasks` as of `read_tasks`."""

  domain: Domain
  validation: Domain | None
  general: General
  tasks: Callable[[scoring.EvalModel, journal.Journal], lm_eval_tasks.Found] | None


def read(
  config: schema.Config,
  tokenizer: chat.ChatTokenizer,
  decoder: transformer.DecoderConfig,
) -> Exam:
  """Reads and checks it, before any weight is.

  Raises:
    UserError: a file or a row is no such thing, or too long for the model.
  """
  domain = read_domain(config, tokenizer)
  validation = read_validation(config, tokenizer, config.evaluate.limit)
  general = read_general(config.evaluate, tokenizer)
  check_lengths(
    config, domain, general, open_ended_prompts(general, tokenizer), decoder
  )
  tasks = read_tasks(config.evaluate.tasks, decoder)
  return Exam(domain, validation, general, tasks)


def read_domain(config: schema.Config, tokenizer: chat.ChatTokenizer) -> Domain:
  """Reads `data.test`."""
  if config.data.test is None:
    raise errors.UserError(
      "data.test: not set, so there is nothing to evaluate on; name a JSONL or Parquet"
      " file of held-out questions"
    )
  return _questions(config, tokenizer, config.data.test, config.evaluate.limit)


def read_validation(
  config: schema.Config, tokenizer: chat.ChatTokenizer, limit: int | None
) -> Domain | None:
  """Reads the first `limit` of `data.validation`, where it is set."""
  if config.data.validation is None:
    return None
  return _questions(config, tokenizer, config.data.validation, limit)


def _questions(
  config: schema.Config,
  tokenizer: chat.ChatTokenizer,
  path: str,
  limit: int | None,
) -> Domain:
  found = question_files.read(
    path,
    limit=limit,
    unusable=config.data.unusable,
    reject_threshold=config.data.reject_threshold,
  )
  questions = found.questions
  rows, aside = batching.encode_rows(
    [(question.messages, question.answer) for question in questions],
    tokenizer=tokenizer,
    teacher_context="none",
    max_prompt_tokens=config.data.max_prompt_tokens,
    max_answer_tokens=config.data.max_answer_tokens,
    max_teacher_tokens=config.data.max_teacher_tokens,
    too_long=config.data.too_long,
    unusable=config.data.unusable,
    places=[found.places[question.id] for question in questions],
  )
  aside = [*found.rejects, *aside]
  rejects_lib.report(aside)
  return Domain([questions[row.row_id] for row in rows], rows, aside)


def read_general(settings: schema.Evaluate, tokenizer: chat.ChatTokenizer) -> General:
  """Reads the benchmarks that the config names, and what scores them."""
  mmlu = None
  if settings.mmlu.items is not None:
    mmlu = read_mmlu(settings.mmlu, tokenizer)
  requests = []
  if settings.open_ended.prompts is not None:
    requests = benchmarks.read(
      benchmarks.Request,
      settings.open_ended.prompts,
      key="evaluate.open_ended.prompts",
      limit=settings.open_ended.limit,
    )
  ifeval = read_ifeval(settings.ifeval, tokenizer, section="evaluate")
  drift = read_drift(settings.drift, tokenizer, section="evaluate")
  return General(ifeval, mmlu, drift, requests)


def read_ifeval(
  settings: schema.Ifeval, tokenizer: chat.ChatTokenizer, *, section: str
) -> Ifeval | None:
  """Reads the prompts, where some are named, and what scores the answers."""
  if settings.items is None:
    return None
  checkers = benchmarks.load_checkers(settings.nltk_data, key=f"{section}.ifeval")
  orders = benchmarks.read(
    benchmarks.Instructions,
    settings.items,
    key=f"{section}.ifeval.items",
    split="train",  # the hub's copy has no other
    limit=settings.limit,
  )
  benchmarks.check_instructions(orders, checkers, key=f"{section}.ifeval.items")
  return Ifeval(orders, _asked(tokenizer, orders), checkers)


def take_ifeval(
  who: scoring.EvalModel, asked: Ifeval, log: journal.Journal, *, max_new_tokens: int
) -> dict[str, intervals.Scores]:
  """The scores of a model's greedy answers, and how long these are in tokens."""
  replies = scoring.answers(
    who,
    asked.prompts,
    log,
    max_new_tokens=max_new_tokens,
    name="IFEval",
    messages=[records.user_turn(item.prompt) for item in asked.items],
  )
  scores = benchmarks.ifeval_scores(
    asked.items, [reply.text for reply in replies], asked.checkers
  )
  # Answers that become short or stop ending explain much of what IFEval shows.
  lengths_N = np.array([float(reply.tokens) for reply in replies])
  return scores | {"ifeval_answer_tokens": intervals.Scores(lengths_N)}


def read_drift(
  settings: schema.Drift, tokenizer: chat.ChatTokenizer, *, section: str
) -> list[list[int]] | None:
  """Reads the general prompts, where some are named."""
  if settings.prompts is None:
    return None
  prompts = benchmarks.read(
    benchmarks.Prompt,
    settings.prompts,
    key=f"{section}.drift.prompts",
    limit=settings.limit,
  )
  return _asked(tokenizer, prompts)


def read_mmlu(settings: schema.Mmlu, tokenizer: chat.ChatTokenizer) -> Mmlu:
  """Reads the questions and puts the solved ones before each."""
  source = str(settings.items)
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
) -> Callable[[scoring.EvalModel, journal.Journal], lm_eval_tasks.Found] | None:
  """Loads the harness' tasks that the config names; returns what asks a model."""
  if not settings.names:
    return None
  try:
    from raft_jax.evaluation import lm_eval_tasks
  except ImportError as error:
    raise errors.UserError(f"evaluate.tasks: needs {benchmarks.EXTRA}") from error
  tasks = lm_eval_tasks.read(settings, decoder.max_positions)
  return functools.partial(lm_eval_tasks.measured, tasks)


def check_lengths(
  config: schema.Config,
  domain: Domain,
  general: General,
  requests: Sequence[Sequence[int]],
  decoder: transformer.DecoderConfig,
) -> None:
  """Whether prompts and answers fit into the model's positions.

  Raises:
    UserError: they do not.
  """
  settings = config.evaluate
  new = settings.max_new_tokens
  need = {
    f"evaluate.max_new_tokens={new}, data.max_*_tokens": max(
      len(row.prompt) + max(len(row.answer), new) for row in domain.rows
    )
  }
  if general.ifeval is not None:
    new = settings.ifeval.max_new_tokens
    key = f"evaluate.ifeval.max_new_tokens={new}"
    need[key] = max(map(len, general.ifeval.prompts)) + new
  if general.mmlu is not None:
    key = f"evaluate.mmlu.shots={settings.mmlu.shots}"
    need[key] = max(map(len, general.mmlu.prompts))
  if general.drift is not None:
    new = settings.drift.max_new_tokens
    need[f"evaluate.drift.max_new_tokens={new}"] = max(map(len, general.drift)) + new
  if requests:
    new = settings.open_ended.max_new_tokens
    key = f"evaluate.open_ended.max_new_tokens={new}"
    need[key] = max(map(len, requests)) + new
  batching.check_positions(need, config.model.source, decoder)


def open_ended_prompts(
  general: General, tokenizer: chat.ChatTokenizer
) -> list[list[int]]:
  """The token ids of the open-ended requests."""
  return _asked(tokenizer, general.requests)


def _asked(
  tokenizer: chat.ChatTokenizer,
  items: Sequence[benchmarks.Instructions | benchmarks.Prompt],
) -> list[list[int]]:
  turns = [records.user_turn(item.prompt) for item in items]
  return [chat.prompt_ids(tokenizer, turn) for turn in turns]
