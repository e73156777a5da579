"""General abilities: items, prompts and scorers of IFEval and MMLU.

The items come from the hub or from a local file. IFEval's checkers are those of
lm-evaluation-harness, and MMLU's prompts equal its own, so that scores can be compared
with published ones. No function here runs a model.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
import pydantic

from raft_jax import errors
from raft_jax.evaluation import intervals
from raft_jax.hf import model_source

LETTERS = ("A", "B", "C", "D")

EXTRA = f"the extra `eval`; run {errors.install('eval')}"


class Instructions(pydantic.BaseModel):
  """An IFEval prompt and its instructions (Zhou et al., arXiv 2311.07911)."""

  key: int | str
  prompt: str
  instruction_id_list: Annotated[list[str], pydantic.Field(min_length=1)]
  kwargs: list[dict[str, Any]]


class Choice(pydantic.BaseModel):
  """An MMLU question (Hendrycks et al., arXiv 2009.03300)."""

  subject: str
  question: str
  choices: tuple[str, str, str, str]
  answer: str

  @pydantic.field_validator("answer", mode="before")
  @classmethod
  def _letter(cls, value: Any) -> Any:
    """The hub's copy numbers the choices 0..3."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 4:
      return LETTERS[value]
    if value not in LETTERS:
      raise ValueError("is neither A, B, C, D nor 0, 1, 2, 3")
    return value


class Prompt(pydantic.BaseModel):
  """A general prompt; other fields of its row are ignored."""

  prompt: str = pydantic.Field(min_length=1)


class Request(Prompt):
  """A general request, perhaps with an example of a good reply."""

  reference: str | None = None


Item = TypeVar("Item", bound=pydantic.BaseModel)


def is_file(source: str) -> bool:
  """Whether a source names a file, not a dataset of the hub."""
  return pathlib.Path(source).suffix.lower() in (".jsonl", ".parquet")


def read(
  kind: type[Item],
  source: str,
  *,
  key: str,
  split: str = "test",
  limit: int | None = None,
) -> list[Item]:
  """The items of a benchmark, in the order of their file.

  Args:
    source: a `.jsonl` or `.parquet` file, or a dataset's name on the hub.
    key: the config key of the source, for error messages.
    split: the split of the hub's dataset.
    limit: read only the first N rows.

  Raises:
    UserError: the file or dataset does not exist, or a row lacks a field.
  """
  if is_file(source):
    rows = _file_rows(pathlib.Path(source), key)
  else:
    rows = _hub_rows(source, split, key)
  items = []
  for place, row in rows:
    try:
      items.append(kind.model_validate(row))
    except pydantic.ValidationError as error:
      first = error.errors()[0]
      field = ".".join(map(str, first["loc"])) or "row"
      raise errors.UserError(
        f"{key}: {place}: {field}: {first['msg']}; give the file as it was published"
      ) from error
    if len(items) == limit:
      break
  if not items:
    raise errors.UserError(f"{key}: {source} has no rows; give another file")
  return items


def _file_rows(path: pathlib.Path, key: str) -> Iterator[tuple[str, Any]]:
  try:
    if path.suffix.lower() == ".parquet":
      from pyarrow import parquet

      rows = parquet.read_table(path).to_pylist()
    else:
      # Not splitlines, which also splits at line separators within a string.
      rows = path.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
    raise errors.UserError(
      f"{key}: cannot read {path}: {str(error).splitlines()[0]}; check the file"
    ) from error
  for number, row in enumerate(rows, start=1):
    if isinstance(row, str) and not row.strip():
      continue
    try:
      yield f"{path}:{number}", json.loads(row) if isinstance(row, str) else row
    except json.JSONDecodeError as error:
      raise errors.UserError(
        f"{key}: {path}:{number}: is not valid JSON: {error.msg}; one object a line"
      ) from error


def _hub_rows(source: str, split: str, key: str) -> Iterator[tuple[str, Any]]:
  try:
    import datasets
  except ImportError as error:
    raise errors.UserError(
      f"{key}: {source!r} is no .jsonl or .parquet file, and a dataset of the hub needs"
      f" {EXTRA}"
    ) from error
  name = "all" if source == "cais/mmlu" else None  # the one with every subject
  try:
    rows = datasets.load_dataset(source, name, split=split)
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    reason = str(error).strip().splitlines()[0]
    raise errors.UserError(
      f"{key}: cannot load dataset {source!r} ({reason}); name a local file instead"
    ) from error
  for number, row in enumerate(rows, start=1):
    yield f"{source}:{number}", row


# IFEval


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """The harness tries to download data, and prints that it did even if it could not."""
  with contextlib.redirect_stdout(io.StringIO()):
    yield


