"""Thinking in replies, by the marks that models document."""

import dataclasses

import pytest
import transformers

from raft_jax.curation import qa_pairs
from raft_jax.generation import engines, judging, thinking
from raft_jax.hf import chat

TOLD = "A tort is a wrong."


@pytest.mark.parametrize(
  "reply",
  [
    f"[THINK]Hm.[/THINK]{TOLD}",  # Magistral
    f"\n[THINK]Hm.\n\nWell.[/THINK]\n\n{TOLD}",
    f"<seed:think>Hm.<seed:cot_budget_reflect>9</seed:cot_budget_reflect></seed:think>{TOLD}",
    "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>"
    + TOLD
    + "<|END_RESPONSE|>",
    f"<|begin_of_thought|>Hm.<|end_of_thought|>\n\n<|begin_of_solution|>{TOLD}"
    "<|end_of_solution|>",
    f"<think>\nHm.\n</think>\n<answer>\n{TOLD}\n</answer>",  # Hunyuan A13B
    f"<thought>Hm.</thought>{TOLD}",
    f"<|channel>thought\nHm.<channel|>{TOLD}",  # Gemma 4
    f"\u25c1think\u25b7Hm.\u25c1/think\u25b7{TOLD}",
    f"<thinking>Hm.</thinking><thinking>Well.</thinking> {TOLD}",
    # gpt-oss, with its control tokens and without
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
    f"<|message|>{TOLD}<|return|>",
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
    "to=functions.f<|message|>{}<|call|><|start|>assistant<|channel|>final"
    f" <|constrain|>json<|message|>{TOLD}",
    f"<|channel|>final<|message|>{TOLD}",
    f"analysisWe should answer.assistantfinal{TOLD}",
    f"analysisWe should.assistantcommentaryHm.assistantfinal{TOLD}",
  ],
)
def test_thinking_is_taken_out_by_its_marks(reply):
  made = engines.strip_thinking(engines.Completion(reply, "stop", 5, 100))
  assert made.text == TOLD
  assert made.completion_tokens == 100
  assert judging.no_answer(made, "") is None


@pytest.mark.parametrize(
  "reply",
  [
    "[THINK]Hm. A tort",
    "<seed:think>Hm.",
    "Hm.</seed:think>A tort is a wrong.",  # who opened it, is not known here
    "<|START_THINKING|>Hm.",
    "<thought>Hm.",
    "<reasoning>Hm.",
    "A tort. <thinking>Or not?</thinking>",
    "analysisWe should answer. A tort",
    "<|channel|>analysis<|message|>Hm. A tort",
    "<|channel|>commentary<|message|>A tort",
  ],
)
def test_what_is_left_of_thinking_is_no_answer(reply):
  made = engines.strip_thinking(engines.Completion(reply, "stop", 5, 10))
  assert judging.no_answer(made, "") == "thinking"
  assert thinking.left_in(made.text)


@pytest.mark.parametrize(
  "reply",
  [
    "Analysis of the case shows a wrong.",
    "analysis shows a wrong.",
    "analysis: a wrong.",
    "The final assistant was wrong.",
    "Answer in <answer> tags.",
    "I think [so].",
  ],
)
def test_words_of_an_answer_are_no_thinking(reply):
  made = engines.Completion(reply, "stop", 5, 10)
  assert engines.strip_thinking(made) == made
  assert judging.no_answer(made, "") is None


def test_a_models_own_marks_count_wherever_they_stand():
  marks = thinking.Marks("<<", ">>")
  assert thinking.answer("Hm.>>Yes.", [marks]) == "Yes."
  assert thinking.answer("A<<Hm.>>B", [thinking.THINK, marks]) == "AB"
  assert thinking.left_in("A<<Hm.", [marks])
  assert not thinking.left_in("A<<Hm.")
  assert thinking.own("{%- if x %}[THINK]") == (thinking.THINK, thinking.KNOWN[1])
  assert thinking.own("") == (thinking.THINK,)


def test_unknown_counts_stay_unknown():
  reply = engines.Completion("<think>Hm.</think>Yes.", "stop", None, None)
  made = engines.strip_thinking(reply)
  assert made == engines.Completion("Yes.", "stop", None, None, None)


@pytest.mark.parametrize("mark", ["[THINK]", "<thought>", "<|channel|>analysis"])
def test_verdicts_and_pairs_are_not_read_from_thinking(mark):
  verdict = f'{mark}Say {{"score": 0.9}}, or [{{"a": 1}}]?'
  assert judging.parse_score(verdict) is None
  assert judging.json_in(verdict) is None
  made = engines.Completion(f'{mark}{{"pairs": [1]}} or', "stop", 5, 10)
  assert qa_pairs.parse_pairs(made) == "not_json"


def test_marks_that_are_control_tokens_are_read(smollm):
  """As Magistral's and gpt-oss's, which transformers leaves out of a text."""
  chat_tokenizer = chat.load(smollm)
  words: transformers.PreTrainedTokenizerFast = chat_tokenizer.hf_tokenizer
  marks = ["[THINK]", "[/THINK]"]
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words.backend_tokenizer,
    eos_token=words.eos_token,
    additional_special_tokens=marks,
  )
  ids = tokenizer("[THINK]Hm. \u00e9[/THINK]Yes, \u00e9.<|im_end|>")["input_ids"]
  assert tokenizer.decode(ids, skip_special_tokens=True) == "Hm. \u00e9Yes, \u00e9."
  special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
  known = dataclasses.replace(
    chat_tokenizer, hf_tokenizer=tokenizer, controls=tuple(special)
  )
  said = thinking.decode(known, ids)
  assert said == "[THINK]Hm. \u00e9[/THINK]Yes, \u00e9."
  assert thinking.answer(said, thinking.own("[THINK]")) == "Yes, \u00e9."
