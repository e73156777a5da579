"""Config sections of `evaluate`, of validation during training, and of `chat`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from raft_jax.config.schema_base import Positive, Section, Seed
from raft_jax.config.schema_endpoints import (
  EnvironmentName,
  Omittable,
  Pair,
  Timeout,
  VerdictJudge,
)


class Ifeval(Section):
  """Verifiable instructions (IFEval)."""

  items: str | None = None
  """A JSONL or Parquet file, or `google/IFEval` on the hub; null: not measured."""
  limit: Positive | None = None
  """Use only the first N prompts."""
  max_new_tokens: Positive = 1280
  """Longest answer; 1280 is lm-evaluation-harness' limit."""
  nltk_data: str | None = None
  """Folder with tokenizers/punkt_tab; null: where NLTK looks."""


class Mmlu(Section):
  """Multiple-choice questions (MMLU), answered by the most probable letter."""

  items: str | None = None
  """A JSONL or Parquet file, or `cais/mmlu` on the hub; null: not measured."""
  examples: str | None = None
  """File of solved questions shown first; null: the hub dataset's own."""
  shots: Annotated[int, pydantic.Field(ge=0)] = 5
  """Number of solved questions per prompt [P]."""
  limit: Positive | None = None
  """Use only the first N questions."""


class Choice(Section):
  """Accuracy on `data.test` without a judge: each question's answer among answers to
  other test questions. The right one should have the highest log-probability per token
  and, in a second form, the most probable letter. Each question costs `others` + 1
  forward passes. `{}` for the defaults. null: not measured."""

  others: Annotated[int, pydantic.Field(ge=1, le=25)] = 4
  """Number of wrong answers beside the right one: those nearest in length [O]."""
  near_duplicate: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.85
  """Two answers whose cosine by `refine.encoder` is at least this are never options of
  the same question [O]."""
  seed: Seed = 0
  """Decides between answers that are equally near in length, and the order of the
  letters."""


class Drift(Section):
  """Drift from the base model's distribution, KL(base ‖ trained). `evaluate` measures
  it on the prompts of the test questions, too."""

  prompts: str | None = None
  """General prompts, JSONL or Parquet {prompt}; null: not measured."""
  limit: Positive | None = 64
  """Use only the first N prompts."""
  max_new_tokens: Positive = 64
  """Tokens of the base model's answers on which both are compared."""


class Tasks(Section):
  """Any task of lm-evaluation-harness. The built-in engine answers these even where
  `servers` are set."""

  names: tuple[str, ...] = ()
  """Names of the harness' tasks, groups and tags, such as arc_easy; empty: none."""
  include: str | None = None
  """Folder with your own tasks' YAML files. Functions that these name are executed."""
  limit: Positive | None = None
  """Use only the first N items of each task."""
  shots: Annotated[int, pydantic.Field(ge=0)] | None = None
  """Number of solved examples per prompt; null: each task's own."""
  chat: bool = False
  """Apply the chat template to prompts, with examples as turns."""


class OpenEnded(Section):
  """Answers to general requests, judged by `evaluate.judges` (as the paper's
  MS-Bench)."""

  prompts: str | None = None
  """JSONL or Parquet {prompt, reference?}; null: not measured."""
  limit: Positive | None = None
  """Use only the first N prompts."""
  max_new_tokens: Positive = 512
  """Longest answer [O]."""


class Server(Section):
  """An OpenAI-compatible server that writes a model's answers."""

  model: str
  """The model's name at the server."""
  base_url: str
  """The server's address, ending in /v1."""
  api_key_env: EnvironmentName | None = None
  """Name of the environment variable that holds the key; never the key."""
  timeout_s: Timeout = 600.0
  """Longest wait for one reply in seconds; then it is asked for again."""
  omit: tuple[Omittable, ...] = ()
  """Parameters that the server does not take, as the engine key `omit`."""
  thinking_marks: Pair | None = None
  """Words before and after a reply's thinking, as the engine key `thinking_marks`."""


class Servers(Section):
  """Servers instead of the built-in engine, for greedy answers to test questions,
  IFEval and open-ended requests, `batch_size` at a time. null: none."""

  trained: Server
  """The server of the trained model: the export of the evaluated checkpoint."""
  base: Server
  """The server of the base model: `model.source`."""


class Evaluate(Section):
  """Scores on `data.test` and of general abilities, each beside the base model's."""

  limit: Positive | None = None
  """Use only the first N test questions, and as many of `data.validation`."""
  max_new_tokens: Positive = 64
  """Longest answer."""
  batch_size: Positive = 16
  """Questions answered at a time."""
  servers: Servers | None = None
  samples: Annotated[int, pydantic.Field(ge=0)] = 8
  """Number of answers shown in the report."""
  journal: str | None = None
  """File of finished items; null: one in `output`. Runs that share the file measure the
  base model once."""
  judges: tuple[VerdictJudge, ...] = ()
  """The panel that judges test answers. D-Acc is the share that a majority calls
  correct. Empty: not measured. The paper has three judges of different families."""
  open_ended: OpenEnded = OpenEnded()
  ifeval: Ifeval = Ifeval()
  mmlu: Mmlu = Mmlu()
  choice: Choice | None = None
  drift: Drift = Drift()
  tasks: Tasks = Tasks()


class ValidationDrift(Drift):
  """Drift from the base model, as `evaluate.drift`."""

  limit: Positive | None = 16
  """Use only the first N prompts."""
  max_new_tokens: Positive = 48
  """Tokens of the base model's answers on which both are compared."""


class ValidationIfeval(Ifeval):
  """Strict share of instructions obeyed, as `evaluate.ifeval`."""

  limit: Positive | None = 16
  """Use only the first N prompts."""
  max_new_tokens: Positive = 96
  """Longest answer."""


class Validation(Section):
  """Measure the loss on `data.validation` and general abilities during training. The
  best step has the lowest loss among those whose drift is at most `max_drift`. `{}` for
  the defaults. null: no validation."""

  every: Positive = 25
  """Steps between two validations. The last step is validated, too [O]."""
  limit: Positive = 32
  """Use only the first N questions of `data.validation` [O]."""
  drift: ValidationDrift = ValidationDrift()
  ifeval: ValidationIfeval = ValidationIfeval()
  max_drift: Annotated[float, pydantic.Field(gt=0.0)] | None = None
  """A step with more drift, in nats per token, cannot be the best; null: no limit."""
  patience: Positive | None = None
  """Stop training after this many validations in a row without a new best; null:
  never."""
  keep: Literal["best", "last"] = "best"
  """The step that `evaluate` and `export` read: the best, if there is one, or the
  last."""


class Chat(Section):
  """How `chat` writes answers."""

  max_new_tokens: Positive = 512
  """Longest answer."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
  """Temperature of sampling; 0 always takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens that reach this probability."""
