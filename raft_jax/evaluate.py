"""Stage 3: the trained model beside the base model, on the domain and in general.

Of the domain: held-out loss of the reference answers, ROUGE-L and sentence-encoder
similarity of greedy answers, named as what they are, and the paper's judged accuracy
(D-Acc) where the config names judges. Of general abilities, where it names items:
IFEval, MMLU, any task of lm-evaluation-harness and judged open-ended requests, with
their retention (trained in % of base), and the drift on general prompts. A score that
is a mean of items carries their number and a 95 % interval; trained and base are
compared item by item.

Finished items go to `evaluation/journal.jsonl`, keyed by the content of the model, the
item and the settings: a second run repeats nothing, and a new checkpoint only itself.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich import console, table

from raft_jax.config import cli, run_lock, schema
from raft_jax.curation import refinement
from raft_jax.data import rouge
from raft_jax.evaluation import (
  benchmarks,
  intervals,
  judged_accuracy,
  scoring,
  test_sets,
)
from raft_jax.evaluation import (
  drift as drift_lib,
)
from raft_jax.generation import (
  calls as calls_lib,
)
from raft_jax.generation import (
  engines,
  openai_engine,
  roles,
  sentence_encoder,
)
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import sampling
from raft_jax.runtime import distributed, interrupts
from raft_jax.storage import atomic, journal, records, rejects
from raft_jax.training import checkpoint
from raft_jax.training import trained_model as trained_model_lib

if TYPE_CHECKING:
  from raft_jax.evaluation import lm_eval_tasks


def domain_scores(
  losses: Sequence[float],
  answers: Sequence[scoring.Answer],
  references: Sequence[str],
  embed: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, intervals.Scores]:
  """Scores of the domain's questions. An answer without a word scores 0, not NaN."""
  texts = [answer.text for answer in answers]
  said_N = np.array([bool(answer.strip()) for answer in texts])
  cosine_N = np.nan_to_num(sentence_encoder.cosine(embed(texts), embed(references)))
  rouge_N = np.array(
    [rouge.rouge_l(ref, answer) for ref, answer in zip(references, texts)]
  )
  values = {
    "held_out_loss": np.array(losses),
    "rouge_l": rouge_N,
    "similarity": np.where(said_N, cosine_N, 0.0),
    "answer_tokens": np.array([float(answer.tokens) for answer in answers]),
    "ended": np.array([float(answer.ended) for answer in answers]),
  }
  return {
    name: intervals.Scores(values_N, share=name == "ended")
    for name, values_N in values.items()
  }


def judged(
  who: scoring.EvalModel,
  domain: test_sets.Domain,
  general: test_sets.General,
  answers: Sequence[scoring.Answer],
  judges: Sequence[calls_lib.Role],
  settings: schema.Evaluate,
  log: journal.Journal,
) -> dict[str, intervals.Scores]:
  """What a panel finds of a model's answers: D-Acc, and the open-ended requests."""
  if not judges:
    return {}
  calls = calls_lib.Calls(log, seed=0, title=f"{who.title}: ")
  items = [
    judged_accuracy.Item(
      refinement.question_text(question), question.answer, answer.text
    )
    for question, answer in zip(domain.questions, answers, strict=True)
  ]
  found = judged_accuracy.scores(
    "d_acc", judged_accuracy.votes("correct", items, judges, calls)
  )
  if general.requests:
    replies = scoring.answers(
      who,
      test_sets.open_ended_prompts(general, who.tokenizer),
      log,
      max_new_tokens=settings.open_ended.max_new_tokens,
      name="open-ended answers",
      messages=[records.user_turn(request.prompt) for request in general.requests],
    )
    items = [
      judged_accuracy.Item(request.prompt, request.reference or "", reply.text)
      for request, reply in zip(general.requests, replies, strict=True)
    ]
    verdicts = judged_accuracy.votes("open_ended", items, judges, calls)
    found |= judged_accuracy.scores("open_ended", verdicts)
  return found


class Measured(NamedTuple):
  """One model's scores, its answers to the test questions and the seconds it took.

  Those of `tasks` are in `general`, too.
  """

  domain: dict[str, intervals.Scores]
  general: dict[str, intervals.Figure]
  tasks: lm_eval_tasks.Found | None
  answers: list[scoring.Answer]
  seconds: float


