"""The formats of rows: what each means, how it is found, and what is refused."""

import functools
import gzip
import json
import pathlib

import pyarrow
import pytest
from pyarrow import parquet

from raft_jax.storage import question_files, records, row_formats, row_layout
from tests.helpers import refusals

refused = functools.partial(refusals.refusal, question_files.read)

Message = records.Message
ALPACA = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
PLAIN = {"question": "Why?", "answer": "So."}
SHAREGPT = {
  "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
}


def turns(*pairs: tuple[str, object]) -> list[dict]:
  return [{"role": role, "content": content} for role, content in pairs]


def conversation(*pairs: tuple[str, str]) -> tuple[Message, ...]:
  return tuple(Message(role, content) for role, content in pairs)


CHAT = turns(
  ("system", "Be brief."), ("user", "A?"), ("assistant", "a"), ("user", "B?")
)
WHOLE = conversation(
  ("system", "Be brief."),
  ("user", "A?"),
  ("assistant", "a"),
  ("user", "B?"),
  ("assistant", "b"),
)

# name -> (format, row, the conversation that it says)
ROWS = {
  "messages and answer": ("question", {"messages": CHAT, "answer": "b"}, WHOLE),
  "whole messages": (
    "messages",
    {"messages": [*CHAT, *turns(("assistant", "b"))]},
    WHOLE,
  ),
  "parts": (
    "messages",
    {
      "messages": turns(
        ("user", [{"type": "text", "text": "A"}, {"type": "text", "text": "?"}]),
        ("assistant", [{"type": "text", "text": "a"}]),
      )
    },
    conversation(("user", "A?"), ("assistant", "a")),
  ),
  "prompt as text": (
    "prompt_completion",
    {"prompt": "A?", "completion": " a"},
    conversation(("user", "A?"), ("assistant", " a")),
  ),
  "prompt as messages": (
    "prompt_completion",
    {"prompt": CHAT, "completion": turns(("assistant", "b"))},
    WHOLE,
  ),
  "completion of several turns": (
    "prompt_completion",
    {
      "prompt": CHAT[:2],
      "completion": [*CHAT[2:], *turns(("assistant", "b"))],
    },
    WHOLE,
  ),
  "alpaca": (
    "alpaca",
    ALPACA,
    conversation(("user", "Translate.\nHund"), ("assistant", "dog")),
  ),
  "alpaca without input": (
    "alpaca",
    {**ALPACA, "input": ""},
    conversation(("user", "Translate."), ("assistant", "dog")),
  ),
  "alpaca with history": (
    "alpaca",
    {
      "instruction": "B?",
      "output": "b",
      "system": "Be brief.",
      "history": [["A?", "a"]],
    },
    WHOLE,
  ),
  "sharegpt": (
    "sharegpt",
    {
      "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "A?"},
        {"from": "gpt", "value": "a"},
        {"from": "user", "value": "B?"},
        {"from": "ChatGPT", "value": "b"},
      ]
    },
    WHOLE,
  ),
  "sharegpt with system": (
    "sharegpt",
    {
      "system": "Be brief.",
      "conversations": [
        {"from": "Human", "value": "A?"},
        {"from": "bot", "value": "a"},
        {"from": "human", "value": "B?"},
        {"from": "model", "value": "b"},
      ],
    },
    WHOLE,
  ),
  "roles in conversations": (
    "sharegpt",
    {"conversations": [*CHAT, *turns(("assistant", "b"))]},
    WHOLE,
  ),
}


def write(folder: pathlib.Path, *rows: object, name: str = "q.jsonl") -> pathlib.Path:
  path = folder / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.mark.parametrize("name", ROWS)
def test_each_format_says_its_conversation(tmp_path, name, capsys):
  kind, row, whole = ROWS[name]
  path = write(tmp_path, {"id": "a", "domain": "law", **row, "other": 1})
  (question,) = question_files.read_questions(path)
  assert (question.id, question.domain) == ("a", "law")
  assert (*question.messages, question.reply) == whole
  assert question_files.read(path).formats == {str(path): kind}
  said = capsys.readouterr().err
  assert said == ("" if kind == "question" else f"{path}: format: {kind}\n")


