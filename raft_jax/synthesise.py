"""Rehearsal questions that the model to be trained writes and answers itself (SSR).

Huang et al., "Mitigating Catastrophic Forgetting in Large Language Models with
Self-Synthesized Rehearsal", arXiv 2403.01244. `synthesise` below is the whole method:
two seeds at a time are examples after which the model writes one more question; what
is none or repeats another is dropped; the questions nearest to the centres of clusters
stand for all, and the model answers these greedily. The paper continues the raw text
of examples and their answers. Ours is a chat, for models that are tuned to one: the
user asks for a question three times, and the seeds are the assistant's first two
replies. No answers are shown, as they are written anew in any case.

Calls go through `calls.Calls`, so a stopped run continues where it was, and the files
are a pure function of the seeds and the journal; only embeddings are computed again.

Run it as `python -m raft_jax.synthesise --config FILE`.
"""

from __future__ import annotations

import collections
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table

import raft_jax
from raft_jax import errors
from raft_jax.config import cli, run_lock, schema
from raft_jax.config import load as config_load
from raft_jax.curation import clusters, near_duplicates, qa_pairs
from raft_jax.generation import (
  calls as calls_lib,
)
from raft_jax.generation import (
  engines,
  judging,
  roles,
  sentence_encoder,
)
from raft_jax.hf import chat
from raft_jax.runtime import interrupts, progress
from raft_jax.storage import journal, question_files, records, rejects, sealed_folder

