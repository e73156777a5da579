"""IFEval and MMLU as lm-evaluation-harness runs them, on items written for this."""

import json
import pathlib
import random

import numpy as np
import pytest

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.evaluation import benchmarks, intervals, scoring, test_sets
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.storage import journal
from tests.helpers import lm_eval_requests, tiny_run

ORDERS = [
  {
    "key": 1,
    "prompt": "Describe a river. Do not use commas.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
  },
  {
    "key": 2,
    "prompt": "Write at least 3 sentences about rain, wrapped in double quotes.",
    "instruction_id_list": [
      "length_constraints:number_sentences",
      "startend:quotation",
    ],
    "kwargs": [{"num_sentences": 3, "relation": "at least"}, {}],
  },
  {
    "key": 3,
    "prompt": "Answer in English and lowercase letters, without commas.",
    "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"],
    "kwargs": [{}, {}],
  },
]
ANSWERS = [
  "It winds, slowly, to the sea.",  # a comma
  '* "Rain fell. It was loud! Dr. Lee slept."',  # quoted only once the star is gone
  "",  # an empty answer follows nothing
]


@pytest.fixture(scope="module")
def checkers():
  return benchmarks.load_checkers(lm_eval_requests.PUNKT)


def _orders(tmp_path, rows=ORDERS, limit=None):
  path = tmp_path / "ifeval.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return benchmarks.read(
    benchmarks.Instructions, str(path), key="evaluate.ifeval.items", limit=limit
  )


def test_ifeval_by_hand(tmp_path, checkers):
  scores = benchmarks.ifeval_scores(_orders(tmp_path), ANSWERS, checkers)
  # Sentences of the second: "Dr." ends none, so three; strict fails the quotes only.
  assert scores["ifeval_prompt_strict"].values_N.tolist() == [0, 0, 0]
  assert scores["ifeval_prompt_loose"].values_N.tolist() == [0, 1, 0]
  strict, loose = (scores[f"ifeval_instruction_{way}"] for way in ("strict", "loose"))
  assert intervals.mean(strict) == pytest.approx(1 / 5)
  assert intervals.mean(loose) == pytest.approx(2 / 5)
  # Three instructions are left without the two on commas.
  without = scores["ifeval_instruction_strict_but_no_comma"]
  assert without.weights_N.tolist() == [0, 2, 1]
  assert intervals.mean(without) == pytest.approx(1 / 3)


def test_ifeval_aggregates_as_the_harness(tmp_path, checkers):
  from lm_eval.tasks.ifeval import utils

  items = _orders(tmp_path)
  answers = ["no comma here", '"One. Two. Three."', "all lower case, one comma"]
  scores = benchmarks.ifeval_scores(items, answers, checkers)
  rows = [utils.process_results(row, [a]) for row, a in zip(ORDERS, answers)]
  for way in ("strict", "loose"):
    by_instruction = utils.agg_inst_level_acc(
      [r[f"inst_level_{way}_acc"] for r in rows]
    )
    by_prompt = np.mean([r[f"prompt_level_{way}_acc"] for r in rows])
    actual = scores[f"ifeval_instruction_{way}"]
    assert intervals.mean(actual) == pytest.approx(by_instruction)
    assert intervals.mean(scores[f"ifeval_prompt_{way}"]) == pytest.approx(by_prompt)
    assert 0 < by_instruction < 1


def test_language_is_detected_the_same_each_time(tmp_path, checkers):
  row = {
    "key": 4,
    "prompt": "Answer in Italian.",
    "instruction_id_list": ["language:response_language"],
    "kwargs": [{"language": "it"}],
  }
  items = _orders(tmp_path, [row] * 20)
  scores = benchmarks.ifeval_scores(items, ["ciao no si"] * 20, checkers)
  assert len(set(scores["ifeval_prompt_strict"].values_N)) == 1


def test_what_a_checker_draws_is_the_same_each_time(tmp_path, checkers):
  row = {
    "key": 5,
    "prompt": "Shout.",
    "instruction_id_list": ["keywords:letter_frequency"],
    # No letter: the checker draws one.
    "kwargs": [{"letter": "!", "let_frequency": 2, "let_relation": "at least"}],
  }
  answers = ["aabbccddeeffgg"] * 40  # half of the alphabet
  before = random.getstate()
  scores = benchmarks.ifeval_scores(_orders(tmp_path, [row] * 40), answers, checkers)
  assert random.getstate() == before
  random.random()
  again = benchmarks.ifeval_scores(_orders(tmp_path, [row]), answers[:1], checkers)
  actual = [*scores["ifeval_prompt_strict"].values_N]
  assert set(actual) == set(again["ifeval_prompt_strict"].values_N)


