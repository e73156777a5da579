"""Stage 1: rewrite, filter, fuse, judge, select.

`refine` below is the whole method: RAFT (arXiv 2606.00147) Eq. 1-4. Every pass puts one
kind of question about all rows that are still open, through `journal.Calls`: what the
journal holds is not asked again, so a stopped run continues where it was, and the
shards are a pure function of the questions and the journal.

Run it as `python -m raft_jax.refine --config FILE`.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.table

import raft_jax
from raft_jax import (
  command_line,
  config,
  encode,
  engines,
  errors,
  journal,
  judge,
  records,
  roles,
  schema,
  shards,
)

CLAIMED = (
  "model.source",
  "model.dtype",
  "data.questions",
  "refine.encoder",
  "refine.similarity_threshold",
  "refine.seed",
  *(
    f"refine.{part}.{key}"
    for part, section in (
      ("rewriter", config.Engine),
      ("fusion", config.Fusion),
      ("judges.*", config.Judge),
    )
    for key in section.model_fields
    if key not in schema.PLACEMENT
  ),
)
"""Config keys that decide the result; a folder's second run may not change them."""


class Item(NamedTuple):
  """What a judge reads."""

  question: str
  original: str
  candidate: str


Judge = Callable[[Sequence[Item], journal.Calls], list[float | None]]
"""Scores in 0..1, None for an abstention."""


class Rewrite(NamedTuple):
  """A rewritten answer; `flaw` is why it cannot be used, `similarity` then None."""

  text: str
  flaw: str | None
  similarity: float | None


# The method


def refine(
  questions: Sequence[records.Question],
  *,
  rewriter: journal.Role,
  fusion: journal.Role,
  judges: Sequence[Judge],
  encoder: encode.Encoder,
  threshold: float,
  rounds: int,
  accept_at: float,
  calls: journal.Calls,
  skip_too_long: bool = False,
) -> list[records.Refined]:
  """Refines every question, in order.

  Args:
    threshold: tau in -1..1; a rewrite of lower cosine is dropped.
    rounds: most fused answers per question.
    accept_at: mean score in 0..1 from which a fused answer ends its question's rounds.
    skip_too_long: keep the original answer where the rewriter's prompt is too long for
      it, instead of raising UserError.
  """
  names = None if skip_too_long else [question.id for question in questions]
  rewrites = rewrite(questions, rewriter, encoder, calls, names)
  history: list[list[records.Round]] = [[] for _ in questions]
  still_open = [
    i
    for i, r in enumerate(rewrites)
    if r.similarity is not None and r.similarity >= threshold
  ]
  for number in range(1, rounds + 1):
    asked = [(questions[i], rewrites[i].text) for i in still_open]
    results = fuse_and_judge(asked, number, fusion, judges, calls)
    for i, result in zip(still_open, results, strict=True):
      history[i].append(result)
    still_open = [i for i in still_open if not accepted(history[i][-1], accept_at)]
  return [
    select(question, rewritten, tuple(past), threshold, accept_at)
    for question, rewritten, past in zip(questions, rewrites, history, strict=True)
  ]


def rewrite(
  questions: Sequence[records.Question],
  rewriter: journal.Role,
  encoder: encode.Encoder,
  calls: journal.Calls,
  names: Sequence[str] | None = None,
) -> list[Rewrite]:
  """Eq. 1 and 2: the model's own words for each answer, and their cosine with it."""
  prompts = [_user(rewrite_prompt(question)) for question in questions]
  replies = calls.ask(rewriter, prompts, names=names)
  flaws = [
    judge.flaw(reply, question_text(q) + "\n" + q.answer)
    for q, reply in zip(questions, replies, strict=True)
  ]
  texts = ["" if reply is None else reply.text.strip() for reply in replies]
  usable = [i for i, reason in enumerate(flaws) if reason is None]
  pairs = [(questions[i].answer, texts[i]) for i in usable]
  similarity = dict(zip(usable, calls.cosines("encode", encoder, pairs), strict=True))
  return [Rewrite(texts[i], flaws[i], similarity.get(i)) for i in range(len(questions))]


