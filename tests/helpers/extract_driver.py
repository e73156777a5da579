"""Runs extract with a scripted model in a process of its own, and kills it at will.

`extract_test` starts `python tests/helpers/extract_driver.py ROOT DOCUMENTS PLAN`.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import re
import sys
import types

from raft_jax import extract
from raft_jax.config import schema
from raft_jax.curation import qa_pairs
from raft_jax.generation import engines, jax_engine
from tests.helpers import refine_driver


class Scripted(refine_driver.Scripted):
  """Writes a pair from each sentence, and judges, by dice of the request's seed."""

  def _reply(self, request: engines.Request) -> engines.Completion:
    dice = random.Random(request.seed)
    content = request.messages[-1].content
    if "faithful" in content:
      verdict = {name: dice.random() < 0.96 for name in qa_pairs.CRITERIA}
      said = dice.choice([*[json.dumps(verdict)] * 9, "Looks fine to me."])
      return engines.Completion(said, "stop", 10, 10)
    said = json.dumps({"pairs": [*written(content)]})
    said = dice.choice([*[said] * 16, "[]", "Sorry, no.", said[:-9]])
    reason = "length" if dice.random() < 0.05 else "stop"
    return engines.Completion(said, reason, 10, len(said.split()))


def written(prompt: str) -> list[dict[str, str]]:
  """A pair for each of the passage's sentences."""
  passage = re.search(r"--- passage (\w+) ---\n(.*)\n--- end \1 ---", prompt, re.DOTALL)
  sentences = re.findall(r"[^.]+\.", passage[2])
  return [
    {"question": f"What about {' '.join(s.split()[:4])}?", "answer": s.strip()}
    for s in sentences
  ]


def make_config(folder: pathlib.Path, documents: pathlib.Path, **keys) -> schema.Config:
  return schema.Config.model_validate(
    {
      "model": {"source": "some/model"},
      "data": {"questions": "not there yet"},
      "extract": {
        "documents": str(documents),
        "chunk_tokens": 40,
        "min_chunk_tokens": 4,
        "writer": {"batch_size": 4},
        "judges": [{"batch_size": 4}, {"model": "second", "batch_size": 4}],
        "shares": {"train": 0.5, "validation": 0.2, "test": 0.3},
        **keys,
      },
      "output": str(folder),
    }
  )


def script(log: pathlib.Path) -> None:
  """Puts the scripted model in the place of the real ones, for this process."""
  words = types.SimpleNamespace(
    hf_tokenizer=lambda text, **_: {"input_ids": text.split()},
    digest="none",
    plain=None,
    vocab_size=None,
  )
  jax_engine.load = lambda source, **_: Scripted(source, log)
  engines.identity = lambda source: f"scripted {source}"
  engines.chat_tokenizer = lambda source, template=None: words


def result(folder: pathlib.Path) -> dict[str, str]:
  """sha256 of everything but the summary, which holds times."""
  files = [*(folder / "extracted").glob("*.jsonl"), folder / "extracted/MANIFEST.json"]
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in files
    if file.name != "journal.jsonl"
  }


def matrix(root: pathlib.Path, documents: pathlib.Path, plan: list) -> list[dict]:
  """See `refine_driver.strikes`."""

  def run_stage(output: pathlib.Path, log: pathlib.Path) -> None:
    script(log)
    extract.extract(make_config(output, documents))

  verdicts = refine_driver.strikes(root, plan, run_stage, result, "extracted")
  return [refine_driver.shown(verdict) for verdict in verdicts]


if __name__ == "__main__":
  root, documents, plan = sys.argv[1:]
  print(
    json.dumps(matrix(pathlib.Path(root), pathlib.Path(documents), json.loads(plan)))
  )
