"""Saving and restoring a run with Orbax: state, identity, and whole steps only.

A step is listed once it is complete on disk, so a killed run finds either the previous
checkpoint or the next, never half of one. Beside the arrays lies `meta`: what the run
is (model, data, tokenizer) and a fingerprint of every leaf, because Orbax restores a
flipped bit in array data without noticing (seen with orbax 0.12.8). A seal names every
file with its size, and with its digest unless it is large: then the fingerprints are
what tells.
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
import jax.numpy as jnp
import orbax.checkpoint as ocp

from raft_jax import errors
from raft_jax.models import transformer
from raft_jax.runtime import distributed

FOLDER = "checkpoints"
BEST = "best"
"""Holds the parameters of the best step, where a run is watched."""
SEAL = "seal.json"
UNSEALED = "_CHECKPOINT_METADATA"
"""Gets the time of the commit when all else is sealed; no array hangs on it."""
LARGE = 64 * 2**20
"""Bytes from which on a file's digest would cost more than its arrays' fingerprints."""


class Damaged(errors.UserError):
  """A checkpoint that is not what was saved; the message says how to go on."""


class _Manager(ocp.CheckpointManager):
  """Orbax's, which leaves it to the training loop to ask whether to stop.

  Its background thread would ask about a step that is over. jax takes the step last
  asked about for the one that this process is at, and could agree on one it has passed.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


@contextlib.contextmanager
def manager(
  output: str | pathlib.Path, *, keep: int | None, name: str = FOLDER
) -> Iterator[Any]:
  """Orbax's manager of a folder of checkpoints; saves in the background.

  Leaving the context waits for the last save and raises what it raised: a failed save
  is never swallowed.

  Args:
    output: the run's folder.
    keep: older checkpoints than so many are deleted; None leaves them to `drop`.
    name: of the folder of checkpoints in it.
  """
  _hush()
  folder = pathlib.Path(output).resolve() / name
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
  """Orbax logs what it also raises: a page of traceback around our one line."""
  logging.getLogger("absl").setLevel(logging.CRITICAL)


@jax.jit
def fingerprints(tree: Any) -> Any:
  """Two wrap-around sums of the bits of each leaf, the second weighted by position.

  Equal on any sharding; a flipped bit or swapped rows change them. uint32 [2] a leaf.
  """

  def of_leaf(leaf):
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    # Not by flattening, which would gather what lies on several devices.
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
      along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      place += along * jnp.uint32(stride % 2**32)
      stride *= leaf.shape[axis]
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * (2 * place + 1))])

  return jax.tree.map(of_leaf, tree)


def named_fingerprints(tree: Any) -> dict[str, list[int]]:
  """Fingerprints by the path of the leaf, ready for JSON."""
  leaves = jax.tree_util.tree_leaves_with_path(distributed.to_host(fingerprints(tree)))
  return {
    # Simple names: those of a NamedTuple and of the dict that Orbax makes of it agree.
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      int(part) for part in value
    ]
    for path, value in leaves
  }


