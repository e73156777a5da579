"""Copies of a folder in a real S3 server, and in a folder."""

import contextlib
import json
import pathlib
import time

import obstore
import pytest

from raft_jax import errors
from raft_jax.storage import mirror, sealed_folder
from tests.helpers import file_trees, s3_server


@pytest.fixture(scope="module")
def s3():
  with s3_server.running():
    yield f"s3://{s3_server.BUCKET}"


@pytest.fixture
def url(s3, request):
  return f"{s3}/{request.node.name}"


def _read(folder: pathlib.Path) -> dict[str, str]:
  """The files of a folder that a mirror keeps."""
  return {
    name: content.decode()
    for name, content in file_trees.read(folder).items()
    if not name.startswith(".mirror")
  }


def _copy(folder: pathlib.Path, url: str) -> None:
  with mirror.kept(folder, url):
    pass


RUN = {
  "config/train.yaml": "method: raft\n",
  "metrics.jsonl": '{"step": 1}\n',
  "checkpoints/8/state/d": "arrays",
  "checkpoints/8/seal.json": "{}",
  "refined/MANIFEST.json": "{}",
  "refined/shard-0": "records",
}


@pytest.mark.parametrize("kind", ["s3", "folder"])
def test_another_machine_continues_from_the_copy(tmp_path, url, kind):
  if kind == "folder":
    url = f"file://{tmp_path / 'store'}"
  first, second = tmp_path / "first", tmp_path / "second"
  with mirror.kept(first, url):
    file_trees.write(first, RUN)
    file_trees.write(
      first, {".train.lock": "", ".tmp-1-x": "half", "a/b.holder": "pid 1"}
    )
    file_trees.write(first, {"checkpoints/9.orbax-checkpoint-tmp/d": "half"})
  with mirror.kept(second, url):
    assert _read(second) == RUN
    (second / "metrics.jsonl").write_text("two lines")
    (second / "checkpoints/8/seal.json").unlink()
    (second / "checkpoints/8/state/d").unlink()
  third = tmp_path / "third"
  _copy(third, url)
  assert _read(third) == {
    **{name: text for name, text in RUN.items() if not name.startswith("checkpoints")},
    "metrics.jsonl": "two lines",
  }


def test_copies_go_on_while_the_run_does(tmp_path, url, monkeypatch):
  monkeypatch.setattr(mirror, "EVERY_S", 0.05)
  store = mirror.open_store(url)
  with mirror.kept(tmp_path, url):
    file_trees.write(tmp_path, RUN)
    deadline = time.monotonic() + 20
    while set(mirror.store_files(store)) != set(RUN):
      assert time.monotonic() < deadline
      time.sleep(0.05)
    claim = json.loads(bytes(obstore.get(store, mirror.STATE).bytes()))
    assert claim["held"]
  assert not json.loads(bytes(obstore.get(store, mirror.STATE).bytes()))["held"]


class _Recorder:
  """Passes calls on to obstore and notes what they change."""

  def __init__(self, monkeypatch, fails_at: int | None = None):
    self.calls: list[tuple[str, str]] = []
    for name in ("put", "delete"):
      monkeypatch.setattr(obstore, name, self._noting(name, getattr(obstore, name)))
    self._fails_at = fails_at

  def _noting(self, name, function):
    def call(store, path, *args, **kwargs):
      if path != mirror.STATE:
        if len(self.calls) == self._fails_at:
          raise OSError("the network is down")
        self.calls.append((name, path))
      return function(store, path, *args, **kwargs)

    return call


def test_seals_are_removed_first_and_written_last(tmp_path, url, monkeypatch):
  _copy(file_trees.write(tmp_path, RUN), url)
  file_trees.write(
    tmp_path, {"refined/shard-0": "other", "refined/MANIFEST.json": "{1}"}
  )
  for name in ("seal.json", "state/d"):
    (tmp_path / "checkpoints/8" / name).unlink()
  recorder = _Recorder(monkeypatch)
  _copy(tmp_path, url)
  seals = [path.rsplit("/", 1)[-1] in mirror.SEALS for _, path in recorder.calls]
  assert [name for name, _ in recorder.calls] == ["delete"] * 3 + ["put"] * 2
  assert seals == [True, True, False, False, True]