DECIDING = (
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
"""Config keys that decide which questions are rehearsed, and their answers."""

IDENTITY_KEYS = (*DECIDING, "data.max_prompt_tokens", "data.max_answer_tokens")
"""Those and the budgets; a folder's second run may not change them."""

QUESTIONS = "questions"


class Draft(NamedTuple):
  """A question after the example of two seeds, or a seed itself (`seeds` is empty)."""

  text: str
  seeds: tuple[int, ...] = ()
  round: int = 0

  def place(self) -> dict[str, Any]:
    return {"seeds": list(self.seeds), "round": self.round, "question": self.text}


class Synthesised(NamedTuple):
  """What is rehearsed, and everything that was dropped on the way to it."""

  rows: list[dict[str, Any]]
  dropped: list[qa_pairs.Dropped]
  sizes: list[int]  # drafts of each cluster


# The method


def synthesise(
  seeds: Sequence[str],
  *,
  writer: calls_lib.Role,
  answerer: calls_lib.Role,
  encoder: sentence_encoder.Encoder,
  fits_prompt: Callable[[str], bool],
  fits_answer: Callable[[str], bool],
  settings: schema.Synthesise,
  calls: calls_lib.Calls,
) -> Synthesised:
  """Questions and answers after the seeds; each draft is kept or dropped.

  Args:
    fits_prompt, fits_answer: whether training could take a text.
  """
  written, unwritten = write(seeds, settings, writer, calls, fits_prompt)
  given = [Draft(seed) for seed in seeds]
  unlike, again = qa_pairs.unlike(
    [*given, *written], lambda draft: draft.text, settings.near_duplicate
  )
  fresh = [draft for draft in unlike if draft.seeds]
  repeats = [row for row in again if row["seeds"]]
  chosen, cluster, others, sizes = choose(fresh, encoder, settings)
  prompts = [records.user_turn(draft.text) for draft in chosen]
  rows, unanswered = [], []
  replies = calls.ask(answerer, prompts)
  for draft, number, reply in zip(chosen, cluster, replies, strict=True):
    reason = answer_fault(draft.text, reply, settings.near_duplicate, fits_answer)
    if reason is not None or reply is None:
      unanswered.append(qa_pairs.drop(draft, f"answer_{reason}", cluster=number))
    else:
      rows.append(row_of(draft, reply.text.strip(), number))
  return Synthesised(rows, [*unwritten, *repeats, *others, *unanswered], sizes)


def order(seeds: int, seed: int) -> list[tuple[int, int]]:
  """All ordered pairs of different seeds, shuffled; a longer run begins like a shorter
  one."""
  every = itertools.permutations(range(seeds), 2)
  return sorted(every, key=lambda pair: journal.content_key(pair=pair, seed=seed))


def write(
  seeds: Sequence[str],
  settings: schema.Synthesise,
  writer: calls_lib.Role,
  calls: calls_lib.Calls,
  fits: Callable[[str], bool],
) -> tuple[list[Draft], list[qa_pairs.Dropped]]:
  """What the model writes after pairs of seeds, pair after pair, round after round."""
  drafts, dropped = [], []
  shown = order(len(seeds), settings.seed)
  for number in range(-(-settings.drafts // len(shown))):
    asked = shown[: settings.drafts - number * len(shown)]
    prompts = [request(seeds[i], seeds[j]) for i, j in asked]
    replies = calls.ask(writer, prompts, round_number=number)
    for pair, reply in zip(asked, replies, strict=True):
      said, reason = read_draft(reply, seeds[pair[0]] + "\n" + seeds[pair[1]])
      draft = Draft(said, pair, number)
      if reason is None and not fits(said):
        reason = "too_long"
      if reason is None:
        drafts.append(draft)
      else:
        dropped.append(qa_pairs.drop(draft, reason))
  return drafts, dropped


def request(first: str, second: str) -> tuple[records.Message, ...]:
  """What asks for one more question: a chat in which two were asked for and given."""
  asked = records.Message("user", judging.template("synthesise").substitute())
  given = [records.Message("assistant", seed) for seed in (first, second)]
  return (asked, given[0], asked, given[1], asked)


_LABEL = re.compile(r"(?:new )?instruction(?: 3)?:\s*", re.IGNORECASE)
_LABELS = re.compile(
  r"^\W*(?:new |example )?(?:instruction|question|task|answer|response|output)"
  r"(?: \d+)?\W*:",
  re.IGNORECASE | re.MULTILINE,
)
_CHATTER = re.compile(r"(?:sure|certainly|of course|okay|here(?:'s| is| are))\b", re.I)


def read_draft(reply: engines.Completion | None, given: str) -> tuple[str, str | None]:
  """The question that a reply is, and why it is none (None: it is one).

  Read strictly: but for one label in front of it, the whole reply is the question. One
  that speaks about its task, or goes on to an answer or to a second question, is none.
  """
  reason = judging.no_answer(reply, given)
  said = reply.text.strip() if reply is not None else ""
  label = _LABEL.match(said)
  if label:
    said = said[label.end() :].strip()
  if reason is not None:
    return said[:500], reason
  if question_files.text_fault("question", said) is not None:
    return "", "empty"
  if _CHATTER.match(said.replace("\u2019", "'")):
    return said[:500], "chatter"
  return said, "several" if _LABELS.search(said) else None


def choose(
  drafts: Sequence[Draft],
  encoder: sentence_encoder.Encoder,
  settings: schema.Synthesise,
) -> tuple[list[Draft], list[int], list[qa_pairs.Dropped], list[int]]:
  """Those that stand for all, their clusters, the others, and each cluster's size."""
  if not drafts:
    return [], [], [], []
  vectors_NE = encoder([draft.text for draft in drafts])
  lengths_N = np.linalg.norm(vectors_NE, axis=1)
  sound = [i for i, length in enumerate(lengths_N) if 0 < length < np.inf]
  dropped = [
    qa_pairs.drop(draft, "no_embedding")
    for i, draft in enumerate(drafts)
    if i not in set(sound)
  ]
  if not sound:
    return [], [], dropped, []
  found = clusters.representatives(
    vectors_NE[sound] / lengths_N[sound, None],
    clusters=settings.clusters,
    keep=settings.keep,
    seed=settings.seed,
  )
  here = set(found.chosen)
  for i, number in enumerate(found.cluster_N):
    if i not in here:
      dropped.append(qa_pairs.drop(drafts[sound[i]], "not_nearest", cluster=number))
  return (
    [drafts[sound[i]] for i in found.chosen],
    [found.cluster_N[i] for i in found.chosen],
    dropped,
    np.bincount(found.cluster_N).tolist(),
  )


def answer_fault(
  question: str,
  reply: engines.Completion | None,
  near: float,
  fits: Callable[[str], bool],
) -> str | None:
  """Why a reply is no answer to learn, or None; `near` duplicates echo the question."""
  reason = judging.no_answer(reply, question)
  if reason is not None or reply is None:
    return reason
  answer = reply.text.strip()
  if question_files.text_fault("answer", answer) is not None:
    return "empty"
  if near_duplicates.find([question, answer], near)[1] is not None:
    return "echo"
  return None if fits(answer) else "too_long"


def row_of(draft: Draft, answer: str, cluster: int) -> dict[str, Any]:
  """A question as `question_files.read_questions` takes it, with where it came from."""
  return {
    "id": journal.content_key(question=draft.text, answer=answer)[:16],
    "question": draft.text,
    "answer": answer,
    "source": {"seeds": draft.seeds, "round": draft.round, "cluster": cluster},
  }


# The run


def fit(run: schema.Config) -> None:
  """Writes `output/synthesised`: questions.jsonl, dropped.jsonl, summary."""
  settings = check(run)
  run_lock.check_lock(run, "synthesise", IDENTITY_KEYS)
  folder = pathlib.Path(run.output) / "synthesised"
  seeds, aside = read_seeds(settings.seeds, run.data.unusable)
  tokenizer = engines.tokenizer(run.model.source, run.model.chat_template)
  interrupts.check()
  encoder = sentence_encoder.load(run.refine.encoder)
  interrupts.check()
  inputs = _inputs(run, settings, seeds, encoder)
  # The mark of a run's folder.
  (folder.parent / "config").mkdir(parents=True, exist_ok=True)
  rejects.write(folder / "rejects.jsonl", aside)
  rejects.report(aside, folder / "rejects.jsonl")
  with journal.open_journal(folder / "journal.jsonl") as book:
    if sealed_folder.inputs(folder) == inputs:
      run_lock.lock_config(run, "synthesise", IDENTITY_KEYS)
      print(f"{folder}: already complete, nothing to do")
      return
    writer, answerer = _roles(run, settings)
    # Not before: what was wrong with the input so far binds no later run.
    run_lock.lock_config(run, "synthesise", IDENTITY_KEYS)
    calls = calls_lib.Calls(book, settings.seed)
    with calls_lib.at_work(calls):
      made = synthesise(
        seeds,
        writer=writer,
        answerer=answerer,
        encoder=encoder,
        fits_prompt=lambda said: (
          len(chat.prompt_ids(tokenizer, records.user_turn(said)))
          <= run.data.max_prompt_tokens
        ),
        fits_answer=lambda said: (
          len(chat.answer_ids(tokenizer, said)) <= run.data.max_answer_tokens
        ),
        settings=settings,
        calls=calls,
      )
    summary = summarise(len(seeds), made, calls)
    seal = {"inputs": inputs, "kept": summary["kept"]} if made.rows else None
    files = {QUESTIONS: made.rows, "dropped": made.dropped}
    sealed_folder.write(folder, files, summary, seal)
  show(summary, folder)
  _refuse_nothing(summary, folder)


def questions(run: schema.Config) -> str:
  """The file that this stage wrote for a config, finished and with these settings.

  Raises:
    UserError: it is not there, damaged, or was made with other settings.
  """
  folder = pathlib.Path(run.output) / "synthesised"
  check(run)
  if sealed_folder.inputs(folder) is None:
    raise errors.UserError(
      f"{folder}: no finished questions, which replay.questions=null learns from; run "
      "`python -m raft_jax.synthesise` with this config first, or name a file there"
    )
  run_lock.check_lock(run, "synthesise", DECIDING)
  return str(folder / f"{QUESTIONS}.jsonl")


def check(run: schema.Config) -> schema.Synthesise:
  """The section `synthesise`, whose writer must be the model to be trained."""
  settings = run.synthesise
  if settings is None:
    raise errors.UserError(
      "synthesise: is required for this stage: add `synthesise: {seeds: FILE}`"
    )
  writer = settings.writer
  if writer.engine != "openai" and writer.model not in (None, run.model.source):
    raise errors.UserError(
      f"synthesise.writer.model: {writer.model} is not model.source "
      f"({run.model.source}); what is rehearsed is the model's own: delete the key"
    )
  return settings


def read_seeds(
  path: str, unusable: str = "error"
) -> tuple[list[str], list[rejects.Reject]]:
  """The seeds of a file, and the rows that are none.

  Args:
    unusable: "error": all must be usable, as there are few; "skip" sets others aside.

  Raises:
    UserError: names the row.
  """
  lines: dict[str, int] = {}
  aside: list[rejects.Reject] = []
  for line, row in question_files.read_texts(path, "question"):
    fault = row
    if not isinstance(row, rejects.Reject):
      seen = lines.setdefault(row["question"].strip(), line)
      if seen == line:
        continue
      place = rejects.Place(row.get("id"), path, line)
      fault = rejects.Reject(place, f"repeats row {seen}", "repeated")
    assert isinstance(fault, rejects.Reject)
    if unusable == "error":
      raise errors.UserError(
        f"{fault}; mend or delete the row, or set data.unusable=skip to set it aside"
      )
    aside.append(fault)
  if len(lines) < 2:
    raise errors.UserError(
      f"{path}: holds {len(lines)} questions, and two are shown at a time; add some"
    )
  return list(lines), aside


def _roles(
  run: schema.Config, settings: schema.Synthesise
) -> tuple[calls_lib.Role, calls_lib.Role]:
  stage = settings.writer
  answering = stage.model_copy(update={"max_new_tokens": run.data.max_answer_tokens})
  return (
    roles.role(
      "draft", stage, run.model, temperature=stage.temperature, top_p=stage.top_p
    ),
    roles.role("answer", answering, run.model, temperature=0.0, top_p=1.0),
  )


def _inputs(
  run: schema.Config,
  settings: schema.Synthesise,
  seeds: Sequence[str],
  encoder: sentence_encoder.Encoder,
) -> str:
  """Digest of all that the files depend on."""
  return journal.content_key(
    version=raft_jax.__version__,
    seeds=seeds,
    settings=config_load.values(run, (*IDENTITY_KEYS, "synthesise.*.context_tokens")),
    prompt=judging.template("synthesise").template,
    model=engines.identity(run.model.source),
    encoder=encoder.identity,
  )


def summarise(seeds: int, made: Synthesised, calls: calls_lib.Calls) -> dict[str, Any]:
  """The content of summary.json: what there was, what was kept, why not the rest."""
  reasons = collections.Counter(row["reason"] for row in made.dropped)
  return {
    "seeds": seeds,
    "drafts": len(made.rows) + len(made.dropped),
    "kept": len(made.rows),
    "dropped": dict(reasons.most_common()),
    "clusters": made.sizes,
    **calls.costs(),
  }


def show(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Prints the summary as a table."""
  table = rich.table.Table(title="synthesis", show_header=False)
  for name in ("seeds", "drafts", "kept"):
    table.add_row(name, f"{summary[name]:,}")
  for name in ("dropped", "seconds", "tokens"):
    table.add_row(name, progress.amounts(summary[name]) or "none")
  sizes = sorted(summary["clusters"], reverse=True)
  table.add_row("drafts by cluster", ", ".join(map(str, sizes)) or "none")
  rich.console.Console().print(table)
  print(f"written to {folder}; the reason for everything dropped is in dropped.jsonl")


def _refuse_nothing(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  if summary["kept"]:
    return
  often = [f"{count} {why}" for why, count in list(summary["dropped"].items())[:3]]
  raise errors.UserError(
    f"synthesise: no question was kept ({', '.join(often)}); see "
    f"{folder / 'dropped.jsonl'}, and change the seeds, synthesise.writer or the "
    "budgets data.max_prompt_tokens and data.max_answer_tokens"
  )


def main() -> None:
  cli.run(
    "synthesise",
    fit,
    "Have the model write and answer questions of general kind, for replay.",
    without_data=True,
  )


if __name__ == "__main__":
  main()
