"""The shortest config that is accepted."""

import pathlib
import textwrap

from raft_jax.config import load as config_load
from raft_jax.config import schema

QUESTIONS = "configs/data/wordnet/law/train.jsonl"
LEAST = f"""\
model: {{source: some/model}}
data: {{questions: {QUESTIONS}}}
output: runs/x
"""


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
  path = folder / "c.yaml"
  path.write_text(textwrap.dedent(text), encoding="utf-8")
  return path


def least(folder: pathlib.Path, *overrides: str) -> schema.Config:
  return config_load.load(write(folder, LEAST), overrides)
