"""Runs refine with scripted models in a process of its own, and kills it at will.

`refine_test` starts `python tests/helpers/refine_driver.py FOLDER QUESTIONS PLAN`.
The models are scripted because the matrix needs hundreds of runs; everything durable
(journal, shards, manifest, lock, signals) is the real code. Each run is a fork.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from raft_jax import refine
from raft_jax.config import schema
from raft_jax.curation import refinement_run
from raft_jax.generation import engines, jax_engine, sentence_encoder
from raft_jax.hf import chat
from raft_jax.storage import journal

FATAL = signal.SIGKILL


class Scripted:
  """A generator whose reply is a function of the request; logs what it is asked."""

  local = True
  prompt_limit = 10_000

  def __init__(self, source: str, log: pathlib.Path):
    self.identity, self._log = f"scripted {source}", log

  def count_tokens(self, messages) -> int:
    return sum(len(m.content.split()) for m in messages)

  def generate(
    self, requests: Iterable[engines.Request], at_once: int
  ) -> Iterator[tuple[int, engines.Completion]]:
    waiting = enumerate(requests)
    while batch := list(itertools.islice(waiting, at_once)):
      yield from self._batch(batch)

  def _batch(
    self, batch: Sequence[tuple[int, engines.Request]]
  ) -> list[tuple[int, engines.Completion]]:
    with self._log.open("a") as log:
      log.writelines(f"{request.seed}\n" for _, request in batch)
    return [(place, self._reply(request)) for place, request in batch]

  def _reply(self, request: engines.Request) -> engines.Completion:
    dice = random.Random(request.seed)
    content = request.messages[-1].content
    if "candidate answer" in content:
      said = dice.choice([json.dumps({"score": round(dice.random(), 2)}), "no idea"])
    else:
      facts = next(x for x in content.splitlines() if "nswer: " in x)
      words = facts.partition("nswer: ")[2].split()
      said = " ".join(w for w in words if dice.random() < 0.8)
      said = dice.choice([said, said, said, said, "", "I cannot say."])
    reason = "length" if dice.random() < 0.1 else "stop"
    return engines.Completion(said, reason, 10, len(said.split()))


class BagOfWords:
  """An encoder: hashed word counts."""

  identity = "bag of words"

  def __init__(self, log: pathlib.Path):
    self._log = log

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    with self._log.open("a") as log:
      log.writelines("embedded\n" for _ in texts)
    vectors = np.zeros((len(texts), 64), np.float32)
    for row, text in zip(vectors, texts, strict=True):
      for word in text.split():
        row[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
    return vectors

  def truncated(self, texts: Sequence[str]) -> list[bool]:
    return [len(text) > 200 for text in texts]


class Tokenizer:
  """A tokenizer of words, whose chat template joins the turns with spaces."""

  chat_template = ""

  def __call__(self, text, **_):
    return {"input_ids": text.split()}

  def apply_chat_template(self, messages, **_):
    return " ".join(message["content"] for message in messages)

  def decode(self, ids, **_):
    return f"<{ids}>"


def make_config(folder: pathlib.Path, questions: pathlib.Path) -> schema.Config:
  return schema.Config.model_validate(
    {
      "model": {"source": "some/model"},
      "data": {"questions": str(questions)},
      "refine": {
        "rewriter": {"batch_size": 4},
        "fusion": {"batch_size": 4},
        "judges": [{"engine": "encoder"}, {"engine": "jax", "batch_size": 4}],
        "records_per_shard": 5,
      },
      "output": str(folder),
    }
  )


REPLACED = (
  (jax_engine, "load"),
  (engines, "identity"),
  (engines, "chat_tokenizer"),
  (sentence_encoder, "load"),
)
"""What `script` puts something else in the place of."""


def script(log: pathlib.Path) -> None:
  """Puts the scripted models in the place of the real ones, for this process."""
  jax_engine.load = lambda source, **_: Scripted(source, log)
  engines.identity = lambda source: f"scripted {source}"
  tokenizer = chat.ChatTokenizer(
    Tokenizer(), eos_ids=(0,), pad_id=0, digest="none", controls=()
  )
  engines.chat_tokenizer = lambda source, template=None: tokenizer
  sentence_encoder.load = lambda source: BagOfWords(log)


def forked(work: Callable[[], None]) -> int:
  """Exit status of `work` done in a fork, negative for a signal."""
  child = os.fork()
  if child == 0:
    status = 1
    try:
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
      os.dup2(1, 2)
      work()
      status = 0
    except SystemExit as stop:
      status = int(stop.code or 0)
    finally:
      os._exit(status)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def strike(kind: str, number: int, blow: int = FATAL, times: int = 1) -> None:
  """Arranges for this process to get a signal at an occurrence of something."""
  seen = 0

  def due() -> bool:
    nonlocal seen
    seen += 1
    return seen == number

  def hit() -> None:
    for _ in range(times):
      os.kill(os.getpid(), blow)
      # Time for the main thread to hear it before the next, or before the work ends.
      time.sleep(1.5 if times > 1 else 0.5)

  def around(real: Callable, before: bool) -> Callable:
    def call(*args, **kwargs):
      now = due()
      if now and before:
        hit()
      result = real(*args, **kwargs)
      if now and not before:
        hit()
      return result

    return call

  def tear(book: journal.Journal, finished: dict) -> None:
    if due():
      lines = b"".join(journal._line(k, v) for k, v in finished.items())
      book._file.write(lines[: len(lines) * 2 // 3])
      hit()
    real_append(book, finished)

  what, _, when = kind.partition(" ")
  if what == "tear":
    real_append, journal.Journal.append = journal.Journal.append, tear
  elif what == "generate":
    Scripted._batch = around(Scripted._batch, when == "before")
  else:
    setattr(os, what, around(getattr(os, what), when == "before"))


def result(folder: pathlib.Path) -> dict[str, str]:
  """sha256 of everything that the stages after this one read."""
  refined = folder / "refined"
  files = [*refined.glob("shard-*"), refined / "MANIFEST.json"]
  return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def logged(log: pathlib.Path) -> list[str]:
  return log.read_text().splitlines() if log.exists() else []


def finished(book: pathlib.Path) -> dict[str, dict]:
  """Value by key of the whole lines of a journal."""
  lines = book.read_bytes().split(b"\n")[:-1] if book.exists() else []
  calls = (journal._parse(line + b"\n") for line in lines)
  return dict(call for call in calls if call is not None)


class Verdict(NamedTuple):
  """What a struck run and the one after it did.

  Attributes:
    first, second: their exit statuses.
    kept: finished calls in the journal in between.
    again: what the second run asked, from the models' log.
    asked_again: how many of the kept calls the second run repeated.
    same: whether its files are those of a run that nothing struck.
    left_over: temporary files in its folder.
  """

  blow: list
  first: int
  second: int
  kept: dict[str, dict]
  again: list[str]
  asked_again: int
  same: bool
  left_over: list[str]


def strikes(
  root: pathlib.Path,
  plan: list,
  run_stage: Callable[[pathlib.Path, pathlib.Path], None],
  result: Callable[[pathlib.Path], dict[str, str]],
  stage: str,
) -> list[Verdict]:
  """For each [kind, occurrence, signal, times] of a plan: a struck run, and another.

  Args:
    run_stage: runs a stage with scripted models; takes its output and the models' log.
    result: of an output, what must not depend on the blow.
    stage: the stage's folder in the output.
  """

  def run(folder: pathlib.Path, log: str, blow: list | None = None) -> int:
    def work() -> None:
      if blow:
        strike(*blow)
      run_stage(folder / "out", folder / log)

    folder.mkdir(exist_ok=True)
    return forked(work)

  assert run(root / "whole", "log") == 0
  expected = result(root / "whole/out")
  verdicts = []
  for i, blow in enumerate(plan):
    folder = root / f"struck{i}"
    first = run(folder, "first", blow)
    kept = finished(folder / "out" / stage / "journal.jsonl")
    second = run(folder, "second")
    again = logged(folder / "second")
    verdicts.append(
      Verdict(
        blow,
        first,
        second,
        kept,
        again,
        len({str(journal.seed_from(key)) for key in kept} & {*again}),
        result(folder / "out") == expected,
        [path.name for path in (folder / "out" / stage).glob(".tmp-*")],
      )
    )
  return verdicts


def shown(verdict: Verdict) -> dict:
  """A verdict for a test to read, its calls as their number."""
  tree = verdict._asdict()
  del tree["again"]
  return {**tree, "kept": len(verdict.kept)}


def matrix(root: pathlib.Path, questions: pathlib.Path, plan: list) -> list[dict]:
  """Struck refinements, each with the texts that were embedded in all."""

  def run_stage(output: pathlib.Path, log: pathlib.Path) -> None:
    script(log)
    refinement_run.WINDOW = 8  # two windows of rows
    refine.refine(make_config(output, questions))

  verdicts = strikes(root, plan, run_stage, result, "refined")
  total = logged(root / "whole/log").count("embedded")
  checked = []
  for verdict in verdicts:
    pairs = sum("cosine" in value for value in verdict.kept.values())
    embedded = verdict.again.count("embedded") + 2 * pairs
    checked.append({**shown(verdict), "embedded": embedded, "expected_embedded": total})
  return checked


if __name__ == "__main__":
  root, questions, plan = sys.argv[1:]
  print(
    json.dumps(matrix(pathlib.Path(root), pathlib.Path(questions), json.loads(plan)))
  )
