"""Runs synthesise with a scripted model in a process of its own, and kills it at will.

Not a test: `synthesise_test` starts it with ROOT SEEDS PLAN.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import sys

import sklearn.cluster  # noqa: F401 - once, and not in every fork
import threadpoolctl  # noqa: F401

from raft_jax import synthesise
from raft_jax.config import schema
from raft_jax.generation import engines, jax_engine, sentence_encoder
from raft_jax.hf import chat
from tests.helpers import refine_driver

WORDS = ("why", "how", "when", "name", "list", "sort", "rain", "bread", "tax", "train")


class Scripted(refine_driver.Scripted):
  """Writes questions of a few words, and answers, by dice of the request's seed."""

  def _reply(self, request: engines.Request) -> engines.Completion:
    dice = random.Random(request.seed)
    said = " ".join(dice.choices(WORDS, k=dice.randrange(4, 12)))
    reason = "length" if dice.random() < 0.1 else "stop"
    if len(request.messages) > 1:
      said = dice.choice([*[said] * 12, f"Instruction: {said}", "", f"Sure! {said}"])
    elif dice.random() < 0.2:
      said = dice.choice(["I cannot say.", request.messages[-1].content, said * 9])
    return engines.Completion(said, reason, 10, len(said.split()))


def make_config(folder: pathlib.Path, seeds: pathlib.Path, **keys) -> schema.Config:
  return schema.Config.model_validate(
    {
      "model": {"source": "some/model"},
      "data": {
        "questions": "not read",
        "max_prompt_tokens": 10,
        "max_answer_tokens": 16,
      },
      "synthesise": {
        "seeds": str(seeds),
        "writer": {"batch_size": 4},
        "drafts": 40,
        "clusters": 4,
        "keep": 20,
        **keys,
      },
      "method": "ssr",
      "replay": {},
      "output": str(folder),
    }
  )


def script(log: pathlib.Path) -> None:
  """Puts the scripted model in the place of the real ones, for this process."""
  tokenizer = chat.ChatTokenizer(
    refine_driver.Tokenizer(), eos_ids=(0,), pad_id=0, digest="none", controls=()
  )
  jax_engine.load = lambda source, **_: Scripted(source, log)
  engines.identity = lambda source: f"scripted {source}"
  engines.chat_tokenizer = lambda source, template=None: tokenizer
  sentence_encoder.load = lambda source: refine_driver.BagOfWords(
    log.with_name("embedded")
  )


def result(folder: pathlib.Path) -> dict[str, str]:
  """sha256 of everything but the summary, which holds times."""
  made = folder / "synthesised"
  files = [
    made / name for name in ("questions.jsonl", "dropped.jsonl", "MANIFEST.json")
  ]
  return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def matrix(root: pathlib.Path, seeds: pathlib.Path, plan: list) -> list[dict]:
  """See `refine_driver.strikes`."""

  def run_stage(output: pathlib.Path, log: pathlib.Path) -> None:
    script(log)
    synthesise.synthesise(make_config(output, seeds))

  verdicts = refine_driver.strikes(root, plan, run_stage, result, "synthesised")
  return [refine_driver.shown(verdict) for verdict in verdicts]


if __name__ == "__main__":
  root, seeds, plan = sys.argv[1:]
  print(json.dumps(matrix(pathlib.Path(root), pathlib.Path(seeds), json.loads(plan))))