@pytest.mark.parametrize("name", ROWS)
def test_each_turn_is_an_example_with_what_came_before(tmp_path, name):
  _, row, whole = ROWS[name]
  path = write(tmp_path, {"id": "a", **row}, {"id": "b", **row})
  layout = row_layout.Layout(turns="each")
  found = question_files.read_questions(path, layout=layout)
  places = [i for i, turn in enumerate(whole) if turn.role == "assistant"]
  assert [(*q.messages, q.reply) for q in found] == [whole[: i + 1] for i in places] * 2
  numbers = ["", "#2", "#3"][: len(places)]
  assert [q.id for q in found] == [f"{i}{n}" for i in "ab" for n in numbers]


def test_ids_of_rows_without_one_are_the_same_for_every_way_to_say_them(tmp_path):
  rows = [row for _, row, whole in ROWS.values() if whole == WHOLE]
  ids = set()
  for i, row in enumerate(rows):
    path = write(tmp_path, row, name=f"{i}.jsonl")
    ids |= {q.id for q in question_files.read_questions(path)}
  assert len(rows) > 5
  assert len(ids) == 1
  each = row_layout.Layout(turns="each")
  first, second = question_files.read_questions(path, layout=each)
  assert {first.id} == ids
  assert second.id == f"{first.id}#2"


def test_a_greeting_is_no_example_and_counts(tmp_path):
  row = {
    "id": "a",
    "messages": turns(
      ("assistant", "Hello."), ("user", "A?"), ("assistant", "a"), ("user", "B?")
    ),
    "answer": "b",
  }
  path = write(tmp_path, row)
  found = question_files.read_questions(path, layout=row_layout.Layout(turns="each"))
  assert [(q.id, q.answer) for q in found] == [("a#2", "a"), ("a#3", "b")]
  assert [q.id for q in question_files.read_questions(path)] == ["a"]


def test_the_limit_counts_examples(tmp_path):
  path = write(tmp_path, *[{"id": i, "messages": CHAT, "answer": "b"} for i in "abc"])
  layout = row_layout.Layout(turns="each")
  found = question_files.read_questions(path, layout=layout, limit=3)
  assert [q.id for q in found] == ["a", "a#2", "b"]


def test_an_id_of_a_turn_that_a_row_has_is_a_repeat(tmp_path):
  path = write(
    tmp_path, {"id": "a", "messages": CHAT, "answer": "b"}, {**PLAIN, "id": "a#2"}
  )
  layout = row_layout.Layout(turns="each")
  assert "'a#2' on line 2 has the id of line 1" in refused(path, layout=layout)


