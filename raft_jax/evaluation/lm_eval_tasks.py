"""Any task of lm-evaluation-harness: its data, and the scores of a model's replies.

The harness writes the requests and scores the replies; `lm_eval_model` computes them.
Importing this module imports the harness (the `eval` extra).
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
"""Aggregations that make a score the mean over its items."""

SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics that an item passes or fails."""

NUMBERS = (int, float, np.number, np.bool_)


class Tasks(NamedTuple):
  """Tasks that are loaded and checked.

  Attributes:
    loaded: the harness' "tasks", "groups" and "group_map".
    limit: use the first N items of each task; None for all.
    chat: whether prompts go through the chat template.
  """

  loaded: dict[str, Any]
  limit: int | None
  chat: bool


class TaskScores(NamedTuple):
  """The scores of one model, by `task_<task>_<metric>` and the name of a named filter.

  Attributes:
    scores: item by item if the score is a mean over items, else the harness' number.
    directions: 1 if higher is better, -1 if lower is, 0 if the task does not say.
    item_digests: digests of every task's items, by `task_<task>`.
  """

  scores: dict[str, intervals.Score]
  directions: dict[str, int]
  item_digests: dict[str, str]


# The tasks


def read(settings: schema.Tasks, positions: int) -> Tasks:
  """Loads the tasks that the config names, and their data.

  Args:
    positions: the model's positions, in tokens.

  Raises:
    UserError: a name is unknown, data cannot be loaded, or a task needs more than
      greedy decoding of text.
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
        f" {importlib.metadata.version('lm_eval')} has no task {name!r};"
        + (f" did you mean {near[0]!r}?" if near else "")
        + " `lm-eval ls tasks` lists them all"
      )
  _seed(())
  built = [_load_task(manager, name) for name in dict.fromkeys(settings.names)]
  try:
    loaded = manager.load([part for parts in built for part in parts])
  except ValueError as error:  # two of the names load the same task
    raise errors.UserError(
      f"evaluate.tasks.names: {error}; leave one of the two out"
    ) from error
  for name, task in loaded["tasks"].items():
    _check(name, task, positions)
    # As the harness' own command line does: a task with 0 shots keeps them.
    if task.get_config("num_fewshot") is None:
      task.set_config("num_fewshot", settings.shots or 0)
    elif settings.shots is not None and task.get_config("num_fewshot") != 0:
      task.set_config("num_fewshot", settings.shots)
    _seed([task])
    with _user_errors(
      f"evaluate.tasks.names: {name} cannot build its requests",
      "lower evaluate.tasks.shots, or leave the task out",
    ):
      task.build_all_requests(limit=1)
  return Tasks(dict(loaded), settings.limit, settings.chat)


def _load_task(manager: Any, name: str) -> list[Any]:
  with _user_errors(
    f"evaluate.tasks.names: cannot load {name!r}",
    "without a network its data must be in the cache of `datasets`, or in files that a"
    " task of evaluate.tasks.include reads",
  ):
    built = manager.load([name])
  groups = built.get("groups", {})
  return [groups[name]] if name in groups else list(built["tasks"].values())


@contextlib.contextmanager
def _user_errors(what: str, remedy: str) -> Iterator[None]:
  """Turns any exception into an error message: tasks are code and data of other people.

  Raises:
    UserError: has the first line of the exception.
  """
  try:
    yield
  except Exception as error:
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    raise errors.UserError(
      f"{what} ({type(error).__name__}: {reason}); {remedy}"
    ) from error


def _check(name: str, task: Any, positions: int) -> None:
  """Checks that a model of text, decoded greedily, can do a task.

  Raises:
    UserError: it cannot.
  """
  place = f"evaluate.tasks.names: {name}"
  if getattr(task, "UNSAFE_CODE", False):
    raise errors.UserError(f"{place} runs code that the model writes; leave it out")
  if getattr(task, "MULTIMODAL", False):
    raise errors.UserError(f"{place} needs images or sound; leave it out")
  if task.OUTPUT_TYPE == "generate_until":
    lm_eval_model.generation(
      task.get_config("generation_kwargs") or {}, place, positions
    )


def _seed(tasks: Iterable[Any]) -> None:
  """Sets the harness' own seeds, so that both models get the same requests."""
  random.seed(defaults.DEFAULT_RANDOM_SEED)
  np.random.seed(defaults.DEFAULT_OTHER_SEED)
  for task in tasks:
    task.set_fewshot_seed(defaults.DEFAULT_OTHER_SEED)