def measure_model(
  who: scoring.EvalModel,
  domain: test_sets.Domain,
  validation: test_sets.Domain | None,
  general: test_sets.General,
  tasks: Callable[[scoring.EvalModel, journal.Journal], lm_eval_tasks.Found] | None,
  settings: schema.Evaluate,
  log: journal.Journal,
  embed: Callable[[Sequence[str]], np.ndarray],
) -> Measured:
  """All scores of one model; what the journal knows is not computed again."""
  started = time.monotonic()
  losses = scoring.losses(who, domain.rows, log, name="held-out loss")
  answers = scoring.answers(
    who,
    [row.prompt for row in domain.rows],
    log,
    max_new_tokens=settings.max_new_tokens,
    name="greedy answers",
    messages=[question.messages for question in domain.questions],
  )
  references = [question.answer for question in domain.questions]
  found: dict[str, intervals.Figure] = {}
  if general.ifeval is not None:
    new = settings.ifeval.max_new_tokens
    found |= test_sets.take_ifeval(who, general.ifeval, log, max_new_tokens=new)
  if general.mmlu is not None:
    logits = scoring.choices(
      who, general.mmlu.prompts, general.mmlu.letters, log, name="MMLU"
    )
    found |= benchmarks.mmlu_scores(general.mmlu.items, logits)
  asked = None if tasks is None else tasks(who, log)
  if asked is not None:
    found |= asked.scores
  interrupts.check()
  scores = domain_scores(losses, answers, references, embed)
  if validation is not None:
    values = scoring.losses(who, validation.rows, log, name="validation loss")
    scores["validation_loss"] = intervals.Scores(np.array(values))
  return Measured(scores, found, asked, answers, time.monotonic() - started)


def summarise(
  base: Mapping[str, intervals.Figure], trained: Mapping[str, intervals.Figure]
) -> dict[str, Any]:
  """Means with intervals for both models, and of trained minus base item by item."""
  described = {
    who: {name: intervals.describe(score) for name, score in scores.items()}
    for who, scores in (("base", base), ("trained", trained))
  }
  paired = {name: intervals.compare(base[name], trained[name]) for name in base}
  return {"scores": described, "paired": paired}


def item_lists(
  domain: test_sets.Domain,
  validation: test_sets.Domain | None,
  general: test_sets.General,
) -> dict[str, str]:
  """Digests of what was asked, by how scores' names begin; "" is the rest."""
  asked: dict[str, Any] = {"": [(row.prompt, row.answer) for row in domain.rows]}
  if validation is not None:
    asked["validation"] = [(row.prompt, row.answer) for row in validation.rows]
  if general.ifeval is not None:
    asked["ifeval"] = general.ifeval.prompts
  if general.mmlu is not None:
    asked["mmlu"] = general.mmlu.prompts
  if general.requests:
    asked["open"] = [request.prompt for request in general.requests]
  if general.drift is not None:
    asked["drift"] = general.drift
  return {word: journal.content_key(items=items) for word, items in asked.items()}


def per_item(
  base: Mapping[str, intervals.Figure],
  trained: Mapping[str, intervals.Figure],
  asked: Mapping[str, str],
) -> dict[str, Any]:
  """Every item's scores, by which two runs are compared that were asked the same."""
  found = {}
  for name, score in trained.items():
    if isinstance(score, float):
      continue
    weights_N, other = score.weights_N, base.get(name)
    starts = [word for word in asked if not word or f"{name}_".startswith(f"{word}_")]
    found[name] = {
      "items": asked[max(starts, key=len)],
      "share": score.share,
      "base": None
      if other is None or isinstance(other, float)
      else other.values_N.tolist(),
      "trained": score.values_N.tolist(),
      "weights": None if weights_N is None else weights_N.tolist(),
    }
  return found


