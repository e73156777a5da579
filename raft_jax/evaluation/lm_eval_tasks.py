"""Any task of lm-evaluation-harness: its data, and the scores of a model's replies.

The harness writes the requests and judges the replies, which `harness_model` gives.
Imports the harness (the `eval` extra) when it is imported itself.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval import defaults, evaluator
from lm_eval import tasks as harness_tasks
from lm_eval.api import metrics as harness_metrics

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.evaluation import intervals, lm_eval_model, scoring
from raft_jax.storage import journal

MEANS = (harness_metrics.mean, np.mean)
"""Aggregations by which a score is the mean of its items'."""

SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics that an item passes or fails."""

NUMBERS = (int, float, np.number, np.bool_)


class Tasks(NamedTuple):
  """Tasks that are ready to be asked.

  Attributes:
    loaded: "tasks", "groups" and "group_map" of the harness.
    limit: the first N items of each; None for all.
    chat: whether prompts go through the chat template.
  """

  loaded: dict[str, Any]
  limit: int | None
  chat: bool


class Found(NamedTuple):
  """What one model scored, by `task_<task>_<metric>` and the filter if it has a name.

  Attributes:
    scores: item by item where the score is a mean of items, else the harness' figure.
    directions: 1 where higher is better, -1 where lower is, 0 where nobody says.
    asked: digests of every task's items, by `task_<task>`.
  """

  scores: dict[str, intervals.Figure]
  directions: dict[str, int]
  asked: dict[str, str]


# The tasks


def read(settings: schema.Tasks, positions: int) -> Tasks:
  """Loads the tasks that the config names, and their data.

  Args:
    positions: how many tokens the model was made for.

  Raises:
    UserError: an unknown name, data that cannot be had, or a task that asks for what
      greedy decoding of text is not.
  """
  if settings.include is not None and not pathlib.Path(settings.include).is_dir():
    raise errors.UserError(
      f"evaluate.tasks.include: {settings.include} is not a folder; name the one with"
      " the tasks' YAML files"
    )
  manager = harness_tasks.TaskManager(include_path=settings.include)
  for name in settings.names:
    if name not in manager.task_index:
      near = difflib.get_close_matches(name, manager.all_tasks, n=1)
      raise errors.UserError(
        f"evaluate.tasks.names: lm-evaluation-harness"
        f" {importlib.metadata.version('lm_eval')} knows no {name!r};"
        + (f" did you mean {near[0]!r}?" if near else "")
        + " `lm-eval ls tasks` lists them all"
      )
  _seed(())
  built = [_built(manager, name) for name in dict.fromkeys(settings.names)]
  try:
    loaded = manager.load([part for parts in built for part in parts])
  except ValueError as error:  # a task that two of the names bring
    raise errors.UserError(
      f"evaluate.tasks.names: {error}; leave one of the two out"
    ) from error
  for name, task in loaded["tasks"].items():
    _check(name, task, positions)
    # The rule of the harness' own command line: a task that says 0 means it.
    if task.get_config("num_fewshot") is None:
      task.set_config("num_fewshot", settings.shots or 0)
    elif settings.shots is not None and task.get_config("num_fewshot") != 0:
      task.set_config("num_fewshot", settings.shots)
    _seed([task])
    with _named(
      f"evaluate.tasks.names: {name} cannot write its requests",
      "lower evaluate.tasks.shots, or leave the task out",
    ):
      task.build_all_requests(limit=1)
  return Tasks(dict(loaded), settings.limit, settings.chat)


def _built(manager: Any, name: str) -> list[Any]:
  with _named(
    f"evaluate.tasks.names: cannot load {name!r}",
    "without a network its data must be in the cache of `datasets`, or in files that a"
    " task of evaluate.tasks.include reads",
  ):
    built = manager.load([name])
  groups = built.get("groups", {})
  return [groups[name]] if name in groups else list(built["tasks"].values())


@contextlib.contextmanager
def _named(what: str, remedy: str) -> Iterator[None]:
  """Exceptions of a task as a message: it is code, and data from anywhere.

  Raises:
    UserError: with the exception's first line.
  """
  try:
    yield
  except Exception as error:
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    raise errors.UserError(
      f"{what} ({type(error).__name__}: {reason}); {remedy}"
    ) from error


def _check(name: str, task: Any, positions: int) -> None:
  """Refuses what this model cannot do.

  Raises:
    UserError: it is one of them.
  """
  place = f"evaluate.tasks.names: {name}"
  if getattr(task, "UNSAFE_CODE", False):
    raise errors.UserError(f"{place} runs code that the model writes; leave it out")
  if getattr(task, "MULTIMODAL", False):
    raise errors.UserError(f"{place} shows images or sound; leave it out")
  if task.OUTPUT_TYPE == "generate_until":
    lm_eval_model.generation(
      task.get_config("generation_kwargs") or {}, place, positions
    )


def _seed(tasks: Iterable[Any]) -> None:
  """The harness' own seeds: both models are asked the same."""
  random.seed(defaults.DEFAULT_RANDOM_SEED)
  np.random.seed(defaults.DEFAULT_OTHER_SEED)
  for task in tasks:
    task.set_fewshot_seed(defaults.DEFAULT_OTHER_SEED)