def fuse_and_judge(
  rows: Sequence[tuple[records.Question, str]],
  number: int,
  fusion: journal.Role,
  judges: Sequence[Judge],
  calls: journal.Calls,
) -> list[records.Round]:
  """One round of Eq. 4 for each question and its rewrite.

  A fused text that cannot be used is shown to no judge: its round has no scores.
  """
  template = judge.template("fuse")
  prompts = [
    template.substitute(question=question_text(q), answer=q.answer, rewrite=rewritten)
    for q, rewritten in rows
  ]
  replies = calls.ask(fusion, [_user(p) for p in prompts], round_number=number)
  texts = ["" if reply is None else reply.text.strip() for reply in replies]
  usable = [
    i
    for i, ((q, _), reply) in enumerate(zip(rows, replies, strict=True))
    if judge.flaw(reply, question_text(q) + "\n" + q.answer) is None
  ]
  items = [Item(question_text(rows[i][0]), rows[i][0].answer, texts[i]) for i in usable]
  panel = [score(items, calls) for score in judges]
  scores = {i: tuple(row) for i, row in zip(usable, zip(*panel), strict=True)}
  return [
    records.Round(texts[i], scores.get(i, ()), judge.panel_mean(scores.get(i, ())))
    for i in range(len(rows))
  ]


def accepted(result: records.Round, accept_at: float) -> bool:
  """Whether a round ends its question's rounds; a score at the threshold does."""
  return result.mean is not None and result.mean >= accept_at


def select(
  question: records.Question,
  rewritten: Rewrite,
  rounds: tuple[records.Round, ...],
  threshold: float,
  accept_at: float,
) -> records.Refined:
  """Eq. 3 and 4: the final answer and why; the original wherever anything failed."""
  best = max(
    (r for r in rounds if r.mean is not None),
    key=lambda r: -math.inf if r.mean is None else r.mean,
    default=None,
  )  # max keeps the first of equals: the earliest round
  if best is not None:
    chosen, answer = "fused", best.text
    reason = "accepted" if accepted(best, accept_at) else "best_round"
  else:
    chosen, answer = "original", question.answer
    reason = _why_original(rewritten, rounds, threshold)
  return records.Refined(
    question=question,
    rewrite=rewritten.text,
    similarity=rewritten.similarity,
    rounds=rounds,
    answer=answer,
    chosen=chosen,
    reason=reason,
  )


def _why_original(
  rewritten: Rewrite, rounds: tuple[records.Round, ...], threshold: float
) -> str:
  if rewritten.flaw is not None:
    return f"rewrite_{rewritten.flaw}"
  if rewritten.similarity is None:
    return "similarity_undefined"
  if rewritten.similarity < threshold:
    return "below_threshold"
  return "judges_failed" if any(r.scores for r in rounds) else "fusion_failed"


def rewrite_prompt(question: records.Question) -> str:
  """What the model is asked, to get the answer in its own words."""
  return judge.template("rewrite").substitute(
    question=question_text(question), answer=question.answer
  )


def question_text(question: records.Question) -> str:
  """The instruction as plain text: one turn as it is, a conversation with its roles."""
  if len(question.messages) == 1:
    return question.messages[0].content
  return "\n".join(f"{role}: {content}" for role, content in question.messages)


def _user(content: str) -> tuple[records.Message, ...]:
  # One user turn and no system turn: some models' chat templates refuse the latter.
  return (records.Message("user", content),)


def language_judge(role: journal.Role) -> Judge:
  """A language model as a judge; a reply without a plain score is an abstention."""

  def score(items: Sequence[Item], calls: journal.Calls) -> list[float | None]:
    replies = calls.ask(role, [judge.prompt(*item) for item in items])
    return [None if r is None else judge.parse_score(r.text) for r in replies]

  return score


def encoder_judge(encoder: encode.Encoder) -> Judge:
  """The sentence encoder as a judge; see `judge.encoder_score`."""

  def score(items: Sequence[Item], calls: journal.Calls) -> list[float | None]:
    pairs = [(item.original, item.candidate) for item in items]
    return [judge.encoder_score(c) for c in calls.cosines("judge", encoder, pairs)]

  return score


