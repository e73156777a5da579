"""The runs of a sweep: each is the sweep's config with some keys set."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import schema

TEST_DATA_KEYS = ("test", "format", "columns", "turns")
"""Keys of `data` that decide what the runs of a sweep are tested on."""

TEST_KEYS = {
  "limit",
  "max_new_tokens",
  "judges",
  "open_ended",
  "ifeval",
  "mmlu",
  "choice",
  "drift",
  "tasks",
}
"""Keys of `evaluate` that decide what runs are tested on, and how."""


class PlannedRun(NamedTuple):
  """One run of a sweep.

  Attributes:
    group: the run's name in the file; its repetitions share it.
    overrides: the keys that the run sets, and their values.
    config: the config of the run, with an output folder of its own.
  """

  name: str
  group: str
  overrides: dict[str, Any]
  config: schema.Config


def expand(base: schema.Config) -> list[PlannedRun]:
  """All runs of a sweep, checked.

  Raises:
    errors.UserError: there are no runs, two runs have the same name, a run sets an
      unknown key, or it sets a key that decides what runs are tested on.
  """
  if not base.sweep.runs:
    raise errors.UserError(
      "sweep.runs: no run is named, so there is nothing to sweep; add e.g."
      " `sweep: {runs: [{name: sft, set: {method: sft}}]}`"
    )
  planned: list[PlannedRun] = []
  for run in base.sweep.runs:
    for point in _grid(run.over):
      overrides = {**run.set, **point}
      name = "-".join([run.name, *(_word(key, value) for key, value in point.items())])
      for key, value in overrides.items():
        if value is not None and _decides_tests(key):
          raise errors.UserError(
            f"sweep run {name!r}: {key}: runs are compared on the same items, scored"
            " in the same way; set this key in its own section, for all runs (null here"
            " leaves a score out)"
          )
      values = config_load.non_defaults(base)
      config = _override(values, name, overrides, output=base.output)
      planned.append(PlannedRun(name, run.name, overrides, config))
  names = [run.name for run in planned]
  repeated = sorted({name for name in names if names.count(name) > 1})
  if repeated:
    raise errors.UserError(
      f"sweep.runs: two runs are named {repeated[0]!r}; give each its own name"
    )
  return planned


def _decides_tests(key: str) -> bool:
  section, *rest = key.split(".")
  if section == "evaluate":
    return not rest or rest[0] in TEST_KEYS
  return section == "data" and bool(rest) and rest[0] in TEST_DATA_KEYS


def _grid(over: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
  for values in itertools.product(*over.values()):
    yield dict(zip(over, values))


def _word(key: str, value: Any) -> str:
  """A part of a run's name, fit for a folder: `train.seed`, 3 -> `seed_3`."""
  text = f"{key.rsplit('.', 1)[-1]}_{value}"
  return re.sub(r"[^\w.+-]", "_", text)


def _override(
  values: dict[str, Any], name: str, overrides: Mapping[str, Any], *, output: str
) -> schema.Config:
  """The config of one run.

  Args:
    values: the sweep's own, without defaults: those of its method must not stay in
      force where a run changes the method.
    output: the sweep's folder.
  """
  folder = pathlib.Path(output)
  # The sweep itself mirrors all of its runs.
  tree = {key: value for key, value in values.items() if key not in ("sweep", "mirror")}
  tree["output"] = str(folder / name)
  for section, file in (("evaluate", "evaluation"), ("refine", "refinement")):
    section_values = tree.setdefault(section, {})
    journal = section_values.get("journal") or str(folder / f"{file}.jsonl")
    section_values["journal"] = journal
  if tree.get("train", {}).get("trackers"):
    tree["train"] = {"tracker_group": folder.name} | tree["train"]
  items = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
  try:
    return config_load.from_tree(tree, items)
  except errors.UserError as error:
    raise errors.UserError(f"sweep run {name!r}: {error}") from error
