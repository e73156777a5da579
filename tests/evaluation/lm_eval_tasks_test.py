"""Tasks of lm-evaluation-harness against its own model, which runs transformers."""

import functools
import json
import pathlib
import sys
import types

import lm_eval
import numpy as np
import pytest
import tokenizers
import transformers
from lm_eval import tasks as harness_tasks
from lm_eval.models import huggingface

from raft_jax import errors, evaluate, evaluation
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.evaluation import (
  intervals,
  lm_eval_model,
  lm_eval_tasks,
  scoring,
  test_sets,
)
from raft_jax.models import sampling
from raft_jax.reporting import run_folder, run_page
from raft_jax.storage import journal
from tests.helpers import tiny_run

WORDS = ("law", "river", "judge", "stone", "court", "water", "appeal", "wind", "rain")


def _words(start: int, count: int) -> str:
  return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(count))


def _questions(seed: int, count: int) -> list[dict]:
  """The fourth is longer than the tiny model's 512 positions."""
  return [
    {
      "question": _words(seed + i, 700 if (seed, i) == (0, 3) else 5 + i),
      "choices": [_words(seed + i + k, 1 + (i + k) % 3) for k in range(4)],
      "answer": (seed + i) % 4,
    }
    for i in range(count)
  ]


TASKS = {
  # Choices of several tokens, after two solved examples.
  "quiz": """
output_type: multiple_choice
test_split: test
fewshot_split: dev
num_fewshot: 2
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
  # Choices of one token, which share their context.
  "letters": """
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}\\nWhich letter?"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: !function average.count, higher_is_better: true}
""",
  "story": """
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: STOP, max_gen_toks: 40, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
""",
  "roll": """
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}
GROUP = """
group: both
task: [quiz, letters]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


def _write(folder: pathlib.Path, stop: list[str]) -> pathlib.Path:
  folder.mkdir()
  for split, rows in (("test", _questions(0, 6)), ("dev", _questions(1, 5))):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines)
  files = {split: str(folder / f"{split}.jsonl") for split in ("test", "dev")}
  for name, body in TASKS.items():
    head = {"task": name, "dataset_path": "json"}
    head["dataset_kwargs"] = {"data_files": files}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    whole = "\n".join(lines) + body.replace("STOP", json.dumps(stop))
    (folder / f"{name}.yaml").write_text(whole)
  (folder / "both.yaml").write_text(GROUP)
  (folder / "average.py").write_text("def count(items):\n  return float(len(items))\n")
  return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm) -> str:
  """Of large weights, untied: others repeat the last token for ever."""
  folder, fields = tmp_path_factory.mktemp("model"), {"tie_word_embeddings": False}
  return str(tiny_run.save_model(folder, smollm, initializer_range=0.3, **fields))


@pytest.fixture(scope="module")
def model(tiny) -> scoring.EvalModel:
  return tiny_run.eval_model(tiny, batch_size=4, title="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> pathlib.Path:
  """The tasks; the stop string is in the midst of what the model says first."""
  path = tmp_path_factory.mktemp("stop")
  prompt = model.tokenizer.hf_tokenizer.encode(_questions(0, 1)[0]["question"])
  with journal.open_journal(path / "journal.jsonl") as log:
    (said,) = lm_eval_model.answers_until(model, [prompt], [], 40, log)
  middle = len(said) // 2
  return _write(path / "tasks", [said[middle : middle + 4], "never said"])


@pytest.fixture
def alone(monkeypatch):
  """Without the harness' own tasks, whose index takes a while."""
  quick = functools.partial(harness_tasks.TaskManager, include_defaults=False)
  monkeypatch.setattr(lm_eval_tasks.harness_tasks, "TaskManager", quick)


def _settings(folder: pathlib.Path, *names: str, **more) -> schema.Tasks:
  return schema.Tasks(names=names, include=str(folder), **more)