@pytest.mark.parametrize("done", range(7))
def test_a_copy_cut_off_at_any_call_is_a_folder_that_a_killed_run_leaves(
  tmp_path, url, monkeypatch, done
):
  """No manifest beside other shards than its own, no step without all of its files."""
  _copy(file_trees.write(tmp_path / "run", RUN), url)
  later = {
    "checkpoints/16/state/d": "later arrays",
    "checkpoints/16/seal.json": "{}",
    "metrics.jsonl": '{"step": 1}\n{"step": 2}\n',
    "refined/MANIFEST.json": "{later}",
    "refined/shard-0": "later records",
  }
  file_trees.write(tmp_path / "run", later)
  store = mirror.open_store(url)
  with monkeypatch.context() as patched:
    _Recorder(patched, fails_at=done)
    fails = pytest.raises(OSError, match="network is down")
    with fails if done < 6 else contextlib.nullcontext():
      mirror.push(store, tmp_path / "run", mirror.read_known(tmp_path / "run", url))
  mirror.pull(store, tmp_path / "other", url)
  found = _read(tmp_path / "other")
  if "refined/MANIFEST.json" in found:
    whole = RUN if found["refined/MANIFEST.json"] == "{}" else later
    assert found["refined/shard-0"] == whole["refined/shard-0"]
  for step in ("8", "16"):
    names = {name for name in found if name.startswith(f"checkpoints/{step}/")}
    assert len(names) in (0, 2)
  assert "checkpoints/8/seal.json" in found


def test_two_machines_cannot_copy_at_once(tmp_path, url, monkeypatch):
  monkeypatch.setattr(mirror, "EVERY_S", 0.05)
  monkeypatch.setattr(mirror, "POLL_S", 0.3)
  with mirror.kept(file_trees.write(tmp_path / "one", RUN), url):
    with pytest.raises(errors.UserError, match=r"last written by .*one, not from"):
      _copy(file_trees.write(tmp_path / "two", RUN), url)
    # An empty folder could continue, but the first machine is at work.
    with pytest.raises(errors.TryAgainError, match=r"is in use by .*one"):
      _copy(tmp_path / "empty", url)


def test_a_lost_machine_is_replaced_and_told_so(tmp_path, url, monkeypatch):
  monkeypatch.setattr(mirror, "EXPIRES_S", 0.0)
  first = mirror.kept(file_trees.write(tmp_path / "one", RUN), url)
  first.__enter__()
  _copy(tmp_path / "two", url)
  (tmp_path / "one/metrics.jsonl").write_text("of a machine that was cut off")
  with pytest.raises(errors.TryAgainError, match="another machine has taken over"):
    first.__exit__(None, None, None)
  store = mirror.open_store(url)
  assert "metrics.jsonl" not in mirror.store_files(store)


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"writer": "x", "time": "y"}'])
def test_a_claim_that_cannot_be_read_is_replaced(tmp_path, url, damaged):
  _copy(file_trees.write(tmp_path / "one", RUN), url)
  obstore.put(mirror.open_store(url), mirror.STATE, damaged)
  _copy(tmp_path / "two", url)
  assert _read(tmp_path / "two") == RUN
  obstore.put(mirror.open_store(url), mirror.STATE, damaged)
  with pytest.raises(errors.UserError, match="last written by someone, not from"):
    _copy(tmp_path / "one", url)


def test_a_failed_last_copy_is_an_error_and_the_next_one_mends_it(
  tmp_path, url, monkeypatch
):
  kept = mirror.kept(file_trees.write(tmp_path / "run", RUN), url)
  kept.__enter__()
  with monkeypatch.context() as patched:
    _Recorder(patched, fails_at=2)
    with pytest.raises(errors.TryAgainError, match=r"not up to date .*has everything"):
      kept.__exit__(None, None, None)
  _copy(tmp_path / "run", url)
  _copy(tmp_path / "other", url)
  assert _read(tmp_path / "other") == RUN


def test_stores_that_cannot_be_used_are_one_line(tmp_path, s3, monkeypatch):
  with pytest.raises(errors.TryAgainError, match=r"mirror: s3://nobucket/x: .*404"):
    _copy(tmp_path, "s3://nobucket/x")
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
  with pytest.raises(errors.TryAgainError) as caught:
    _copy(tmp_path, f"{s3}/x")
  assert "\n" not in str(caught.value)
  assert "planted-secret" not in str(caught.value)
  assert not sealed_folder.inputs(tmp_path)


@pytest.mark.parametrize("fetched", [0, 2, 5])
def test_a_fetch_that_was_cut_off_is_done_again(tmp_path, url, monkeypatch, fetched):
  """Else a run would begin with a part of the files, and copy that."""
  _copy(file_trees.write(tmp_path / "run", RUN), url)
  bars = iter([None] * fetched)

  def stop(*args):
    if next(bars, "end"):
      raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(mirror.interrupts, "check", stop)
    with pytest.raises(KeyboardInterrupt):
      _copy(tmp_path / "other", url)
  assert len(_read(tmp_path / "other")) == fetched
  with mirror.kept(tmp_path / "other", url):
    assert _read(tmp_path / "other") == RUN


def test_names_that_leave_the_folder_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(mirror, "store_files", lambda store: ["a/../../x"])
  with pytest.raises(errors.UserError, match="which is no file's name"):
    mirror.pull(None, tmp_path, "s3://b/x")
