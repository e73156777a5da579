"""Synthesis of rehearsal questions into a sealed folder, which training replays."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import raft_jax
from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import run_lock, schema
from raft_jax.curation import stage_run, synthesis
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging, ray_workers, roles, sentence_encoder
from raft_jax.hf import answer_turns, chat
from raft_jax.runtime import interrupts
from raft_jax.storage import journal, question_files, records, rejects, sealed_folder

FOLDER = "synthesised"
"""Name of the folder in a run's output."""

CONTENT_KEYS = (
  "model.source",
  "model.chat_template",
  "model.dtype",
  "refine.encoder",
  *(f"synthesise.{key}" for key in schema.Synthesise.model_fields if key != "writer"),
  *(
    f"synthesise.writer.{key}"
    for key in schema.QuestionWriter.model_fields
    if key not in schema.PLACEMENT
  ),
)
"""Config keys that decide the questions and their answers, for the run that replays
them."""

IDENTITY_KEYS = (*CONTENT_KEYS, "data.max_prompt_tokens", "data.max_answer_tokens")
"""Those keys and the budgets. A second run into the same folder may not change them."""

QUESTIONS = "questions"


def synthesise(
  config: schema.Config, ray: int | None = None
) -> Mapping[str, Any] | None:
  """Writes `output/synthesised`: questions.jsonl, dropped.jsonl and a summary.

  The files are a pure function of the seeds and the journal; only the embeddings are
  computed again by a run that continues.

  Args:
    ray: as for `stage_run.calling`.

  Returns:
    The summary; None if the folder was complete before.
  """
  settings, model = check(config.synthesise, config.model), config.model
  ray_workers.check(ray, {"synthesise.writer": settings.writer})
  run = stage_run.begin(config, "synthesise", IDENTITY_KEYS, FOLDER)
  seeds, unusable = read_seeds(settings.seeds, config.data.unusable)
  tokenizer = engines.chat_tokenizer(model.source, model.chat_template)
  interrupts.check()
  encoder = sentence_encoder.load(config.refine.encoder)
  interrupts.check()
  keys = (*IDENTITY_KEYS, "synthesise.*.context_tokens")
  inputs = _inputs(
    seeds, config_load.values(config, keys), model.source, encoder.identity
  )
  stage_run.make_folder(run)
  rejects.write(run.folder / "rejects.jsonl", unusable)
  rejects.report(unusable, run.folder / "rejects.jsonl")
  with journal.open_journal(run.folder / "journal.jsonl") as book:
    if stage_run.is_complete(run, inputs, sealed_folder.inputs(run.folder)):
      return None
    max_prompt, max_answer = (
      config.data.max_prompt_tokens,
      config.data.max_answer_tokens,
    )
    writer, answerer = _roles(settings.writer, model, max_answer)
    with stage_run.calling(run, book, settings.seed, ray) as calls:
      synthesised = synthesis.synthesise(
        seeds,
        writer=writer,
        answerer=answerer,
        encoder=encoder,
        fits_prompt=lambda text: (
          len(chat.prompt_ids(tokenizer, records.user_turn(text))) <= max_prompt
        ),
        fits_answer=lambda text: (
          len(answer_turns.answer_ids(tokenizer, text)) <= max_answer
        ),
        settings=settings,
        calls=calls,
      )
    summary = summarise(len(seeds), synthesised, calls)
    _write(run.folder, synthesised, summary, inputs)
  return summary


def questions(config: schema.Config) -> str:
  """The file of finished questions in a run's output.

  Raises:
    UserError: it is missing, damaged, or was made with other settings.
  """
  folder = pathlib.Path(config.output) / FOLDER
  check(config.synthesise, config.model)
  if sealed_folder.inputs(folder) is None:
    raise errors.UserError(
      f"{folder}: no finished questions, which replay.questions=null learns from; run "
      "`python -m raft_jax.synthesise` with this config first, or name a file there"
    )
  run_lock.check_lock(config, "synthesise", CONTENT_KEYS)
  return str(folder / f"{QUESTIONS}.jsonl")


def check(settings: schema.Synthesise | None, model: schema.Model) -> schema.Synthesise:
  """The section `synthesise`, whose writer must be the model to be trained."""
  if settings is None:
    raise errors.UserError(
      "synthesise: is required for this stage: add `synthesise: {seeds: FILE}`"
    )
  roles.check_trained_model(
    "synthesise.writer",
    settings.writer,
    model,
    "the model to be trained must rehearse its own words",
  )
  return settings


def read_seeds(
  path: str, policy: str = "error"
) -> tuple[list[str], list[rejects.Reject]]:
  """The seeds of a file, and the rows that cannot be used.

  Args:
    policy: `data.unusable`. "error" refuses any such row, since seeds are few; "skip"
      sets it aside.

  Raises:
    UserError: names the row.
  """
  lines: dict[str, rejects.Place] = {}
  unusable: list[rejects.Reject] = []
  for place, row in question_files.read_texts(path, "question"):
    if isinstance(row, rejects.Reject):
      reject = row
    else:
      first = lines.setdefault(row["question"].strip(), place)
      if first is place:
        continue
      at = first.line if first.file == place.file else f"{first.file}:{first.line}"
      reject = rejects.Reject(place, f"repeats row {at}", "repeated")
    if policy == "error":
      raise errors.UserError(
        f"{reject}; mend or delete the row, or set data.unusable=skip to set it aside"
      )
    unusable.append(reject)
  if len(lines) < 2:
    raise errors.UserError(
      f"{path}: holds {len(lines)} questions, and two are shown at a time; add some"
    )
  return list(lines), unusable


def _roles(
  writer: schema.QuestionWriter, model: schema.Model, max_answer_tokens: int
) -> tuple[calls_lib.Role, calls_lib.Role]:
  answerer = writer.model_copy(update={"max_new_tokens": max_answer_tokens})
  return (
    roles.role(
      "draft", writer, model, temperature=writer.temperature, top_p=writer.top_p
    ),
    roles.role("answer", answerer, model, temperature=0.0, top_p=1.0),
  )


def _inputs(
  seeds: Sequence[str],
  identity_values: Mapping[str, Any],
  model_source: str,
  encoder_identity: str,
) -> str:
  """Digest of everything that the files depend on."""
  return journal.content_key(
    version=raft_jax.__version__,
    seeds=seeds,
    settings=identity_values,
    prompt=judging.template("synthesise").template,
    model=engines.identity(model_source),
    encoder=encoder_identity,
  )


def summarise(
  seeds: int, synthesised: synthesis.Synthesised, calls: calls_lib.Calls
) -> dict[str, Any]:
  """The content of summary.json: what was written, what was kept, and why not the
  rest."""
  rows, dropped = synthesised.rows, synthesised.dropped
  reasons = collections.Counter(row["reason"] for row in dropped)
  return {
    "seeds": seeds,
    "drafts": len(rows) + len(dropped),
    "kept": len(rows),
    "dropped": dict(reasons.most_common()),
    "clusters": synthesised.cluster_sizes,
    **calls.costs(),
  }


def _write(
  folder: pathlib.Path,
  synthesised: synthesis.Synthesised,
  summary: Mapping[str, Any],
  inputs: str,
) -> None:
  """Writes the files, and seals the folder if any question was kept."""
  rows, dropped = synthesised.rows, synthesised.dropped
  manifest = {"inputs": inputs, "kept": summary["kept"]} if rows else None
  files = {QUESTIONS: rows, "dropped": dropped}
  sealed_folder.write(folder, files, summary, manifest)