@pytest.mark.parametrize("chat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_replies_and_scores_equal_those_of_transformers(
  tmp_path, tiny, model, folder, alone, chat
):
  names = ["both", "story"] if chat else ["both", "story", "roll"]
  manager = harness_tasks.TaskManager(include_path=str(folder), include_defaults=False)
  ask = functools.partial(
    lm_eval.simple_evaluate,
    tasks=names,
    task_manager=manager,
    bootstrap_iters=0,
    apply_chat_template=chat,
  )
  theirs = ask(
    huggingface.HFLM(pretrained=tiny, dtype="float32", device="cpu", batch_size=3)
  )
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    ours = ask(lm_eval_model.Adapter(model, log))
    computed = len(log.calls)
    actual = lm_eval_tasks.score(
      lm_eval_tasks.read(_settings(folder, *names, chat=chat), 512), model, log
    )
    assert len(log.calls) == computed  # the very same requests
  for name, wanted in theirs["samples"].items():
    for mine, other in zip(ours["samples"][name], wanted, strict=True):
      assert mine["arguments"] == other["arguments"]
      for reply, expected in zip(mine["resps"], other["resps"], strict=True):
        if name == "story":
          assert reply == expected
        elif name == "roll":
          assert reply[0] == pytest.approx(expected[0], abs=2e-3, rel=1e-5)
        else:
          assert reply[0][0] == pytest.approx(expected[0][0], abs=1e-4)
          assert reply[0][1] == expected[0][1]
  if not chat:
    (said, *_), *_ = (row["resps"][0] for row in theirs["samples"]["story"])
    assert 0 < len(said.split()) < 30  # stopped
  # What the scores are made of is the harness' own, item by item.
  for name, metric, chosen in (
    ("quiz", "acc", ""),
    ("quiz", "acc_norm", ""),
    ("letters", "acc", ""),
    ("story", "exact_match", "_whole"),
  ):
    score = actual.scores[f"task_{name}_{metric}{chosen}"]
    assert score.share
    items = [row[metric] for row in theirs["samples"][name]]
    assert score.values_N.tolist() == items
    assert actual.directions[f"task_{name}_{metric}{chosen}"] == 1
  both = actual.scores["task_both_acc"]
  assert len(both.values_N) == 12
  assert intervals.mean(both) == pytest.approx(theirs["results"]["both"]["acc,none"])
  assert actual.scores["task_letters_f1"] == 6.0  # the harness' figure, of no items
  if not chat:
    rolled = theirs["results"]["roll"]
    bits = actual.scores["task_roll_bits_per_byte"]
    assert len(bits.values_N) == 6
    assert intervals.mean(bits) == pytest.approx(rolled["bits_per_byte,none"], rel=1e-5)
    assert actual.directions["task_roll_bits_per_byte"] == -1
    perplexity = actual.scores["task_roll_word_perplexity"]
    assert perplexity == pytest.approx(rolled["word_perplexity,none"], rel=1e-3)


def test_limit_shots_and_seeds(tmp_path, model, folder, alone):
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    digests = []
    for shots in (2, 2, 1):
      tasks = lm_eval_tasks.read(_settings(folder, "quiz", limit=2, shots=shots), 512)
      actual = [lm_eval_tasks.score(tasks, model, log) for _ in range(2)]
      assert len(actual[0].scores["task_quiz_acc"].values_N) == 2
      # The examples are drawn, and the same for both models.
      assert actual[0].item_digests == actual[1].item_digests
      digests.append(actual[0].item_digests["task_quiz"])
  assert digests[0] == digests[1] != digests[2]


def test_a_killed_evaluation_repeats_nothing(
  tmp_path, model, folder, alone, monkeypatch, caplog
):
  tasks = lm_eval_tasks.read(_settings(folder, "both", "story", "roll"), 512)
  computed: list[int] = []
  left = [2]

  def counted(function):
    @functools.wraps(function)
    def call(*args, **names):
      if not left[0]:
        raise KeyboardInterrupt
      left[0] -= 1
      computed.append(1)
      return function(*args, **names)

    return call

  for module, name in (
    (lm_eval_model, "continuation_log_probs"),
    (sampling, "generate"),
  ):
    monkeypatch.setattr(module, name, counted(getattr(module, name)))

  def measured(allowed: int) -> lm_eval_tasks.TaskScores:
    computed.clear()
    left[0] = allowed
    with journal.open_journal(tmp_path / "journal.jsonl") as log:
      return lm_eval_tasks.score(tasks, model, log)

  batches = []
  for _ in range(99):
    try:
      actual = measured(2)
    except KeyboardInterrupt:
      batches.append(len(computed))
    else:
      batches.append(len(computed))
      break
  again = measured(0)
  assert computed == []
  assert again.scores["task_quiz_acc"].values_N.tolist() == (
    actual.scores["task_quiz_acc"].values_N.tolist()
  )
  # One go takes as many batches as all the killed ones together.
  (tmp_path / "journal.jsonl").unlink()
  measured(99)
  assert sum(batches) == len(computed) > 6
  # The longest question is asked with four choices, twice, and to be continued.
  assert "lost their beginning" in caplog.text