# The scores


def measured(tasks: Tasks, who: scoring.Subject, log: journal.Journal) -> Found:
  """All scores of one model; what the journal knows is not computed again."""
  loaded = tasks.loaded
  _seed(loaded["tasks"].values())
  results = evaluator.evaluate(
    lm_eval_model.Adapter(who, log),
    loaded,
    limit=tasks.limit,
    bootstrap_iters=0,
    apply_chat_template=tasks.chat,
    fewshot_as_multiturn=True,
  )
  assert results is not None
  found = Found({}, {}, {})
  for name, task in loaded["tasks"].items():
    rows = results["samples"][name]
    _add_task(found, name, task, rows, results["results"][name])
    hashes = [
      [row[f"{part}_hash"] for part in ("doc", "prompt", "target")] for row in rows
    ]
    found.asked[f"task_{name}"] = journal.content_key(items=hashes)
  for name, group in loaded.get("groups", {}).items():
    leaves = [task.task_name for task in group.get_all_tasks()]
    _add_group(found, name, group, leaves, results["results"][name])
    asked = [found.asked[f"task_{leaf}"] for leaf in leaves]
    found.asked[f"task_{name}"] = journal.content_key(items=asked)
  return found


def score_name(task: str, metric: str, chosen: str) -> str:
  """`chosen` is the filter by which the answer was found in the reply."""
  return "_".join(["task", task, metric, *([] if chosen == "none" else [chosen])])


def _add_task(
  found: Found,
  name: str,
  task: Any,
  rows: Sequence[Mapping[str, Any]],
  totals: Mapping[str, Any],
) -> None:
  aggregations, better = task.aggregation(), task.higher_is_better()
  for key in totals:
    metric, comma, chosen = key.rpartition(",")
    same = [row for row in rows if row["filter"] == chosen]
    if not comma or not same or metric.endswith("_stderr"):
      continue
    values = [row[metric] for row in same if metric in row["metrics"]]
    aggregate = aggregations.get(metric, harness_metrics.mean)
    if len(values) < len(same):  # no pairs where a model's reply decides what counts
      aggregate = None
    score = _score(metric, values, aggregate, totals[key])
    if score is not None:
      label = score_name(name, metric, chosen)
      found.scores[label] = score
      found.directions[label] = {True: 1, False: -1}.get(better.get(metric), 0)


def _score(
  metric: str, values: Sequence[Any], aggregate: Callable[..., Any] | None, total: Any
) -> intervals.Figure | None:
  """Item by item, or the figure alone; None where there is no figure."""
  numbers = all(isinstance(value, NUMBERS) for value in values)
  if aggregate in MEANS and numbers and np.isfinite(values).all():
    passed = metric in SHARES and set(values) <= {0, 1}
    return intervals.Scores(np.array(values, float), share=passed)
  if aggregate is harness_metrics.bits_per_byte:
    log_p_N, bytes_N = np.array(values, float).T
    bits_N = -log_p_N / np.log(2) / np.maximum(bytes_N, 1)
    return intervals.Scores(bits_N, weights_N=bytes_N)
  number = isinstance(total, NUMBERS) and np.isfinite(total)
  return float(total) if number and metric != "bypass" else None


def _add_group(
  found: Found,
  name: str,
  group: Any,
  leaves: Sequence[str],
  totals: Mapping[str, Any],
) -> None:
  """A group's score is of all its items where tasks are weighed by their size."""
  for wanted in group.aggregate_metric_list or ():
    for key, total in totals.items():
      metric, _, chosen = key.rpartition(",")
      if metric != wanted.metric:
        continue
      names = [score_name(leaf, metric, chosen) for leaf in leaves]
      parts = [found.scores[part] for part in names if part in found.scores]
      label = score_name(name, metric, chosen)
      items = [part for part in parts if isinstance(part, intervals.Scores)]
      whole = len(items) == len(parts) and all(p.weights_N is None for p in items)
      if items and whole and wanted.weight_by_size:
        values_N = np.concatenate([part.values_N for part in items])
        share = all(part.share for part in items)
        found.scores[label] = intervals.Scores(values_N, share=share)
      else:
        found.scores[label] = float(total)
      known = [found.directions[part] for part in names if part in found.directions]
      found.directions[label] = known[0] if known else 0