def test_tools_of_a_sharegpt_row_reach_the_question(tmp_path):
  tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
  path = write(
    tmp_path,
    {
      "tools": json.dumps([tool]),
      "system": "Be brief.",
      "conversations": [
        {"from": "human", "value": "A?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "seen"},
        {"from": "gpt", "value": "a"},
      ],
    },
  )
  layout = row_layout.Layout(turns="each")
  call, said = question_files.read_questions(path, layout=layout)
  assert call.tool_calls == (records.ToolCall("look", '{"x": 1}'),)
  assert [m.role for m in said.messages] == ["system", "user", "assistant", "tool"]
  assert json.loads(said.messages[0].tools[0]) == tool


def test_a_thought_of_any_learned_turn_is_apart_from_its_answer(tmp_path):
  said = ("assistant", "<think>\nhm\n</think>\n\na")
  path = write(tmp_path, {"messages": turns(("user", "A?"), said)})
  (question,) = question_files.read_questions(path)
  assert (question.reasoning_content.count("hm"), question.answer) == (1, "a")


# Detection


def test_a_column_map_names_the_fields(tmp_path):
  path = write(tmp_path, {"q": "Why?", "a": "So.", "question": "other", "nr": 7})
  layout = row_layout.Layout(columns={"question": "q", "answer": "a", "id": "nr"})
  (question,) = question_files.read_questions(path, layout=layout)
  assert question == records.Question("7", "", records.user_turn("Why?"), "So.")


def test_a_column_map_may_turn_one_format_into_another(tmp_path):
  path = write(tmp_path, {"dialogue": SHAREGPT["conversations"]})
  layout = row_layout.Layout(columns={"conversations": "dialogue"})
  assert question_files.read(path, layout=layout).formats == {str(path): "sharegpt"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_column_that_is_missing_is_named_with_those_that_exist(tmp_path, suffix):
  path = tmp_path / f"q{suffix}"
  if suffix == ".jsonl":
    write(tmp_path, {"Frage": "Why?", "answer": "So."})
  elif suffix == ".csv":
    path.write_text("Frage,answer\nWhy?,So.\n")
  else:
    parquet.write_table(pyarrow.table({"Frage": ["Why?"], "answer": ["So."]}), path)
  message = refused(path, layout=row_layout.Layout(columns={"question": "q"}))
  assert message == (
    f"{path}: data.columns maps question to 'q', and there is no such column; there "
    "are 'Frage', 'answer'"
  )


def test_two_formats_that_fit_are_named_and_one_can_be_chosen(tmp_path):
  path = write(tmp_path, {**ALPACA, **PLAIN})
  message = refused(path)
  assert message.startswith(f"{path}: its rows fit question (`question` or `messages`")
  assert "and alpaca (`instruction` and `output`)" in message
  assert "data.format=question" in message
  layout = row_layout.Layout(format="alpaca")
  (question,) = question_files.read_questions(path, layout=layout)
  assert question.answer == "dog"


def test_whole_messages_beside_an_answer_are_ambiguous(tmp_path):
  whole = turns(("user", "A?"), ("assistant", "a"))
  path = write(tmp_path, {"messages": whole, "answer": "a"})
  message = refused(path)
  assert "its rows fit question" in message
  assert "and messages" in message


def test_a_bad_first_row_does_not_decide_the_format(tmp_path):
  path = write(tmp_path, {"nothing": 1}, ALPACA)
  read = question_files.read(path, unusable="skip")
  assert read.formats == {str(path): "alpaca"}
  assert [r.reason for r in read.rejects] == ["has no `instruction`"]


@pytest.mark.parametrize(
  ("first", "second", "says"),
  [
    (ALPACA, SHAREGPT, "is sharegpt, and the file is alpaca; put it into a file of"),
    (SHAREGPT, PLAIN, "is question, and the file is sharegpt"),
    (PLAIN, ALPACA, "is alpaca, and the file is question"),
    (PLAIN, {"messages": CHAT[:3]}, "is messages, and the file is question"),
    (ALPACA, {"prompt": "A", "completion": "a"}, "is prompt_completion, and the"),
  ],
)
def test_a_row_of_another_format_is_set_aside_by_its_line(
  tmp_path, first, second, says
):
  path = write(tmp_path, first, {"id": "x", **second})
  assert refused(path).startswith(f"{path}:2: row 'x': {says}")
  assert len(question_files.read(path, unusable="skip").questions) == 1


@pytest.mark.parametrize("name", row_formats.FORMATS)
def test_a_row_without_the_fields_of_its_file_is_set_aside(tmp_path, name):
  row = next(row for form, row, _ in ROWS.values() if form == name)
  read = question_files.read(write(tmp_path, row, {"text": "x"}), unusable="skip")
  assert len(read.questions) == 1
  assert [r.reason.partition("`")[0] for r in read.rejects] == ["has no "]


def test_each_file_of_a_folder_has_its_own_format(tmp_path):
  write(tmp_path, ALPACA, name="1.jsonl")
  write(tmp_path, SHAREGPT, name="2.jsonl")
  read = question_files.read(tmp_path)
  assert [*read.formats.values()] == ["alpaca", "sharegpt"]
  assert [q.answer for q in read.questions] == ["dog", "Yes"]


# Bad input: (row after a good one, options, what the message says)

GOOD = {
  "alpaca": ALPACA,
  "sharegpt": SHAREGPT,
  "messages": {"messages": turns(("user", "A?"), ("assistant", "a"))},
  "prompt_completion": {"prompt": "A?", "completion": "a"},
}
USER = {"role": "user", "content": "A?"}
SAID = {"role": "assistant", "content": "a"}


def spoken(*pairs: tuple[object, object]) -> dict:
  return {"conversations": [{"from": who, "value": text} for who, text in pairs]}


BAD = {
  "number": ("alpaca", {**ALPACA, "output": 3}, "`output` is int, not text"),
  "empty output": ("alpaca", {**ALPACA, "output": " "}, "`output` is empty"),
  "history": ("alpaca", {**ALPACA, "history": "x"}, "`history` is not a list of ["),
  "odd history": ("alpaca", {**ALPACA, "history": [["A"]]}, "`history[0]` is not a pa"),
  "empty history": (
    "alpaca",
    {**ALPACA, "history": [["A", ""]]},
    "`history[0][1]` is empty",
  ),
  "no output": ("alpaca", {"instruction": "A"}, "has no `output`"),
  "speaker": (
    "sharegpt",
    spoken(("narrator", "x")),
    "`conversations[0].from` is 'narrator', not one of human, user, gpt",
  ),
  "no speaker": ("sharegpt", {"conversations": [{"value": "x"}]}, "role` is None"),
  "two names": (
    "sharegpt",
    {"conversations": [{"from": "human", "role": "user", "value": "x"}]},
    "`conversations[0]` has both `from` and `role`",
  ),
  "empty turn": (
    "sharegpt",
    spoken(("human", ""), ("gpt", "a")),
    "`conversations[0].content` is empty",
  ),
  "two system turns": (
    "sharegpt",
    spoken(("system", "x"), ("system", "y"), ("human", "A"), ("gpt", "a")),
    "`conversations[1]` is a system turn; only the first",
  ),
  "system twice": (
    "sharegpt",
    {"system": "x", **spoken(("system", "y"), ("human", "A"), ("gpt", "a"))},
    "has two system turns: `system`, and `conversations[0]`",
  ),
  "no assistant": (
    "sharegpt",
    spoken(("human", "A"), ("human", "B")),
    "`conversations` has no assistant turn",
  ),
  "ends with user": (
    "sharegpt",
    spoken(("human", "A"), ("gpt", "a"), ("human", "B")),
    "`conversations` ends with a turn of the user; it must end",
  ),
  "no turns": ("sharegpt", {"conversations": []}, "`conversations` is not a non-empty"),
  "turn is text": ("sharegpt", {"conversations": ["x"]}, "`conversations[0]` is not"),
  "a weight": (
    "messages",
    {"messages": [USER, {**SAID, "weight": 1}]},
    "`messages[1]` has 'weight'",
  ),
  "a weight of none": (
    "messages",
    {"messages": [USER, {**SAID, "weight": 0}]},
    "`messages[1]` has 'weight'",
  ),
  "an image": (
    "messages",
    {"messages": [{**USER, "content": [{"type": "image"}]}, SAID]},
    "`messages[0].content[0]` is 'image'; only {type: text, text}",
  ),
  "no parts": (
    "messages",
    {"messages": [{**USER, "content": []}, SAID]},
    "`messages[0].content` is empty",
  ),
  "no user": ("messages", {"messages": [SAID]}, "has no turn of the user before"),
  "assistant twice": (
    "messages",
    {"messages": [USER, SAID, SAID]},
    "turn 3 is the assistant's, after the assistant's; join them",
  ),
  "developer": (
    "messages",
    {"messages": [{**USER, "role": "developer"}, SAID]},
    "`messages[0].role` is 'developer'",
  ),
  "messages as text": ("messages", {"messages": "[]"}, "`messages` is text, not a lis"),
  "prompt of numbers": (
    "prompt_completion",
    {"prompt": 1, "completion": "a"},
    "`prompt` is int, not text",
  ),
  "completion of the user": (
    "prompt_completion",
    {"prompt": "A", "completion": [USER]},
    "`completion` begins with a turn of the user",
  ),
  "late system": (
    "prompt_completion",
    {"prompt": "A", "completion": [{**USER, "role": "system"}, SAID]},
    "`completion` begins with a turn of the system",
  ),
  "function call": (
    "sharegpt",
    spoken(("human", "A"), ("function_call", "look()"), ("gpt", "a")),
    "`conversations[1].value` is not valid JSON",
  ),
  "unclosed thought": (
    "alpaca",
    {**ALPACA, "output": "<think>hm"},
    "`output` opens <think> and never closes it",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_line_and_field(tmp_path, name):
  kind, row, says = BAD[name]
  path = write(tmp_path, GOOD[kind], {"id": "b", **row})
  message = refused(path)
  assert message.startswith(f"{path}:2: row 'b': ")
  assert says in message


def test_preferences_and_bare_texts_are_told_apart(tmp_path):
  pair = write(tmp_path, {"prompt": "A", "chosen": "a", "rejected": "b"})
  assert "is a pair of preferences (`chosen`, `rejected`)" in refused(pair)
  text = write(tmp_path, {"text": "Once."})
  assert "has no `question` (or `messages`); 1 of 1" in refused(text)


def test_the_format_is_found_past_rows_that_are_torn(tmp_path):
  path = tmp_path / "q.jsonl.gz"
  lines = ["{", "[1]", json.dumps(SHAREGPT)]
  path.write_bytes(gzip.compress("\n".join(lines).encode()))
  read = question_files.read(path, unusable="skip")
  assert read.formats == {str(path): "sharegpt"}
  assert [reject.place.line for reject in read.rejects] == [1, 2]
