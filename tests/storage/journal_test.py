"""The journal keeps every finished call, whatever happens to process or file."""

import contextlib
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import zlib

import pytest

from raft_jax import errors
from raft_jax.storage import journal


def _fill(path: pathlib.Path, count: int) -> None:
  with journal.open_journal(path) as book:
    for i in range(count):
      book.append(
        {journal.content_key(call=i): {"text": f"answer {i} é\n\u2028", "n": i}}
      )


def test_what_was_appended_is_there_when_reopened(tmp_path):
  path = tmp_path / "deep" / "journal.jsonl"
  _fill(path, 3)
  with journal.open_journal(path) as book:
    assert book.dropped == 0
    assert book.calls == {
      journal.content_key(call=i): {"text": f"answer {i} é\n\u2028", "n": i}
      for i in range(3)
    }
  assert not path.with_name("journal.jsonl.holder").exists()


def test_line_holds_the_crc32_of_its_canonical_key_and_value(tmp_path):
  path = tmp_path / "journal.jsonl"
  with journal.open_journal(path) as book:
    book.append({"k": {"b": 1, "a": None}})
  # Written by hand from the module's docstring, not with the module's own functions.
  body = b'{"key":"k","value":{"a":null,"b":1}}'
  assert path.read_bytes() == (
    b'{"crc32":"%08x",' % zlib.crc32(body) + body[1:] + b"\n"
  )


def test_key_depends_on_every_part_and_not_on_their_order():
  # sha256 of {"role":"rewrite","seed":1} by coreutils' sha256sum.
  golden = "817371b1a04ec22219e084f5b3529be8ca35afacdf1a587bea7b123a0d718b55"
  assert journal.content_key(seed=1, role="rewrite") == golden
  assert journal.content_key(seed=2, role="rewrite") != golden
  with pytest.raises(ValueError):
    journal.content_key(temperature=float("nan"))


def test_seed_fits_31_bits_and_follows_the_key():
  seeds = {journal.seed_from(journal.content_key(call=i)) for i in range(1000)}
  assert len(seeds) == 1000
  assert max(seeds) < 2**31
  assert max(seeds) > 2**30


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_torn_last_line_is_dropped_and_counted(tmp_path, cut, caplog):
  path = tmp_path / "journal.jsonl"
  _fill(path, 3)
  whole = path.read_bytes()
  path.write_bytes(whole[:-cut])
  with journal.open_journal(path) as book:
    assert book.dropped == 1
    assert len(book.calls) == 2
    book.append({"new": 1})
  assert "dropped 1 torn line" in caplog.text
  with journal.open_journal(path) as book:
    assert book.dropped == 0
    assert len(book.calls) == 3


@pytest.mark.parametrize("tail", [b"\0" * 100, b"{\n", b"\xff\xfe\n", b'{"key":"a"}\n'])
def test_garbage_tail_is_dropped(tmp_path, tail):
  path = tmp_path / "journal.jsonl"
  _fill(path, 2)
  good = path.read_bytes()
  path.write_bytes(good + tail)
  with journal.open_journal(path) as book:
    assert (book.dropped, len(book.calls)) == (1, 2)
  assert path.read_bytes() == good


def test_every_flipped_byte_of_a_middle_line_is_an_error_naming_the_line(tmp_path):
  path = tmp_path / "journal.jsonl"
  _fill(path, 3)
  lines = path.read_bytes().splitlines(keepends=True)
  for place in range(0, len(lines[1]) - 1, 7):
    damaged = bytearray(lines[1])
    damaged[place] ^= 1
    path.write_bytes(lines[0] + bytes(damaged) + lines[2])
    with (
      pytest.raises(errors.UserError, match=r"journal\.jsonl:2: damaged line; delete"),
      journal.open_journal(path),
    ):
      pass


def test_value_edited_by_hand_is_an_error(tmp_path):
  path = tmp_path / "journal.jsonl"
  _fill(path, 2)
  lines = path.read_bytes().splitlines(keepends=True)
  record = json.loads(lines[0])
  record["value"]["n"] = 7
  path.write_bytes(json.dumps(record).encode() + b"\n" + lines[1])
  with (
    pytest.raises(errors.UserError, match=r":1: damaged"),
    journal.open_journal(path),
  ):
    pass


_HOLD = """
import sys, time
from raft_jax.storage import journal
with journal.open_journal(sys.argv[1]) as book:
  book.append({"k": 1})
  print("held", flush=True)
  time.sleep(60)
"""


@contextlib.contextmanager
def held(path: pathlib.Path):
  """A process that holds a journal."""
  with subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True
  ) as holder:
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield holder


def test_second_process_is_told_who_holds_the_folder_and_a_killed_one_frees_it(
  tmp_path,
):
  path = tmp_path / "journal.jsonl"
  with held(path) as holder:
    with (
      pytest.raises(errors.UserError, match=f"in use by pid {holder.pid} on "),
      journal.open_journal(path),
    ):
      pass
    holder.send_signal(signal.SIGKILL)
  with journal.open_journal(path) as book:
    assert book.calls == {"k": 1}


def test_who_waits_has_it_when_the_holder_ends(tmp_path, capsys):
  path = tmp_path / "journal.jsonl"
  with held(path) as holder:
    end = threading.Timer(0.3, holder.kill)
    end.start()
    with journal.locked(path, waits=True):
      assert holder.wait() == -signal.SIGKILL
    end.join()
  said = capsys.readouterr().out
  assert re.search(rf"in use by pid {holder.pid} on .*; waiting", said)


def test_full_disk_is_a_user_error_and_keeps_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "journal.jsonl"
  _fill(path, 2)

  def no_space(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  with journal.open_journal(path) as book, monkeypatch.context() as patch:
    patch.setattr(os, "fsync", no_space)
    with pytest.raises(errors.UserError, match=r"No space left .* bytes free"):
      book.append({"k": 1})
    assert "k" not in book.calls
  with journal.open_journal(path) as book:
    assert len(book.calls) >= 2