def test_a_context_of_spaces_is_the_start_of_a_text(tmp_path, model):
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    adapter = lm_eval_model.Adapter(model, log)
    requests = [types.SimpleNamespace(args=args) for args in ((" ", "a"), ("", " a"))]
    one, other = adapter.loglikelihood(requests)
  assert one == other


def test_the_journal_tells_continuations_apart(tmp_path, model):
  """Of the same tokens: another last one, and another place where they begin."""
  pairs = (("rain law", " river"), ("rain law", " wind"), ("rain", " law river"))
  actual = []
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    for args in pairs:
      adapter = lm_eval_model.Adapter(model, log)
      actual += adapter.loglikelihood([types.SimpleNamespace(args=args)])
    assert len(log.calls) == 3
  assert len({log_p for log_p, _ in actual}) == 3


def test_choices_of_one_token_share_their_context(tmp_path, model, folder, alone):
  tasks = lm_eval_tasks.read(_settings(folder, "letters"), 512)
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    lm_eval_tasks.score(tasks, model, log)
    assert len(log.calls) == 6


def test_bos_is_added_as_the_harness_adds_it(model):
  backend = tokenizers.Tokenizer.from_str(
    model.tokenizer.hf_tokenizer.backend_tokenizer.to_str()
  )
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
  )
  for bos in ("<|im_start|>", None):
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token=bos, eos_token="<|im_end|>"
    )
    theirs = types.SimpleNamespace(tokenizer=tokenizer, add_bos_token=None)
    theirs.custom_prefix_token_id = None
    theirs.prefix_token_id = huggingface.HFLM.prefix_token_id.fget(theirs)
    chat_tokenizer = types.SimpleNamespace(
      hf_tokenizer=tokenizer, digest="", vocab_size=None
    )
    ours = lm_eval_model.Adapter(model._replace(tokenizer=chat_tokenizer), None)
    assert ours.prefix_token_id == theirs.prefix_token_id == (1 if bos else 2)
    for added in (None, True, False):
      for words in ("rain", "<|im_start|>user\nrain", "<|im_end|>rain", ""):
        expected = huggingface.HFLM.tok_encode(theirs, words, add_special_tokens=added)
        assert ours.tok_encode(words, add_special_tokens=added) == expected


def test_a_special_token_may_be_a_stop_string(tmp_path, model):
  ids = [
    *model.tokenizer.hf_tokenizer.encode("one two"),
    0,
    *model.tokenizer.hf_tokenizer.encode("three"),
  ]

  def stopped(row):
    return "<|endoftext|>" in model.tokenizer.hf_tokenizer.decode(row)

  assert lm_eval_model._until(ids, stopped) == [
    *model.tokenizer.hf_tokenizer.encode("one two"),
    0,
  ]
  assert lm_eval_model._until(ids[:2], stopped) == ids[:2]


def _refused(folder: pathlib.Path, match: str, *names: str, positions: int = 512):
  with pytest.raises(errors.UserError, match=match):
    lm_eval_tasks.read(_settings(folder, *names), positions)


def test_what_cannot_be_asked_is_named(tmp_path, folder, alone):
  _refused(
    folder, r"tasks\.names: .* has no task 'quizz'; did you mean 'quiz'", "quizz"
  )
  _refused(tmp_path / "no", r"tasks\.include: .*no is not a folder", "quiz")
  _refused(folder, r"names: Duplicate task 'quiz'.* leave one", "both", "quiz")
  _refused(folder, r"names: story asks for answers of 40 tokens", "story", positions=40)
  other = _write(tmp_path / "tasks", ["x"])
  story = (other / "story.yaml").read_text()
  for change, words in (
    ("do_sample: true, temperature: 0.7", "story asks for .*do_sample=True"),
    ("temperature: 0.7", r"story asks for .*temperature=0\.7"),
    ("num_beams: 4", "story asks for .*num_beams=4"),
  ):
    (other / "story.yaml").write_text(story.replace("do_sample: false", change))
    _refused(other, words + ".*greedily", "story")
  (other / "story.yaml").write_text(story.replace("do_sample: false", "num_beams: 1"))
  lm_eval_tasks.read(_settings(other, "story"), 512)
  quiz = (other / "quiz.yaml").read_text()
  (other / "quiz.yaml").write_text(f"unsafe_code: true\n{quiz}")
  _refused(other, "names: quiz runs code", "quiz")
  broken = quiz.replace('"json"', '"no/such_dataset"')
  (other / "quiz.yaml").write_text(broken)
  _refused(other, r"names: cannot load 'quiz' \(.*no/such_dataset.*network", "quiz")
  (other / "quiz.yaml").write_text(quiz.replace("answer", "!function average.none"))
  _refused(other, r"names: cannot load 'quiz' \(AttributeError", "quiz")
  with pytest.raises(errors.UserError, match=r"quiz cannot build .* lower .*shots"):
    lm_eval_tasks.read(_settings(folder, "quiz", shots=6), 512)


