"""Your data as a run will read it, without a model's weights.

`python -m raft_jax.inspect --config C`; without a config, the keys `model.source` and
`data.questions` are enough. Prints format, rejects, lengths, repeats and an example;
`--write FILE` writes a config that fits.
"""

from __future__ import annotations

import pathlib

import rich.console

from raft_jax.config import cli, schema
from raft_jax.data import inspection, inspection_tables, training_set
from raft_jax.hf import chat
from raft_jax.planning import commented_config, fitting, outlook
from raft_jax.runtime import distributed
from raft_jax.storage import rejects
from raft_jax.training import run_plan


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
    commented_config.check_absent(pathlib.Path(write))
  thinking = data.thinking == "keep"
  tokenizer = chat.load(source, config.model.chat_template, thinking=thinking)
  distils = run_plan.uses_distillation(config.distill, config.balance)
  context = training_set.context_of(config.distill) if distils else "none"
  sets = [inspection.read("questions", data, tokenizer, context=context)]
  for name in ("validation", "test"):
    if getattr(data, name) is not None:
      sets.append(inspection.read(name, data, tokenizer, context="none"))
  originals = list(sets)
  refined, note = inspection.read_refined(config, tokenizer, context)
  if refined is not None:
    sets.append(refined)
  if rejects_file is not None:
    rejects.write(rejects_file, [reject for found in sets for reject in found.rejects])
  console = rich.console.Console()
  console.print(inspection_tables.files(sets))
  console.print(inspection_tables.lengths(sets, data, config.rollout.max_new_tokens))
  reasons = [
    line for found in sets for line in inspection_tables.reasons(found, rejects_file)
  ]
  same, near = inspection.repeats(originals)
  rows = sum(len(found.examples) for found in originals)
  print("\n".join([*reasons, *inspection_tables.repeats(same, near, rows)]))
  shown = inspection.example(sets, tokenizer, row)
  if shown is not None:
    scored = outlook.scored(config.distill, config.rollout) if distils else None
    inspection_tables.show_example(console, shown, scored=scored)
  print("\n".join([*note, *outlook.describe(config, sets, distils=distils)]))
  if write is not None:
    choices = fitting.choose(config, sets)
    commented_config.write(pathlib.Path(write), config, choices, sets)
    print(f"wrote {write}; read its comments, then run refine or train with it")


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