# The scores


def score(tasks: Tasks, model: scoring.EvalModel, log: journal.Journal) -> TaskScores:
  """All scores of one model; replies in the journal are not computed again."""
  loaded = tasks.loaded
  _seed(loaded["tasks"].values())
  results = evaluator.evaluate(
    lm_eval_model.Adapter(model, log),
    loaded,
    limit=tasks.limit,
    bootstrap_iters=0,
    apply_chat_template=tasks.chat,
    fewshot_as_multiturn=True,
  )
  assert results is not None
  result = TaskScores({}, {}, {})
  for name, task in loaded["tasks"].items():
    rows = results["samples"][name]
    _add_task(result, name, task, rows, results["results"][name])
    hashes = [
      [row[f"{part}_hash"] for part in ("doc", "prompt", "target")] for row in rows
    ]
    result.item_digests[f"task_{name}"] = journal.content_key(items=hashes)
  for name, group in loaded.get("groups", {}).items():
    leaves = [task.task_name for task in group.get_all_tasks()]
    _add_group(result, name, group, leaves, results["results"][name])
    digests = [result.item_digests[f"task_{leaf}"] for leaf in leaves]
    result.item_digests[f"task_{name}"] = journal.content_key(items=digests)
  return result


def score_name(task: str, metric: str, filter_name: str) -> str:
  """The name of a score; the filter extracts the answer from a reply."""
  named = [] if filter_name == "none" else [filter_name]
  return "_".join(["task", task, metric, *named])


def _add_task(
  result: TaskScores,
  name: str,
  task: Any,
  rows: Sequence[Mapping[str, Any]],
  totals: Mapping[str, Any],
) -> None:
  aggregations, better = task.aggregation(), task.higher_is_better()
  for key in totals:
    metric, comma, filter_name = key.rpartition(",")
    same = [row for row in rows if row["filter"] == filter_name]
    if not comma or not same or metric.endswith("_stderr"):
      continue
    values = [row[metric] for row in same if metric in row["metrics"]]
    aggregate = aggregations.get(metric, harness_metrics.mean)
    if len(values) < len(same):  # items that depend on the reply cannot be paired
      aggregate = None
    metric_score = _metric_score(metric, values, aggregate, totals[key])
    if metric_score is not None:
      label = score_name(name, metric, filter_name)
      result.scores[label] = metric_score
      result.directions[label] = {True: 1, False: -1}.get(better.get(metric), 0)


def _metric_score(
  metric: str, values: Sequence[Any], aggregate: Callable[..., Any] | None, total: Any
) -> intervals.Score | None:
  """The score item by item, else the harness' number; None if it is not a number."""
  numbers = all(isinstance(value, NUMBERS) for value in values)
  if aggregate in MEANS and numbers and np.isfinite(values).all():
    passed = metric in SHARES and set(values) <= {0, 1}
    return intervals.ItemScores(np.array(values, float), share=passed)
  if aggregate is harness_metrics.bits_per_byte:
    log_p_N, bytes_N = np.array(values, float).T
    bits_N = -log_p_N / np.log(2) / np.maximum(bytes_N, 1)
    return intervals.ItemScores(bits_N, weights_N=bytes_N)
  number = isinstance(total, NUMBERS) and np.isfinite(total)
  return float(total) if number and metric != "bypass" else None


def _add_group(
  result: TaskScores,
  name: str,
  group: Any,
  leaves: Sequence[str],
  totals: Mapping[str, Any],
) -> None:
  """Adds a group's score: over all items if the group weights its tasks by size."""
  for wanted in group.aggregate_metric_list or ():
    for key, total in totals.items():
      metric, _, filter_name = key.rpartition(",")
      if metric != wanted.metric:
        continue
      names = [score_name(leaf, metric, filter_name) for leaf in leaves]
      parts = [result.scores[part] for part in names if part in result.scores]
      label = score_name(name, metric, filter_name)
      items = [part for part in parts if isinstance(part, intervals.ItemScores)]
      complete = len(items) == len(parts) and all(p.weights_N is None for p in items)
      if items and complete and wanted.weight_by_size:
        values_N = np.concatenate([part.values_N for part in items])
        share = all(part.share for part in items)
        result.scores[label] = intervals.ItemScores(values_N, share=share)
      else:
        result.scores[label] = float(total)
      directions = [
        result.directions[part] for part in names if part in result.directions
      ]
      result.directions[label] = directions[0] if directions else 0
