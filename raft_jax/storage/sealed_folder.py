"""Folders of JSONL files and a summary, sealed by a manifest that is written last.

Without its manifest, or where it disagrees with the files, a folder is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from raft_jax.storage import atomic

MANIFEST = "MANIFEST.json"


def write(
  folder: pathlib.Path,
  files: Mapping[str, Iterable[Mapping[str, Any]]],
  summary: Mapping[str, Any],
  seal: Mapping[str, Any] | None,
) -> None:
  """Summary first, then each file's rows, and last the manifest.

  Args:
    files: rows by name; `train` becomes train.jsonl.
    seal: what the manifest says beside the files' digests; `inputs` is the digest of
      all that they depend on. None leaves the folder unfinished.
  """
  (folder / MANIFEST).unlink(missing_ok=True)
  for stale in folder.glob(f"{atomic.TEMPORARY}*"):
    stale.unlink()
  with atomic.replacing(folder / "summary.json") as temporary:
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
  for name, rows in files.items():
    with atomic.replacing(folder / f"{name}.jsonl") as temporary:
      temporary.write_bytes(b"".join(map(_line, rows)))
  if seal is not None:
    sealed = {**seal, "sha256": {f"{n}.jsonl": _sha256(folder, n) for n in files}}
    with atomic.replacing(folder / MANIFEST) as temporary:
      temporary.write_text(json.dumps(sealed, indent=2, sort_keys=True) + "\n")


def inputs(folder: pathlib.Path) -> str | None:
  """What a finished folder was made of; None if it is unfinished or damaged."""
  try:
    sealed = json.loads((folder / MANIFEST).read_bytes())
    names = [name.removesuffix(".jsonl") for name in sealed["sha256"]]
    whole = sealed["sha256"] == {f"{n}.jsonl": _sha256(folder, n) for n in names}
    return sealed["inputs"] if whole and (folder / "summary.json").exists() else None
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _line(row: Mapping[str, Any]) -> bytes:
  content = json.dumps(row, ensure_ascii=False, allow_nan=False)
  return content.encode("utf-8", "backslashreplace") + b"\n"  # of half a surrogate pair


def _sha256(folder: pathlib.Path, name: str) -> str:
  return hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