def save(orbax: Any, step: int, state: Any, identity: dict[str, Any]) -> None:
  """Starts saving `state` under `step`; returns once the arrays may be donated."""
  meta = {
    "identity": identity,
    "fingerprints": named_fingerprints(state),
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
  """Waits until what was saved is on the disk; raises what the saving raised."""
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
  """The newest step, if there is one, after checking that it is whole and of this run.

  Args:
    identity: what the run is.
    on_corrupt: "previous" sets a damaged step aside and goes on to the one before.

  Raises:
    errors.UserError: it is damaged, or of another run; nothing large was read.
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

  They may be those of other devices, or other processes, than it was saved from.

  Args:
    identity: what the run is; also asked of a step that is gone back to.
    on_corrupt: as for `check_latest`, which comes first.

  Raises:
    errors.UserError: when its bytes changed on disk.
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
      check_fingerprints(folder, meta["fingerprints"], named_fingerprints(state))
      return state, step
    except Damaged as damage:
      _step_back(orbax, folder, damage, on_corrupt)
      check_latest(orbax, identity, on_corrupt=on_corrupt)


def _step_back(
  orbax: Any, folder: pathlib.Path, damage: Damaged, on_corrupt: str
) -> None:
  """Sets a damaged step aside, loudly, if that is wanted and another one is left."""
  if on_corrupt != "previous" or not _earlier(folder):
    raise damage
  aside = folder.with_name(f"damaged-{folder.name}")
  print(
    f"WARNING: {damage}\nWARNING: set aside as {aside}; going back to step "
    f"{max(_earlier(folder))}, and the steps since then are trained again"
  )

  def move() -> None:
    if distributed.is_primary():
      shutil.rmtree(aside, ignore_errors=True)
      folder.rename(aside)

  distributed.run_on_all(move)
  orbax.reload()


def _earlier(folder: pathlib.Path) -> list[int]:
  """The steps saved before the one in `folder`, as far as their names tell."""
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
  """The steps that a folder of checkpoints holds, in no order."""
  folder = pathlib.Path(output).resolve() / name
  return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def require(output: str | pathlib.Path, name: str = FOLDER) -> None:
  """Raises UserError where a folder holds no checkpoint; reads none."""
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
    identity: those parts of the run's that must be as they were saved.
    name: of the folder of checkpoints.

  Returns:
    The float32 parameter tree and the step it was saved at.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another model.
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
  # Not `manager`: reading must not clean up what a running training writes.
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
  check_fingerprints(place, meta["fingerprints"], named_fingerprints(restored))
  return restored["params"], step


def check_identity(
  folder: pathlib.Path, saved: dict[str, Any], identity: dict[str, Any]
) -> None:
  """Raises UserError naming the first part in which two runs differ."""
  for key in sorted({*saved, *identity}):
    if saved.get(key) != identity.get(key):
      raise errors.UserError(
        f"{folder}: saved by a run whose {key} was {saved.get(key)!r}, now "
        f"{identity.get(key)!r}; choose another `output`, or delete the folder"
      )


def check_fingerprints(
  folder: pathlib.Path, saved: dict[str, list[int]], found: dict[str, list[int]]
) -> None:
  """Raises Damaged when restored arrays are not bit for bit those saved."""
  changed = [name for name, value in found.items() if saved.get(name) != value]
  if changed:
    raise Damaged(
      f"{folder}: the bytes of {changed[0]} (and {len(changed) - 1} more) are not "
      f"those that were saved; {_remedy(folder)}"
    )


# --- The seal -------------------------------------------------------------------------


def _seal_unnamed(folder: pathlib.Path) -> None:
  """Seals the step that is complete but for its name, which Orbax gives it last."""
  if distributed.is_primary():
    for step in folder.glob("*.orbax-checkpoint-tmp*"):
      seal(step)


def seal(step: pathlib.Path) -> None:
  """Writes down size and digest of every file of a step."""
  files = {
    path.relative_to(step).as_posix(): _measure(path, path.stat().st_size < LARGE)
    for path in sorted(step.rglob("*"))
    if path.is_file() and path.name not in (UNSEALED, SEAL)
  }
  (step / SEAL).write_text(json.dumps({"sha256": _digest(files), "files": files}))


def check_seal(step: pathlib.Path, *, sealed: bool = False) -> None:
  """Compares every file of a step with its seal.

  Args:
    sealed: that there is no seal is damage, too.

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
    found = _measure(file, digest is not None) if file.is_file() else None
    if found != [size, digest]:
      what = "missing" if found is None else "not what was saved"
      raise Damaged(f"{file}: {what}; {_remedy(step)}")


def _measure(path: pathlib.Path, whole: bool) -> list[Any]:
  digest = hashlib.sha256(path.read_bytes()).hexdigest() if whole else None
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
  """Turns Orbax's many ways to fail on a full or read-only disk into one error."""
  try:
    yield
  except Exception as error:  # a failed write surfaces as whatever its thread raised
    free = shutil.disk_usage(folder).free / 2**30
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise errors.UserError(
      f"{folder}: the checkpoint was not saved ({reason[:200]}; {free:.1f} GiB free); "
      "earlier ones are whole: mend the disk and rerun the same command"
    ) from error


@contextlib.contextmanager
def _readable(folder: Any) -> Iterator[None]:
  """Turns Orbax's many ways to fail on damaged files into one clear error."""
  try:
    yield
  except Exception as error:  # Orbax raises bare ones, too, for damaged files
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise Damaged(
      f"{folder}: cannot be restored ({reason[:200]}); {_remedy(pathlib.Path(folder))}"
    ) from error
