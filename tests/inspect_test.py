"""`inspect`: lengths are those of transformers, stops those of training; its config."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import rich.console
import transformers

from raft_jax import errors, inspect, train
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.data import inspection, inspection_tables, training_set
from raft_jax.hf import chat
from raft_jax.planning import commented_config, fitting
from raft_jax.training import run_inputs
from tests.helpers import brute_force_duplicates, tiny_run

ROWS = [
  {"id": "a", "question": "What is a tort?", "answer": "A civil wrong."},
  {"id": "b", "question": "What is a lien?", "answer": "A claim on property " * 9},
  {
    "id": "c",
    "question": "What is a writ?",
    "answer": "An order of a court to do some act.",
  },
  {"id": "d", "question": "What is a writ?", "answer": "Something else entirely."},
  {"id": "e", "question": "Why does <|im_end|> end a turn?", "answer": "It does."},
]
HELD_OUT = [
  {"id": "t1", "question": "What is a tort?", "answer": "A civil wrong."},
  {"id": "t2", "question": "What is a deed?", "answer": "A signed paper."},
  {
    "id": "t3",
    "question": "What is a writ ?",
    "answer": "An order of a court to do some act.",
  },
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm) -> pathlib.Path:
  return tiny_run.save_model(tmp_path_factory.mktemp("inspect") / "model", smollm)


@pytest.fixture(scope="module")
def tokenizer(model):
  return chat.load(str(model))


def write_rows(path: pathlib.Path, rows) -> pathlib.Path:
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
  return path


def configure(folder, model, rows=ROWS, held_out=HELD_OUT, *overrides):
  tree = {
    "model": {"source": str(model)},
    "data": {"questions": str(write_rows(folder / "train.jsonl", rows))},
    "output": str(folder / "out"),
  }
  if held_out:
    tree["data"]["test"] = str(write_rows(folder / "test.jsonl", held_out))
  return config_load.from_tree(tree, overrides)


def read(config, tokenizer, name="questions", context="chat"):
  return inspection.read(name, config.data, tokenizer, context=context)


# --- Figures --------------------------------------------------------------------------


def test_lengths_are_those_of_apply_chat_template(tmp_path, model, tokenizer):
  config = configure(tmp_path, model, ROWS[:4])
  found = read(config, tokenizer, context="none")
  theirs = transformers.AutoTokenizer.from_pretrained(model)
  prompts, answers = [], []
  for row in ROWS[:4]:
    turns = [{"role": "user", "content": row["question"]}]
    options = {"return_dict": False, "tokenize": True}
    prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, **options)
    turns.append({"role": "assistant", "content": row["answer"]})
    rest = theirs.apply_chat_template(turns, **options)[len(prompt) :]
    prompts.append(len(prompt))
    answers.append(rest.index(theirs.eos_token_id) + 1)
  lengths = inspection.lengths(found)
  assert lengths["prompt"].tolist() == prompts
  assert lengths["answer"].tolist() == answers


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 1000])
def test_a_percentile_is_the_least_length_that_holds_its_share(count):
  tokens = np.random.default_rng(count).integers(1, 500, count)
  for share, mark in zip(
    inspection.SHARES, inspection.percentiles(tokens), strict=True
  ):
    assert np.mean(tokens <= mark) >= share
    assert np.mean(tokens < mark) < share
  for budget in (0, 100, 499):
    over, share = inspection.beyond(tokens, budget)
    assert (over, share) == (np.sum(tokens > budget), np.mean(tokens > budget))


def test_rejects_are_grouped_by_reason_with_their_places(tmp_path, model, tokenizer):
  rows = [
    *ROWS,
    "{broken",
    {"id": "x", "question": "No answer?"},
    {"id": "y", "question": "None here?"},
    ROWS[0],
  ]
  found = read(configure(tmp_path, model, rows), tokenizer)
  seen = [
    (group.rows, group.kind, [place.line for place in group.places])
    for group in inspection.reasons(found.rejects)
  ]
  assert sorted(seen) == [
    (1, "repeated", [9]),
    (1, "unreadable", [6]),
    (2, "unreadable", [7, 8]),
  ]
  assert (found.total, found.used) == (9, 5)
  text = "\n".join(inspection_tables.reasons(found, None))
  assert "4 rows are set aside (--rejects-file FILE lists all)" in text
  assert f"{tmp_path / 'train.jsonl'}:7" in text


def test_repeats_are_those_of_a_brute_force_search(tmp_path, model, tokenizer):
  config = configure(tmp_path, model)
  sets = [read(config, tokenizer), read(config, tokenizer, "test", "none")]
  places = {
    names: [(later.id, first.id) for later, first in pairs]
    for names, pairs in inspection.same_questions(sets).items()
  }
  assert places == {
    ("questions", "questions"): [("d", "c")],
    ("questions", "test"): [("t1", "a")],
  }
  rows = [*ROWS, *HELD_OUT]
  texts = [f"{row['question']}\n{row['answer']}" for row in rows]
  expected = {
    (rows[i]["id"], rows[j]["id"])
    for i, j in enumerate(brute_force_duplicates.find(texts, inspection.NEAR))
    if j is not None
  }
  near = inspection.near_repeats(sets)
  assert {(a.id, b.id) for pairs in near.values() for a, b in pairs} == expected
  assert expected == {("t1", "a"), ("t3", "c")}
  beside = inspection.beside(near, inspection.same_questions(sets))
  assert [(a.id, b.id) for a, b in beside["questions", "test"]] == [("t3", "c")]


def test_too_many_rows_are_not_compared(tmp_path, model, tokenizer, monkeypatch):
  monkeypatch.setattr(inspection, "NEAR_ROWS", 4)
  found = read(configure(tmp_path, model), tokenizer)
  assert inspection.near_repeats([found]) is None
  assert "not looked for among 5 rows" in inspection_tables.repeats({}, None, 5)[0]


STOPS = [
  ([*ROWS, "{broken"], ()),
  ([*ROWS, ROWS[0]], ()),
  (ROWS, ("data.max_answer_tokens=8",)),
  (ROWS, ("data.max_prompt_tokens=2", "data.too_long=skip")),
  (
    [*ROWS, {"messages": [{"role": "user", "content": ""}], "answer": "x"}],
    ("data.reject_threshold=0.0",),
  ),
]


@pytest.mark.parametrize(("rows", "overrides"), STOPS)
def test_it_stops_where_training_stops(tmp_path, model, tokenizer, rows, overrides):
  config = configure(tmp_path, model, rows, None, "data.answers=original", *overrides)
  with pytest.raises(errors.UserError) as stopped:
    training_set.load(config, tokenizer, distil=True)
  assert read(config, tokenizer).stop == str(stopped.value)


def test_it_uses_the_rows_that_training_uses(tmp_path, model, tokenizer):
  options = ("data.unusable=skip", "data.too_long=skip", "data.max_answer_tokens=20")
  config = configure(
    tmp_path, model, [*ROWS, "{broken"], None, "data.answers=original", *options
  )
  found = read(config, tokenizer)
  loaded = training_set.load(config, tokenizer, distil=True)
  assert found.stop is None
  assert found.used == len(loaded.rows) == 4
  assert found.rejects == loaded.rejects


# --- One example ----------------------------------------------------------------------


def shown(console, config, tokenizer, row_id=None):
  found = inspection.example([read(config, tokenizer)], tokenizer, row_id)
  inspection_tables.show_example(console, found, scored="its own answer")
  return console.file.getvalue()


def test_learned_tokens_are_in_brackets_without_colours(tmp_path, model, tokenizer):
  config = configure(tmp_path, model)
  text = shown(rich.console.Console(file=io.StringIO()), config, tokenizer, "c")
  theirs = transformers.AutoTokenizer.from_pretrained(model)
  turns = [
    {"role": "user", "content": "What is a writ?"},
    {"role": "assistant", "content": "An order of a court to do some act."},
  ]
  whole = theirs.apply_chat_template(turns, tokenize=False)
  assert whole.rstrip("\n") in text.replace("[[", "").replace("]]", "")
  assert "[[An order of a court to do some act.<|im_end|>]]" in text
  assert "[[its own answer]]" in text


def test_learned_tokens_are_coloured_in_a_terminal(
  tmp_path, model, tokenizer, monkeypatch
):
  monkeypatch.delenv("NO_COLOR", raising=False)
  monkeypatch.setenv("TERM", "xterm-256color")
  console = rich.console.Console(file=io.StringIO(), force_terminal=True)
  config = configure(tmp_path, model)
  text = shown(console, config, tokenizer, "c")
  assert "\x1b[1;32mAn order of a court to do some act.<|im_end|>" in text
  assert "[[" not in text
  monkeypatch.setenv("NO_COLOR", "1")
  console = rich.console.Console(file=io.StringIO(), force_terminal=True)
  assert "[[An order of a court to do some act.<|im_end|>]]" in shown(
    console, config, tokenizer, "c"
  )


def test_a_row_cannot_steer_the_terminal():
  assert inspection_tables.plain("a\x1b[2Jb\r\n\tü") == "a\\x1b[2Jb\\r\n\tü"
  long = "x" * 9000
  assert "5,000 characters" in inspection_tables.cut(long)


@pytest.mark.parametrize(
  ("row_id", "says"),
  [("nobody", "no row has the id 'nobody'"), ("b", "it is not used")],
)
def test_a_row_that_cannot_be_shown(tmp_path, model, tokenizer, row_id, says):
  rows = [*ROWS[:1], {"id": "b", "question": "No answer?"}]
  found = read(configure(tmp_path, model, rows), tokenizer)
  with pytest.raises(errors.UserError, match=says):
    inspection.example([found], tokenizer, row_id)


# --- The written config ---------------------------------------------------------------


def test_the_written_config_loads_and_trains(tmp_path, model, capsys):
  rows = [
    {"id": f"r{i}", "question": f"What is {i}?", "answer": f"{i} it is. " * (1 + i % 5)}
    for i in range(100)
  ]
  rows.append({"id": "long", "question": "Q?", "answer": "word " * 200})
  config = configure(tmp_path, model, [*rows, "{broken"], HELD_OUT, "distill.top_k=32")
  path = tmp_path / "my.yaml"
  inspect.main(config, write=str(path))
  capsys.readouterr()
  loaded = config_load.load(path)
  assert config_load.load(path, ["data.answers=original"]).data.unusable == "skip"
  assert loaded.distill.top_k == 32  # what fits any data stays
  assert loaded.train.batch_size == 4  # the most that gives a pass 16 steps
  assert loaded.data.max_answer_tokens < 100  # the long row is an outlier
  text = path.read_text()
  assert text.startswith("# ")
  settings = config_load.load(path, ["data.answers=original", "train.max_steps=1"])
  plan, _ = run_inputs.prepare(settings)
  assert plan.batch_rows == 4
  train.fit(settings)
  metrics = (tmp_path / "out/metrics.jsonl").read_text()
  assert '"sft"' in metrics or '"loss' in metrics


def test_comments_say_what_is_true(tmp_path, model, tokenizer):
  config = configure(tmp_path, model)
  found = read(config, tokenizer)
  choices = fitting.budgets([found], 512, None)
  tokens = sorted(inspection.lengths(found)["prompt"])
  assert f"at most {tokens[-1]} tokens" in choices["data.max_prompt_tokens"].why
  for part in ("prompt", "answer", "teacher"):
    limit = choices[f"data.max_{part}_tokens"].value
    assert limit % 16 == 0
    assert (inspection.lengths(found)[part] <= limit).mean() >= 0.8
  small = fitting.budgets([found], 32, schema.Refine())
  assert all(
    choice.value < 32 for key, choice in small.items() if key.endswith("tokens")
  )


def test_memory_asks_for_more_until_a_step_fits(
  tmp_path, model, tokenizer, monkeypatch
):
  config = configure(tmp_path, model, ROWS, None)
  monkeypatch.setattr(fitting, "device_bytes", lambda mesh: 1000.0)
  choices = fitting.choose(config, [read(config, tokenizer)])
  assert choices["lora"].value == {}
  assert choices["model.remat"].value is True
  assert "DOES NOT FIT" in choices["model.remat"].why
  path = tmp_path / "lora.yaml"
  path.write_text(commented_config.as_yaml(config, choices, ["A run."]))
  assert config_load.load(path).lora is not None
  monkeypatch.setattr(fitting, "device_bytes", lambda mesh: 1e15)
  choices = fitting.choose(config, [read(config, tokenizer)])
  assert choices["model.remat"].value is False
  assert "lora" not in choices


def test_a_file_is_never_overwritten(tmp_path, model):
  path = tmp_path / "my.yaml"
  path.write_text("mine")
  with pytest.raises(errors.UserError, match="exists and is not overwritten"):
    inspect.main(configure(tmp_path, model), write=str(path))
  assert path.read_text() == "mine"
  with pytest.raises(errors.UserError, match="there is no folder"):
    commented_config.check_absent(tmp_path / "no/my.yaml")


# --- The command ----------------------------------------------------------------------


def command(*words, cwd=None):
  root = str(pathlib.Path(__file__).parents[1])
  env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "NO_COLOR": "1"}
  line = [sys.executable, "-m", "raft_jax.inspect", *map(str, words)]
  return subprocess.run(
    line, capture_output=True, text=True, check=False, env=env, cwd=cwd
  )


def test_without_a_config_and_in_the_root_of_the_project(tmp_path, model):
  path = tmp_path / "mine.csv"
  path.write_text("question,answer\nWhat is a tort?,A civil wrong.\n")
  root = pathlib.Path(__file__).parents[1]
  made = (root / "runs").exists()
  listed = tmp_path / "rejects.jsonl"
  done = command(
    f"data.questions={path}",
    f"model.source={model}",
    "--rejects-file",
    listed,
    cwd=root,  # where `import inspect` must stay Python's
  )
  assert done.returncode == 0, done.stderr
  assert "[[A civil wrong.<|im_end|>]]" in done.stdout
  assert "use 1 of 1 rows of questions" in done.stdout
  assert "fewer rows than a batch needs" in done.stdout
  assert (root / "runs").exists() == made  # nothing is written unless asked for
  assert not listed.exists()  # nothing is set aside


@pytest.mark.parametrize(
  ("words", "says"),
  [
    ((), "--config is missing"),
    (("model.source=x", "data.questions=none.jsonl"), "'none.jsonl' is not a file"),
    (("--config", "none.yaml"), "none.yaml: cannot read the config"),
    (("model.source=nowhere", "data.questions=empty.jsonl"), "nowhere"),
  ],
)
def test_bad_words_are_one_error(tmp_path, words, says):
  (tmp_path / "empty.jsonl").write_text("")
  done = command(*words, cwd=tmp_path)
  assert done.returncode == 2
  assert says in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("content", "says"),
  [
    ("", "holds no rows"),
    ("{broken\n", "1 of 1 rows are unusable"),
    ('{"question": "a"}\n{"question": "b"}\n', "2 of 2 rows are unusable"),
  ],
)
def test_a_file_without_usable_rows(tmp_path, model, content, says):
  config = configure(tmp_path, model, [], None)
  (tmp_path / "train.jsonl").write_text(content)
  with pytest.raises(errors.UserError, match=says):
    inspect.main(config)


def test_a_model_without_a_tokenizer(tmp_path, model):
  folder = tmp_path / "bare"
  folder.mkdir()
  (folder / "config.json").write_text((model / "config.json").read_text())
  with pytest.raises(errors.UserError, match="bare"):
    inspect.main(configure(tmp_path, folder))
