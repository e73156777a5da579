"""Exports that are killed or meet: the target is the old folder or the new one."""

import subprocess
import sys

import pytest

from raft_jax import errors
from raft_jax.hf import export_folder

EXPORT = """
import os, pathlib, sys
from raft_jax.hf import export_folder

target, calls = pathlib.Path(sys.argv[1]), int(sys.argv[2])
names = "mkdir", "rename", "rmdir"
left = [calls]


def counted(call):
  def run(*args, **options):
    left[0] -= 1
    if left[0] < 0:
      os._exit(9)
    return call(*args, **options)

  return run


for name in names:
  setattr(os, name, counted(getattr(os, name)))
with export_folder.replacing(
  target, 0, overwrite=True, ours=lambda folder: True
) as folder:
  (folder / "weights").write_text("new")
"""
"""Exports into a folder; the process dies before call n that changes a folder."""


def replacing(target, need=0):
  return export_folder.replacing(target, need, overwrite=True, ours=lambda _: True)


def export(target, text):
  with replacing(target) as temporary:
    (temporary / "weights").write_text(text)


def killed(target, calls):
  return subprocess.run(
    [sys.executable, "-c", EXPORT, str(target), str(calls)], check=False
  ).returncode


def test_an_export_that_is_killed_anywhere_loses_nothing(tmp_path):
  found = []
  for calls in range(10):
    target = tmp_path / str(calls) / "export"
    target.mkdir(parents=True)
    (target / "weights").write_text("old")
    status = killed(target, calls)
    # A second try that fails must not lose the first export either.
    with (
      pytest.raises(errors.UserError, match="the export needs"),
      replacing(target, need=2**62),
    ):
      pass
    found.append((target / "weights").read_text())
    assert [path.name for path in target.parent.iterdir()] == ["export"]
    assert [path.name for path in target.iterdir()] == ["weights"]
    export(target, "third")
    assert (target / "weights").read_text() == "third"
    if status == 0:
      break
  assert status == 0
  assert found == sorted(found, reverse=True)  # old ones, then new ones
  assert {"old", "new"} == set(found)


def test_a_second_export_waits_for_the_first(tmp_path):
  target = tmp_path / "export"
  with replacing(target) as temporary:
    (temporary / "weights").write_text("first")
    with pytest.raises(errors.TryAgainError, match="another process exports into it"):
      export(target, "second")
  assert (target / "weights").read_text() == "first"
  assert [path.name for path in target.iterdir()] == ["weights"]
