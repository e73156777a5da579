"""Reads the collected runs of sweeps: by domain, by setting, and their scores.

`raft_jax.sweep` writes `sweep.json` into its folder. A folder of such folders is one
comparison over several domains.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax import errors
from raft_jax.evaluation import intervals

Run = Mapping[str, Any]
"""One run of a sweep, a row of `sweep.json`."""

FILE = "sweep.json"

SEED, RATE = "train.seed", "train.learning_rate"
STEPS = ("train.epochs", "train.max_steps")
"""Runs that differ only in the seed are one setting. Settings that differ only in the
learning rate and the number of steps are one method, of which one is chosen."""

SFT = "sft"
"""The method of SFT runs."""

TASK = "task_"
"""The names of lm-evaluation-harness' scores begin with this."""


def read(output: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """The runs of the sweep of each domain; a single sweep has its folder's name.

  Raises:
    errors.UserError: there is no sweep, a file is damaged or has no run, or two runs
      measured a score on different items.
  """
  files = [output / FILE] if (output / FILE).exists() else _below(output)
  if not files:
    raise errors.UserError(
      f"{output}: holds no {FILE}; run `python -m raft_jax.sweep` with this config"
    )
  return {path.parent.name: _runs(path) for path in files}


def exist(output: pathlib.Path) -> bool:
  """Whether a folder holds a sweep, or folders of sweeps."""
  return (output / FILE).exists() or bool(_below(output))


def _below(output: pathlib.Path) -> list[pathlib.Path]:
  return sorted(output.glob(f"*/{FILE}"))


def _runs(path: pathlib.Path) -> list[dict[str, Any]]:
  try:
    runs = json.loads(path.read_text(encoding="utf-8"))
    if not runs:
      raise ValueError("no run")
    for run in runs:
      values(run)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.UserError(
      f"{path}: cannot be read ({error}); run `python -m raft_jax.sweep` again"
    ) from error
  if difference := difference_of_items(runs):
    score, first, second = difference
    raise errors.UserError(
      f"{path}: {first} and {second} measured {score} on different items, which cannot"
      " be compared; evaluate both on the same items, then run `python -m"
      " raft_jax.sweep` again"
    )
  return runs


class ItemDifference(NamedTuple):
  """A score that two runs, by their names, measured on different items."""

  score: str
  first: str
  second: str


def difference_of_items(runs: Sequence[Run]) -> ItemDifference | None:
  """The first score that two runs measured on different items."""
  first: dict[str, Run] = {}
  for run in runs:
    for name, score in (run.get("items") or {}).items():
      reference = first.setdefault(name, run)
      if score["items"] != reference["items"][name]["items"]:
        return ItemDifference(name, reference["name"], run["name"])
  return None


def values(run: Run) -> dict[str, Mapping[str, Any]]:
  """{value, low, high} of one run by column; {} if it was not measured."""
  result = run["scores"]
  retention = result.get("retention") or {}
  distance = (result.get("weight_distance") or {}).get("mean")
  cost = run.get("cost") or {}
  peak = cost.get("host_peak_bytes")
  return {
    **result["scores"]["trained"],
    "open_ended_retention": retention.get("open_ended") or {},
    "ifeval_retention": retention.get("ifeval_prompt_strict") or {},
    "mmlu_retention": retention.get("mmlu") or {},
    "drift": result.get("drift") or {},
    "domain_drift": result.get("domain_drift") or {},
    "weight_distance": {} if distance is None else {"value": distance},
    "support_mass": {"value": run["support_mass"]} if "support_mass" in run else {},
    "step_seconds": {"value": cost["step_seconds"]} if "step_seconds" in cost else {},
    "host_peak_gib": {} if peak is None else {"value": peak / 2**30},
  }


def settings(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
  """Label and runs of each setting; the runs of a setting differ only in their seed."""
  return [(_label(same[0], [SEED]), same) for same in _alike(runs, {SEED})]


def _label(run: Run, without: Sequence[str]) -> str:
  """The name of a run without the words of some keys."""
  name = run["name"]
  for key in without:
    word = re.escape(f"-{key.rsplit('.', 1)[-1]}_{run['set'].get(key)}")
    name = re.sub(rf"{word}(?=-|$)", "", name, count=1)
  return name


def methods(runs: Sequence[Run]) -> dict[str, list[list[Run]]]:
  """The settings of each method, each a list of runs, by the method's label."""
  one_method = (SEED, RATE, *STEPS)
  alike = _alike(runs, set(one_method))
  groups = [same[0]["group"] for same in alike]
  labelled: dict[str, list[list[Run]]] = {}
  for group, same in zip(groups, alike):
    # A group that repeats over more keys has several methods, each with its own label.
    label = group if groups.count(group) == 1 else _label(same[0], one_method)
    if label in labelled:  # keys that are no part of the name tell them apart
      label = _label(same[0], [SEED])
    labelled[label] = _alike(same, {SEED})
  return labelled


def chosen(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """The runs of each method's best setting, by the method's label.

  The best setting has the lowest mean loss on the validation questions. If none was
  measured, the first counts as the best.
  """
  return {
    label: min(alike, key=_validation_loss) for label, alike in methods(runs).items()
  }


def sft_rates(runs: Sequence[Run]) -> list[list[Run]]:
  """The runs of SFT at each learning rate, in the order of their held-out loss.

  Leaves out runs that differ from the first SFT run in another key, and rates that both
  fit worse and drift more than another rate or the base model.
  """
  first = next((run for run in runs if run["method"] == SFT), None)
  if first is None:
    return []
  plain = _fixed(first, {SEED, RATE})
  rates = [
    same
    for same in _alike(runs, {SEED})
    if same[0]["method"] == SFT and _fixed(same[0], {SEED, RATE}) == plain
  ]
  places = [place(same) for same in rates]
  base = runs[0]["scores"]["scores"]["base"]["held_out_loss"]["value"]
  better = [*places, (base, 0.0)]
  kept = [
    (loss, same)
    for same, (loss, drift) in zip(rates, places)
    if drift is None
    or not any(x < loss and y is not None and y <= drift for x, y in better)
  ]
  return [same for _, same in sorted(kept, key=lambda pair: pair[0])]


def place(runs: Sequence[Run]) -> tuple[float, float | None]:
  """Means of held-out loss and drift over a setting's runs; None if not measured."""
  scores = [values(run) for run in runs]
  drifts = [score["drift"]["value"] for score in scores if score["drift"]]
  loss = float(np.mean([score["held_out_loss"]["value"] for score in scores]))
  return loss, float(np.mean(drifts)) if drifts else None


def _validation_loss(runs: Sequence[Run]) -> float:
  scores = [values(run).get("validation_loss") or {} for run in runs]
  return float(np.mean([score.get("value", np.inf) for score in scores]))


def _alike(runs: Sequence[Run], apart_from: set[str]) -> list[list[Run]]:
  """Groups of runs that have the same name and keys, apart from some keys."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    fixed = json.dumps(_fixed(run, apart_from))
    groups.setdefault(f"{run['group']} {fixed}", []).append(run)
  return list(groups.values())


def _fixed(run: Run, apart_from: set[str]) -> dict[str, Any]:
  return {key: value for key, value in run["set"].items() if key not in apart_from}


def having(runs: Sequence[Run], name: str) -> list[Run]:
  """The runs that measured a score item by item."""
  return [run for run in runs if (run.get("items") or {}).get(name)]


def samples(
  runs: Sequence[Run], name: str, model: str = "trained"
) -> np.ndarray | None:
  """A score of a setting, [S] as `intervals.resampled_means`; None if not measured.

  The score of an item is its mean over the runs that have it.

  Args:
    model: "trained", or "base" for the model before training.
  """
  scores = [run["items"][name] for run in having(runs, name)]
  if not scores:
    return None
  first = scores[0]
  # The base model has no drift, as it does not differ from itself.
  count = len(first["trained"])
  values_M = np.mean([score[model] or [0.0] * count for score in scores], axis=0)
  weights_M = None if first["weights"] is None else np.array(first["weights"])
  return intervals.resampled_means(values_M, first["items"], weights_M)


def samples_over_seeds(runs: Sequence[Run], name: str) -> np.ndarray | None:
  """A setting's score, resampled over items and seeds, [S]; None if not measured."""
  measured = having(runs, name)
  if not measured:
    return None
  means = [mean for run in measured if (mean := samples([run], name)) is not None]
  seeds = [run["set"].get(SEED) for run in measured]
  return intervals.resampled_runs(np.stack(means), seeds)
