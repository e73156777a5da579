"""Folders that are sealed by a manifest, which is removed first and written last.

A folder without a manifest, or with one that disagrees with its files, is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from raft_jax.storage import atomic

MANIFEST = "MANIFEST.json"
SUMMARY = "summary.json"

STEP_SEAL = "seal.json"
"""The manifest of a checkpoint, in the folder of its step."""
CHECKPOINTS = "checkpoints"
BEST = "best"
"""The folders of a run that hold checkpoints: all of its steps, and the best one."""


def unseal(folder: pathlib.Path, stale: str = "") -> None:
  """Removes the manifest, then what killed writers left behind.

  Args:
    stale: pattern of further files to remove.
  """
  (folder / MANIFEST).unlink(missing_ok=True)
  leftovers = [*folder.glob(f"{atomic.TEMPORARY}*")]
  leftovers += folder.glob(stale) if stale else ()
  for path in leftovers:
    path.unlink()


def seal(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Writes the manifest, after everything else in the folder."""
  text = json.dumps(manifest, sort_keys=True, indent=2, allow_nan=False) + "\n"
  with atomic.replacing(folder / MANIFEST) as temporary:
    temporary.write_bytes(text.encode())


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest as it stands; raises OSError or ValueError if it cannot be read."""
  manifest = json.loads((folder / MANIFEST).read_bytes())
  if not isinstance(manifest, dict):
    raise ValueError("not a JSON object")
  return manifest


def sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_summary(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
  with atomic.replacing(folder / SUMMARY) as temporary:
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")


def write(
  folder: pathlib.Path,
  files: Mapping[str, Iterable[Mapping[str, Any]]],
  summary: Mapping[str, Any],
  manifest: Mapping[str, Any] | None,
) -> None:
  """Writes the summary, then a JSONL file for each name, and last the manifest.

  Args:
    files: rows by name; `train` becomes train.jsonl.
    manifest: its entries beside the files' digests; `inputs` is the digest of
      everything that the files depend on. None leaves the folder unfinished.
  """
  unseal(folder)
  write_summary(folder, summary)
  for name, rows in files.items():
    with atomic.replacing(folder / f"{name}.jsonl") as temporary:
      temporary.write_bytes(b"".join(map(_line, rows)))
  if manifest is not None:
    names = [f"{name}.jsonl" for name in files]
    seal(folder, {**manifest, "sha256": {n: sha256(folder / n) for n in names}})


def inputs(folder: pathlib.Path) -> str | None:
  """`inputs` in the manifest of a finished folder; None if unfinished or damaged."""
  try:
    manifest = read_manifest(folder)
    digests = manifest["sha256"]
    intact = digests == {name: sha256(folder / name) for name in digests}
    return manifest["inputs"] if intact and (folder / SUMMARY).exists() else None
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _line(row: Mapping[str, Any]) -> bytes:
  content = json.dumps(row, ensure_ascii=False, allow_nan=False)
  return content.encode("utf-8", "backslashreplace") + b"\n"  # of half a surrogate pair
