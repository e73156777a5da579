"""The log of a run: what survives a restart, and TensorBoard, which may fail."""

import contextlib
import json
import math
import pathlib
import struct
import warnings

import numpy as np
import pytest
import tensorboardX
from tensorboardX.proto import event_pb2

from raft_jax.training import metrics_log


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_says_when_where_and_what(tmp_path):
  log = metrics_log.Log(tmp_path, resume_step=0)
  log.write(1, {"loss_sft": 2.5}, split="validation")
  log.close()
  (row,) = rows(tmp_path / "metrics.jsonl")
  assert set(row) == {"step", "time_utc", "wall_s", "split", "values"}
  assert (row["step"], row["split"], row["values"]) == (
    1,
    "validation",
    {"loss_sft": 2.5},
  )
  assert row["time_utc"].endswith("+00:00")
  assert 0 <= row["wall_s"] < 60


def test_what_is_not_finite_becomes_null(tmp_path):
  log = metrics_log.Log(tmp_path, resume_step=0)
  log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
  log.close()
  (row,) = rows(tmp_path / "metrics.jsonl")
  assert row["values"] == {"a": None, "b": None, "c": None, "d": 0.0}


def test_a_row_is_on_disk_before_the_log_is_closed(tmp_path):
  log = metrics_log.Log(tmp_path, resume_step=0)
  log.write(1, {"a": 1.0})
  assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
  log.close()


def test_a_log_that_goes_on_drops_later_and_torn_rows(tmp_path):
  """Steps 3 and 4 came after the checkpoint; the last row was cut by a power loss."""
  path = tmp_path / "metrics.jsonl"
  kept = ['{"step": 1, "values": {}}\n', '{"step": 2, "values": {"a": 0.1}}\n']
  lost = [
    '{"step": 3, "values": {}}\n',
    '{"step": 4, "values": {}}\n',
    '{"step": 2, "v',
  ]
  path.write_text("".join([*kept, "[]\n", "{}\n", *lost]))
  log = metrics_log.Log(tmp_path, resume_step=2)
  assert path.read_text() == "".join(kept)
  log.write(3, {"a": 1.0})
  log.close()
  assert [row["step"] for row in rows(path)] == [1, 2, 3]


def test_nothing_to_keep_is_no_fault(tmp_path):
  metrics_log.keep_until(tmp_path / "metrics.jsonl", 5)
  assert list(tmp_path.iterdir()) == []


def test_repeated_ngrams_by_hand():
  assert metrics_log.repeated_ngrams([]) == 0
  assert metrics_log.repeated_ngrams([1, 1, 1]) == 0  # three tokens hold no 4-gram
  assert metrics_log.repeated_ngrams([1, 2, 3, 4, 5]) == 0
  # 1111, 1111, 1111: two of the three occurred before.
  assert metrics_log.repeated_ngrams([1] * 6) == pytest.approx(2 / 3)
  # 12, 21, 12, 23: one of four.
  assert metrics_log.repeated_ngrams([1, 2, 1, 2, 3], n=2) == pytest.approx(1 / 4)


def test_rollout_health_counts_real_tokens_and_leaks():
  # Row 0: one 4-gram of two is new; row 1 has four tokens, and padding behind them
  # that would repeat; row 2 is empty. Mean of 1/2, 0, 0.
  tokens_BR = np.array([[7, 7, 7, 7, 7, 0, 0, 0, 0], [1, 2, 3, 4, *[0] * 5], [0] * 9])
  health = metrics_log.rollout_health(
    tokens_BR,
    np.array([5, 4, 0]),
    ["Based on The Reference knowledge, no.", "A plain answer.", ""],
    ("the reference knowledge", "the answer to this question"),
  )
  assert health == {
    "rollout_repeated_4gram": pytest.approx(1 / 6),
    "rollout_leaked": pytest.approx(1 / 3),
  }
  nothing = metrics_log.rollout_health(tokens_BR, np.zeros(3, int), [""] * 3, ())
  assert nothing == {"rollout_repeated_4gram": 0.0, "rollout_leaked": 0.0}


def crc32c(data):
  """CRC-32C by the bit (RFC 3720, B.4: polynomial 0x1EDC6F41, reflected)."""
  register = 0xFFFFFFFF
  for byte in data:
    register ^= byte
    for _ in range(8):
      register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
  return register ^ 0xFFFFFFFF


def masked(data):
  """As TFRecord files hold it: rotated right by 15 bits, plus a constant."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder):
  """Reads event files: length, its CRC, bytes, their CRC, and so on."""
  for path in sorted(folder.iterdir()):
    assert "tfevents" in path.name
    raw, start = path.read_bytes(), 0
    while start < len(raw):
      header = raw[start : start + 8]
      (length,) = struct.unpack("<Q", header)
      body = raw[start + 12 : start + 12 + length]
      assert raw[start + 8 : start + 12] == struct.pack("<I", masked(header))
      start += 16 + length
      assert raw[start - 4 : start] == struct.pack("<I", masked(body))
      yield event_pb2.Event.FromString(body)


def test_tensorboard_gets_every_row_also_of_a_run_that_goes_on(tmp_path):
  assert crc32c(b"123456789") == 0xE3069283  # the published check value
  for step in (1, 2):
    log = metrics_log.Log(tmp_path, resume_step=step - 1, tracked=["tensorboard"])
    log.write(step, {"loss_sft": 2.0 * step, "kd_at_0": math.nan})
    log.close()
  first, one, second, two = events(tmp_path / "tensorboard")
  assert first.file_version == second.file_version == "brain.Event:2"
  for step, event in ((1, one), (2, two)):
    assert event.step == step
    sft, kd = event.summary.value
    assert (sft.tag, sft.simple_value) == ("train/loss_sft", 2.0 * step)
    assert kd.tag == "train/kd_at_0"
    assert math.isnan(kd.simple_value)


def test_without_tensorboard_there_is_no_folder(tmp_path):
  metrics_log.Log(tmp_path, resume_step=0).close()
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@contextlib.contextmanager
def one_warning(says):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    yield
  (warning,) = caught
  assert says in str(warning.message)


def test_tensorboard_that_cannot_start_is_one_warning(tmp_path):
  (tmp_path / "tensorboard").write_text("a file where the folder should be")
  with one_warning("no TensorBoard"):
    log = metrics_log.Log(tmp_path, resume_step=0, tracked=["tensorboard"])
    for step in (1, 2):
      log.write(step, {"a": 1.0})
    log.close()
  assert len(rows(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
def test_tensorboard_on_a_full_disk_is_one_warning_and_the_run_goes_on(tmp_path):
  log = metrics_log.Log(tmp_path, resume_step=0, tracked=["tensorboard"])
  log.write(1, {"a": 1.0})
  # The same writer, with its file on a device that is always full.
  board = log.trackers.feeds[0].tracker.summarise.__self__
  board._records.close()
  board._records = tensorboardX.RecordWriter("/dev/full")
  with one_warning("TensorBoard is off"):
    for step in range(2, 40):
      log.write(step, {"a": 1.0})
    log.close()
  assert len(rows(tmp_path / "metrics.jsonl")) == 39
