"""Whether the fast tests notice a wrong sign, shift, mask or seed.

`python -m tests.benchmarks.planted_faults` copies the repository, plants one arithmetic
fault at a time, runs the tests of that place, and prints a table. Words after it choose
faults by their file or kind. If no test notices a fault, it ends with status 1. All of
them take about 25 minutes on two cores.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import yaml
from rich import console, table

ROOT = pathlib.Path(__file__).parents[2]


class Fault(NamedTuple):
  """One wrong piece of code.

  Attributes:
    kind: what is wrong.
    file: in `raft_jax`.
    right, wrong: the text that stands there once, and what is put in its place.
    tests: files in `tests`.
  """

  kind: str
  file: str
  right: str
  wrong: str
  tests: tuple[str, ...]


def read_faults() -> list[Fault]:
  """The faults of `planted_faults.yaml`."""
  groups = yaml.safe_load((pathlib.Path(__file__).with_suffix(".yaml")).read_text())
  return [
    Fault(file=group["file"], tests=tuple(group["tests"]), **fault)
    for group in groups
    for fault in group["faults"]
  ]


def plant(copy: pathlib.Path, fault: Fault) -> tuple[str, float]:
  """What the tests say about a fault, and how long they took."""
  path = copy / "raft_jax" / fault.file
  text = path.read_text()
  if text.count(fault.right) != 1:
    return f"stands there {text.count(fault.right)} times", 0.0
  path.write_text(text.replace(fault.right, fault.wrong))
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    + [f"tests/{name}" for name in fault.tests],
    cwd=copy,
    capture_output=True,
    text=True,
    check=False,
  )
  path.write_text(text)
  failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
  noticed = failed[0].split("::", 1)[1].split(" - ")[0] if failed else "NOT NOTICED"
  return noticed, time.monotonic() - began


def main(words: Sequence[str]) -> int:
  chosen = [
    fault
    for fault in read_faults()
    if not words or any(word in (fault.kind, fault.file) for word in words)
  ]
  rows = table.Table("fault", "file", "instead of", "noticed by", "s")
  missed = 0
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "repository"
    tracked = subprocess.run(
      ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
      (copy / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, copy / name)
    for number, fault in enumerate(chosen, 1):
      noticed, seconds = plant(copy, fault)
      missed += " " in noticed and "[" not in noticed
      print(
        f"{number}/{len(chosen)} {fault.kind} in {fault.file}: {noticed}", flush=True
      )
      rows.add_row(
        fault.kind, fault.file, " ".join(fault.right.split()), noticed, f"{seconds:.0f}"
      )
  console.Console(width=160, markup=False).print(rows)
  print(f"{len(chosen) - missed} of {len(chosen)} faults were noticed")
  return 1 if missed else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