def test_the_harness_is_an_extra(monkeypatch, model):
  for name in ("lm_eval_tasks", "lm_eval_model"):
    monkeypatch.delitem(sys.modules, f"raft_jax.evaluation.{name}")
    monkeypatch.delattr(evaluation, name)
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  assert test_sets.read_tasks(schema.Tasks(), model.config) is None
  with pytest.raises(
    errors.UserError, match=r"evaluate\.tasks: needs the extra `eval`; run"
  ):
    test_sets.read_tasks(schema.Tasks(names=("arc_easy",)), model.config)


@pytest.mark.slow
def test_tasks_in_a_whole_evaluation(tmp_path, tiny, law, folder, alone):
  files = {"questions": str(law / "train.jsonl"), "test": str(law / "test.jsonl")}
  output = tmp_path / "output"
  tiny_run.write_config(tmp_path / "run.yaml", tiny, output, **files)
  load = functools.partial(config_load.load, tmp_path / "run.yaml")
  tasks = [f"evaluate.tasks.include={folder}", "evaluate.limit=2"]
  # Before a model is loaded: there is no checkpoint, either.
  with pytest.raises(errors.UserError, match="has no task 'arc'"):
    evaluate.main(load([*tasks, "evaluate.tasks.names=[arc]"]))
  run = load([*tasks, "evaluate.tasks.names=[both, roll]"])
  tiny_run.save_checkpoint(output, tiny, step=1, scale=1.5)
  evaluate.main(run)
  result = json.loads((output / "evaluation/scores.json").read_text())
  items = json.loads((output / "evaluation/items.json").read_text())
  for name in ("task_quiz_acc", "task_quiz_acc_norm", "task_both_acc"):
    assert result["scores"]["trained"][name]["n"] == len(items[name]["base"])
    assert {"difference", "low", "high", "p"} == set(result["paired"][name])
    assert result["directions"][name] == 1
    assert name in result["retention"]
  assert items["task_quiz_acc"]["items"] == items["task_quiz_acc_norm"]["items"]
  assert items["task_quiz_acc"]["items"] != items["task_letters_acc"]["items"]
  assert items["task_quiz_acc"]["items"] != items["rouge_l"]["items"]
  base, trained = (
    result["scores"][model]["task_roll_word_perplexity"]
    for model in ("base", "trained")
  )
  difference = result["paired"]["task_roll_word_perplexity"]
  assert difference == {"difference": trained["value"] - base["value"]}
  assert set(base) == {"value"}
  assert difference["difference"] != 0
  assert "task_roll_word_perplexity" not in items
  assert "task_roll_bits_per_byte" not in result["retention"]  # lower is better
  rows = {row["name"]: row for row in run_page.score_rows(run_folder.read(output))}
  assert rows["task_both_acc"]["general"]
  assert rows["task_roll_bits_per_byte"]["direction"] == "lower is better, "
  assert rows["task_roll_word_perplexity"]["verdict"] == "not compared"
  assert "task quiz acc norm" in run_page.render(run_folder.read(output), "t")


def test_scores_of_two_models_are_made_comparable():
  ones, halves = np.array([1.0, 0.0]), np.array([0.5, 0.0])
  base = {
    "a": intervals.ItemScores(ones, share=True),
    "b": intervals.ItemScores(ones),
    "c": 2.0,
  }
  trained = {"b": 0.25, "a": intervals.ItemScores(halves), "d": 1.0}
  left, right = intervals.comparable(base, trained)
  assert list(left) == list(right) == ["a", "b"]
  assert not left["a"].share
  assert not right["a"].share
  assert (left["b"], right["b"]) == (0.5, 0.25)
  assert intervals.compare(left["b"], right["b"]) == {"difference": -0.25}
  assert intervals.retention(left["b"], right["b"]) == {"value": 50.0}
  assert np.array_equal(left["a"].values_N, ones)
