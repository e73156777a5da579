"""The method of stage 1: rewrite, filter, fuse, judge, select.

`refine` below is the whole method: RAFT (arXiv 2606.00147), Eq. 1-4. Each pass makes
calls of one kind for all rows that need them, through `calls.Calls`. Calls in the
journal are not repeated, so that the records are a pure function of the questions and
the journal. `reselect` selects again among the answers of earlier calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from raft_jax.generation import calls as calls_lib
from raft_jax.generation import judging, sentence_encoder
from raft_jax.storage import records


class Item(NamedTuple):
  """The texts that a judge compares."""

  question: str
  original: str
  candidate: str


Judge = Callable[[Sequence[Item], calls_lib.Calls], list[float | None]]
"""Scores items in 0..1; None is an abstention."""


class Rewrite(NamedTuple):
  """A rewritten answer.

  Attributes:
    flaw: why it cannot be used, or None.
    similarity: its cosine with the answer; None if there is a flaw.
  """

  text: str
  flaw: str | None
  similarity: float | None


def refine(
  questions: Sequence[records.Question],
  *,
  rewriter: calls_lib.Role,
  fusion: calls_lib.Role,
  judges: Sequence[Judge],
  encoder: sentence_encoder.Encoder,
  threshold: float,
  rounds: int,
  accept_at: float,
  calls: calls_lib.Calls,
  prompt: str = "rewrite",
  skip_too_long: bool = False,
  names: Sequence[str] | None = None,
) -> list[records.Refined]:
  """Refines every question, in order.

  Args:
    threshold: tau, as for `passes`.
    rounds: largest number of fused answers for each question; at 0, the rewrites that
      pass the filter are final.
    accept_at: mean score in 0..1 at which a fused answer ends its question's rounds.
    prompt: name of the template that requests a rewrite.
    skip_too_long: keep the original answer if the rewriter's prompt is too long,
      instead of raising UserError.
    names: names of the questions in that error; None for their ids.
  """
  error_names = None
  if not skip_too_long:
    error_names = names or [question.id for question in questions]
  rewrites = rewrite(questions, rewriter, encoder, calls, error_names, prompt)
  history: list[list[records.Round]] = [[] for _ in questions]
  unfinished = [i for i, r in enumerate(rewrites) if passes(r.similarity, threshold)]
  for number in range(1, rounds + 1):
    rows = [(questions[i], rewrites[i].text) for i in unfinished]
    results = fuse_and_judge(rows, number, fusion, judges, calls)
    for i, result in zip(unfinished, results, strict=True):
      history[i].append(result)
    unfinished = [i for i in unfinished if not accepted(history[i][-1], accept_at)]
  return [
    select(question, rewritten, tuple(past), threshold, accept_at)
    for question, rewritten, past in zip(questions, rewrites, history, strict=True)
  ]


def rewrite(
  questions: Sequence[records.Question],
  rewriter: calls_lib.Role,
  encoder: sentence_encoder.Encoder,
  calls: calls_lib.Calls,
  names: Sequence[str] | None = None,
  prompt: str = "rewrite",
) -> list[Rewrite]:
  """Eq. 1 and 2: each answer in the model's own words, and its cosine with the
  original. The call of a tool has no other words: it is not rewritten."""
  asked = [i for i, question in enumerate(questions) if not question.tool_calls]
  prompts = [records.user_turn(rewrite_prompt(questions[i], prompt)) for i in asked]
  given = calls.ask(rewriter, prompts, names=names and [names[i] for i in asked])
  reply_by_row = dict(zip(asked, given, strict=True))
  replies = [reply_by_row.get(i) for i in range(len(questions))]
  flaws = [
    "tool_call"
    if q.tool_calls
    else judging.flaw(reply, question_text(q) + "\n" + q.answer)
    for q, reply in zip(questions, replies, strict=True)
  ]
  texts = ["" if reply is None else reply.text.strip() for reply in replies]
  usable = [i for i, reason in enumerate(flaws) if reason is None]
  pairs = [(questions[i].answer, texts[i]) for i in usable]
  similarity = dict(zip(usable, calls.cosines("encode", encoder, pairs), strict=True))
  return [Rewrite(texts[i], flaws[i], similarity.get(i)) for i in range(len(questions))]


def passes(similarity: float | None, threshold: float) -> bool:
  """The filter of Eq. 3 on the cosine of an answer and its rewrite.

  Args:
    similarity: None if it is undefined; then it does not pass.
    threshold: tau in -1..1; a cosine equal to it passes. At 1 none passes, not even
      that of a copy, whose cosine is 1 up to rounding. At 0 or below all pass.
  """
  if similarity is None or threshold >= 1:
    return False
  return threshold <= 0 or similarity >= threshold


def fuse_and_judge(
  rows: Sequence[tuple[records.Question, str]],
  number: int,
  fusion: calls_lib.Role,
  judges: Sequence[Judge],
  calls: calls_lib.Calls,
) -> list[records.Round]:
  """One round of Eq. 4 for each question and its rewrite.

  No judge sees a fused text that cannot be used; its round has no scores.
  """
  template = judging.template("fuse")
  prompts = [
    template.substitute(question=question_text(q), answer=q.answer, rewrite=rewritten)
    for q, rewritten in rows
  ]
  replies = calls.ask(
    fusion, [records.user_turn(p) for p in prompts], round_number=number
  )
  texts = ["" if reply is None else reply.text.strip() for reply in replies]
  usable = [
    i
    for i, ((q, _), reply) in enumerate(zip(rows, replies, strict=True))
    if judging.flaw(reply, question_text(q) + "\n" + q.answer) is None
  ]
  items = [Item(question_text(rows[i][0]), rows[i][0].answer, texts[i]) for i in usable]
  panel = [score(items, calls) for score in judges]
  scores = {i: tuple(row) for i, row in zip(usable, zip(*panel), strict=True)}
  return [
    records.Round(texts[i], scores.get(i, ()), judging.panel_mean(scores.get(i, ())))
    for i in range(len(rows))
  ]


def accepted(result: records.Round, accept_at: float) -> bool:
  """Whether a round ends its question's rounds: its mean is at least `accept_at`."""
  return result.mean is not None and result.mean >= accept_at


