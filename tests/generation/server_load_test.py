"""Ten thousand calls to a server, 256 at a time."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

import psutil
import pytest

from raft_jax.generation import calls as calls_lib
from raft_jax.generation import openai_engine
from raft_jax.storage import journal, records

ROOT = pathlib.Path(__file__).parents[2]
CALLS, AT_ONCE = 10_000, 256

SERVER = """
import hashlib, sys, time
from tests.helpers import chat_server

def answer(request):
  # Most replies take 0.1 s; one in 50 takes 2 s.
  dice = hashlib.sha256(request["messages"][0]["content"].encode()).digest()[0]
  time.sleep(2 if dice < 5 else 0.1)
  return chat_server.says("word " * 200)

with chat_server.serving(answer) as server:
  print(server.url, flush=True)
  sys.stdin.read()
"""


@contextlib.contextmanager
def serving():
  with subprocess.Popen(
    [sys.executable, "-c", SERVER],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as server:
    yield server.stdout.readline().strip()
    server.stdin.close()


@pytest.mark.slow
def test_memory_is_flat_and_a_straggler_idles_nobody(tmp_path):
  memory = []

  def append(book, finished):
    real(book, finished)
    memory.append((len(book.calls), psutil.Process().memory_info().rss))

  real, journal.Journal.append = journal.Journal.append, append
  prompts = [(records.Message("user", f"Question {i}?"),) for i in range(CALLS)]
  try:
    with serving() as url, journal.open_journal(tmp_path / "journal.jsonl") as book:
      engine = openai_engine.connect("served", base_url=url)
      role = calls_lib.Role("rewrite", engine, 12, 0.5, 0.9, AT_ONCE)
      began = time.monotonic()
      replies = calls_lib.Calls(book, 0).ask(role, prompts)
      seconds = time.monotonic() - began
  finally:
    journal.Journal.append = real
  assert len(replies) == CALLS
  early = max(size for count, size in memory if count <= CALLS // 4)
  late = max(size for count, size in memory)
  print(
    f"{CALLS / seconds:.0f} calls/s in {len(memory)} appends; "
    f"{early / 2**20:.0f} MiB after {CALLS // 4} calls, {late / 2**20:.0f} in all"
  )
  assert late - early < 64 * 2**20
  # In batches of 256, nearly each with a reply of 2 s, it would take 40 times 2 s.
  assert seconds < 60
