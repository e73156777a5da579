"""Sealed shards: whole after a kill, refused when damaged."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from raft_jax import errors
from raft_jax.storage import shards


def seal(folder: pathlib.Path, n: int = 10, per_shard: int = 4) -> shards.Manifest:
  data = [b"record %d " % i for i in range(n)]
  return shards.write_shards(
    folder, data, records_per_shard=per_shard, meta={"config": "c"}
  )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def broken(folder: pathlib.Path) -> str:
  with pytest.raises(errors.UserError) as caught:
    shards.read_shards(folder)
  assert "refine" in str(caught.value)  # the remedy
  return str(caught.value)


def test_shards_round_trip(tmp_path):
  manifest = seal(tmp_path)
  assert [file.records for file in manifest.files] == [4, 4, 2]
  assert shards.read_manifest(tmp_path) == manifest
  assert shards.read_shards(tmp_path) == [b"record %d " % i for i in range(10)]
  tree = json.loads((tmp_path / "MANIFEST.json").read_text())
  assert tree["version"] == 1
  assert tree["records"] == 10
  assert tree["meta"] == {"config": "c"}
  assert set(tree["files"][0]) == {"name", "records", "sha256", "bytes"}


def test_shards_are_a_pure_function_of_the_records(tmp_path):
  seal(tmp_path / "a")
  before = contents(tmp_path / "a")
  seal(tmp_path / "b", n=40, per_shard=3)  # more, and other, files to begin with
  seal(tmp_path / "b")
  assert contents(tmp_path / "b") == before


def test_leftovers_of_a_kill_are_ignored_and_removed(tmp_path):
  manifest = seal(tmp_path)
  (tmp_path / ".tmp-12-shard-00000-of-00003.array_record").write_bytes(b"half")
  assert shards.read_manifest(tmp_path) == manifest
  seal(tmp_path)
  assert len(contents(tmp_path)) == 4


KILLED = """
import os, signal, sys
from raft_jax.storage import shards
real, calls = os.replace, 0
def replace(*paths):
  global calls
  calls += 1
  if calls == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
  real(*paths)
os.replace = replace
data = [b"record %d " % i for i in range(10)]
shards.write_shards(sys.argv[1], data, records_per_shard=4, meta={"config": "c"})
"""


@pytest.mark.parametrize("rename", [1, 3, 4])  # first shard, last shard, manifest
def test_kill_before_each_rename(tmp_path, rename):
  seal(tmp_path / "whole")
  seal(tmp_path / "killed", n=6)  # a finished folder that is being rewritten
  done = subprocess.run(
    [sys.executable, "-c", KILLED, tmp_path / "killed", str(rename)], check=False
  )
  assert done.returncode == -signal.SIGKILL
  assert "incomplete" in broken(tmp_path / "killed")
  seal(tmp_path / "killed")
  assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def shard(folder: pathlib.Path) -> pathlib.Path:
  return folder / "shard-00001-of-00003.array_record"


@pytest.mark.parametrize("size", [0, 100, 65536, 131071])
def test_truncated_shard_is_refused(tmp_path, size):
  seal(tmp_path)
  os.truncate(shard(tmp_path), size)
  message = broken(tmp_path)
  assert message.startswith(f"{shard(tmp_path)}: damaged")
  assert f"expected bytes 131072, got {size}" in message


def test_flipped_bit_is_refused(tmp_path):
  seal(tmp_path)
  data = bytearray(shard(tmp_path).read_bytes())
  data[-1] ^= 1  # the reader alone does not see this: it is padding
  shard(tmp_path).write_bytes(data)
  assert "expected sha256 " in broken(tmp_path)


def test_truncation_that_the_reader_takes_for_empty(tmp_path):
  """A shard cut at an inner 64 KiB boundary, with a manifest made to agree."""
  data = [os.urandom(1000) for _ in range(400)]
  shards.write_shards(tmp_path, data, records_per_shard=400, meta={})
  path = tmp_path / "shard-00000-of-00001.array_record"
  os.truncate(path, 2 * 65536)
  reader = shards.array_record_module.ArrayRecordReader(str(path))
  assert reader.num_records() == 0  # why the bare reader is never trusted
  tree = json.loads((tmp_path / "MANIFEST.json").read_text())
  tree["files"][0]["bytes"] = path.stat().st_size
  tree["files"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
  (tmp_path / "MANIFEST.json").write_text(json.dumps(tree))
  assert broken(tmp_path).startswith(f"{path}: damaged")
  # A whole file with too few records is the same fault.
  shards.write_shards(tmp_path / "b", data[:399], records_per_shard=400, meta={})
  other = tmp_path / "b/MANIFEST.json"
  other.write_text(other.read_text().replace("399", "400"))
  assert "expected 400 records, got 399" in broken(tmp_path / "b")


def test_missing_shard_and_damaged_manifest(tmp_path):
  seal(tmp_path)
  shard(tmp_path).unlink()
  assert "missing" in broken(tmp_path)
  manifest = tmp_path / "MANIFEST.json"
  good = json.loads(manifest.read_text())
  evil = [{**good["files"][0], "name": "../x"}, *good["files"][1:]]
  for tree in ([], {}, good | {"version": 2}, good | {"records": 9}, {"files": [3]}):
    manifest.write_text(json.dumps(tree))
    assert f"{manifest}: damaged" in broken(tmp_path)
  manifest.write_text(json.dumps(good | {"files": evil}))
  assert "a file is no shard" in broken(tmp_path)
  manifest.write_text(json.dumps(good)[:50])
  assert f"{manifest}: damaged" in broken(tmp_path)


def test_full_disk_names_file_and_space(tmp_path, monkeypatch):
  # /dev/full is the kernel's always-full device: the writer meets a real ENOSPC.
  real = shards.array_record_module.ArrayRecordWriter
  monkeypatch.setattr(
    shards.array_record_module,
    "ArrayRecordWriter",
    lambda path, options: real("/dev/full", options),
  )
  with pytest.raises(errors.UserError, match=r"No space left.*MB are free") as caught:
    seal(tmp_path)
  assert "shard-00000" in str(caught.value)
  assert contents(tmp_path) == {}


def test_a_shard_that_reads_back_differently_is_refused(tmp_path, monkeypatch):
  class Forgetful(shards.array_record_module.ArrayRecordWriter):
    def write(self, record):
      if b"3" not in record:
        super().write(record)

  monkeypatch.setattr(shards.array_record_module, "ArrayRecordWriter", Forgetful)
  with pytest.raises(errors.UserError, match=r"shard-00000.*reads back differently"):
    seal(tmp_path)
  assert contents(tmp_path) == {}


def test_nothing_to_write_is_a_programming_error(tmp_path):
  with pytest.raises(ValueError, match="needs records"):
    shards.write_shards(tmp_path, [], records_per_shard=1, meta={})


@pytest.mark.parametrize(
  "changed", [{"files": [], "records": 0}, {"meta": 3}, {"meta": None}]
)
def test_a_manifest_without_shards_or_meta_is_refused(tmp_path, changed):
  seal(tmp_path)
  path = tmp_path / "MANIFEST.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changed))
  assert broken(tmp_path).startswith(f"{path}: damaged")
