"""The questions and answers that a run learns from, as token ids."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from raft_jax import errors
from raft_jax.config import data_layout, run_lock, schema
from raft_jax.curation import refined_folder, refinement, synthesis_run
from raft_jax.data import document_sentences, token_rows
from raft_jax.hf import chat
from raft_jax.storage import question_files, records, sealed_folder, shards
from raft_jax.storage import rejects as rejects_lib

REFINED_KEYS = (*refined_folder.IDENTITY_KEYS, "data.limit")
"""Config keys that decide the refined records which a run learns from."""


class Example(NamedTuple):
  """A conversation up to a user turn, the answer to learn, and where they are."""

  place: rejects_lib.Place
  messages: tuple[records.Message, ...]
  answer: records.Message


class TrainingSet(NamedTuple):
  """The token rows of a run.

  Attributes:
    rows: of the domain.
    replayed: of the section `replay`; their ids continue after the domain's.
    general: of the section `anchor`, for the importance of parameters.
    rejects: rows that were set aside.
    digest: sha256 of all token rows.
    questions_by_row: conversation and answer of each row and replayed row, by row id.
  """

  rows: list[token_rows.Row]
  replayed: list[token_rows.Row]
  general: list[token_rows.Row]
  rejects: list[rejects_lib.Reject]
  digest: str
  questions_by_row: Mapping[int, token_rows.Conversation]


def rewritten(record: records.Refined) -> str:
  """The model's rewrite where it is usable, else the original answer.

  This is the self-distillation of Yang et al., arXiv 2402.13669, which checks the form
  of a rewrite but not its similarity to the answer.
  """
  return record.question.answer if record.similarity is None else record.rewrite


def filtered(record: records.Refined, threshold: float) -> str:
  """The rewrite where it passes the filter of Eq. 3 of RAFT (arXiv 2606.00147), else
  the original answer."""
  accepted = refinement.passes(record.similarity, threshold)
  return record.rewrite if accepted else record.question.answer


ANSWERS: dict[str, Callable[[records.Refined, float], str]] = {
  "rewritten": lambda record, threshold: rewritten(record),
  "filtered": filtered,
  "refined": lambda record, threshold: record.answer,
}
"""For each value of `data.answers`: the answer to learn from a refined record, given
the threshold of the cosine."""


def load(
  config: schema.Config, tokenizer: chat.ChatTokenizer, *, distil: bool
) -> TrainingSet:
  """Reads and tokenises everything that the run learns from.

  Args:
    distil: whether there is a teacher, which needs a context of its own.
  """
  data, replay, anchor = config.data, config.replay, config.anchor
  context = context_of(config.distill) if distil else "none"
  rows, set_aside, questions_by_row = _domain_rows(config, tokenizer, context)
  replayed: list[token_rows.Row] = []
  general: list[token_rows.Row] = []
  if replay is not None and replay.share:
    first = max(row.row_id for row in rows) + 1
    path = replay.questions or synthesis_run.questions(config)
    examples, unusable = _read_examples(path, data)
    encoded, refused = _encode(examples, tokenizer, context, data)
    set_aside += unusable + refused
    questions_by_row |= {
      first + i: (e.messages, e.answer) for i, e in enumerate(examples)
    }
    replayed = [row._replace(row_id=first + row.row_id) for row in encoded]
  if anchor is not None and anchor.importance != "none" and anchor.questions:
    examples, unusable = _read_examples(anchor.questions, data)
    general, refused = _encode(examples[: anchor.limit], tokenizer, "none", data)
    set_aside += unusable + refused
  parts = [part for part in (rows, replayed, general) if part]
  digest = hashlib.sha256(b"".join(repr(part).encode() for part in parts)).hexdigest()
  return TrainingSet(rows, replayed, general, set_aside, digest, questions_by_row)


def _domain_rows(
  config: schema.Config, tokenizer: chat.ChatTokenizer, context: str
) -> tuple[
  list[token_rows.Row],
  list[rejects_lib.Reject],
  dict[int, token_rows.Conversation],
]:
  """The rows of the domain, what was set aside, and the questions by row id."""
  data, extract = config.data, config.extract
  if config.sentences is not None and extract is not None:
    rows, rejects = document_sentences.load(config.sentences, extract, data, tokenizer)
    return rows, rejects, {}
  set_aside: list[rejects_lib.Reject] = []
  if data.answers == "original":
    examples, set_aside = _read_examples(data.questions, data)
  else:  # refinement has listed the rows that it set aside
    examples = read_refined(config, tokenizer)
  rows, refused = _encode(examples, tokenizer, context, data)
  questions_by_row: dict[int, token_rows.Conversation] = {
    i: (e.messages, e.answer) for i, e in enumerate(examples)
  }
  return rows, [*set_aside, *refused], questions_by_row


def context_of(distill: schema.Distill) -> str:
  """The form in which the teacher's context is known before there are rollouts."""
  form = distill.teacher_context
  return "none" if form == "sibling" else form


