"""IFEval and MMLU of the real small model as lm-evaluation-harness scores them.

Over 104 items each, made of what is committed. Where RAFT_JAX_GENERAL names a folder
with ifeval.jsonl, mmlu_test.jsonl and mmlu_dev.jsonl: over the first 104 of these.
"""

import itertools
import json
import os
import pathlib
import random

import numpy as np
import pytest

from raft_jax.config import schema
from raft_jax.evaluation import (
  benchmarks,
  greedy_answers,
  intervals,
  scoring,
  test_sets,
)
from raft_jax.hf import chat
from raft_jax.hf import save as hf_save
from raft_jax.storage import journal, records
from tests.helpers import lm_eval_requests, tiny_run

pytestmark = pytest.mark.slow

ITEMS = 104
DATA = pathlib.Path(__file__).parents[2] / "configs/data"
GENERAL = os.environ.get("RAFT_JAX_GENERAL")


def _rows(path: pathlib.Path, limit: int | None = None) -> list[dict]:
  lines = itertools.islice(path.read_text().splitlines(), limit)
  return [json.loads(line) for line in lines]


def _write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _quiz(domain: str) -> list[dict]:
  """Questions of a domain; the wrong choices are other entries' answers."""
  rows = _rows(DATA / f"wordnet/{domain}/train.jsonl")
  answers = {row["question"]: row["answer"].split(". ")[0].rstrip(".") for row in rows}
  # The shortest, so that five solved questions stay short, too.
  answers = dict(sorted(answers.items(), key=lambda pair: len(pair[1]))[:40])
  said, actual = list(answers.values()), []
  for i, question in enumerate(answers):
    choices = [said[(i + step) % len(said)] for step in (7, 11, 13)]
    choices.insert(i % 4, said[i])
    actual.append(
      {
        "subject": domain,
        "question": question,
        "choices": choices,
        "answer": "ABCD"[i % 4],
      }
    )
  return actual


ORDERS = (
  ("punctuation:no_comma", {}, "Do not use commas."),
  ("change_case:english_lowercase", {}, "Use lowercase letters only."),
  (
    "length_constraints:number_words",
    {"num_words": 40, "relation": "at least"},
    "Answer in at least 40 words.",
  ),
  (
    "detectable_format:number_bullet_lists",
    {"num_bullets": 3},
    "Answer in exactly 3 bullet points, such as:\n* This is a point.",
  ),
  (
    "keywords:existence",
    {"keywords": ["time", "people"]},
    "Use the words time and people.",
  ),
  ("startend:quotation", {}, "Wrap the whole answer in double quotation marks."),
  ("detectable_format:title", {}, "Give a title in double angular brackets, <<so>>."),
  (
    "keywords:forbidden_words",
    {"forbidden_words": ["the"]},
    "Do not use the word the.",
  ),
  (
    "length_constraints:number_sentences",
    {"num_sentences": 4, "relation": "less than"},
    "Answer in less than 4 sentences.",
  ),
)