# The run


def fit(run: config.Config) -> None:
  """Refines `data.questions` into `output/refined`: shards, manifest, summary."""
  check(run)
  config.check_output(run, "refine", CLAIMED)
  folder = pathlib.Path(run.output) / "refined"
  # The mark of a run's folder; rejects are the first that is written there.
  (folder.parent / "config").mkdir(parents=True, exist_ok=True)
  questions = records.read_questions(
    run.data.questions,
    limit=run.data.limit,
    reject_threshold=run.data.reject_threshold,
    rejects_path=folder / "rejects.jsonl",
  )
  encoder = encode.load(run.refine.encoder)
  inputs = _inputs(run, questions, encoder)
  with journal.open_journal(folder / "journal.jsonl") as book:
    if _complete(folder, inputs):
      config.claim_output(run, "refine", CLAIMED)
      print(f"{folder}: already complete, nothing to do")
      return
    rewriter = _role("rewrite", run.refine.rewriter, run)
    fusion = _role("fuse", run.refine.fusion, run)
    judges = [_judge(each, run, encoder) for each in run.refine.judges]
    # Not before: what was wrong with the input so far binds no later run.
    config.claim_output(run, "refine", CLAIMED)
    calls = journal.Calls(book, run.refine.seed)
    try:
      with journal.listening(calls.signals):
        refined = refine(
          questions,
          rewriter=rewriter,
          fusion=fusion,
          judges=judges,
          encoder=encoder,
          threshold=run.refine.similarity_threshold,
          rounds=run.refine.fusion.rounds,
          accept_at=run.refine.fusion.accept_at,
          calls=calls,
          skip_too_long=run.data.too_long == "skip",
        )
    except journal.Stopped:
      kept = f"{len(book.calls)} calls are kept"
      print(f"stopped: {kept}; run the same command again to continue", file=sys.stderr)
      raise
    finally:
      engines.release()
    summary = summarise(refined, calls, run.refine.similarity_threshold)
    _write(folder, run, refined, summary, encoder, inputs)
  show(summary, calls)


def check(run: config.Config) -> None:
  """What can be wrong about a refinement before any file is read.

  Raises:
    UserError: a rewriter that is not the model that will be trained: its rewrites
      would not be in that model's words. (A server's model has a name of its own.)
  """
  rewriter = run.refine.rewriter
  if rewriter.engine != "openai" and rewriter.model not in (None, run.model.source):
    raise errors.UserError(
      f"refine.rewriter.model: {rewriter.model} is not model.source "
      f"({run.model.source}); the model to be trained must rewrite: delete the key"
    )


def _role(name: str, stage: config.Engine, run: config.Config) -> journal.Role:
  return roles.role(
    name, stage, run.model, temperature=stage.temperature, top_p=stage.top_p
  )


def _judge(stage: config.Judge, run: config.Config, encoder: encode.Encoder) -> Judge:
  if stage.engine == "encoder":
    return encoder_judge(encoder)
  # The built-in engine cannot hold a reply to a form.
  form = judge.REPLY_SCHEMA if stage.structured and stage.engine != "jax" else None
  return language_judge(
    roles.role("judge", stage, run.model, temperature=0.0, top_p=1.0, reply_schema=form)
  )


def _inputs(
  run: config.Config,
  questions: Sequence[records.Question],
  encoder: encode.Encoder,
) -> str:
  """Digest of all that the shards depend on."""
  stages: list[schema.Asked] = [run.refine.fusion, *run.refine.judges]
  local = [stage for stage in stages if stage.engine != "openai"]
  models = {run.model.source, *(stage.model or run.model.source for stage in local)}
  return journal.content_key(
    version=raft_jax.__version__,
    questions=[[q.id, q.domain, q.messages, q.answer] for q in questions],
    settings=run.refine.model_dump(mode="json"),
    too_long=run.data.too_long,
    dtype=run.model.dtype,
    prompts=[judge.template(n).template for n in ("rewrite", "fuse", "judge")],
    models=sorted(engines.identity(source) for source in models),
    encoder=encoder.identity,
  )


