"""Talking to a tiny model: answers as transformers', turns, signals, and bad input."""

import contextlib
import io
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
import transformers

from raft_jax import chat, errors, export
from raft_jax.config import load as config_load
from raft_jax.config import run_lock
from raft_jax.runtime import interrupts
from raft_jax.training import run_inputs
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


@pytest.mark.parametrize(
  ("change", "once", "model", "says"),
  [
    ("output=nowhere", "Hm?", None, "no checkpoint; run `python -m raft_jax.train`"),
    (
      "method=sft",
      "Hm?",
      None,
      "raft -> sft; distill.teacher: base -> none); choose",
    ),
    ("data.limit=7", "Hm?", None, "holds a train run of another config (data.limit"),
    ("train.seed=0", "", None, "--once: the question is empty"),
    ("train.seed=0", " \n", None, "--once: the question is empty"),
    ("train.seed=0", "\udcff?", None, "--once: the question is not UTF-8"),
    ("train.seed=0", "tort " * 600, None, r"takes 6\d\d tokens, .* has room for 512;"),
    ("train.seed=0", "Hm?", "no/where", "no/where"),
  ],
)
def test_bad_input_is_named(path, bound, change, once, model, says):
  del bound
  if not says.startswith(r"takes"):
    says = re.escape(says)
  with pytest.raises(errors.UserError, match=says):
    chat.main(load(path, change), once=once, model=model)


@pytest.fixture
def bound(path):
  """The output folder bound to its config, as `train` does it."""
  lock = pathlib.Path(load(path).output) / "config/train.yaml"
  run_lock.lock_config(load(path), "train", run_inputs.IDENTITY_KEYS)
  yield
  lock.unlink()


def test_a_piped_question_without_an_answer_does_not_stop_the_others(
  path, capsys, monkeypatch
):
  lines = ["What is a tort?", "tort " * 600, "/what", "And a lien?"]
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
  with pytest.raises(errors.UserError, match="1 of 3 questions have no answer"):
    chat.main(load(path, "chat.max_new_tokens=3"), once=None, model=None)
  out, complaint = capsys.readouterr()
  assert out.count("== base") == 2
  assert re.search(r"error: the question with the turns .* begin anew", complaint)
  assert "/what is no command" in complaint


def test_an_answer_fills_the_context_and_no_more(path, capsys):
  """The question leaves room for few tokens of the answer."""
  question = "tort " * 470
  chat.main(load(path, "chat.max_new_tokens=99"), once=question, model=None)
  left = re.findall(r"\(cut after (\d+) tokens", capsys.readouterr().out)
  tokenizer = transformers.AutoTokenizer.from_pretrained(load(path).model.source)
  turn = [{"role": "user", "content": question}]
  ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
  assert left == [str(512 - len(ids))] * 2
  assert 0 < 512 - len(ids) < 99


# --- In a terminal --------------------------------------------------------------------


class Terminal:
  """A chat in a terminal of 100 columns, whose output is read as it comes."""

  def __init__(self, path, *words):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    self.process = subprocess.Popen(
      [sys.executable, "-m", "raft_jax.chat", "--config", str(path), *words],
      stdin=theirs,
      stdout=theirs,
      stderr=theirs,
      start_new_session=True,
      env={**os.environ, "TERM": "xterm", "JAX_PLATFORMS": "cpu"},
    )
    os.close(theirs)
    self._file, self.shown = ours, ""

  def type(self, line):
    os.write(self._file, line.encode())

  def strike(self):
    time.sleep(2 * interrupts.SAME_S)
    self.process.send_signal(signal.SIGINT)

  def wait_for(self, pattern):
    """Until the output matches; forgets it up to the end of the match."""
    deadline = time.monotonic() + 200
    while not (match := re.search(pattern, self.shown, re.DOTALL)):
      assert time.monotonic() < deadline, self.shown[-3000:]
      if select.select([self._file], [], [], 1.0)[0]:
        try:
          self.shown += os.read(self._file, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
          raise AssertionError(self.shown[-3000:]) from None
    self.shown = self.shown[match.end() :]

  def status(self):
    """The exit status; reads on, so that the process can write its last words."""
    deadline = time.monotonic() + 60
    while self.process.poll() is None and time.monotonic() < deadline:
      if select.select([self._file], [], [], 0.1)[0]:
        with contextlib.suppress(OSError):
          self.shown += os.read(self._file, 4096).decode(errors="replace")
    return self.process.wait(1)


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_a_second_one_the_program(path):
  terminal = Terminal(path, "chat.max_new_tokens=400")
  terminal.wait_for("/reset begins a new conversation.*> ")
  terminal.type("What is a tort?\n")
  terminal.wait_for(r"trained, step 3.*base.*\w+")
  terminal.strike()  # in the first compilation, or while an answer is written
  terminal.wait_for("stopped.*stopped.*> ")
  terminal.type("And a lien?\n")
  terminal.wait_for(r"trained, step 3.*\w{3}.*trained, step 3.*\w{3}")
  terminal.strike()
  terminal.wait_for("stopped.*stopped.*> ")
  terminal.type("/reset\n")
  terminal.wait_for("a new conversation.*> ")
  terminal.strike()  # a second one in a row
  assert terminal.status() == 0
  assert "Traceback" not in terminal.shown


@pytest.mark.slow
def test_at_the_prompt_two_ctrl_c_or_ctrl_d_leave(path):
  terminal = Terminal(path, "chat.max_new_tokens=4")
  terminal.wait_for("> ")
  terminal.strike()
  terminal.wait_for("another Ctrl-C, Ctrl-D or /quit leaves.*> ")
  terminal.type("What is a tort?\n")
  terminal.wait_for("cut after 4 tokens.*cut after 4 tokens.*> ")
  terminal.strike()
  terminal.wait_for("another Ctrl-C.*> ")
  terminal.type("\x04")
  assert terminal.status() == 0
  other = Terminal(path)
  other.wait_for("> ")
  other.process.terminate()
  assert other.status() == 143
  assert "Traceback" not in terminal.shown + other.shown


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.3, 2.0, 5.0, 8.0, 11.0])
def test_a_single_question_is_interrupted_as_any_command(path, after_s):
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "raft_jax.chat", "--config", str(path)),
      *("--once", "What is a tort?", "chat.max_new_tokens=450"),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  time.sleep(after_s)
  process.send_signal(signal.SIGINT)
  answer, complaint = process.communicate(timeout=100)
  # The command was over, or Python was closing down and had no handler any more.
  over = answer.endswith("\n") and process.returncode in (0, -signal.SIGINT)
  assert over or process.returncode == 130
  assert over or complaint.endswith(
    "interrupted; run the same command again to continue\n"
  )
  assert "Traceback" not in complaint
