"""Whole evaluations of a tiny model: their files, repetition and errors."""

import json
import pathlib

import numpy as np
import pytest

from raft_jax import errors, evaluate
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.data import rouge
from raft_jax.evaluation import intervals, scoring
from raft_jax.reporting import run_folder, run_page
from raft_jax.storage import question_files
from tests.helpers import chat_server, tiny_run


def test_rouge_l_by_hand():
  # Longest common subsequence "the cat on mat": precision 4/5, recall 4/6.
  assert rouge.rouge_l("The cat sat on the mat.", "the cat on a mat") == pytest.approx(
    2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)
  )
  assert rouge.rouge_l("judges ruling courts", "judge rules court") == 1.0  # stems
  assert rouge.rouge_l("one two three", "three two one") == pytest.approx(1 / 3)
  assert rouge.rouge_l("a law", "") == 0.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm) -> str:
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


def _config(tmp_path: pathlib.Path, source: str, **data: str) -> schema.Config:
  return tiny_run.write_config(
    tmp_path / "run.yaml", source, tmp_path / "output", **data
  )


def test_a_whole_evaluation_and_its_repetition(
  tmp_path, tiny, law, monkeypatch, capsys
):
  files = {
    "questions": str(law / "train.jsonl"),
    "test": str(law / "test.jsonl"),
    "validation": str(law / "validation.jsonl"),
  }
  run = _config(tmp_path, tiny, **files)
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=3, scale=1.0)
  evaluate.main(run)
  scores = json.loads((output / "evaluation/scores.json").read_text())
  losses = scores["scores"]["base"]
  assert losses["validation_loss"]["value"] != losses["held_out_loss"]["value"]
  assert (scores["items"], scores["checkpoint_step"], scores["model"]) == (6, 3, tiny)
  assert scores["scores"]["base"]["held_out_loss"]["n"] == 6
  # The checkpoint holds the base model itself: every paired difference is 0.
  for paired in scores["paired"].values():
    assert (paired["difference"], paired["low"], paired["high"]) == (0.0, 0.0, 0.0)
  items = json.loads((output / "evaluation/items.json").read_text())
  assert set(items) == set(scores["scores"]["base"])
  for name, values in items.items():
    assert np.mean(values["base"]) == pytest.approx(
      scores["scores"]["base"][name]["value"]
    )
  assert items["rouge_l"]["items"] == items["held_out_loss"]["items"]
  assert items["rouge_l"]["items"] != items["validation_loss"]["items"]
  # A random model of 49152 tokens knows nothing: ln(49152) = 10.8.
  assert scores["scores"]["base"]["held_out_loss"]["value"] == pytest.approx(
    10.8, abs=0.2
  )
  samples = [
    json.loads(line)
    for line in (output / "evaluation/samples.jsonl").read_text().splitlines()
  ]
  first = question_files.read_questions(law / "test.jsonl", limit=2)
  assert [row["question"] for row in samples] == [q.messages[-1].content for q in first]
  assert [row["reference"] for row in samples] == [q.answer for q in first]
  assert "held out loss" in capsys.readouterr().out

  # Another checkpoint: the base model's items are known, the new one's are not.
  tiny_run.save_checkpoint(output, tiny, step=4, scale=1.5)
  computed: list[int] = []
  compute_missing = scoring.compute_missing

  def counted(log, keys, lengths, compute, **names):
    computed.extend(key not in log.calls for key in keys)
    return compute_missing(log, keys, lengths, compute, **names)

  monkeypatch.setattr(scoring, "compute_missing", counted)
  evaluate.main(run)
  # Loss and answer of six questions and the loss of six others, of two models, of
  # which one is known.
  assert (len(computed), sum(computed)) == (36, 18)
  again = json.loads((output / "evaluation/scores.json").read_text())
  assert again["checkpoint_step"] == 4
  assert again["scores"]["base"] == scores["scores"]["base"]
  assert again["paired"]["held_out_loss"]["difference"] != 0.0
  assert "Held-out loss on 6 test questions" in run_page.render(
    run_folder.read(output), "t"
  )