def _complete(folder: pathlib.Path, inputs: str) -> bool:
  if not (folder / "summary.json").exists():
    return False
  try:
    manifest = shards.read_manifest(folder)
  except errors.UserError:
    return False  # not there, or damaged: the journal rebuilds it
  return manifest.meta.get("inputs") == inputs


def summarise(
  refined: Sequence[records.Refined], calls: journal.Calls, threshold: float
) -> dict[str, Any]:
  """The content of summary.json; `accepted` counts rewrites that passed the filter."""
  similarities = [r.similarity for r in refined if r.similarity is not None]
  passed = sum(s >= threshold for s in similarities)
  lowest = min([0, *(math.floor(s * 20) for s in similarities)])
  edges = [twentieth / 20 for twentieth in range(lowest, 21)]
  bins = collections.Counter(min(math.floor(s * 20), 19) for s in similarities)
  scores = [score for r in refined for past in r.rounds for score in past.scores]
  rounds = collections.Counter(str(len(r.rounds)) for r in refined if r.rounds)
  return {
    "questions": len(refined),
    "accepted": passed,
    "accept_rate": passed / len(refined),
    "threshold": threshold,
    "similarity": {
      "edges": edges,
      "counts": [bins[twentieth] for twentieth in range(lowest, 20)],
    },
    "rounds": dict(sorted(rounds.items())),
    "reasons": dict(collections.Counter(r.reason for r in refined).most_common()),
    "chosen": dict(collections.Counter(r.chosen for r in refined).most_common()),
    "judge_failures": sum(score is None for score in scores),
    "seconds": {k: round(v, 3) for k, v in calls.totals("seconds").items()},
    "tokens": calls.totals("completion_tokens"),
    "thinking_tokens": calls.totals("thinking_tokens"),
  }


def _write(
  folder: pathlib.Path,
  run: config.Config,
  refined: Sequence[records.Refined],
  summary: Mapping[str, Any],
  encoder: encode.Encoder,
  inputs: str,
) -> None:
  """Summary first, then shards, and the manifest that seals both last."""
  with records.replacing(folder / "summary.json") as temporary:
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
  settings = {"model": run.model.source, "refine": run.refine.model_dump(mode="json")}
  shards.write_shards(
    folder,
    [records.to_json(r) for r in refined],
    records_per_shard=run.refine.records_per_shard,
    meta={
      "inputs": inputs,
      "config": config.digest(settings),
      "tokenizer": engines.codec(run.model.source).digest,
      "model": engines.identity(run.model.source),
      "encoder": encoder.identity,
      "counts": {k: summary[k] for k in ("questions", "accepted", "reasons", "chosen")},
    },
  )


def show(summary: Mapping[str, Any], calls: journal.Calls) -> None:
  """Prints the summary as a table, and what is worth a second look."""
  table = rich.table.Table(title="refinement", show_header=False)
  table.add_row("questions", str(summary["questions"]))
  table.add_row(
    f"rewrites with cosine >= {summary['threshold']:g}",
    f"{summary['accepted']} ({summary['accept_rate']:.0%})",
  )
  for name in ("chosen", "reasons", "rounds", "seconds", "tokens", "thinking_tokens"):
    parts = [f"{key} {round(value, 1):,}" for key, value in summary[name].items()]
    if name != "thinking_tokens" or any(summary[name].values()):
      title = {"rounds": "rounds taken", "thinking_tokens": "tokens of thinking"}
      table.add_row(title.get(name, name), ", ".join(parts))
  table.add_row("judge abstentions", str(summary["judge_failures"]))
  rich.console.Console().print(table)
  cut = int(calls.totals("truncated").get("encode", 0))
  if cut:
    print(f"{cut} texts were longer than the encoder reads: their cosine is of a part")
  unused = len(calls.book.calls) - len(calls.used)
  if unused:
    print(f"{unused} journalled calls belong to rows or settings that are gone")


def main() -> None:
  command_line.run(
    "refine", fit, "Rewrite, filter, fuse and judge the training answers."
  )


if __name__ == "__main__":
  main()
