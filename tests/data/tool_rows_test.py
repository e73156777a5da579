"""Rows with tools and reasoning on their way to the training set and the test sets."""

import json

import pytest
import transformers

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.curation import refined_folder, refinement
from raft_jax.data import training_set
from raft_jax.evaluation import test_sets
from raft_jax.generation import engines, openai_engine
from raft_jax.hf import chat
from raft_jax.storage import messages, question_files, records, rejects
from tests.helpers import chat_templates

ASKED = {"role": "user", "content": "Is it warm in Paris?"}
CALL = {"id": "c1", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "21 degrees", "tool_call_id": "c1"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
ROWS = [
  {"id": "plain", "question": "Why?", "answer": "So."},
  {"id": "tools", "question": "Is it warm?", "answer": "Yes.", "tools": TOOLS},
  {"id": "history", "messages": [ASKED, CALLED, RESULT], "answer": "Yes."},
  {"id": "thinks", "question": "2 + 2?", "answer": "<think>\nTwo.\n</think>\n\n4."},
  {"id": "field", "question": "3 + 3?", "answer": "6.", "reasoning_content": "Three."},
]


BUDGETS = {"max_prompt_tokens": 2000, "max_answer_tokens": 500}
BUDGETS |= {"max_teacher_tokens": 3000}


def make_config(tmp_path, source, **data) -> schema.Config:
  path = tmp_path / "q.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  data = {"questions": str(path), "test": str(path), "answers": "original", **data}
  return schema.Config.model_validate(
    {"model": {"source": source}, "data": data, "output": str(tmp_path / "out")}
  )


def test_rows_with_tools_are_set_aside_by_name(tmp_path, smollm):
  """SmolLM2's template has none."""
  tokenizer = chat.load(smollm)
  run = make_config(tmp_path, smollm)
  says = r"q\.jsonl:2: row 'tools': the chat template has no tools: .*'get_weather'"
  with pytest.raises(errors.UserError, match=says):
    training_set.load(run, tokenizer, distil=True)
  skips = make_config(tmp_path, smollm, unusable="skip")
  loaded = training_set.load(skips, tokenizer, distil=True)
  assert [(r.place.id, r.place.line) for r in loaded.rejects] == [
    ("tools", 2),
    ("history", 3),
  ]
  assert "no tool calls" in loaded.rejects[1].reason
  assert [row.row_id for row in loaded.rows] == [0, 3, 4]


def test_rows_with_tools_are_learned_where_the_template_has_tools(tmp_path, complete):
  template = chat_templates.TEMPLATES["trl/qwen3"]
  (complete / "chat_template.jinja").write_text(template)
  run = make_config(tmp_path, str(complete), **BUDGETS)
  loaded = training_set.load(run, chat.load(str(complete)), distil=True)
  assert loaded.rejects == []
  own = transformers.AutoTokenizer.from_pretrained(complete)
  given = [[{"role": "user", "content": ROWS[1]["question"]}], ROWS[2]["messages"]]
  for row, turns, tools in zip(loaded.rows[1:], given, (TOOLS, None)):
    text = own.apply_chat_template(
      turns,
      tools=tools,
      tokenize=False,
      add_generation_prompt=True,
      enable_thinking=False,
    )
    assert list(row.prompt) == own(text, add_special_tokens=False)["input_ids"]
    assert len(row.teacher) > len(row.prompt)


@pytest.mark.parametrize("thinking", ["drop", "keep"])
def test_thinking_of_answers(tmp_path, smollm, thinking):
  """The oracle is transformers, with the answer in the form that is to be learned."""
  run = make_config(tmp_path, smollm, unusable="skip", thinking=thinking)
  tokenizer = chat.load(smollm, thinking=thinking == "keep")
  loaded = training_set.load(run, tokenizer, distil=False)
  by_id = {row.row_id: row for row in loaded.rows}
  # Its template leaves `reasoning_content` out.
  assert set(by_id) == ({0, 3} if thinking == "keep" else {0, 3, 4})
  if thinking == "keep":
    assert "leaves out the answer's reasoning" in loaded.rejects[-1].reason
  answer = ROWS[3]["answer"] if thinking == "keep" else "4."
  ids = transformers_ids(smollm, ROWS[3]["question"], answer)
  assert [*by_id[3].prompt, *by_id[3].answer] == ids


def transformers_ids(smollm: str, question: str, answer: str) -> list[int]:
  own = chat.load(smollm).hf_tokenizer
  assert isinstance(own, transformers.PreTrainedTokenizerFast)
  turns = [
    {"role": "user", "content": question},
    {"role": "assistant", "content": answer},
  ]
  text = own.apply_chat_template(turns, tokenize=False).removesuffix("\n")
  return own(text, add_special_tokens=False)["input_ids"]


def test_a_refined_answer_has_the_originals_reasoning_only_with_its_words():
  reply = records.Message("assistant", "4.", "Two.")
  question = question_files.question("a", "", records.user_turn("2 + 2?"), reply)
  for text, reasoning in (("4.", "Two."), ("It is 4.", "")):
    turn = training_set.as_turn(question, text)
    assert (turn.content, turn.reasoning_content) == (text, reasoning)


def test_questions_that_differ_in_tools_or_reasoning_differ_in_their_digest():
  ask = records.user_turn("Q")
  tools = messages.with_tools(ask, TOOLS)
  plain = records.Message("assistant", "y")
  called = messages.parse([ASKED, CALLED])[1]
  variants = [
    question_files.question("a", "", turns, reply)
    for turns in (ask, tools)
    for reply in (plain, plain._replace(reasoning_content="hm"), called)
  ]
  assert len(set(map(refined_folder.question_bytes, variants))) == len(variants)


def test_answers_that_call_tools_are_not_scored(tmp_path, smollm, monkeypatch):
  run = make_config(tmp_path, smollm, unusable="skip")
  place = rejects.Place("call", "q.jsonl", 1)
  called = messages.parse([ASKED, CALLED])[1]
  call = question_files.question("call", "", records.user_turn("Warm?"), called)
  text = records.Question("text", "", records.user_turn("Warm?"), "Yes.")

  def reading(questions):
    places = {q.id: place._replace(id=q.id) for q in questions}
    monkeypatch.setattr(
      question_files, "read", lambda *a, **k: question_files.Read(questions, places, [])
    )
    return test_sets.read_test(run.data, chat.load(smollm), None)

  found = reading([call, text])
  assert [q.id for q in found.questions] == ["text"]
  assert [r.place.id for r in found.rejects] == ["call"]
  assert "tool call" in found.rejects[0].reason
  with pytest.raises(errors.UserError, match="has no other answers"):
    reading([call])


def test_a_server_gets_calls_in_the_form_of_its_api():
  turns = messages.conversation([ASKED, CALLED, RESULT], tools=TOOLS)
  request = engines.Request(turns, 10, 0.0, 1.0, 0)
  body, _ = openai_engine._parameters(request, ())
  function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
  assert body["tools"] == TOOLS
  assert body["messages"] == [
    ASKED,
    {
      "role": "assistant",
      "content": "",
      "tool_calls": [{"type": "function", "function": function, "id": "c1"}],
    },
    RESULT,
  ]


def test_history_with_calls_as_plain_text():
  turns = messages.conversation([ASKED, CALLED, RESULT])
  assert refinement.question_text(records.Question("a", "", turns, "y")) == (
    "user: Is it warm in Paris?\n"
    'assistant: get_weather({"city": "Paris"})\n'
    "tool: 21 degrees"
  )
