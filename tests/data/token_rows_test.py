"""Token rows within budgets, on the real tokenizer and the real questions."""

import numpy as np
import pytest

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import token_rows
from raft_jax.hf import answer_turns, chat, teacher_prompts
from raft_jax.storage import question_files, rejects


@pytest.fixture(scope="module")
def tokenizer(smollm):
  return chat.load(smollm)


@pytest.fixture(scope="module")
def questions(law):
  return question_files.read_questions(law / "train.jsonl", limit=120)


def encode(questions, tokenizer, teacher_context="chat", **options):
  return token_rows.encode(
    [(q.messages, q.answer) for q in questions],
    schema.Data(questions="q.jsonl", **options),
    tokenizer=tokenizer,
    teacher_context=teacher_context,
    places=[rejects.Place(q.id, "q.jsonl", i) for i, q in enumerate(questions, 1)],
  )


def test_rows_hold_the_tokenizers_ids_in_order(questions, tokenizer):
  rows, skipped = encode(questions, tokenizer)
  assert skipped == []
  assert [row.row_id for row in rows] == list(range(len(questions)))
  row, question = rows[7], questions[7]
  assert row.prompt == tuple(chat.prompt_ids(tokenizer, question.messages))
  assert row.answer == tuple(answer_turns.answer_ids(tokenizer, question.answer))
  form = teacher_prompts.teacher_ids(
    tokenizer, question.messages, question.answer, "chat"
  )
  assert row.teacher == tuple(form)
  assert row.answer[-1] in tokenizer.eos_ids
  assert chat.decode(tokenizer, row.answer) == question.answer
  assert (
    encode(questions[7:8], tokenizer, teacher_context="none")[0][0].teacher
    != row.teacher
  )


def test_too_long_is_an_error_that_names_row_lengths_and_keys(questions, tokenizer):
  rows, _ = encode(questions, tokenizer)
  answers = [len(row.answer) for row in rows]
  limit = int(np.median(answers))
  first = next(i for i, n in enumerate(answers) if n > limit)
  over = sum(n > limit for n in answers)
  with pytest.raises(errors.UserError) as caught:
    encode(questions, tokenizer, max_answer_tokens=limit)
  assert str(caught.value) == (
    f"q.jsonl:{first + 1}: row {questions[first].id!r} is too long: answer of "
    f"{answers[first]} tokens > "
    f"data.max_answer_tokens={limit} ({over} of {len(rows)} rows are over a budget); "
    f"set data.max_answer_tokens={max(answers)} to fit all, or data.too_long=skip to "
    "leave them out"
  )
  with pytest.raises(errors.UserError, match=r"data\.max_prompt_tokens=3"):
    encode(questions, tokenizer, max_prompt_tokens=3)
  with pytest.raises(errors.UserError, match=r"data\.max_teacher_tokens=3"):
    encode(questions, tokenizer, max_teacher_tokens=3)


def test_a_budget_is_inclusive_and_skipping_keeps_row_ids(questions, tokenizer):
  whole, _ = encode(questions, tokenizer)
  longest = max(len(row.prompt) for row in whole)
  assert encode(questions, tokenizer, max_prompt_tokens=longest) == (whole, [])
  options = {"max_prompt_tokens": longest - 1, "too_long": "skip"}
  kept, skipped = encode(questions, tokenizer, **options)
  assert kept == [row for row in whole if len(row.prompt) < longest]
  gone = [questions[row.row_id].id for row in whole if len(row.prompt) == longest]
  assert [reject.place.id for reject in skipped] == gone != []
  with pytest.raises(errors.UserError, match="no row is left of 120"):
    encode(questions, tokenizer, max_prompt_tokens=1, too_long="skip")
