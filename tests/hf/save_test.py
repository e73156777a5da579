"""Export: what is written, noticed and refused."""

import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from raft_jax import errors
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from tests.helpers import tiny_llama


def test_save_needs_contiguous_tensors_no_longer(complete, tmp_path):
  """safetensors writes the buffer of a strided view as it lies in memory."""
  config = hf_load.load_config(str(complete))
  params = jax.tree.map(np.asarray, hf_load.load_params(str(complete), config))
  params["embed"] = np.asfortranarray(params["embed"])
  params["layers"]["q"] = np.ascontiguousarray(params["layers"]["q"].T).T
  assert not params["layers"]["q"][0].flags.c_contiguous
  hf_save.save(tmp_path / "out", params, config, str(complete), card="")
  tiny_llama.assert_same(params, tiny_llama.theirs(tmp_path / "out"))


def test_save_notices_wrong_bytes(complete, tmp_path, monkeypatch):
  config = hf_load.load_config(str(complete))
  params = hf_load.load_params(str(complete), config)
  write = safetensors.numpy.save_file

  def flip(tensors, path, metadata):
    write(tensors, path, metadata)
    data = bytearray(pathlib.Path(path).read_bytes())
    data[-5] ^= 1
    pathlib.Path(path).write_bytes(data)

  monkeypatch.setattr(safetensors.numpy, "save_file", flip)
  with pytest.raises(OSError, match="differs from what was written"):
    hf_save.save(tmp_path / "out", params, config, str(complete), card="")
  assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_save_refuses_what_is_there(complete, tmp_path):
  config = hf_load.load_config(str(complete))
  params = hf_load.load_params(str(complete), config)

  def save(**options):
    hf_save.save(tmp_path / "out", params, config, str(complete), card="new", **options)

  (tmp_path / "out").mkdir()
  (tmp_path / "out/thesis.txt").write_text("mine")
  for options in ({}, {"overwrite": True}):
    with pytest.raises(errors.UserError, match="not an earlier export"):
      save(**options)
  (tmp_path / "out/thesis.txt").unlink()
  save()
  with pytest.raises(errors.UserError, match="holds an earlier export"):
    save()
  (tmp_path / "out/README.md").write_text("old")
  save(overwrite=True)
  assert (tmp_path / "out/README.md").read_text() == "new"
  assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
  (tmp_path / "link").symlink_to(tmp_path / "out")
  with pytest.raises(errors.UserError, match="is not a folder"):
    hf_save.save(
      tmp_path / "link", params, config, str(complete), card="", overwrite=True
    )


def test_save_refuses_non_finite(complete, tmp_path):
  config = hf_load.load_config(str(complete))
  params = hf_load.load_params(str(complete), config)
  params["layers"]["up"] = params["layers"]["up"].at[1, 2, 3].set(np.nan)
  with pytest.raises(
    errors.UserError, match="layers/up has values that are not finite"
  ):
    hf_save.save(tmp_path / "out", params, config, str(complete), card="")
  assert not (tmp_path / "out").exists()


def test_save_needs_room_before_it_writes(complete, tmp_path, monkeypatch):
  config = hf_load.load_config(str(complete))
  params = hf_load.load_params(str(complete), config)
  need = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  free = types.SimpleNamespace(free=need - 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
  written = []
  monkeypatch.setattr(safetensors.numpy, "save_file", lambda *a, **k: written.append(a))
  with pytest.raises(errors.UserError, match=rf"needs {need:,} bytes and {need - 1:,}"):
    hf_save.save(tmp_path / "out", params, config, str(complete), card="")
  assert not written
  assert {path.name for path in tmp_path.iterdir()} == {"source"}
