"""A run whose machine is taken away continues on another one from an object store."""

import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import obstore
import pytest

from raft_jax.storage import mirror
from tests.helpers import s3_server, short_run, tiny_run


@pytest.mark.slow
def test_a_preempted_run_continues_elsewhere_bit_for_bit(
  tmp_path: pathlib.Path, smollm: str, law: pathlib.Path
):
  source = str(tiny_run.save_model(tmp_path / "model", smollm))
  whole = tmp_path / "whole"
  short_run.write_refined(whole, law)
  shutil.copytree(whole, tmp_path / "one")
  path, _ = short_run.make_config(whole, source, law)
  with s3_server.running():
    url = f"s3://{s3_server.BUCKET}/run"
    store = mirror.open_store(url)
    settings = (f"mirror={url}", f"output={tmp_path / 'one'}")
    process = short_run.run(path, *settings)
    short_run.wait_for_step(process, tmp_path / "one", 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == os.EX_TEMPFAIL, said
    stopped_at = max(
      int(name.split("/")[1])
      for name in mirror.store_files(store)
      if name.endswith("/seal.json")
    )
    assert 3 <= stopped_at < short_run.STEPS
    shutil.rmtree(tmp_path / "one")

    settings = (f"mirror={url}", f"output={tmp_path / 'two'}")
    process = short_run.run(path, *settings)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"resuming after step {stopped_at} of {short_run.STEPS}" in said
    shards = [name for name in mirror.store_files(store) if "shard-" in name]
    for name in shards:
      content = (whole / name).read_bytes()
      assert bytes(obstore.get(store, name).bytes()) == content
    assert shards
    mirror.pull(store, tmp_path / "three", url)

  process = short_run.run(path)
  said, _ = process.communicate(timeout=300)
  assert process.returncode == 0, said
  expected = short_run.whole_state(whole, short_run.STEPS)
  for output in (tmp_path / "two", tmp_path / "three"):
    found = short_run.whole_state(output, short_run.STEPS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert short_run.rows(output)[-2:] == short_run.rows(whole)[-2:]
