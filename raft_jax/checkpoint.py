"""Saving and restoring a run with Orbax: state, identity, and whole steps only.

A step is listed once it is complete on disk, so a killed run finds either the previous
checkpoint or the next, never half of one. Beside the arrays lies `meta`: what the run
is (model, data, tokenizer) and a fingerprint of every leaf, because Orbax restores a
flipped bit in array data without noticing (seen with orbax 0.12.8).
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from raft_jax import errors, hosts, model

FOLDER = "checkpoints"


class _Manager(ocp.CheckpointManager):
  """Orbax's, which leaves it to the training loop to ask whether to stop.

  Its background thread would ask about a step that is over. jax takes the step last
  asked about for the one that this process is at, and could agree on one it has passed.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


@contextlib.contextmanager
def manager(output: str | pathlib.Path, *, keep: int) -> Iterator[Any]:
  """Orbax's manager of `output/checkpoints`; saves in the background.

  Leaving the context waits for the last save and raises what it raised: a failed save
  is never swallowed.
  """
  _hush()
  folder = pathlib.Path(output).resolve() / FOLDER
  policies = ocp.checkpoint_managers
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=True
  )
  with _Manager(folder, options=options) as orbax:
    yield orbax
    with _writable(folder):
      orbax.wait_until_finished()
      orbax.check_for_errors()


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
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).ravel()
    odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * odd)])

  return jax.tree.map(of_leaf, tree)


def named_fingerprints(tree: Any) -> dict[str, list[int]]:
  """Fingerprints by the path of the leaf, ready for JSON."""
  leaves = jax.tree_util.tree_leaves_with_path(hosts.whole(fingerprints(tree)))
  return {
    # Simple names: those of a NamedTuple and of the dict that Orbax makes of it agree.
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      int(part) for part in value
    ]
    for path, value in leaves
  }


def save(orbax: Any, step: int, state: Any, identity: dict[str, Any]) -> None:
  """Starts saving `state` under `step`; returns once the arrays may be donated."""
  meta = {"identity": identity, "fingerprints": named_fingerprints(state)}
  with _writable(orbax.directory):
    orbax.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
      ),
    )


def check_latest(orbax: Any, identity: dict[str, Any]) -> int | None:
  """The newest step, if there is one, after checking that it is of this run.

  Raises:
    errors.UserError: it belongs to another run; nothing large was read.
  """
  step = orbax.latest_step()
  if step is not None:
    saved = _restore_meta(orbax, step)["identity"]
    check_identity(orbax.directory / str(step), saved, identity)
  return step


def restore(orbax: Any, abstract: Any) -> tuple[Any, int]:
  """Restores the newest checkpoint into the shapes and shardings of `abstract`.

  Ask `check_latest` first whether it is of this run.

  Raises:
    errors.UserError: when its bytes changed on disk.
  """
  step = orbax.latest_step()
  folder = orbax.directory / str(step)
  meta = _restore_meta(orbax, step)
  with _readable(folder):
    state = orbax.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    ).state
  check_fingerprints(folder, meta["fingerprints"], named_fingerprints(state))
  return state, step


def restore_params(
  output: str | pathlib.Path, shapes: model.Params, identity: dict[str, Any]
) -> tuple[model.Params, int]:
  """The trained parameters of a run's newest checkpoint, for evaluation and export.

  Args:
    output: the run's folder.
    shapes: tree of the parameters that the run trains.
    identity: those parts of the run's that must be as they were saved.

  Returns:
    The float32 parameter tree and the step it was saved at.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another model.
  """
  folder = pathlib.Path(output).resolve() / FOLDER
  steps = [path for path in folder.glob("*") if path.name.isdigit()]
  if not steps:
    raise errors.UserError(
      f"{folder}: no checkpoint; run `python -m raft_jax.train` with this config first"
    )
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
  """Raises UserError when restored arrays are not bit for bit those saved."""
  changed = [name for name, value in found.items() if saved.get(name) != value]
  if changed:
    raise errors.UserError(
      f"{folder}: the bytes of {changed[0]} (and {len(changed) - 1} more) are not "
      "those that were saved; delete this folder to go on from the step before"
    )


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
    raise errors.UserError(
      f"{folder}: cannot be restored ({reason[:200]}); delete this folder to go on "
      "from the step before"
    ) from error
