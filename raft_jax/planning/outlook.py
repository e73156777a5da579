"""What the commands will do with inspected data, and how many steps training takes."""

from __future__ import annotations

from collections.abc import Sequence

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import inspection, inspection_tables, token_rows
from raft_jax.hf import load as hf_load
from raft_jax.training import run_inputs

STAGES = {
  "questions": "refine and train",
  "validation": "evaluate",
  "test": "evaluate",
  "refined": "train",
}
"""The commands that read a source."""


def scored(distill: schema.Distill, rollout: schema.Rollout) -> str:
  """What the teacher scores, in words."""
  new = rollout.max_new_tokens
  return {
    "answer": "the answer",
    "rollout": f"the student's own answer, of at most {new} tokens",
    "mixed": f"the answer, or the student's own of at most {new} tokens",
  }[distill.trajectory]


def describe(
  config: schema.Config, sets: Sequence[inspection.QuestionSet], *, distils: bool
) -> list[str]:
  """A line for each source and what is done with it, and lines about training."""
  lines = ["with these settings:"]
  for found in sets:
    does = f"use {found.used:,} of {found.total:,} rows of {found.name}"
    if found.stop is not None:
      does = f"stop: {inspection_tables.plain(found.stop)}"
    lines.append(f"  {STAGES[found.name]}: {does}")
  learned = inspection.learned(sets)
  distill = config.distill if distils else None
  train, new = config.train, config.rollout.max_new_tokens
  if learned.rows and distill is not None and distill.trajectory != "answer":
    over, share = inspection.beyond(inspection.lengths(learned)["answer"], new)
    if over:
      lines.append(
        f"  train: {share:.1%} of the answers are longer than rollout.max_new_tokens="
        f"{new}, at which the student's own answers are cut"
      )
  per_epoch = learned.used // train.batch_size
  steps = min(per_epoch * train.epochs, train.max_steps or per_epoch * train.epochs)
  lines.append(
    f"  train: {steps:,} steps (train.epochs={train.epochs} of {learned.used:,} rows, "
    f"train.batch_size={train.batch_size})"
  )
  if not steps:
    lines[-1] += "; there are fewer rows than a batch needs: lower train.batch_size"
  too_long = beyond_positions(
    config.model.source, list(learned.rows.values()), config.data, distill, new
  )
  return [*lines, f"  train: stop: {too_long}"] if too_long else lines


def beyond_positions(
  source: str,
  rows: Sequence[token_rows.Row],
  data: schema.Data,
  distill: schema.Distill | None,
  new_tokens: int,
) -> str | None:
  """Why the model cannot read the longest row within the budgets, or None.

  Args:
    source: of the model.
    distill: None if there is no teacher.
  """
  limits = token_rows.budgets(data)
  rows = [row for row in rows if token_rows.fits(row, limits)]
  if not rows:
    return None
  longest = run_inputs.longest_row(
    rows, distill, new_tokens=new_tokens, context=data.max_teacher_tokens
  )
  try:
    decoder = hf_load.load_config(source, weights=False)
    token_rows.check_positions(longest, source, decoder)
  except errors.UserError as error:
    return str(error)
  return None
