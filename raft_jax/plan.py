"""Memory and step time before a run: `python -m raft_jax.plan --config C --topology T`.

Compiles the run's own rollout, teacher and update for machines that are absent, and
reports whether they fit into memory, what they compute and send, and how fast they can
be at most. Needs the extra `plan` and the model's config.json, but neither weights nor
data. Times are rooflines of the makers' figures, not measurements.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from raft_jax import errors
from raft_jax.config import cli, data_layout, schema
from raft_jax.hf import carried_tensors
from raft_jax.planning import estimate, machines, tables
from raft_jax.runtime import interrupts
from raft_jax.storage import question_files, sources

MEM_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""The share of a GPU's memory that JAX takes; 0.75 by default."""


def plan(
  config: schema.Config,
  topology: Sequence[str],
  questions: int | None = None,
  compare_rollouts: bool = False,
) -> None:
  """Prints what the run needs on each machine.

  Raises:
    errors.UserError: a topology is unknown, a package is missing, or the config does
      not suit a machine.
  """
  if not topology:
    raise errors.UserError("--topology is missing; e.g. --topology a100_80:8 v5e:4x4")
  chosen = [machines.parse(word) for word in topology]
  for machine in chosen:
    estimate.check_installed(machine)
  share = memory_share()
  steps = total_steps(config.data, config.train, questions)
  tokens = step_tokens(config.train, config.rollout, config.data, config.lora)
  for index, machine in enumerate(chosen):
    interrupts.check()
    print(f"compiling for {machine.topology} ...", file=sys.stderr, flush=True)
    costs = estimate.measure(
      config.model_dump(mode="json"), machine, compare_rollouts=compare_rollouts
    )
    if not index:
      print(header(config.model, tokens, costs))
      tower = carried_tensors.describe(config.model.source, costs["parameters"])
      if tower is not None:
        print(tower)
    verdict = estimate.judge(
      costs,
      machine,
      share=share,
      total_steps=steps,
      gradient_stats_every=config.train.gradient_stats_every,
    )
    tables.show(tokens, machine, costs, verdict, share=share, total_steps=steps)


def total_steps(
  data: schema.Data, train: schema.Train, questions: int | None
) -> int | None:
  """Optimizer steps of the run; None if the number of questions is unknown."""
  if questions is None and sources.on_disk(data.questions):
    questions = len(
      question_files.read_questions(
        data.questions,
        layout=data_layout.layout(data),
        limit=data.limit,
        reject_threshold=data.reject_threshold,
        unusable=data.unusable,
      )
    )
  if questions is None:
    return train.max_steps
  steps = train.epochs * (questions // train.batch_size)
  return steps if train.max_steps is None else min(steps, train.max_steps)


def step_tokens(
  train: schema.Train,
  rollout: schema.Rollout,
  data: schema.Data,
  lora: schema.Lora | None,
) -> estimate.StepTokens:
  """The size of a step whose rows are as long as the budgets allow."""
  return estimate.StepTokens(
    batch_size=train.batch_size,
    rows=train.batch_size * rollout.group,
    prompt=data.max_prompt_tokens,
    answer=data.max_answer_tokens,
    teacher=data.max_teacher_tokens,
    rollout=rollout.max_new_tokens,
    trains_weights=lora is None,
  )


def memory_share() -> float:
  """The share of a GPU's memory that JAX takes."""
  word = os.environ.get(MEM_FRACTION, "0.75")
  try:
    share = float(word)
  except ValueError:
    share = math.nan
  if not 0 < share <= 1:
    raise errors.UserError(f"{MEM_FRACTION}={word}: must be a number from 0 to 1")
  return share


def header(
  model: schema.Model, tokens: estimate.StepTokens, costs: Mapping[str, Any]
) -> str:
  """The model and the size of a step."""
  remat = ", remat" if model.remat else ""
  active = ""
  if costs["active"] != costs["parameters"]:
    active = f"{costs['active']:,} active for a token, "
  return (
    f"{model.source}: {costs['parameters']:,} parameters, {active}{costs['trained']:,} "
    f"trained; activations {model.dtype}{remat}\n"
    f"{tokens.batch_size} rows a step of at most {tokens.prompt} (prompt) + "
    f"{tokens.answer} (answer) + {tokens.rollout} (rollout) tokens; the teacher reads "
    f"{tokens.teacher} + {tokens.rollout}"
  )


def main() -> None:
  """Command line."""
  cli.run(
    "plan",
    plan,
    __doc__,
    options={
      "--topology": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "KIND:SIZE",
        "help": "machines: a100_80:8, a100_80:2x8, h100:8, v5e:4x4, v5p:2x2x2, cpu:8",
      },
      "--questions": {
        "type": int,
        "metavar": "N",
        "help": "how many questions the run will learn from (default: data.questions)",
      },
      "--compare-rollouts": {
        "action": "store_true",
        "help": "also compile rollouts for other values of rollout.tensor",
      },
    },
    without_data=True,
  )


if __name__ == "__main__":
  main()
