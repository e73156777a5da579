"""Messages and tools are read strictly: each fault names its field."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from raft_jax import errors
from raft_jax.storage import (
  messages,
  question_files,
  records,
  row_files,
  row_formats,
)

USER = {"role": "user", "content": "Why?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def call(**fields) -> dict:
  return {**CALLED, "tool_calls": [{"function": {"name": "f", **fields}}]}


def test_arguments_as_an_object_and_as_its_text():
  given = {"b": 1, "a": "ü"}
  as_object, as_text = (
    messages.parse([USER, call(arguments=arguments)])[1].tool_calls[0].arguments
    for arguments in (given, json.dumps(given, ensure_ascii=False, indent=1))
  )
  assert as_object == '{"b": 1, "a": "ü"}'  # in the order of the data
  assert json.loads(as_text) == given
  assert as_text != as_object  # kept as it was written


def test_a_call_alone_and_its_result():
  turns = messages.parse([USER, CALLED, {**RESULT, "name": "f", "tool_call_id": "c1"}])
  assert turns[1].content == ""
  assert turns[1].tool_calls == (records.ToolCall("f", "{}", "c1"),)
  assert turns[2] == records.Message("tool", "7", name="f", tool_call_id="c1")
  bare = {**CALLED, "tool_calls": [{"name": "f", "arguments": {}}]}
  assert messages.parse([USER, bare])[1].tool_calls[0].name == "f"


def test_tools_as_a_list_and_as_its_text():
  assert messages.parse_tools([TOOL]) == messages.parse_tools(json.dumps([TOOL]))
  assert messages.parse_tools(None) == messages.parse_tools([]) == ()
  assert messages.parse([USER], tools=[TOOL])[0].tools == (json.dumps(TOOL),)


def test_empty_extras_leave_no_trace():
  empty = {"tool_calls": [], "reasoning_content": "", "name": None, "weight": None}
  assert messages.parse([USER, {"role": "assistant", "content": "x", **empty}]) == (
    records.Message("user", "Why?"),
    records.Message("assistant", "x"),
  )


BAD = {
  "tool turn first": ([RESULT], "`messages[0]` is a tool turn without a tool call"),
  "tool turn after text": (
    [USER, {"role": "assistant", "content": "x"}, RESULT],
    "`messages[2]` is a tool turn without a tool call before it",
  ),
  "two results of a call": (
    [USER, CALLED, RESULT, RESULT],
    "`messages[3]` is tool turn 2 after 1 tool calls",
  ),
  "result of another call": (
    [USER, CALLED, {**RESULT, "tool_call_id": "c2"}],
    "`messages[2].tool_call_id` is 'c2', and the calls before it have the ids 'c1'",
  ),
  "result is an object": (
    [USER, CALLED, {**RESULT, "content": {"t": 7}}],
    "`messages[2].content` is dict, not text",
  ),
  "empty result": (
    [USER, CALLED, {**RESULT, "content": ""}],
    "`messages[2].content` is empty",
  ),
  "calls are an object": (
    [USER, {**CALLED, "tool_calls": CALL}],
    "`messages[1].tool_calls` is dict, not a list of calls",
  ),
  "calls are a text": (
    [USER, {**CALLED, "tool_calls": "f()"}],
    "`messages[1].tool_calls` is str, not a list of calls",
  ),
  "call is a text": (
    [USER, {**CALLED, "tool_calls": ["f"]}],
    "`messages[1].tool_calls[0]` is not an object",
  ),
  "function is a text": (
    [USER, {**CALLED, "tool_calls": [{"function": "f"}]}],
    "`messages[1].tool_calls[0].function` is not an object {name, arguments}",
  ),
  "another type of call": (
    [USER, {**CALLED, "tool_calls": [{**CALL, "type": "custom"}]}],
    "`messages[1].tool_calls[0].type` is 'custom', not 'function'",
  ),
  "no name": (
    [USER, {**CALLED, "tool_calls": [{"function": {"arguments": {}}}]}],
    "`messages[1].tool_calls[0].function.name` is NoneType, not text",
  ),
  "no arguments": ([USER, call()], "function.arguments` is NoneType, not an object"),
  "torn arguments": (
    [USER, call(arguments='{"a": ')],
    "`messages[1].tool_calls[0].function.arguments` is not valid JSON: Expecting value",
  ),
  "list of arguments": ([USER, call(arguments=[1])], "is list, not an object"),
  "text of a list": ([USER, call(arguments="[1]")], "is list, not an object"),
  "argument twice": ([USER, call(arguments='{"a":1,"a":2}')], "has the key 'a' twice"),
  "half of a pair": (
    [USER, call(arguments={"a": "\ud83d"})],
    "`messages[1].tool_calls[0].function.arguments` holds half of a surrogate pair",
  ),
  "argument NaN": ([USER, call(arguments='{"a":NaN}')], "NaN is not a JSON number"),
  "call by the user": (
    [{**USER, "tool_calls": [CALL]}],
    "`messages[0]` has 'tool_calls'; a turn of role user may have role, content alone",
  ),
  "reasoning of the user": (
    [{**USER, "reasoning_content": "hm"}],
    "`messages[0]` has 'reasoning_content'",
  ),
  "reasoning is a list": (
    [USER, {"role": "assistant", "content": "x", "reasoning_content": ["hm"]}],
    "`messages[1].reasoning_content` is list, not text",
  ),
  "reasoning alone": (
    [USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}],
    "`messages[1]` has reasoning_content and no content after it",
  ),
  "old function call": (
    [USER, {"role": "assistant", "content": "x", "function_call": {"name": "f"}}],
    "`messages[1]` has 'function_call'; a turn of role assistant may have",
  ),
  "unknown role": (
    [{"role": "function", "content": "x"}],
    "`messages[0].role` is 'function', not one of system, user, assistant, tool",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_turns(name):
  turns, says = BAD[name]
  with pytest.raises(row_files.Fault) as caught:
    messages.parse(turns)
  assert says in str(caught.value)


BAD_TOOLS = {
  "object": ({"f": TOOL}, "`tools` is dict, not a list of schemas"),
  "number": (7, "`tools` is int, not a list of schemas"),
  "torn text": ("[{", "`tools` is not valid JSON"),
  "names": (["f"], "`tools[0]` is not a schema {type: function"),
  "no name": ([{"type": "function", "function": {}}], "`tools[0]` is not a schema"),
  "search": ([{"type": "web_search"}], "`tools[0]` is not a schema"),
  "parameters": (
    [{"name": "f", "parameters": ["x"]}],
    "`tools[0].parameters` is not a JSON schema",
  ),
  "twice": ([TOOL, TOOL], "`tools[1]` has the name of tools[0]"),
}


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_bad_tools(name):
  tools, says = BAD_TOOLS[name]
  with pytest.raises(row_files.Fault) as caught:
    messages.parse([USER], tools=tools)
  assert says in str(caught.value)


def learned(text, reasoning=None) -> records.Message:
  """The turn that is learned of a row with this answer."""
  row = {"question": "?", "answer": text, "reasoning_content": reasoning}
  turns = row_formats.conversation(row, "question")
  return row_formats.examples(turns, "last", "question")[0].answer


def test_thinking_is_apart_from_the_answer():
  turn = learned("<think>\nhm\n</think>\n\n4")
  assert (turn.content, turn.reasoning_content) == ("4", "<think>\nhm\n</think>\n\n")
  assert learned("4", "hm").reasoning_content == "hm"
  for text in ("use <think> here", "a </think> b", "x <think>y</think>"):
    assert learned(text) == records.Message("assistant", text)


@pytest.mark.parametrize(
  ("text", "reasoning", "says"),
  [
    ("<think>hm", None, "`answer` opens <think> and never closes it"),
    (" <think>hm</thinking> 4", None, "`answer` opens <think> and never closes it"),
    ("<think>a</think><think>b</think>4", None, "`answer` has two <think> parts"),
    ("<think>a<think>b</think>c</think>4", None, "has two <think> parts"),
    ("<think>a</think> ", None, "`answer` is thinking without an answer after it"),
    ("<think>a</think>4", "b", "begins with <think> beside `reasoning_content`"),
    ("4", ["b"], "`reasoning_content` is list, not text"),
    ("4", " ", "`reasoning_content` is empty"),
  ],
)
def test_bad_thinking(text, reasoning, says):
  with pytest.raises(row_files.Fault) as caught:
    learned(text, reasoning)
  assert says in str(caught.value)


def test_rows_name_line_and_field(tmp_path):
  rows = [
    {"id": "a", "messages": [USER, CALLED, RESULT], "tools": [TOOL], "answer": "7"},
    {"id": "b", "question": "x", "answer": "<think>hm</think>y"},
    {"id": "c", "question": "x", "answer": "y", "tools": "hammer"},
  ]
  path = tmp_path / "q.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  with pytest.raises(errors.UserError, match=r"q\.jsonl:3: .*'c'.*`tools` is not"):
    question_files.read(path)
  kept = question_files.read(path, reject_threshold=0.5).questions
  assert [q.id for q in kept] == ["a", "b"]
  assert kept[0].messages[0].tools == (json.dumps(TOOL),)
  assert (kept[1].answer, kept[1].reasoning_content) == ("y", "<think>hm</think>")


def test_calls_in_parquet_have_their_own_arguments(tmp_path):
  """A column has one schema: each call gets the arguments of all calls, as null."""
  calls = ({"city": "Paris"}, {"zone": "Q7", "days": [1, 2]})
  rows = [
    {
      "id": f"{i}",
      "messages": [
        USER,
        {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": given}}]},
        {**RESULT, "name": "f"},
      ],
      "tools": [TOOL | {"function": {"name": "f", "parameters": {"type": "object"}}}],
      "answer": "x",
    }
    for i, given in enumerate(calls)
  ]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
  (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
  read, same = (
    question_files.read(tmp_path / f"q.{kind}").questions
    for kind in ("parquet", "jsonl")
  )
  found = [json.loads(q.messages[1].tool_calls[0].arguments) for q in read]
  assert found == list(calls)
  assert [q.messages[0].tools for q in read] == [q.messages[0].tools for q in same]


def test_records_of_tools_and_reasoning_are_read_back():
  turns = messages.conversation([USER, CALLED, RESULT], tools=[TOOL])
  (last,) = messages.parse([{**CALLED, "reasoning_content": "hm"}])
  question = question_files.question("a", "", turns, last)
  assert question.reply == last
  refined = records.Refined(question, "", None, (), "", "original", "x")
  assert records.from_json(records.to_json(refined)) == refined


def test_a_plain_record_has_no_other_fields():
  question = records.Question("a", "law", records.user_turn("Q"), "y")
  refined = records.Refined(question, "r", 0.5, (), "y", "original", "x")
  assert json.loads(records.to_json(refined))["question"] == {
    "id": "a",
    "domain": "law",
    "messages": [{"role": "user", "content": "Q"}],
    "answer": "y",
  }
  assert records.keyed(question.messages) == [["user", "Q"]]