def test_general_abilities_beside_the_domain(tmp_path, tiny, law):
  prompts = [
    f"Name {word} things. Do not use commas." for word in ("two", "red", "old")
  ]
  orders = [
    {
      "key": i,
      "prompt": prompt,
      "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
      "kwargs": [{}, {}],
    }
    for i, prompt in enumerate(prompts)
  ]
  questions = [
    {
      "subject": "anatomy",
      "question": f"Which letter is number {i}?",
      "choices": ["A", "B", "C", "D"],
      "answer": "ABCD"[i],
    }
    for i in range(4)
  ]
  for name, rows in (("ifeval", orders), ("mmlu", questions)):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"{name}.jsonl").write_text(lines)
  run = _config(
    tmp_path, tiny, questions=str(law / "train.jsonl"), test=str(law / "test.jsonl")
  )
  run = config_load.load(
    tmp_path / "run.yaml",
    [
      f"evaluate.ifeval.items={tmp_path / 'ifeval.jsonl'}",
      "evaluate.ifeval.nltk_data=pkg://llama_index/core/_static/nltk_cache",
      "evaluate.ifeval.max_new_tokens=8",
      f"evaluate.mmlu.items={tmp_path / 'mmlu.jsonl'}",
      f"evaluate.mmlu.examples={tmp_path / 'mmlu.jsonl'}",
      "evaluate.mmlu.shots=1",
      "evaluate.choice.others=2",
      "evaluate.judges=[{engine: jax, max_new_tokens: 4}]",
      f"evaluate.open_ended.prompts={tmp_path / 'ifeval.jsonl'}",
      "evaluate.open_ended.max_new_tokens=8",
      f"evaluate.drift.prompts={tmp_path / 'ifeval.jsonl'}",
      "evaluate.drift.max_new_tokens=8",
    ],
  )
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=1, scale=1.0)
  evaluate.main(run)
  same = json.loads((output / "evaluation/scores.json").read_text())
  # The checkpoint is the base model: nothing moved.
  assert same["drift"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}
  assert same["domain_drift"] == same["drift"] | {"n": same["items"]}
  assert set(same["weight_distance"]["tensors"].values()) == {0.0}
  assert same["scores"]["base"]["ifeval_instruction_loose"]["n"] == 3
  assert same["retention"]["ifeval_prompt_strict"] == {}  # nothing is quoted
  assert same["scores"]["base"]["mmlu"]["n"] == 4
  # A random model answers with line ends, which is wrong whatever a judge would say.
  assert same["scores"]["trained"]["d_acc"]["value"] == 0.0
  assert same["scores"]["trained"]["d_acc_undecided"]["value"] == 0.0
  assert same["scores"]["base"]["open_ended_undecided"]["n"] == 3
  assert same["choice"] == {"options": 3, "left_out": 0}
  page = run_page.render(run_folder.read(output), "t")
  assert "MMLU" in page
  assert "Right answer chosen, by letter" in page
  assert "Choices are among 3 answers" in page
  assert "Open-ended requests, good by majority" in page
  assert "Drift on 3 general prompts" in page
  assert f"On the prompts of the {same['items']} test questions it is" in page

  tiny_run.save_checkpoint(output, tiny, step=2, scale=1.5)
  evaluate.main(run)
  moved = json.loads((output / "evaluation/scores.json").read_text())
  assert moved["drift"]["value"] > 0
  assert moved["domain_drift"]["value"] > 0
  _check_kept(output / "evaluation", moved)
  assert moved["scores"]["base"] == same["scores"]["base"]
  # Every tensor is one and a half times the base model's.
  assert moved["weight_distance"]["mean"] == pytest.approx(0.5, rel=1e-5)
  _check_choices(output / "evaluation", moved)


def _check_kept(folder: pathlib.Path, scores: dict):
  """The MMLU questions that the base model got right."""
  items = json.loads((folder / "items.json").read_text())
  right = [i for i, passed in enumerate(items["mmlu"]["base"]) if passed]
  assert right
  assert scores["scores"]["base"]["mmlu_kept"]["value"] == 1.0
  trained = [items["mmlu"]["trained"][i] for i in right]
  assert items["mmlu_kept"]["trained"] == trained
  assert scores["scores"]["trained"]["mmlu_kept"]["value"] == np.mean(trained)
  digests = {items[name]["items"] for name in ("mmlu", "mmlu_kept")}
  assert len(digests) == 2
  # Of the domain's drift the items are the test questions.
  assert items["domain_drift"]["items"] == items["held_out_loss"]["items"]


