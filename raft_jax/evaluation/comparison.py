"""The trained model compared with the base model, and the files with the results."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax.config import schema
from raft_jax.data import token_rows
from raft_jax.evaluation import (
  answer_choice,
  benchmarks,
  greedy_answers,
  intervals,
  model_scores,
  scoring,
  test_sets,
)
from raft_jax.evaluation import (
  drift as drift_lib,
)
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines
from raft_jax.hf import chat
from raft_jax.storage import atomic, journal, records

RETAINED = (
  "open_ended",
  "ifeval_prompt_strict",
  "ifeval_prompt_loose",
  "ifeval_instruction_strict",
  "ifeval_instruction_loose",
  "mmlu",
)
"""General scores with a retention, trained in percent of base, as in the paper."""

DRIFTS = ("drift", "domain_drift")
"""KL(base ‖ trained) on general prompts, and on the prompts of the test questions."""

SAME_LENGTH = "ifeval_instruction_strict_same_length"
"""IFEval's instructions obeyed, with each pair of answers cut to the shorter one's
length: short answers obey some instructions by accident."""

KEPT = "mmlu_kept"
"""Right answers among the MMLU questions that the base model gets right, as a share."""


class Comparison(NamedTuple):
  """Both models' scores.

  Attributes:
    summary: the part of `scores.json` that the scores decide.
    items: every item's scores, for `items.json`.
    samples: the first questions with both models' answers, for `samples.jsonl`.
    choices: the multiple-choice questions with both models' scores of every option, for
      `choice.jsonl`.
    seconds: how long the scores of "base" and "trained" took.
  """

  summary: dict[str, Any]
  items: dict[str, Any]
  samples: list[dict[str, str]]
  choices: list[dict[str, Any]]
  seconds: dict[str, float]


def compare(
  base_model: scoring.EvalModel,
  trained_model: scoring.EvalModel,
  sets: test_sets.TestSets,
  *,
  judges: Sequence[calls_lib.Role],
  settings: schema.Evaluate,
  log: journal.Journal,
  embed: test_sets.Embed,
) -> Comparison:
  """Scores both models and compares them; what the journal holds is not recomputed."""
  trained, base = (
    model_scores.score(model, sets, settings, log, embed)
    for model in (trained_model, base_model)
  )
  # After both models were scored, so that a judge's weights are loaded only once.
  for model, scores in ((trained_model, trained), (base_model, base)):
    scores.general.update(
      model_scores.judged_scores(model, sets, scores.answers, judges, settings, log)
    )
  engines.release()
  base_scores, trained_scores = intervals.comparable(
    base.domain | base.general, trained.domain | trained.general
  )
  digests = item_digests(sets) | trained.task_digests
  if sets.general.mmlu is not None:
    digests |= add_kept(base_scores, trained_scores, sets.general.mmlu.prompts)
  if (ifeval := sets.general.ifeval) is not None:
    cut = at_same_length(
      base.ifeval_answers, trained.ifeval_answers, tokenizer=base_model.tokenizer
    )
    for scores_of, texts in zip((base_scores, trained_scores), cut):
      all_scores = benchmarks.ifeval_scores(ifeval.items, texts, ifeval.checkers)
      scores_of[SAME_LENGTH] = all_scores["ifeval_instruction_strict"]
  summary = {
    **summarise(base_scores, trained_scores),
    "retention": {
      name: intervals.retention(base_scores[name], trained_scores[name])
      for name in base_scores
      if name in RETAINED or trained.directions.get(name) == 1
    },
    "directions": trained.directions,
    **{name: {} for name in DRIFTS},
  }
  moved = drifts(base_model, trained_model, sets, settings.drift.max_new_tokens, log)
  summary |= {name: intervals.describe(drift) for name, drift in moved.items()}
  trained_scores |= moved
  choices = []
  if sets.choices is not None:
    summary["choice"] = {
      "options": len(sets.choices.letters),
      "left_out": sets.choices.left_out,
    }
    assert base.choices is not None
    assert trained.choices is not None
    choices = answer_choice.described(
      sets.choices, sets.test.questions, base.choices, trained.choices
    )
  questions = sets.test.questions[: settings.samples]
  return Comparison(
    summary,
    items=item_scores(base_scores, trained_scores, digests),
    samples=sample_answers(questions, base.answers, trained.answers),
    choices=choices,
    seconds={"base": base.seconds, "trained": trained.seconds},
  )


def add_kept(
  base: dict[str, intervals.Score],
  trained: dict[str, intervals.Score],
  prompts: Sequence[Sequence[int]],
) -> dict[str, str]:
  """Adds `KEPT` to both models' scores, unless the base model gets nothing right.

  Args:
    prompts: of all MMLU questions.

  Returns:
    The digest of the questions that count, by the score's name.
  """
  before, after = base["mmlu"], trained["mmlu"]
  assert isinstance(before, intervals.ItemScores)
  assert isinstance(after, intervals.ItemScores)
  right_K = np.flatnonzero(before.values_N == 1)
  if not right_K.size:
    return {}
  base[KEPT] = before._replace(values_N=before.values_N[right_K])
  trained[KEPT] = after._replace(values_N=after.values_N[right_K])
  return {KEPT: journal.content_key(items=[prompts[i] for i in right_K.tolist()])}


def at_same_length(
  base: Sequence[greedy_answers.Answer],
  trained: Sequence[greedy_answers.Answer],
  *,
  tokenizer: chat.ChatTokenizer,
) -> tuple[list[str], list[str]]:
  """The answers of both models, each pair cut to the tokens of the shorter one."""
  texts: tuple[list[str], list[str]] = ([], [])
  for pair in zip(base, trained, strict=True):
    ids = [chat.encode(tokenizer, answer.text) for answer in pair]
    length = min(map(len, ids))
    for cut, answer, tokens in zip(texts, pair, ids):
      whole = len(tokens) == length
      cut.append(answer.text if whole else chat.decode(tokenizer, tokens[:length]))
  return texts


def drifts(
  base_model: scoring.EvalModel,
  trained_model: scoring.EvalModel,
  sets: test_sets.TestSets,
  max_new_tokens: int,
  log: journal.Journal,
) -> dict[str, intervals.ItemScores]:
  """The `DRIFTS`; {} if the config names no general prompts."""
  if sets.general.drift is None:
    return {}
  of_domain: Sequence[Sequence[int]] = [row.prompt for row in sets.test.rows]
  return {
    name: drift_lib.from_base(
      base_model,
      trained_model,
      prompts,
      max_new_tokens,
      log,
      name=name.replace("_", " "),
    )
    for name, prompts in zip(DRIFTS, (sets.general.drift, of_domain))
  }


def losses_as_trained(
  models: Mapping[str, scoring.EvalModel],
  rows: Sequence[token_rows.Row],
  log: journal.Journal,
  *,
  form: str,
) -> dict[str, Any]:
  """Held-out losses on a quantised base, as a part of `scores.json`.

  The other scores are those of the export, whose kernels are not quantised.

  Args:
    models: "base" and "trained".
    form: of the quantised kernels.
  """
  means = {
    name: float(np.mean(scoring.losses(model, rows, log, name="held-out loss")))
    for name, model in models.items()
  }
  return {"as_trained": {"form": form, **means}}


def summarise(
  base: Mapping[str, intervals.Score], trained: Mapping[str, intervals.Score]
) -> dict[str, Any]:
  """Means with intervals of both models, and paired differences, trained minus base."""
  scores = {
    model: {name: intervals.describe(score) for name, score in scores.items()}
    for model, scores in (("base", base), ("trained", trained))
  }
  paired = {name: intervals.compare(base[name], trained[name]) for name in base}
  return {"scores": scores, "paired": paired}


def item_digests(sets: test_sets.TestSets) -> dict[str, str]:
  """Digests of the items of each test set, by the start of its scores' names.

  "" stands for the test questions, to which all other scores belong.
  """
  general = sets.general
  items: dict[str, Any] = {"": [(row.prompt, row.answer) for row in sets.test.rows]}
  if sets.validation is not None:
    items["validation"] = [(row.prompt, row.answer) for row in sets.validation.rows]
  if sets.choices is not None:
    items["choice"] = [(row.prompt, row.answer) for row in sets.choices.rows]
  if general.ifeval is not None:
    items["ifeval"] = general.ifeval.prompts
  if general.mmlu is not None:
    items["mmlu"] = general.mmlu.prompts
  if general.open_ended is not None:
    items["open"] = [request.prompt for request in general.open_ended.items]
  if general.drift is not None:
    items["drift"] = general.drift
  return {start: journal.content_key(items=value) for start, value in items.items()}


def item_scores(
  base: Mapping[str, intervals.Score],
  trained: Mapping[str, intervals.Score],
  digests: Mapping[str, str],
) -> dict[str, Any]:
  """Every item's scores, for later comparisons with runs on the same items.

  Args:
    digests: of the items, by the start of the scores' names.
  """
  result = {}
  for name, score in trained.items():
    if isinstance(score, float):
      continue
    base_score = base.get(name)
    starts = [s for s in digests if not s or f"{name}_".startswith(f"{s}_")]
    result[name] = {
      "items": digests[max(starts, key=len)],
      "share": score.share,
      "base": None
      if base_score is None or isinstance(base_score, float)
      else base_score.values_N.tolist(),
      "trained": score.values_N.tolist(),
      "weights": None if score.weights_N is None else score.weights_N.tolist(),
    }
  return result


def sample_answers(
  questions: Sequence[records.Question],
  base: Sequence[greedy_answers.Answer],
  trained: Sequence[greedy_answers.Answer],
) -> list[dict[str, str]]:
  """Questions with their reference and both models' answers, for a reader."""
  return [
    {
      "id": question.id,
      "question": question.messages[-1].content,
      "reference": question.answer,
      "base": base[i].text,
      "trained": trained[i].text,
    }
    for i, question in enumerate(questions)
  ]


