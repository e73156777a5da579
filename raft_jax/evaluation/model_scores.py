"""All scores of one model: on the domain, on general abilities, and by judges."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raft_jax.config import schema
from raft_jax.curation import refinement
from raft_jax.data import rouge
from raft_jax.evaluation import (
  answer_choice,
  benchmarks,
  greedy_answers,
  intervals,
  judged_accuracy,
  scoring,
  test_sets,
)
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import sentence_encoder
from raft_jax.runtime import interrupts
from raft_jax.storage import journal, records


class ModelScores(NamedTuple):
  """What one model scored.

  Attributes:
    general: general abilities, the tasks of lm-evaluation-harness included.
    directions: for each score of a task, 1 if higher is better, -1 if lower is, 0 if
      the task does not say.
    task_digests: digests of every task's items.
    answers: the greedy answers to the test questions.
    ifeval_answers: the greedy answers to IFEval's prompts; empty if not measured.
    choices: scores of the options of multiple choice; None if not measured.
    seconds: how long the scores took.
  """

  domain: dict[str, intervals.Score]
  general: dict[str, intervals.Score]
  directions: dict[str, int]
  task_digests: dict[str, str]
  answers: list[greedy_answers.Answer]
  ifeval_answers: list[greedy_answers.Answer]
  choices: answer_choice.Scored | None
  seconds: float


def score(
  model: scoring.EvalModel,
  sets: test_sets.TestSets,
  settings: schema.Evaluate,
  log: journal.Journal,
  embed: test_sets.Embed,
) -> ModelScores:
  """All scores of one model except the judges'; skips what the journal holds."""
  started = time.monotonic()
  test = sets.test
  losses = scoring.losses(model, test.rows, log, name="held-out loss")
  answers = greedy_answers.generate(
    model,
    [row.prompt for row in test.rows],
    log,
    max_new_tokens=settings.max_new_tokens,
    name="greedy answers",
    messages=[question.messages for question in test.questions],
  )
  general: dict[str, intervals.Score] = {}
  replies: list[greedy_answers.Answer] = []
  if (ifeval := sets.general.ifeval) is not None:
    new = settings.ifeval.max_new_tokens
    replies = ifeval_answers(model, ifeval, log, max_new_tokens=new)
    general |= ifeval_scores(ifeval, replies)
  if (mmlu := sets.general.mmlu) is not None:
    logits = scoring.choices(model, mmlu.prompts, mmlu.letters, log, name="MMLU")
    general |= benchmarks.mmlu_scores(mmlu.items, logits)
  directions: dict[str, int] = {}
  task_digests: dict[str, str] = {}
  if sets.general.score_tasks is not None:
    task_scores = sets.general.score_tasks(model, log)
    general |= task_scores.scores
    directions, task_digests = task_scores.directions, task_scores.item_digests
  interrupts.check()
  references = [question.answer for question in test.questions]
  domain: dict[str, intervals.Score] = {}
  domain |= domain_scores(losses, answers, references, embed)
  if sets.validation is not None:
    rows = sets.validation.rows
    values = scoring.losses(model, rows, log, name="validation loss")
    domain["validation_loss"] = intervals.ItemScores(np.array(values))
  options = None
  if sets.choices is not None:
    options = answer_choice.score(model, sets.choices, log)
    domain |= answer_choice.scores(sets.choices.items, options)
  return ModelScores(
    domain,
    general,
    directions,
    task_digests,
    answers,
    replies,
    choices=options,
    seconds=time.monotonic() - started,
  )


def domain_scores(
  losses: Sequence[float],
  answers: Sequence[greedy_answers.Answer],
  references: Sequence[str],
  embed: test_sets.Embed,
) -> dict[str, intervals.ItemScores]:
  """The scores on the domain's questions. An empty answer scores 0, not NaN."""
  texts = [answer.text for answer in answers]
  cosine_N = np.nan_to_num(sentence_encoder.cosine(embed(texts), embed(references)))
  has_text_N = np.array([bool(text.strip()) for text in texts])
  rouge_N = np.array(
    [rouge.rouge_l(reference, text) for reference, text in zip(references, texts)]
  )
  values = {
    "held_out_loss": np.array(losses),
    "rouge_l": rouge_N,
    "similarity": np.where(has_text_N, cosine_N, 0.0),
    "answer_tokens": np.array([float(answer.tokens) for answer in answers]),
    "ended": np.array([float(answer.ended) for answer in answers]),
  }
  return {
    name: intervals.ItemScores(values_N, share=name == "ended")
    for name, values_N in values.items()
  }


def ifeval_scores(
  ifeval: test_sets.Ifeval, answers: Sequence[greedy_answers.Answer]
) -> dict[str, intervals.ItemScores]:
  """The scores of a model's greedy answers, and the length of these in tokens."""
  scores = benchmarks.ifeval_scores(
    ifeval.items, [answer.text for answer in answers], ifeval.checkers
  )
  # Answers that become short, or do not end, explain much of a change on IFEval.
  lengths_N = np.array([float(answer.tokens) for answer in answers])
  return scores | {"ifeval_answer_tokens": intervals.ItemScores(lengths_N)}


def ifeval_answers(
  model: scoring.EvalModel,
  ifeval: test_sets.Ifeval,
  log: journal.Journal,
  *,
  max_new_tokens: int,
) -> list[greedy_answers.Answer]:
  """The model's greedy answers to IFEval's prompts."""
  return greedy_answers.generate(
    model,
    ifeval.prompts,
    log,
    max_new_tokens=max_new_tokens,
    name="IFEval",
    messages=[records.user_turn(item.prompt) for item in ifeval.items],
  )


def judged_scores(
  model: scoring.EvalModel,
  sets: test_sets.TestSets,
  answers: Sequence[greedy_answers.Answer],
  judges: Sequence[calls_lib.Role],
  settings: schema.Evaluate,
  log: journal.Journal,
) -> dict[str, intervals.ItemScores]:
  """D-Acc of the answers to the test questions, and the share of good open-ended ones.

  {} if there are no judges.
  """
  if not judges:
    return {}
  calls = calls_lib.Calls(log, seed=0, title=f"{model.title}: ")
  items = [
    judged_accuracy.Item(
      refinement.question_text(question), question.answer, answer.text
    )
    for question, answer in zip(sets.test.questions, answers, strict=True)
  ]
  votes = judged_accuracy.votes("correct", items, judges, calls)
  scores = judged_accuracy.scores("d_acc", votes)
  open_ended = sets.general.open_ended
  if open_ended is not None:
    replies = greedy_answers.generate(
      model,
      open_ended.prompts,
      log,
      max_new_tokens=settings.open_ended.max_new_tokens,
      name="open-ended answers",
      messages=[records.user_turn(item.prompt) for item in open_ended.items],
    )
    items = [
      judged_accuracy.Item(item.prompt, item.reference or "", reply.text)
      for item, reply in zip(open_ended.items, replies, strict=True)
    ]
    votes = judged_accuracy.votes("open_ended", items, judges, calls)
    scores |= judged_accuracy.scores("open_ended", votes)
  return scores
