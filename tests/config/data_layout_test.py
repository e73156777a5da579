"""The keys that say what the rows of a file are."""

import pytest

from raft_jax import errors
from raft_jax.config import data_layout, sweep_runs
from raft_jax.config import load as config_load
from raft_jax.curation import refined_folder
from raft_jax.storage import row_layout
from raft_jax.training import run_inputs
from tests.helpers import least_config


def refused(folder, *overrides: str) -> str:
  with pytest.raises(errors.UserError) as caught:
    least_config.least(folder, *overrides)
  return str(caught.value)


def test_the_layout_is_what_the_config_says(tmp_path):
  config = least_config.least(
    tmp_path, "data.format=alpaca", "data.columns={output: reply}", "data.turns=each"
  )
  columns = {"output": "reply"}
  assert data_layout.layout(config.data) == ("alpaca", columns, "each")
  assert data_layout.general_layout(config.data) == (None, {}, "each")
  default = least_config.least(tmp_path)
  assert data_layout.layout(default.data) == row_layout.DETECTED


@pytest.mark.parametrize(
  ("given", "says"),
  [
    ("data.format=csv", "data.format: "),
    (
      "data.columns={prompts: q}",
      "data.columns: 'prompts' is no field of a row; fields",
    ),
    ("data.columns={question: 3}", "data.columns.question"),
    ("data.columns={question: q, answer: q}", "maps two fields to the column 'q'"),
    ("data.turns=all", "data.turns: "),
    ("data.questions=hub://squad", "write hub://ORG/NAME[:CONFIG][/SPLIT][@REVISION]"),
    ("data.test=none/*.csv", "data.test: 'none/*.csv' is not a file"),
    ("data.test=README.md", "data.test: README.md: unknown file type '.md'"),
    ("data.test=hub://a/b//c", "data.test: hub://a/b//c: is no address"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, given, says):
  assert says in refused(tmp_path, given)


def test_a_folder_a_glob_and_the_hub_are_sources(tmp_path):
  for source in ("configs/data/wordnet/law/tr*.jsonl", "hub://org/name:law/train@v1"):
    assert least_config.least(tmp_path, f"data.questions={source}")


def test_the_keys_bind_a_folder():
  for keys in (run_inputs.IDENTITY_KEYS, refined_folder.IDENTITY_KEYS):
    assert {"data.format", "data.columns", "data.turns"} <= {*keys}


def test_the_runs_of_a_sweep_are_tested_on_the_same_examples(tmp_path):
  text = least_config.LEAST + "sweep: {runs: [{name: a, set: {data.turns: each}}]}\n"
  base = config_load.load(least_config.write(tmp_path, text))
  with pytest.raises(errors.UserError, match=r"data\.turns: runs are compared on the"):
    sweep_runs.expand(base)