def select(
  question: records.Question,
  rewritten: Rewrite,
  rounds: tuple[records.Round, ...],
  threshold: float,
  accept_at: float,
) -> records.Refined:
  """Eq. 3 and 4: the final answer and the reason; the original if anything failed.

  Without any round, a rewrite that passes the filter is the final answer (Eq. 3).
  """
  best = max(
    (r for r in rounds if r.mean is not None),
    key=lambda r: -math.inf if r.mean is None else r.mean,
    default=None,
  )  # of equal means, max returns the earliest
  if best is not None:
    chosen, answer = "fused", best.text
    reason = "accepted" if accepted(best, accept_at) else "best_round"
  elif not rounds and passes(rewritten.similarity, threshold):
    chosen, answer, reason = "rewrite", rewritten.text, "passed_filter"
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


def reselect(
  refined: records.Refined,
  *,
  threshold: float,
  rounds: int,
  accept_at: float,
  judges: Sequence[int],
) -> records.Refined | None:
  """The record that `refine` would have made with other rules of selection.

  Args:
    threshold, rounds, accept_at: as for `refine`.
    judges: positions of the judges that count, in the record's scores.

  Returns:
    None if these rules need a fused answer that was never written.
  """
  reason = refined.reason
  flaw = reason.removeprefix("rewrite_") if reason.startswith("rewrite_") else None
  rewritten = Rewrite(refined.rewrite, flaw, refined.similarity)
  history: list[records.Round] = []
  if passes(rewritten.similarity, threshold):
    for past in refined.rounds[:rounds]:
      scores = tuple(past.scores[i] for i in judges) if past.scores else ()
      history.append(records.Round(past.text, scores, judging.panel_mean(scores)))
      if accepted(history[-1], accept_at):
        break
    else:
      if len(history) < rounds:
        return None
  return select(refined.question, rewritten, tuple(history), threshold, accept_at)


def _why_original(
  rewritten: Rewrite, rounds: tuple[records.Round, ...], threshold: float
) -> str:
  if rewritten.flaw is not None:
    return f"rewrite_{rewritten.flaw}"
  if rewritten.similarity is None:
    return "similarity_undefined"
  if not passes(rewritten.similarity, threshold):
    return "below_threshold"
  return "judges_failed" if any(r.scores for r in rounds) else "fusion_failed"


def rewrite_prompt(question: records.Question, prompt: str = "rewrite") -> str:
  """The prompt that requests the answer in the model's own words."""
  return judging.template(prompt).substitute(
    question=question_text(question), answer=question.answer
  )


def question_text(question: records.Question) -> str:
  """The instruction as plain text; a conversation of several turns has their roles."""
  if len(question.messages) == 1:
    return question.messages[0].content
  return "\n".join(
    f"{turn.role}: {records.as_text(turn)}" for turn in question.messages
  )


def language_judge(role: calls_lib.Role) -> Judge:
  """A language model as a judge, which abstains if its reply has no plain score."""

  def score(items: Sequence[Item], calls: calls_lib.Calls) -> list[float | None]:
    replies = calls.ask(role, [judging.prompt(*item) for item in items])
    return [
      None
      if reply is None
      else judging.parse_score(reply.text, cut=reply.finish_reason == "length")
      for reply in replies
    ]

  return score


def encoder_judge(encoder: sentence_encoder.Encoder) -> Judge:
  """The sentence encoder as a judge; see `judging.encoder_score`."""

  def score(items: Sequence[Item], calls: calls_lib.Calls) -> list[float | None]:
    pairs = [(item.original, item.candidate) for item in items]
    return [judging.encoder_score(c) for c in calls.cosines("judge", encoder, pairs)]

  return score
