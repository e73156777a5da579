"""Talking to a tiny model: answers as transformers', turns, signals, and bad input."""

import io
import pathlib
import sys

import pytest
import torch
import transformers

from raft_jax import chat, export
from raft_jax.config import load as config_load
from tests.helpers import tiny_run

NEW = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory, smollm) -> pathlib.Path:
  """The config of a run with a checkpoint, and with its export."""
  folder = tmp_path_factory.mktemp("chat")
  source = tiny_run.save_model(folder / "model", smollm, tie_word_embeddings=False)
  path, output = folder / "run.yaml", folder / "output"
  path.write_text(
    f"model: {{source: {source}}}\n"
    "data: {questions: absent.jsonl}\n"
    f"chat: {{max_new_tokens: {NEW}}}\n"
    f"output: {output}\n"
  )
  other = tiny_run.save_model(
    folder / "other", smollm, seed=1, tie_word_embeddings=False
  )
  tiny_run.save_checkpoint(output, str(other), step=3, scale=1.0, of=str(source))
  export.export(config_load.load(path, without_data=True))
  return path


def load(path, *overrides):
  return config_load.load(path, overrides, without_data=True)


def theirs(folder: str, questions: list[str], new: int = NEW) -> list[str]:
  """transformers' greedy answers to questions of one conversation."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  network = transformers.AutoModelForCausalLM.from_pretrained(folder)
  turns, answers = [], []
  for question in questions:
    turns.append({"role": "user", "content": question})
    encoded = tokenizer.apply_chat_template(
      turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
      ids = network.generate(**encoded, do_sample=False, max_new_tokens=new)
    start = encoded["input_ids"].shape[1]
    answers.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    turns.append({"role": "assistant", "content": answers[-1]})
  return answers


CUT = f"\n(cut after {NEW} tokens, see chat.max_new_tokens)\n"


def test_once_prints_the_greedy_answers_of_transformers(path, capsys):
  question = "What is a tort?"
  chat.main(load(path), once=question, model=None)
  config = load(path)
  (trained,) = theirs(f"{config.output}/export", [question])
  (base,) = theirs(config.model.source, [question])
  assert trained != base
  assert (
    capsys.readouterr().out == f"== trained, step 3\n{trained}{CUT}== base\n{base}{CUT}"
  )


def test_each_model_has_its_own_turns_and_reset_begins_anew(path, capsys, monkeypatch):
  questions = ["What is a tort?", "And a lien?"]
  monkeypatch.setattr(
    sys, "stdin", io.StringIO("\n".join([*questions, "", "/reset", questions[0]]))
  )
  chat.main(load(path), once=None, model=None)
  config = load(path)
  pairs = list(
    zip(
      theirs(f"{config.output}/export", questions),
      theirs(config.model.source, questions),
    )
  )
  assert capsys.readouterr().out == "".join(
    f"> {question}\n== trained, step 3\n{trained}{CUT}== base\n{base}{CUT}"
    for question, (trained, base) in zip([*questions, questions[0]], [*pairs, pairs[0]])
  )


def test_an_export_can_be_talked_to_in_place_of_the_checkpoint(path, capsys):
  config = load(path)
  chat.main(config, once="What is a tort?", model=None)
  expected = capsys.readouterr().out
  folder = f"{config.output}/export"
  chat.main(config, once="What is a tort?", model=folder)
  assert capsys.readouterr().out == expected.replace("trained, step 3", folder)
