"""Saving and restoring a run with Orbax: state, identity, and whole steps only.

A step is listed once it is complete on disk, so a killed run finds either the previous
checkpoint or the next, never half of one. `meta` is stored beside the arrays: what the
run is (model, data, tokenizer) and a fingerprint of every leaf, because Orbax restores
a flipped bit in array data without an error (orbax 0.12.8). A seal lists every file
with its size and, unless the file is large, its digest; large files are checked by the
fingerprints.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from raft_jax import errors
from raft_jax.models import transformer
from raft_jax.runtime import distributed
from raft_jax.storage import hub_datasets, sealed_folder
from raft_jax.training import tree_fingerprints

FOLDER = sealed_folder.CHECKPOINTS
BEST = sealed_folder.BEST
"""The folder with the parameters of the best step, if the run is validated."""
SEAL = sealed_folder.STEP_SEAL
UNSEALED = "_CHECKPOINT_METADATA"
"""Orbax writes the time of the commit here after the seal; no array depends on it."""
LARGE = 64 * 2**20
"""Bytes of a file above which a digest would cost more than the fingerprints."""


class Damaged(errors.UserError):
  """A checkpoint differs from what was saved; the message says how to continue."""


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, without its own check whether to stop.

  Only the training loop may check. Orbax's background thread would ask jax about a step
  that is over; jax takes the last step asked about as the current one, so the processes
  could agree to stop at a step that one of them has passed.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


@contextlib.contextmanager
def manager(
  output: str | pathlib.Path, *, keep: int | None, name: str = FOLDER
) -> Iterator[Any]:
  """Orbax's manager of a folder of checkpoints; saves in the background.

  On exit it waits for the last save and raises its error, if it failed.

  Args:
    output: the run's folder.
    keep: how many of the latest checkpoints are kept; None keeps all until `drop`.
    name: of the folder of checkpoints in the run's folder.

  Raises:
    errors.UserError: a step is a symbolic link, which Orbax could not delete later.
  """
  _hush()
  folder = pathlib.Path(output).resolve() / name
  for step in folder.glob("[0-9]*"):
    if step.is_symlink():
      raise errors.UserError(
        f"{step}: is a symbolic link; move the checkpoint itself there, delete the "
        "link, or choose another output"
      )
  policies = ocp.checkpoint_managers
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policies.LatestN(keep),
    cleanup_tmp_directories=True,
    async_options=ocp.AsyncOptions(
      post_finalization_callback=functools.partial(_seal_unnamed, folder)
    ),
  )
  with _Manager(folder, options=options) as orbax:
    yield orbax
    commit(orbax)


def _hush() -> None:
  """Silences Orbax, which also logs a traceback for every error that it raises."""
  logging.getLogger("absl").setLevel(logging.CRITICAL)


def save(orbax: Any, step: int, state: Any, identity: dict[str, Any]) -> None:
  """Starts to save `state` under `step`; returns when the arrays may be donated."""
  meta = {
    "identity": identity,
    "fingerprints": tree_fingerprints.by_path(state),
    "sealed": True,
  }
  with _writable(orbax.directory):
    orbax.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
      ),
    )


def commit(orbax: Any) -> None:
  """Waits until all saves are on disk; raises the error of one that failed."""
  with _writable(orbax.directory):
    orbax.wait_until_finished()
    orbax.check_for_errors()


def drop(orbax: Any, steps: Iterable[int]) -> None:
  """Deletes checkpoints."""
  for step in steps:
    orbax.delete(step)


def check_latest(
  orbax: Any, identity: dict[str, Any], *, on_corrupt: str = "stop"
) -> int | None:
  """The newest step, or None, after a check that it is intact and belongs to this run.

  Reads no large file.

  Args:
    identity: what the run is.
    on_corrupt: "previous" sets a damaged step aside and checks the one before it.

  Raises:
    errors.UserError: it is damaged, or belongs to another run.
  """
  while (step := orbax.latest_step()) is not None:
    folder = pathlib.Path(orbax.directory / str(step))
    try:
      distributed.run_on_all(functools.partial(check_seal, folder))
      meta = _restore_meta(orbax, step)
      if meta.get("sealed"):
        distributed.run_on_all(functools.partial(check_seal, folder, sealed=True))
    except Damaged as damage:
      _step_back(orbax, folder, damage, on_corrupt)
      continue
    check_identity(folder, meta["identity"], identity)
    return step
  return None


def restore(
  orbax: Any, abstract: Any, identity: dict[str, Any], *, on_corrupt: str = "stop"
) -> tuple[Any, int]:
  """Restores the newest checkpoint into the shapes and shardings of `abstract`.

  The run may have been saved from other devices or processes. Call `check_latest`
  first.

  Args:
    identity: what the run is; an earlier step that is restored instead must match it.
    on_corrupt: as in `check_latest`.

  Raises:
    errors.UserError: its bytes changed on disk.
  """
  while True:
    step = orbax.latest_step()
    folder = pathlib.Path(orbax.directory / str(step))
    try:
      meta = _restore_meta(orbax, step)
      with _readable(folder):
        state = orbax.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        ).state
      check_fingerprints(folder, meta["fingerprints"], tree_fingerprints.by_path(state))
      return state, step
    except Damaged as damage:
      _step_back(orbax, folder, damage, on_corrupt)
      check_latest(orbax, identity, on_corrupt=on_corrupt)


def _step_back(
  orbax: Any, folder: pathlib.Path, damage: Damaged, on_corrupt: str
) -> None:
  """Sets a damaged step aside with a warning, if `on_corrupt` allows it."""
  if on_corrupt != "previous" or not _earlier(folder):
    raise damage
  aside = folder.with_name(f"damaged-{folder.name}")
  print(
    f"WARNING: {damage}\nWARNING: set aside as {aside}; going back to step "
    f"{max(_earlier(folder))}; the steps since then are trained again"
  )

  def move() -> None:
    if distributed.is_primary():
      shutil.rmtree(aside, ignore_errors=True)
      folder.rename(aside)

  distributed.run_on_all(move)
  orbax.reload()


def _earlier(folder: pathlib.Path) -> list[int]:
  """The steps saved before the one in `folder`, by the names of their folders."""
  steps = [int(path.name) for path in folder.parent.glob("*") if path.name.isdigit()]
  return [step for step in steps if step < int(folder.name)]


def _remedy(folder: pathlib.Path) -> str:
  if folder.parent.name == BEST:
    return "set validation.keep=last to read the last step instead"
  earlier = _earlier(folder)
  if not earlier:
    return "no earlier step is left: delete the run's checkpoints to begin again"
  return (
    f"delete this folder, or train with --on-corrupt=previous, to go on from the step "
    f"before ({max(earlier)})"
  )


def steps(output: str | pathlib.Path, name: str = FOLDER) -> list[int]:
  """The steps in a folder of checkpoints, in no particular order."""
  folder = pathlib.Path(output).resolve() / name
  return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def require(output: str | pathlib.Path, name: str = FOLDER) -> None:
  """Raises UserError if a folder holds no checkpoint; reads none."""
  if not steps(output, name):
    raise errors.UserError(
      f"{pathlib.Path(output).resolve() / name}: no checkpoint; run `python -m"
      " raft_jax.train` with this config first"
    )


def restore_params(
  output: str | pathlib.Path,
  shapes: transformer.Params,
  identity: dict[str, Any],
  name: str = FOLDER,
) -> tuple[transformer.Params, int]:
  """The trained parameters of a run's newest checkpoint, for evaluation and export.

  Args:
    output: the run's folder.
    shapes: tree of the parameters that the run trains.
    identity: the parts of the run's identity that must match.
    name: of the folder of checkpoints.

  Returns:
    The float32 parameter tree and the step of its checkpoint.

  Raises:
    errors.UserError: there is no checkpoint, or it belongs to another model.
  """
  require(output, name)
  folder = pathlib.Path(output).resolve() / name
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = {
    "params": jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      shapes,
    )
  }
  _hush()
  # Not `manager`, which would clean up what a running training is writing.
  with ocp.CheckpointManager(folder) as orbax:
    step = orbax.latest_step()
    place, meta = folder / str(step), _restore_meta(orbax, step)
    check_seal(place, sealed=meta.get("sealed", False))
    check_identity(place, meta["identity"], meta["identity"] | identity)
    with _readable(place):
      restored = orbax.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
          ),
        ),
      ).state
  check_fingerprints(place, meta["fingerprints"], tree_fingerprints.by_path(restored))
  return restored["params"], step


def check_identity(
  folder: pathlib.Path, saved: dict[str, Any], identity: dict[str, Any]
) -> None:
  """Raises UserError with the first part in which two runs differ."""
  for key in sorted({*saved, *identity}):
    if saved.get(key) != identity.get(key):
      remedy = "choose another `output`, or delete the folder"
      if hub_datasets.PREFIX in key and saved.get(key):
        remedy = f"name the dataset with @{saved[key]}, {remedy}"
      raise errors.UserError(
        f"{folder}: saved by a run whose {key} was {saved.get(key)!r}, now "
        f"{identity.get(key)!r}; {remedy}"
      )


def check_fingerprints(
  folder: pathlib.Path, saved: dict[str, list[int]], restored: dict[str, list[int]]
) -> None:
  """Raises Damaged if restored arrays are not bit for bit the saved ones."""
  changed = [name for name, value in restored.items() if saved.get(name) != value]
  if changed:
    raise Damaged(
      f"{folder}: the bytes of {changed[0]} (and {len(changed) - 1} more) are not "
      f"those that were saved; {_remedy(folder)}"
    )


# --- The seal -------------------------------------------------------------------------


def _seal_unnamed(folder: pathlib.Path) -> None:
  """Seals a step that is complete except for its name, which Orbax gives it last."""
  if distributed.is_primary():
    for step in folder.glob("*.orbax-checkpoint-tmp*"):
      seal(step)


def seal(step: pathlib.Path) -> None:
  """Stores size and digest of every file of a step."""
  files = {
    path.relative_to(step).as_posix(): _size_and_digest(
      path, with_digest=path.stat().st_size < LARGE
    )
    for path in sorted(step.rglob("*"))
    if path.is_file() and path.name not in (UNSEALED, SEAL)
  }
  (step / SEAL).write_text(json.dumps({"sha256": _digest(files), "files": files}))


def check_seal(step: pathlib.Path, *, sealed: bool = False) -> None:
  """Compares every file of a step with its seal.

  Args:
    sealed: whether a missing seal counts as damage.

  Raises:
    Damaged: names the file.
  """
  path = step / SEAL
  if not path.exists():
    if sealed:
      raise Damaged(f"{path}: missing; {_remedy(step)}")
    return
  try:
    content = json.loads(path.read_bytes())
    files = content["files"]
    intact = content["sha256"] == _digest(files)
  except (ValueError, KeyError, TypeError):
    intact = False
  if not intact:
    raise Damaged(f"{path}: damaged; {_remedy(step)}")
  for name, (size, digest) in files.items():
    file = step / name
    if not file.is_file():
      raise Damaged(f"{file}: missing; {_remedy(step)}")
    if _size_and_digest(file, with_digest=digest is not None) != [size, digest]:
      raise Damaged(f"{file}: not what was saved; {_remedy(step)}")


def _size_and_digest(path: pathlib.Path, *, with_digest: bool) -> list[Any]:
  digest = hashlib.sha256(path.read_bytes()).hexdigest() if with_digest else None
  return [path.stat().st_size, digest]


def _digest(files: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _restore_meta(orbax: Any, step: int) -> dict[str, Any]:
  with _readable(orbax.directory / str(step)):
    return orbax.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    ).meta


@contextlib.contextmanager
def _writable(folder: Any) -> Iterator[None]:
  """Turns Orbax's many errors on a full or read-only disk into one clear error."""
  try:
    yield
  except Exception as error:  # a failed write raises whatever its thread raised
    free = shutil.disk_usage(folder).free / 2**30
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise errors.UserError(
      f"{folder}: the checkpoint was not saved ({reason[:200]}; {free:.1f} GiB free); "
      "earlier ones are intact: free or repair the disk and rerun the same command"
    ) from error


@contextlib.contextmanager
def _readable(folder: Any) -> Iterator[None]:
  """Turns Orbax's many errors for damaged files into one clear error."""
  try:
    yield
  except Exception as error:  # for damaged files Orbax also raises plain Exceptions
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise Damaged(
      f"{folder}: cannot be restored ({reason[:200]}); {_remedy(pathlib.Path(folder))}"
    ) from error