def load_checkers(nltk_data: str | None, *, key: str = "evaluate.ifeval") -> Any:
  """The checkers of lm-evaluation-harness' IFEval, which need no network.

  Args:
    nltk_data: folder (or `pkg://PACKAGE/FOLDER`) that holds `tokenizers/punkt_tab`,
      NLTK's sentence model, which two kinds of instruction need; None: NLTK's own
      search path.
    key: the section's config key, for error messages.

  Raises:
    UserError: the harness or the sentence model is missing.
  """
  try:
    import langdetect
    import nltk
  except ImportError as error:
    raise errors.UserError(f"{key}: needs {EXTRA}") from error
  if nltk_data is not None:
    folder = model_source.resolve(nltk_data)
    # The checkers look the model up again for each answer.
    nltk.data.path.insert(0, os.fspath(folder))
  try:
    nltk.data.find("tokenizers/punkt_tab/english/")
  except LookupError as error:
    raise errors.UserError(
      f"{key}.nltk_data: NLTK's sentence model is missing; run `python -m"
      " nltk.downloader punkt_tab`, or name a folder with tokenizers/punkt_tab"
    ) from error
  try:
    with _quiet():
      from lm_eval.tasks.ifeval import utils
  except ImportError as error:
    raise errors.UserError(f"{key}: needs {EXTRA}") from error
  # Language detection is random: without a seed the same answer may pass or fail.
  langdetect.DetectorFactory.seed = 0
  return utils


def ifeval_scores(
  items: Sequence[Instructions], answers: Sequence[str], checkers: Any
) -> dict[str, intervals.ItemScores]:
  """Strict and loose scores, by prompt and by instruction.

  Short answers satisfy `no_comma` by accident, so there is also a strict score of all
  other instructions.
  """
  by_prompt: dict[str, list[float]] = collections.defaultdict(list)
  passed: dict[str, list[list[bool]]] = collections.defaultdict(list)
  kinds = [item.instruction_id_list for item in items]
  for item, answer in zip(items, answers, strict=True):
    with _fixed_seed():
      result = checkers.process_results(item.model_dump(), [answer])
    for way in ("strict", "loose"):
      by_prompt[f"ifeval_prompt_{way}"].append(float(result[f"prompt_level_{way}_acc"]))
      passed[f"ifeval_instruction_{way}"].append(result[f"inst_level_{way}_acc"])
  name = "ifeval_instruction_strict"
  comma = "punctuation:no_comma"
  passed[f"{name}_but_no_comma"] = [
    [ok for ok, kind in zip(row, names) if kind != comma]
    for row, names in zip(passed[name], kinds)
  ]
  scores = {
    name: intervals.ItemScores(np.array(values), share=True)
    for name, values in by_prompt.items()
  }
  for name, rows in passed.items():
    weights_N = np.array([len(row) for row in rows], float)
    share_N = np.array([np.mean(row) if row else 0.0 for row in rows])
    if weights_N.any():
      scores[name] = intervals.ItemScores(share_N, weights_N)
  return scores


def check_instructions(
  items: Sequence[Instructions], checkers: Any, *, key: str
) -> None:
  """Checks, before any answer is generated, that every item can be scored.

  Raises:
    UserError: the checkers reject an item; the message names the first one.
  """
  for item in items:
    try:
      with _fixed_seed():
        checkers.process_results(item.model_dump(), [""])
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise errors.UserError(
        f"{key}: item {item.key}: its instructions cannot be checked"
        f" ({type(error).__name__}: {error}); give the file as it was published"
      ) from error


@contextlib.contextmanager
def _fixed_seed() -> Iterator[None]:
  """Seeds `random`, so that the same answer gets the same score each time.

  The checkers draw at random what an item leaves open, or gives outside the valid range
  (the letter `!` of item 1129).
  """
  before = random.getstate()
  random.seed(0)
  try:
    yield
  finally:
    random.setstate(before)


# MMLU


def mmlu_prompts(
  items: Sequence[Choice], examples: Sequence[Choice], *, shots: int
) -> list[str]:
  """Each question, preceded by the first `shots` examples of its subject.

  The wording is that of lm-evaluation-harness (the default variant of task mmlu). The
  answer is the letter after one space.

  Raises:
    UserError: a subject has too few examples.
  """
  by_subject: Mapping[str, list[Choice]] = collections.defaultdict(list)
  for example in examples:
    by_subject[example.subject].append(example)
  prompts = []
  for item in items:
    shown = by_subject[item.subject][:shots]
    if len(shown) < shots:
      raise errors.UserError(
        f"evaluate.mmlu.examples: {len(shown)} examples of subject {item.subject!r},"
        f" but evaluate.mmlu.shots={shots}; add some or lower it"
      )
    topic = item.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {topic}."
    solved = [f"{_question_text(example)} {example.answer}" for example in shown]
    prompts.append("\n\n".join([head, *solved, _question_text(item)]))
  return prompts


def _question_text(item: Choice) -> str:
  lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices)]
  return "\n".join([item.question.strip(), *lines, "Answer:"])


def mmlu_scores(
  items: Sequence[Choice], logits: Sequence[Sequence[float]]
) -> dict[str, intervals.ItemScores]:
  """The share of questions whose correct letter is the most probable of the four.

  Args:
    logits: of the letters A to D after each prompt; among equal ones the first wins.
  """
  chosen = [LETTERS[int(np.argmax(row))] for row in logits]
  correct = [float(letter == item.answer) for letter, item in zip(chosen, items)]
  return {"mmlu": intervals.ItemScores(np.array(correct), share=True)}