def flat(result: Mapping[str, Any]) -> dict[str, float]:
  """The means of a result by names such as `evaluation/trained/rouge_l`."""
  paired = result["paired"].items()
  tables = {
    **result["scores"],
    "retention": result["retention"],
    "difference": {name: {"value": pair["difference"]} for name, pair in paired},
    "drift": {"mean": result["drift"], "domain": result["domain_drift"]},
  }
  return {
    f"evaluation/{table}/{name}": float(score["value"])
    for table, scores in tables.items()
    for name, score in scores.items()
    if score  # empty: a drift not measured, the retention of 0 before training
  }


def write(
  folder: pathlib.Path, result: Mapping[str, Any], compared: Comparison
) -> None:
  """Writes the files of an evaluation.

  `scores.json` comes last: other commands take its presence to mean that the
  evaluation is complete.
  """
  with atomic.replacing(folder / "items.json") as path:
    path.write_text(json.dumps(compared.items, allow_nan=False) + "\n")
  with atomic.replacing(folder / "samples.jsonl") as path:
    path.write_text("".join(json.dumps(row) + "\n" for row in compared.samples))
  if compared.choices:
    with atomic.replacing(folder / "choice.jsonl") as path:
      path.write_text("".join(json.dumps(row) + "\n" for row in compared.choices))
  else:  # those of an evaluation with another config
    (folder / "choice.jsonl").unlink(missing_ok=True)
  with atomic.replacing(folder / "scores.json") as path:
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
