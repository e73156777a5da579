"""The configs that an output folder's stages were run with, which bind later runs.

Each stage records its config in `output/config/<stage>.yaml`. A later run into the same
folder may not change the keys that decide the stage's result.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import schema, strict_yaml
from raft_jax.storage import atomic, hub_datasets

RESULTS = {
  "train": ("checkpoints and best in it", ("checkpoints/[0-9]*", "best/[0-9]*")),
  "refine": ("refined in it", ("refined/*",)),
}
"""What a stage leaves that binds the folder to its config, in words and as patterns.
Without it the stage starts anew. The other stages have one config for the folder."""


def check_lock(config: schema.Config, stage: str, keys: Sequence[str]) -> None:
  """Refuses a folder that holds something else than this run; writes nothing.

  Args:
    config: of the run.
    stage: "refine", "train", ...
    keys: dotted keys or sections that decide the stage's result. They may not change
      between two runs into the same folder; all other keys may.

  Raises:
    errors.UserError: the folder is not ours, or was made with other values of `keys`.
  """
  values = config_load.flat(config.model_dump(mode="json"))
  for key in keys:
    # A section that is null has no keys here, and its own name matches instead.
    if not any(
      config_load.matches(name, [key]) or config_load.matches(key, [name])
      for name in values
    ):
      raise ValueError(f"no config key {key!r}")
  output = pathlib.Path(config.output)
  try:
    if not _is_bound(output, stage):
      return
    locked = _read_locked(output, stage)
  except OSError as e:
    raise errors.UserError(
      f"output: cannot use {output}: {e.strerror}; choose another output"
    ) from e
  changes = {
    key: pair
    for key, pair in config_load.changes(locked, config).items()
    if config_load.matches(key, keys)
  }
  _refuse_changes(
    output,
    stage,
    {
      key: (old, new)
      for key, (old, new) in changes.items()
      # Checkpoints and manifests compare the commits themselves.
      if hub_datasets.without_revision(str(old))
      != hub_datasets.without_revision(str(new))
    },
  )


def lock_config(config: schema.Config, stage: str, keys: Sequence[str]) -> None:
  """Records the config in output/config/<stage>.yaml, after `check_lock`.

  Call this in one process only, holding the folder's lock if there is one, and only
  when the stage is about to write: a run that never started must not bind the next one.

  Raises:
    errors.UserError: as `check_lock`, or the folder cannot be written.
  """
  check_lock(config, stage, keys)
  path = _lock_path(pathlib.Path(config.output), stage)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary:
      temporary.write_text(config_load.dump(config), encoding="utf-8")
  except OSError as e:
    raise errors.UserError(
      f"output: cannot write {path}: {e.strerror}; choose another output"
    ) from e


def _lock_path(output: pathlib.Path, stage: str) -> pathlib.Path:
  return output / "config" / f"{stage}.yaml"


def _is_bound(output: pathlib.Path, stage: str) -> bool:
  """Whether the folder holds results of the stage, which bind it to their config.

  Raises:
    errors.UserError: the folder holds files, and no run of raft_jax made it.
  """
  if not output.exists():
    return False
  path = _lock_path(output, stage)
  present = [item for item in output.iterdir() if not item.name.startswith(".")]
  if present and not path.parent.is_dir():
    raise errors.UserError(
      f"output: {output} is not empty (e.g. {present[0].name}) and no run of raft_jax "
      f"made it; choose another output or empty the folder"
    )
  # Where only recorded configs are left, no run got further than its first checks.
  if not path.exists() or [item.name for item in present] == ["config"]:
    return False
  _, patterns = RESULTS.get(stage, ("", ("config",)))
  return any(any(output.glob(pattern)) for pattern in patterns)


def _read_locked(output: pathlib.Path, stage: str) -> dict[str, Any]:
  """The config that the folder is bound to, under the present names of its keys."""
  path = _lock_path(output, stage)
  draft = strict_yaml.Draft()
  tree = draft.read(config_load.read_text(path), "", lambda line: f"{path}:{line}")
  if draft.problems or not isinstance(tree, dict):
    raise errors.UserError(
      f"{path}: damaged; delete it if {output} was made with this config, else choose "
      "another output"
    )
  if tree.get("watch"):
    raise errors.UserError(
      f"output: {output} was validated by an earlier version of raft_jax, which logged "
      "other names; choose another output, or go on with that version"
    )
  for old_name, new_name in config_load.RENAMED.items():
    _rename(tree, old_name.split("."), new_name.rsplit(".", 1)[-1])
  return tree


def _rename(tree: dict[str, Any], path: Sequence[str], new_name: str) -> None:
  *parents, last = path
  for part in parents:
    tree = tree.get(part) or {}
  if last in tree:
    tree[new_name] = tree.pop(last)


def _refuse_changes(
  output: pathlib.Path, stage: str, changes: Mapping[str, tuple[Any, Any]]
) -> None:
  if not changes:
    return
  results, _ = RESULTS.get(stage, ("the folder", ()))
  shown = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
  raise errors.UserError(
    f"output: {output} holds a {stage} run of another config ({shown}); choose "
    f"another output, put the old values back, or delete {results}"
  )