def _check_choices(folder: pathlib.Path, scores: dict):
  """Multiple choice, by what `choice.jsonl` says of every option."""
  rows = [json.loads(line) for line in (folder / "choice.jsonl").open()]
  items = json.loads((folder / "items.json").read_text())
  right = np.array(["ABC".index(row["right"]) for row in rows])
  for name, part in (
    ("choice", "log_prob_per_token"),
    ("choice_letter", "letter_probability"),
  ):
    correct = {}
    for model in ("base", "trained"):
      values = np.array([row[model][part] for row in rows])
      correct[model] = (values.argmax(axis=1) == right).astype(float)
      assert items[name][model] == correct[model].tolist()
      assert scores["scores"][model][name]["value"] == correct[model].mean()
      assert scores["scores"][model][f"{name}_ece"]["value"] > 0
    assert any(row["base"][part] != row["trained"][part] for row in rows)
    paired = scores["paired"][name]
    assert paired["difference"] == np.mean(correct["trained"] - correct["base"])
    assert paired["p"] == intervals.mcnemar(correct["base"], correct["trained"])
    assert items[name]["items"] != items["rouge_l"]["items"]


def test_servers_write_the_answers_of_both_models(tmp_path, tiny, law):
  known = {
    question.messages[-1].content: question.answer
    for question in question_files.read_questions(law / "test.jsonl", limit=6)
  }

  def answer(request: dict) -> chat_server.Reply:
    assert (request["temperature"], request["max_tokens"]) == (0.0, 8)
    said = known[request["messages"][-1]["content"]]
    return chat_server.says(f"<think>Hm.</think>{said}")

  with chat_server.serving(answer) as server:
    at = f"{{model: {chat_server.MODEL}, base_url: '{server.url}'}}"
    _config(
      tmp_path, tiny, questions=str(law / "train.jsonl"), test=str(law / "test.jsonl")
    )
    run = config_load.load(
      tmp_path / "run.yaml",
      [f"evaluate.servers={{trained: {at}, base: {at}}}", "evaluate.max_new_tokens=8"],
    )
    output = pathlib.Path(run.output)
    tiny_run.save_checkpoint(output, tiny, step=1, scale=1.5)
    evaluate.main(run)
    evaluate.main(run)  # asks for nothing again
  assert len(server.requests) == 2 * 6
  scores = json.loads((output / "evaluation/scores.json").read_text())["scores"]
  for model in ("base", "trained"):
    # The answers are the references; the server counts five tokens and ends each.
    assert scores[model]["rouge_l"]["value"] == 1.0
    assert scores[model]["answer_tokens"]["value"] == 5.0
    assert scores[model]["ended"]["value"] == 1.0
  # Losses are the models' own.
  losses = [scores[model]["held_out_loss"]["value"] for model in ("base", "trained")]
  assert losses[0] != losses[1]

  full = chat_server.error(400, "This model's maximum context length is 8 tokens.")
  with chat_server.serving(lambda request: full) as server:
    at = f"{{model: {chat_server.MODEL}, base_url: '{server.url}'}}"
    run = config_load.load(
      tmp_path / "run.yaml",
      [f"evaluate.servers={{trained: {at}, base: {at}}}", "evaluate.max_new_tokens=9"],
    )
    with pytest.raises(errors.UserError, match=r"evaluate\.servers: .* no room"):
      evaluate.main(run)


def test_bad_input_is_named_before_anything_is_computed(tmp_path, tiny, law):
  questions = str(law / "train.jsonl")
  with pytest.raises(errors.UserError, match=r"data\.test"):
    evaluate.main(_config(tmp_path, tiny, questions=questions))
  run = _config(tmp_path, tiny, questions=questions, test=str(law / "test.jsonl"))
  with pytest.raises(errors.UserError, match="no checkpoint"):
    evaluate.main(run)
  assert not pathlib.Path(run.output).exists()
  long = run.model_copy(
    update={"evaluate": run.evaluate.model_copy(update={"max_new_tokens": 500})}
  )
  with pytest.raises(errors.UserError, match=r"evaluate\.max_new_tokens"):
    evaluate.main(long)