def read_refined(config: schema.Config, tokenizer: chat.ChatTokenizer) -> list[Example]:
  """The examples of a run's refined records.

  Raises:
    errors.UserError: they are unfinished, or belong to other questions or settings.
  """
  folder = _find_refined(config.output, config.method)
  run_lock.check_lock(config, "refine", REFINED_KEYS)
  rewriter = tokenizer
  if tokenizer.thinking:  # the rewriter's is off
    rewriter = chat.load(config.model.source, config.model.chat_template)
  return _refined_examples(
    folder,
    config.data,
    threshold=config.refine.similarity_threshold,
    source=config.model.source,
    tokenizer_digest=rewriter.digest,
  )


def _find_refined(output: str, method: str) -> pathlib.Path:
  """The folder of a run's refined records. Raises UserError if it is unfinished."""
  folder = pathlib.Path(output) / refined_folder.FOLDER
  if not (folder / sealed_folder.MANIFEST).exists():
    raise errors.UserError(
      f"{folder}: no refined records, which method {method!r} learns from; "
      "run `python -m raft_jax.refine` with this config first (or set "
      "data.answers=original)"
    )
  return folder


def _refined_examples(
  folder: pathlib.Path,
  data: schema.Data,
  *,
  threshold: float,
  source: str,
  tokenizer_digest: str,
) -> list[Example]:
  """The examples of a folder of refined records.

  Args:
    threshold: of the cosine, for `data.answers=filtered`.
    source: the model's, for the error message.
    tokenizer_digest: of the tokenizer and chat template that the model has now.

  Raises:
    errors.UserError: the records belong to other questions or another tokenizer.
  """
  meta = shards.read_manifest(folder).meta
  places = _check_questions(data, folder, meta.get("questions"))
  if meta.get("tokenizer") not in (None, tokenizer_digest):
    raise errors.UserError(
      f"{folder}: its answers were written with another tokenizer or chat template "
      f"than {source} has now; restore the old one, or refine into "
      "another output"
    )
  choose_answer = ANSWERS[data.answers]
  examples = []
  for raw in shards.read_shards(folder):
    record = records.from_json(raw)
    question = record.question
    place = places.get(question.id, rejects_lib.Place(question.id))
    answer = as_turn(question, choose_answer(record, threshold))
    examples.append(Example(place, question.messages, answer))
  return examples


def as_turn(question: records.Question, answer: str) -> records.Message:
  """The turn of a chosen answer. Other words than the question's have no reasoning."""
  if answer == question.answer:
    return question.reply
  return records.Message("assistant", answer)


def _check_questions(
  data: schema.Data, folder: pathlib.Path, refined_digest: str | None
) -> Mapping[str, rejects_lib.Place]:
  """Where the questions of refined records are in the file that they were made from.

  Args:
    refined_digest: digest of the questions that were refined.

  Raises:
    errors.UserError: the file has other questions now.
  """
  if refined_digest is None:  # refined by an earlier version
    return {}
  digest = hashlib.sha256()
  contents = _read(data.questions, data)
  for question in contents.questions:
    digest.update(refined_folder.question_bytes(question))
  if refined_digest != digest.hexdigest():
    raise errors.UserError(
      f"{folder}: its answers belong to other questions than {data.questions} has now; "
      "run `python -m raft_jax.refine` with this config again: it makes only the calls "
      "for questions that have changed"
    )
  return contents.places


def _read_examples(
  path: str, data: schema.Data
) -> tuple[list[Example], list[rejects_lib.Reject]]:
  contents = _read(path, data)
  examples = [
    Example(contents.places[question.id], question.messages, question.reply)
    for question in contents.questions
  ]
  return examples, contents.rejects


def _read(path: str, data: schema.Data) -> question_files.Read:
  is_domain = path == data.questions
  return question_files.read(
    path,
    layout=(data_layout.layout if is_domain else data_layout.general_layout)(data),
    limit=data.limit if is_domain else None,
    unusable=data.unusable,
    reject_threshold=data.reject_threshold,
  )


def _encode(
  examples: Sequence[Example],
  tokenizer: chat.ChatTokenizer,
  teacher_context: str,
  data: schema.Data,
) -> tuple[list[token_rows.Row], list[rejects_lib.Reject]]:
  return token_rows.encode(
    [(example.messages, example.answer) for example in examples],
    data,
    tokenizer=tokenizer,
    teacher_context=teacher_context,
    places=[example.place for example in examples],
  )
