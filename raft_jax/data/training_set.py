"""What a run learns from: the questions and answers that its config names, as ids."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from raft_jax import errors, refine, synthesise
from raft_jax.config import run_lock, schema
from raft_jax.curation import refinement
from raft_jax.data import batching
from raft_jax.hf import chat
from raft_jax.storage import question_files, records, shards
from raft_jax.storage import rejects as rejects_lib

REFINED = (*refine.IDENTITY_KEYS, "data.limit")
"""Keys that decide the refined records which a run learns from."""


class Examples(NamedTuple):
  """Token rows, the rows that were set aside, and what identifies them.

  Attributes:
    rows: of the domain.
    replayed: of the `replay` section; their ids go on after the domain's.
    general: of the `anchor` section, for the importance of parameters.
    digest: sha256 of all of them.
    asked: the texts of `rows` and `replayed` by row id.
  """

  rows: list[batching.Row]
  replayed: list[batching.Row]
  general: list[batching.Row]
  rejects: list[rejects_lib.Reject]
  digest: str
  asked: Mapping[int, batching.Conversation]


def rewritten(record: records.Refined) -> str:
  """The model's rewrite where it is usable, the original answer elsewhere.

  Self-distillation of Yang et al., arXiv 2402.13669: a check of form, and none of
  likeness.
  """
  return record.question.answer if record.similarity is None else record.rewrite


def filtered(record: records.Refined, threshold: float) -> str:
  """Eq. 3 of RAFT (arXiv 2606.00147): the rewrite where its cosine with the original
  answer reaches the threshold, else the original."""
  near = refinement.passes(record.similarity, threshold)
  return record.rewrite if near else record.question.answer


ANSWERS: dict[str, Callable[[records.Refined, float], str]] = {
  "rewritten": lambda record, threshold: rewritten(record),
  "filtered": filtered,
  "refined": lambda record, threshold: record.answer,
}
"""`data.answers` -> the answer that is learnt from a refined record, by the cosine's
threshold."""


def read(
  config: schema.Config, tokenizer: chat.ChatTokenizer, *, distil: bool
) -> Examples:
  """Reads and tokenises all that the run learns from.

  Args:
    distil: whether there is a teacher, whose context is wanted, too.
  """
  context = config.distill.teacher_context if distil else "none"
  if context == "sibling":  # known after the rollouts
    context = "none"
  domain, aside = _domain(config, tokenizer)
  rows, more = _encode(config, tokenizer, domain, context)
  aside += more
  asked = {i: example[1:] for i, example in enumerate(domain)}
  replayed: list[batching.Row] = []
  general: list[batching.Row] = []
  replay, anchor = config.replay, config.anchor
  if replay is not None and replay.share:
    first = max(row.row_id for row in rows) + 1
    others, spoilt = _questions(
      config, replay.questions or synthesise.questions(config)
    )
    found, more = _encode(config, tokenizer, others, context)
    aside += spoilt + more
    asked |= {first + i: e[1:] for i, e in enumerate(others)}
    replayed = [row._replace(row_id=first + row.row_id) for row in found]
  if anchor is not None and anchor.importance != "none" and anchor.questions:
    questions, spoilt = _questions(config, anchor.questions)
    general, more = _encode(config, tokenizer, questions[: anchor.limit], "none")
    aside += spoilt + more
  every = [part for part in (rows, replayed, general) if part]
  digest = hashlib.sha256(b"".join(repr(part).encode() for part in every)).hexdigest()
  return Examples(rows, replayed, general, aside, digest, asked)


Example = tuple[rejects_lib.Place, tuple[records.Message, ...], str]
"""Where it is, messages and the answer to learn."""


def _domain(
  config: schema.Config, tokenizer: chat.ChatTokenizer
) -> tuple[list[Example], list[rejects_lib.Reject]]:
  if config.data.answers == "original":
    return _questions(config, config.data.questions)
  folder = pathlib.Path(config.output) / "refined"
  if not (folder / shards.MANIFEST).exists():
    raise errors.UserError(
      f"{folder}: no refined records, which method {config.method!r} learns from; "
      "run `python -m raft_jax.refine` with this config first (or "
      "data.answers=original)"
    )
  # The records are of the questions and the model that this config names.
  run_lock.check_lock(config, "refine", REFINED)
  meta = shards.read_manifest(folder).meta
  places = _check_questions(config, folder, meta.get("questions"))
  made_with = meta.get("tokenizer")
  if made_with not in (None, tokenizer.digest):
    raise errors.UserError(
      f"{folder}: its answers were written with another tokenizer or chat template "
      f"than {config.model.source} has now; put the old one back, or refine into "
      "another output"
    )
  answer = ANSWERS[config.data.answers]
  threshold = config.refine.similarity_threshold
  found = [records.from_json(raw) for raw in shards.read_shards(folder)]
  examples = [
    (
      places.get(r.question.id, rejects_lib.Place(r.question.id)),
      r.question.messages,
      answer(r, threshold),
    )
    for r in found
  ]
  return examples, []  # what refine set aside, it has listed


def _check_questions(
  config: schema.Config, folder: pathlib.Path, made_of: str | None
) -> Mapping[str, rejects_lib.Place]:
  """Where the questions of refined records are, in the file that they were made of."""
  if made_of is None:  # by an earlier version
    return {}
  digest = hashlib.sha256()
  found = _read(config, config.data.questions)
  for question in found.questions:
    digest.update(refine.hashed(question))
  if made_of != digest.hexdigest():
    raise errors.UserError(
      f"{folder}: its answers are of other questions than {config.data.questions} has "
      "now; run `python -m raft_jax.refine` with this config again: it asks for what "
      "has changed only"
    )
  return found.places


def _questions(
  config: schema.Config, path: str
) -> tuple[list[Example], list[rejects_lib.Reject]]:
  found = _read(config, path)
  examples = [(found.places[q.id], q.messages, q.answer) for q in found.questions]
  return examples, found.rejects


def _read(config: schema.Config, path: str) -> question_files.Read:
  return question_files.read(
    path,
    limit=config.data.limit if path == config.data.questions else None,
    unusable=config.data.unusable,
    reject_threshold=config.data.reject_threshold,
  )


def _encode(
  config: schema.Config,
  tokenizer: chat.ChatTokenizer,
  found: Sequence[Example],
  context: str,
) -> tuple[list[batching.Row], list[rejects_lib.Reject]]:
  return batching.encode_rows(
    [(messages, answer) for _, messages, answer in found],
    tokenizer=tokenizer,
    teacher_context=context,
    max_prompt_tokens=config.data.max_prompt_tokens,
    max_answer_tokens=config.data.max_answer_tokens,
    max_teacher_tokens=config.data.max_teacher_tokens,
    too_long=config.data.too_long,
    unusable=config.data.unusable,
    places=[place for place, _, _ in found],
  )