def test_missing_sentence_model_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=r"nltk_data: NLTK's sentence model"):
    _without_punkt(tmp_path)


def _without_punkt(tmp_path):
  import nltk

  before = list(nltk.data.path)
  nltk.data.path[:] = []
  try:
    benchmarks.load_checkers(str(tmp_path))
  finally:
    nltk.data.path[:] = before


@pytest.mark.parametrize(
  "broken",
  [
    {"instruction_id_list": ["punctuation:no_coma"]},
    {"kwargs": []},
    {"kwargs": [{"num_sentence": 3}, {}]},
    {"kwargs": [{"num_sentences": 3, "relation": "at most"}, {}]},
  ],
  ids=str,
)
def test_instructions_that_cannot_be_checked_are_named(tmp_path, checkers, broken):
  items = _orders(tmp_path, [ORDERS[0], ORDERS[1] | broken])
  with pytest.raises(errors.UserError, match=r"k: item 2: its instructions cannot be"):
    benchmarks.check_instructions(items, checkers, key="k")
  benchmarks.check_instructions(_orders(tmp_path), checkers, key="k")


def test_only_a_line_feed_ends_a_row(tmp_path):
  path = tmp_path / "prompts.jsonl"
  text = "one\u2028line"
  row = json.dumps({"prompt": text}, ensure_ascii=False)
  path.write_text(f"{row}\r\n\n{row}\n{{", encoding="utf-8")
  actual = benchmarks.read(benchmarks.Prompt, str(path), key="k", limit=2)
  assert [item.prompt for item in actual] == [text, text]
  with pytest.raises(errors.UserError, match=r"prompts\.jsonl:4: is not valid JSON"):
    benchmarks.read(benchmarks.Prompt, str(path), key="k")


def test_bad_items_are_named_with_their_line(tmp_path):
  with pytest.raises(errors.UserError, match=r"ifeval\.jsonl:2: instruction_id_list"):
    _orders(tmp_path, [ORDERS[0], {"key": 2, "prompt": "?", "kwargs": []}])
  assert len(_orders(tmp_path, [ORDERS[0], {}], limit=1)) == 1
  with pytest.raises(errors.UserError, match="has no rows"):
    _orders(tmp_path, [])
  path = tmp_path / "broken.jsonl"
  path.write_text('{"prompt": "x"}\n{"prompt": \n')
  with pytest.raises(errors.UserError, match=r"broken\.jsonl:2: is not valid JSON"):
    benchmarks.read(benchmarks.Prompt, str(path), key="evaluate.drift.prompts")
  with pytest.raises(errors.UserError, match=r"evaluate\.drift\.prompts: cannot read"):
    benchmarks.read(benchmarks.Prompt, "no/such.jsonl", key="evaluate.drift.prompts")
  with pytest.raises(errors.UserError, match=r"evaluate\.drift\.prompts: cannot load"):
    benchmarks.read(benchmarks.Prompt, "no/such_set", key="evaluate.drift.prompts")


def _choice(subject: str, i: int) -> dict:
  choices = [f"{subject[:3]} {word} {i}" for word in ("red", "old", "far", "low")]
  return {
    "subject": subject,
    "question": f" Which of these is number {i} of {subject}? ",
    "choices": choices,
    "answer": "ABCD"[i % 4],
  }


SUBJECTS = ("moral_disputes", "anatomy")


@pytest.fixture
def quiz(tmp_path) -> dict[str, pathlib.Path]:
  """Three test questions and two solved ones of two subjects."""
  files = {}
  for name, numbers in (("test", range(3)), ("dev", range(7, 9))):
    files[name] = tmp_path / f"{name}.jsonl"
    rows = [_choice(subject, i) for subject in SUBJECTS for i in numbers]
    files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
  return files