def side_by_side(
  questions: Sequence[records.Question],
  base: Sequence[scoring.Answer],
  trained: Sequence[scoring.Answer],
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


def write(
  folder: pathlib.Path,
  result: Mapping[str, Any],
  items: Mapping[str, Any],
  samples: Sequence[Mapping[str, str]],
) -> None:
  """The files of an evaluation; `scores.json` last, by which others know it is done."""
  with atomic.replacing(folder / "items.json") as path:
    path.write_text(json.dumps(items, allow_nan=False) + "\n")
  with atomic.replacing(folder / "samples.jsonl") as path:
    path.write_text("".join(json.dumps(row) + "\n" for row in samples))
  with atomic.replacing(folder / "scores.json") as path:
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


RETAINED = (
  "open_ended",
  "ifeval_prompt_strict",
  "ifeval_prompt_loose",
  "ifeval_instruction_strict",
  "ifeval_instruction_loose",
  "mmlu",
)
"""General scores for which the paper's retention, trained in % of base, is given."""


def show(result: Mapping[str, Any]) -> None:
  """Prints the score table."""
  rows = table.Table(
    title=f"{result['items']} test questions, checkpoint of step"
    f" {result['checkpoint_step']}; 95 % intervals; difference paired",
    title_justify="left",
    show_lines=True,
  )
  rows.add_column("score")
  for column in ("base", "trained", "difference", "retention"):
    rows.add_column(column, justify="right")

  def cell(value: float, interval: Mapping[str, Any], digits: int = 3) -> str:
    if "low" not in interval:
      return f"{value:.{digits}f}"
    low, high = interval["low"], interval["high"]
    return f"{value:.{digits}f}\n{low:.{digits}f} to {high:.{digits}f}"

  for name, paired in result["paired"].items():
    base, trained = (result["scores"][who][name] for who in ("base", "trained"))
    kept = result["retention"].get(name)
    rows.add_row(
      name.replace("_", " "),
      cell(base["value"], base),
      cell(trained["value"], trained),
      cell(paired["difference"], paired),
      f"{cell(kept['value'], kept, 1)} %" if kept else "",
    )
  if result["drift"]:
    drift = result["drift"]
    rows.add_row("drift (nats per token)", "0", cell(drift["value"], drift), "", "")
  if result["weight_distance"]:
    mean = result["weight_distance"]["mean"]
    rows.add_row("weight distance", "0", f"{mean:.2e}", "", "")
  console.Console().print(rows)


def connect(
  servers: schema.Servers | None,
) -> tuple[engines.Generator | None, engines.Generator | None]:
  """The servers of the trained and of the base model; None for the built-in sampler.

  Raises:
    UserError: a server cannot be reached or does not serve its model.
  """
  if servers is None:
    return None, None
  trained, base = (
    openai_engine.connect(
      server.model,
      base_url=server.base_url,
      api_key_env=server.api_key_env,
      timeout_s=server.timeout_s,
      omit=server.omit,
      marks=server.thinking_marks,
    )
    for server in (servers.trained, servers.base)
  )
  return trained, base


def main(config: schema.Config) -> None:
  """Scores base and trained parameters and writes `output/evaluation`."""
  distributed.refuse("evaluate")
  tokenizer = chat.load(config.model.source, config.model.chat_template)
  decoder = hf_load.load_config(config.model.source)
  interrupts.check()
  domain, validation, general, tasks = test_sets.read(config, tokenizer, decoder)
  interrupts.check()
  judges = [
    roles.judge("vote", stage, config.model, judged_accuracy.REPLY_SCHEMA)
    for stage in config.evaluate.judges
  ]
  # Before an encoder is loaded.
  checkpoint.require(
    config.output, trained_model_lib.checkpoint_folder(config.output, config.validation)
  )
  trained_server, base_server = connect(config.evaluate.servers)
  embed = sentence_encoder.load(config.refine.encoder)
  interrupts.check()
  unroll = config.model.unroll
  settings = scoring.Settings(
    *(config.evaluate.batch_size, config.model.dtype, unroll),
    sampling.unrolled(config.rollout.unroll, unroll, jax.default_backend()),
  )
  # Both models are in memory at once, less than training needs: the drift compares them
  # token by token.
  params, step = trained_model_lib.load(config, decoder)
  interrupts.check()
  run_lock.lock_config(config, "evaluate", ())
  folder = pathlib.Path(config.output) / "evaluation"
  folder.mkdir(exist_ok=True)
  aside = [*domain.rejects, *(validation.rejects if validation else ())]
  rejects.write(folder / "rejects.jsonl", aside)
  base_params = hf_load.load_params(config.model.source, decoder)
  subject = functools.partial(
    scoring.subject, config=decoder, tokenizer=tokenizer, settings=settings
  )
  trained_model = subject(params, title=f"step {step}", server=trained_server)
  base_model = subject(base_params, title="base model", server=base_server)
  kept = config.evaluate.journal or folder / "journal.jsonl"
  with journal.open_journal(pathlib.Path(kept)) as log:
    trained, base = (
      measure_model(
        who, domain, validation, general, tasks, config.evaluate, log, embed
      )
      for who in (trained_model, base_model)
    )
    # After both, so that a judge's weights come and go once.
    for who, found in ((trained_model, trained), (base_model, base)):
      found.general.update(
        judged(who, domain, general, found.answers, judges, config.evaluate, log)
      )
    engines.release()
    drift: dict[str, Any] = {}
    base_scores, scored = intervals.alike(
      base.domain | base.general, trained.domain | trained.general
    )
    compared = summarise(base_scores, scored)
    if general.drift is not None:
      new = config.evaluate.drift.max_new_tokens
      values = drift_lib.from_base(base_model, trained_model, general.drift, new, log)
      drift = intervals.describe(values)
      scored["drift"] = values
  tasks_found = trained.tasks
  directions = {} if tasks_found is None else tasks_found.directions
  asked = {} if tasks_found is None else tasks_found.asked
  interrupts.check()
  moved = drift_lib.weight_distances(base_params, params)
  result = {
    "model": config.model.source,
    "checkpoint_step": step,
    "edits": trained_model_lib.edits(config.prune, config.interpolate),
    "items": len(domain.rows),
    **compared,
    "retention": {
      name: intervals.retention(base_scores[name], scored[name])
      for name in base_scores
      if name in RETAINED or directions.get(name) == 1
    },
    "directions": directions,
    "drift": drift,
    "weight_distance": {"mean": float(np.mean(list(moved.values()))), "tensors": moved},
    "seconds": {"base": base.seconds, "trained": trained.seconds},
  }
  items = per_item(base_scores, scored, item_lists(domain, validation, general) | asked)
  shown = domain.questions[: config.evaluate.samples]
  write(folder, result, items, side_by_side(shown, base.answers, trained.answers))
  show(result)


if __name__ == "__main__":
  cli.run("evaluate", main, "Score the trained model beside the base model.")