def _orders() -> list[dict]:
  """Each general prompt with two instructions, of which no pair comes twice to it."""
  prompts = [row["prompt"] for row in _rows(DATA / "prompts.jsonl")]
  actual = []
  for i in range(ITEMS):
    chosen = [ORDERS[i % len(ORDERS)], ORDERS[(i + 1 + i // 64) % len(ORDERS)]]
    kinds, options, words = zip(*chosen)
    actual.append(
      {
        "key": i,
        "prompt": " ".join([prompts[i % len(prompts)], *words]),
        "instruction_id_list": list(kinds),
        "kwargs": list(options),
      }
    )
  return actual


@pytest.fixture
def files(tmp_path) -> dict[str, pathlib.Path]:
  if GENERAL:
    folder = pathlib.Path(GENERAL)
    test, dev = (
      _rows(folder / "mmlu_test.jsonl", ITEMS),
      _rows(folder / "mmlu_dev.jsonl"),
    )
    orders = _rows(folder / "ifeval.jsonl", ITEMS)
  else:
    domains = sorted(path.name for path in DATA.glob("wordnet/*/"))
    quizzes = [_quiz(domain) for domain in domains]
    each = -(-ITEMS // len(domains))
    dev = [row for quiz in quizzes for row in quiz[:5]]
    test = [row for quiz in quizzes for row in quiz[5 : 5 + each]][:ITEMS]
    orders = _orders()
  assert len(test) == len(orders) == ITEMS
  return {
    name: _write(tmp_path / f"{name}.jsonl", rows)
    for name, rows in (("test", test), ("dev", dev), ("ifeval", orders))
  }


@pytest.fixture(scope="module")
def model(smollm) -> scoring.EvalModel:
  return tiny_run.eval_model(smollm, batch_size=8, title="SmolLM2")


def test_mmlu_with_five_examples(tmp_path, smollm, model, files, capsys):
  folder = tmp_path / "exported"
  hf_save.save(folder, model.params, model.config, smollm, card="")
  settings = schema.Mmlu(items=str(files["test"]), examples=str(files["dev"]), shots=5)
  mmlu = test_sets.read_mmlu(settings, model.tokenizer)
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    logits = scoring.choices(model, mmlu.prompts, mmlu.letters, log, name="MMLU")
  right = benchmarks.mmlu_scores(mmlu.items, logits)["mmlu"].values_N

  quiz = {name: files[name] for name in ("test", "dev")}
  samples = lm_eval_requests.asked_by_the_harness(
    str(folder), tmp_path / "tasks", quiz, shots=5
  )
  prompts = [
    chat.document_ids(model.tokenizer, row["arguments"][0][0]) for row in samples
  ]
  wanted = np.array([[reply[0][0] for reply in row["resps"]] for row in samples])
  # Log-probabilities among the four letters: ours are logits, theirs of all tokens.
  ours, theirs = (
    values
    - np.log(np.exp(values - values[:, :1]).sum(1, keepdims=True))
    - values[:, :1]
    for values in (np.array(logits), wanted)
  )
  agree = right == np.array([row["acc"] for row in samples])
  with capsys.disabled():
    print(
      f"\nMMLU, {len(samples)} items: {agree.sum()} agree, accuracy {right.mean():.4f}"
      f" and {np.mean([row['acc'] for row in samples]):.4f}, log-probabilities differ"
      f" by at most {np.abs(ours - theirs).max():.1e}; prompts of"
      f" {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    )
  assert len(samples) == ITEMS
  assert mmlu.prompts == prompts
  np.testing.assert_allclose(ours, theirs, atol=1e-3)
  assert agree.all()
  assert 0 < right.mean() < 1


IFEVAL = """include: {harness}/tasks/ifeval/ifeval.yaml
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{train: {items}}}}}
"""


class Lowest(random.Random):
  """Draws the first of a choice, the least of a range."""

  def random(self):
    return 0.0


def test_ifeval_of_greedy_answers(tmp_path, model, files, capsys, monkeypatch):
  import lm_eval
  from lm_eval import evaluator, tasks
  from lm_eval.api import model as protocol
  from lm_eval.tasks.ifeval import instructions

  # A checker draws what an item leaves open: here the same for both.
  monkeypatch.setattr(instructions, "random", Lowest())
  settings = schema.Evaluate.model_validate(
    {"ifeval": {"items": str(files["ifeval"]), "nltk_data": lm_eval_requests.PUNKT}}
  )
  ifeval = test_sets.read_general(settings, model.tokenizer).ifeval
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    replies = greedy_answers.generate(
      model,
      ifeval.prompts,
      log,
      max_new_tokens=64,
      name="IFEval",
      messages=[records.user_turn(item.prompt) for item in ifeval.items],
    )
  said = [reply.text for reply in replies]
  scores = benchmarks.ifeval_scores(ifeval.items, said, ifeval.checkers)

  class Said(protocol.LM):
    """Gives the harness those answers."""

    def generate_until(self, requests):
      known = dict(zip((item.prompt for item in ifeval.items), said, strict=True))
      return [known[request.args[0]] for request in requests]

    def loglikelihood(self, requests):
      raise NotImplementedError

    loglikelihood_rolling = loglikelihood

  assert len({item.prompt for item in ifeval.items}) == ITEMS
  (tmp_path / "tasks").mkdir()
  (tmp_path / "tasks/written.yaml").write_text(
    IFEVAL.format(harness=pathlib.Path(lm_eval.__file__).parent, items=files["ifeval"])
  )
  manager = tasks.TaskManager(include_path=tmp_path / "tasks", include_defaults=False)
  harness = evaluator.evaluate(Said(), manager.load(["written"]), bootstrap_iters=0)
  samples, results = harness["samples"]["written"], harness["results"]["written"]
  assert len(samples) == ITEMS
  words = []
  for way in ("strict", "loose"):
    prompt = scores[f"ifeval_prompt_{way}"]
    instruction = scores[f"ifeval_instruction_{way}"]
    rows = [row[f"inst_level_{way}_acc"] for row in samples]
    for actual, items, name in (
      (prompt, [float(row[f"prompt_level_{way}_acc"]) for row in samples], "prompt"),
      (instruction, [np.mean(row) for row in rows], "inst"),
    ):
      agree = actual.values_N == np.array(items)
      ours = intervals.mean(actual)
      theirs = results[f"{name}_level_{way}_acc,none"]
      words.append(f"{name} {way} {agree.sum()} agree, {ours:.4f} and {theirs:.4f}")
      assert agree.all()
      assert ours == pytest.approx(theirs, abs=1e-12)
      assert 0 < ours < 1
    assert instruction.weights_N.tolist() == [len(row) for row in rows]
  with capsys.disabled():
    print(f"\nIFEval, {len(samples)} items: {'; '.join(words)}")
