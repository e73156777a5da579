"""Your data as a run will read it, without a model's weights.

`python -m raft_jax.inspect --config C`; without a config, the keys `model.source` and
`data.questions` are enough. Prints format, rejects, lengths, repeats and an example;
`--write FILE` writes a config that fits.
"""

from __future__ import annotations

import pathlib

import rich.console

from raft_jax import errors
from raft_jax.config import cli, schema
from raft_jax.curation import refined_folder
from raft_jax.data import inspection, inspection_tables, token_rows, training_set
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.planning import fitting
from raft_jax.runtime import distributed
from raft_jax.storage import rejects, sealed_folder
from raft_jax.training import run_inputs, run_plan


def main(
  config: schema.Config,
  *,
  row: str | None = None,
  rejects_file: str | None = None,
  write: str | None = None,
) -> None:
  """Prints what the run will make of its data.

  Args:
    row: id of the example to print; None: the first.
    rejects_file: file for the list of rows that are set aside.
    write: file for a config that fits data and machine.
  """
  distributed.refuse("inspect")
  data, source = config.data, config.model.source
  if write is not None:
    fitting.check_absent(pathlib.Path(write))
  thinking = data.thinking == "keep"
  tokenizer = chat.load(source, config.model.chat_template, thinking=thinking)
  distils = run_plan.uses_distillation(config.distill, config.balance)
  context = training_set.context_of(config.distill) if distils else "none"
  sets = [inspection.read("questions", data, tokenizer, context=context)]
  for name in ("validation", "test"):
    if getattr(data, name) is not None:
      sets.append(inspection.read(name, data, tokenizer, context="none"))
  originals = list(sets)
  refined, note = refined_set(config, tokenizer, context)
  if refined is not None:
    sets.append(refined)
  if rejects_file is not None:
    every = [reject for found in sets for reject in found.rejects]
    rejects.write(rejects_file, every)
  console = rich.console.Console()
  console.print(inspection_tables.files(sets))
  console.print(inspection_tables.lengths(sets, data, config.rollout.max_new_tokens))
  for found in sets:
    say(inspection_tables.reasons(found, rejects_file))
  say(repeats(originals))
  shown = inspection.example(sets, tokenizer, row)
  if shown is not None:
    new = config.rollout.max_new_tokens
    scored = {
      "answer": "the answer",
      "rollout": f"the student's own answer, of at most {new} tokens",
      "mixed": f"the answer, or the student's own of at most {new} tokens",
    }[config.distill.trajectory]
    inspection_tables.show_example(console, shown, scored=scored if distils else None)
  say([*note, *outlook(config, sets, distils=distils)])
  if write is not None:
    fitting.write(pathlib.Path(write), config, sets, tokenizer)
    print(f"wrote {write}; read its comments, then run refine or train with it")


def say(lines: list[str]) -> None:
  for line in lines:
    print(line)


def refined_set(
  config: schema.Config, tokenizer: chat.ChatTokenizer, context: str
) -> tuple[inspection.QuestionSet | None, list[str]]:
  """The run's refined records if it has some to learn from, and why they are not."""
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
  return (
    inspection.measure(
      "refined", str(folder), examples, config.data, tokenizer, context=context
    ),
    [],
  )


def repeats(sets: list[inspection.QuestionSet]) -> list[str]:
  """Lines about rows that occur twice."""
  same = inspection.same_questions(sets)
  near = inspection.near_repeats(sets)
  return inspection_tables.repeats(
    same,
    None if near is None else inspection.beside(near, same),
    sum(len(found.examples) for found in sets),
  )


STAGES = {
  "questions": "refine and train",
  "validation": "evaluate",
  "test": "evaluate",
  "refined": "train",
}
"""The commands that read a source."""


def outlook(
  config: schema.Config, sets: list[inspection.QuestionSet], *, distils: bool
) -> list[str]:
  """What the commands will do with the data, and the steps of training."""
  lines = ["with these settings:"]
  for found in sets:
    does = f"use {found.used:,} of {found.total:,} rows of {found.name}"
    if found.stop is not None:
      does = f"stop: {inspection_tables.plain(found.stop)}"
    lines.append(f"  {STAGES[found.name]}: {does}")
  learned = next(s for s in reversed(sets) if s.name in ("questions", "refined"))
  train, new = config.train, config.rollout.max_new_tokens
  if learned.rows and distils and config.distill.trajectory != "answer":
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
  if too_long := beyond_positions(config, list(learned.rows.values()), distils=distils):
    lines.append(f"  train: stop: {too_long}")
  return lines


def beyond_positions(
  config: schema.Config, rows: list[token_rows.Row], *, distils: bool
) -> str | None:
  """Why the model cannot read the longest row within the budgets, or None."""
  limits = token_rows.budgets(config.data)
  rows = [row for row in rows if token_rows.fits(row, limits)]
  if not rows:
    return None
  longest = run_inputs.longest_row(
    rows,
    config.distill if distils else None,
    new_tokens=config.rollout.max_new_tokens,
    context=config.data.max_teacher_tokens,
  )
  source = config.model.source
  try:
    decoder = hf_load.load_config(source, weights=False)
    token_rows.check_positions(longest, source, decoder)
  except errors.UserError as error:
    return str(error)
  return None


if __name__ == "__main__":
  cli.run(
    "inspect",
    main,
    "Show the data as the model will read it, and write a config that fits it.",
    options={
      "--row": {"metavar": "ID", "help": "show this row instead of the first"},
      "--rejects-file": {
        "metavar": "FILE",
        "help": "list every row that is set aside, as JSONL",
      },
      "--write": {
        "metavar": "FILE",
        "help": "write a config whose budgets, batch and steps fit data and machine",
      },
    },
    base={"output": "runs/mine"},
  )