@pytest.mark.slow
def test_mmlu_equals_the_harness_item_by_item(tmp_path, quiz, smollm):
  """Prompts and log-probabilities of lm-eval's own Hugging Face model."""
  folder = str(tiny_run.save_model(tmp_path / "model", smollm))
  samples = lm_eval_requests.asked_by_the_harness(
    folder, tmp_path / "tasks", quiz, shots=2
  )
  prompts = [row["arguments"][0][0] for row in samples]
  expected = [[response[0][0] for response in row["resps"]] for row in samples]

  chat_tokenizer, decoder = chat.load(folder), hf_load.load_config(folder)
  settings = schema.Mmlu(items=str(quiz["test"]), examples=str(quiz["dev"]), shots=2)
  mmlu = test_sets.read_mmlu(settings, chat_tokenizer)
  assert mmlu.prompts == [
    chat.document_ids(chat_tokenizer, prompt) for prompt in prompts
  ]
  model = scoring.eval_model(
    hf_load.load_params(folder, decoder),
    decoder,
    chat_tokenizer,
    scoring.Settings(batch_size=4, dtype="float32", unroll=1),
    "tiny",
  )
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    logits = scoring.choices(model, mmlu.prompts, mmlu.letters, log, name="MMLU")
  actual, wanted = np.array(logits), np.array(expected)
  # The harness has log-probabilities: the same but for one constant a prompt.
  np.testing.assert_allclose(actual - actual[:, :1], wanted - wanted[:, :1], atol=1e-5)
  right = benchmarks.mmlu_scores(mmlu.items, logits)["mmlu"].values_N
  assert right.tolist() == [row["acc"] for row in samples]


def test_mmlu_needs_its_examples(quiz, smollm):
  chat_tokenizer = chat.load(smollm)
  with pytest.raises(errors.UserError, match=r"evaluate\.mmlu\.examples: not set"):
    test_sets.read_mmlu(schema.Mmlu(items=str(quiz["test"])), chat_tokenizer)
  too_many = schema.Mmlu(items=str(quiz["test"]), examples=str(quiz["dev"]), shots=3)
  with pytest.raises(errors.UserError, match="2 examples of subject 'moral_disputes'"):
    test_sets.read_mmlu(too_many, chat_tokenizer)
  none = test_sets.read_mmlu(
    schema.Mmlu(items=str(quiz["test"]), shots=0), chat_tokenizer
  )
  assert "(with answers) about moral disputes.\n\nWhich" in chat.decode(
    chat_tokenizer, none.prompts[0]
  )


def test_numbered_answers_of_the_hub_are_read_as_letters():
  row = _choice("anatomy", 0)
  assert benchmarks.Choice.model_validate(row | {"answer": 3}).answer == "D"
  for wrong in (4, -1, True, "E", None):
    with pytest.raises(ValueError, match=r"answer"):
      benchmarks.Choice.model_validate(row | {"answer": wrong})


OBEDIENT = [
  "The green chlorophyll fades.",
  "Flour and water are kneaded, then baked in an oven.",
  "A mountain that spits fire.",
  "Go to bed early.",
  "Waves touch my feet.",
  "It explains words.",
  "* fox\n* deer\n* owl\n* boar",
  "* bread\n* cheese\n* a blanket",
  "<<first snow>>\nit falls",
  "<<The Warm Crumb>>\nA small bakery.",
  "the smell of it.",
  "you steer into the fall.",
  "CAUTION! THE FLOOR IS WET, SO PLEASE WALK SLOWLY AND HOLD THE HAND RAIL.",
  "THE SCHOOL CHOIR SINGS TONIGHT.",
  "It has no air. Look up tonight.",
  "Thank you for the water. See you soon!",
  '"Ask when you are lost."',
  '"The slow river cuts the stone."',
  "I miss you.\n\nP.S. Bring the map.",
  "The window is broken.\n\nP.S. It is cold.",
  "First *boil the water*.",
  "It has *trust* and *humour*.",
  '{"name": "Tom", "age": 3, "colour": "grey"}',
  '{"capital": "Paris", "river": "Seine"}',
  "Biscuit\n******\nPepper",
  "Come on [date] at [time].",
  "Dear [name], I write to complain.",
  "The market is loud. " * 15,
  "Light scatters. Blue scatters most. So the sky is blue.",
  "An apple pie holds apple slices under a crust that smells of apple.",
  "It leads a road over a river.",
  "Tea is mild.\n***\nCoffee is strong.",
]


def test_our_own_instructions_can_be_obeyed(checkers):
  """Each prompt asks for what its checker wants, and the checkers want something."""
  items = benchmarks.read(
    benchmarks.Instructions, "configs/data/instructions.jsonl", key="k"
  )
  scores = benchmarks.ifeval_scores(items, OBEDIENT, checkers)
  assert scores["ifeval_prompt_strict"].values_N.tolist() == [1.0] * len(items)
  shifted = benchmarks.ifeval_scores(items, OBEDIENT[5:] + OBEDIENT[:5], checkers)
  assert shifted["ifeval_prompt_strict"].values_N.mean() < 0.5
