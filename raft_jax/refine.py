"""Stage 1: rewrite, filter, fuse, judge, select.

`refinement` holds the method; here it is run over a file of questions, a window of rows
at a time, so that memory does not grow with the file. Every call to a model goes
through the journal: a stopped run continues where it was, and the shards are a pure
function of the questions and the journal. Several machines share the work as workers,
each with a journal of its own; the same command without a worker's number merges them.

Run it as `python -m raft_jax.refine --config FILE`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import raft_jax
from raft_jax import errors
from raft_jax.config import cli, run_lock, schema
from raft_jax.config import load as config_load
from raft_jax.curation import refined_folder, refinement
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
from raft_jax.runtime import interrupts
from raft_jax.storage import journal, question_files, records, rejects, shards

WINDOW = 4096
"""Rows in memory at a time."""

ENGINES = tuple(
  f"refine.{part}.{key}"
  for part, section in (
    ("rewriter", schema.Engine),
    ("fusion", schema.Fusion),
    ("judges.*", schema.Judge),
  )
  for key in section.model_fields
  if key not in schema.PLACEMENT
)
IDENTITY_KEYS = (
  "model.source",
  "model.chat_template",
  "model.dtype",
  "data.questions",
  "refine.prompt",
  "refine.encoder",
  "refine.similarity_threshold",
  "refine.seed",
  *ENGINES,
)
"""Config keys that decide the result; a folder's second run may not change them."""

SELECTING = (
  "refine.similarity_threshold",
  "refine.fusion.rounds",
  "refine.fusion.accept_at",
  "refine.judges",
)
"""The `IDENTITY_KEYS` that `--select-only` may change: no new text is generated."""


class Share(NamedTuple):
  """Which rows a worker does: `worker`, `worker` + `workers`, ..."""

  worker: int
  workers: int


WHOLE = Share(0, 1)


def fit(
  run: schema.Config,
  num_workers: int | None = None,
  worker: int | None = None,
  select_only: str | None = None,
) -> None:
  """Refines `data.questions` into `output/refined`: shards, manifest, summary, report.

  Args:
    num_workers, worker: do this worker's share of the rows, into a journal of its own.
    select_only: a finished run's output folder, to choose anew among its answers.
  """
  share = _share(num_workers, worker, select_only)
  check(run)
  run_lock.check_lock(run, "refine", IDENTITY_KEYS)
  folder = pathlib.Path(run.output) / "refined"
  # The mark of a run's folder; rejects are the first that is written there.
  (folder.parent / "config").mkdir(parents=True, exist_ok=True)
  folder.mkdir(exist_ok=True)
  if select_only is not None:
    return _select(run, folder, pathlib.Path(select_only))
  checked, questions = _checked(run, folder / "rejects.jsonl")
  interrupts.check()
  encoder = sentence_encoder.load(run.refine.encoder)
  interrupts.check()
  inputs = _inputs(run, questions, checked, encoder)
  with _journal(run, folder, share) as book:
    if _complete(folder, inputs):
      run_lock.lock_config(run, "refine", IDENTITY_KEYS)
      print(f"{folder}: already complete, nothing to do")
      return
    rewriter = _role("rewrite", run.refine.rewriter, run)
    method = _method(run, encoder, rewriter)
    if checked.usable > WINDOW:
      _check_lengths(run, checked, rewriter)
    # Not before: what was wrong with the input so far binds no later run.
    run_lock.lock_config(run, "refine", IDENTITY_KEYS)
    calls = calls_lib.Calls(book, run.refine.seed)
    with calls_lib.at_work(calls):
      refined = _refine_all(run, share, checked, folder, calls, method)
    if share != WHOLE:
      print(
        f"worker {share.worker} of {share.workers} is done; when all are, run the same "
        "command without --num-workers and --worker to merge them"
      )
      return
    meta = {
      "inputs": inputs,
      "tokenizer": engines.tokenizer(run.model.source, run.model.chat_template).digest,
      "model": engines.identity(run.model.source),
      "encoder": encoder.identity,
      "questions": questions,
    }
    refined_folder.seal(run, folder, refined, refined_folder.costs(calls), meta)


def _checked(
  run: schema.Config, listed: pathlib.Path
) -> tuple[question_files.Checked, str]:
  """Which questions can be refined, and the digest of all that can be read.

  What the chat template refuses, training could not learn from: it is not first found
  when the models have done their work.
  """
  digest = hashlib.sha256()
  tokenizer = engines.tokenizer(run.model.source, run.model.chat_template)

  def fault(question: records.Question) -> str | None:
    try:
      chat.prompt_ids(tokenizer, question.messages)
    except errors.UserError as error:
      return str(error)
    return None

  checked = question_files.check_questions(
    run.data.questions,
    limit=run.data.limit,
    unusable=run.data.unusable,
    reject_threshold=run.data.reject_threshold,
    rejects_path=listed,
    keep=lambda line, question: digest.update(hashed(question)),
    fault=fault,
  )
  rejects.report(checked.rejects, listed)
  return checked, digest.hexdigest()


def hashed(q: records.Question) -> bytes:
  """What of a question the digest of all of them is made of."""
  return journal.canonical([q.id, q.domain, q.messages, q.answer]).encode()


def _share(
  num_workers: int | None, worker: int | None, select_only: str | None
) -> Share:
  if num_workers is None and worker is None:
    return WHOLE
  if num_workers is None or worker is None:
    raise errors.UserError(
      "command line: --num-workers and --worker go together: how many there are, and "
      "the number of this one from 0"
    )
  if select_only is not None:
    raise errors.UserError(
      "command line: --select-only asks no model, so it takes no workers; leave out "
      "--num-workers and --worker"
    )
  if not 0 <= worker < num_workers:
    raise errors.UserError(
      f"command line: --worker {worker}: the workers are 0 to {num_workers - 1} "
      f"(--num-workers {num_workers})"
    )
  return Share(worker, num_workers)


@contextlib.contextmanager
def _journal(run: schema.Config, folder: pathlib.Path, share: Share) -> Any:
  """The journal of a worker, or of all, with what is finished in the others beside it.

  Who merges holds the lock of each worker's journal: none is still at work.
  """
  whole = pathlib.Path(run.refine.journal or folder / "journal.jsonl")
  path = whole
  if share != WHOLE:
    path = whole.with_stem(f"{whole.stem}-worker-{share.worker}-of-{share.workers}")
  workers = sorted(whole.parent.glob(f"{whole.stem}-worker-*{whole.suffix}"))
  others = [p for p in (whole, *workers) if p != path and p.exists()]
  with contextlib.ExitStack() as locks:
    for other in others if share == WHOLE else ():
      locks.enter_context(journal.locked(other))
    with journal.open_journal(path, others=others) as book:
      yield book


Placed = tuple[int, records.Question]
"""A question and its line."""
Method = Callable[[Sequence[Placed], calls_lib.Calls], Sequence[records.Refined]]


def _rows(run: schema.Config, checked: question_files.Checked) -> Iterator[Placed]:
  """The questions to refine, in order."""
  return question_files.rows(
    run.data.questions, limit=run.data.limit, without=checked.lines
  )


def _name(run: schema.Config, line: int, question: records.Question) -> str:
  """What messages call a question."""
  return f"{question.id} ({run.data.questions}:{line})"


def _check_lengths(
  run: schema.Config, checked: question_files.Checked, rewriter: calls_lib.Role
) -> None:
  """Refuses a row that is too long now, not when its window's turn comes."""
  limit = rewriter.generator.prompt_limit
  if limit is None or run.data.too_long == "skip":
    return
  for line, question in _rows(run, checked):
    prompt = refinement.rewrite_prompt(question, run.refine.prompt)
    count = rewriter.generator.count_tokens(records.user_turn(prompt))
    if count + rewriter.max_new_tokens > limit:
      raise calls_lib.too_long(rewriter, _name(run, line, question), count)


def _method(
  run: schema.Config, encoder: sentence_encoder.Encoder, rewriter: calls_lib.Role
) -> Method:
  """`refinement.refine` with the engines and settings of the config."""
  fusion = _role("fuse", run.refine.fusion, run)
  judges = [_judge(each, run, encoder) for each in run.refine.judges]

  def method(
    placed: Sequence[Placed], calls: calls_lib.Calls
  ) -> Sequence[records.Refined]:
    return refinement.refine(
      [question for _, question in placed],
      rewriter=rewriter,
      fusion=fusion,
      judges=judges,
      encoder=encoder,
      prompt=run.refine.prompt,
      threshold=run.refine.similarity_threshold,
      rounds=run.refine.fusion.rounds,
      accept_at=run.refine.fusion.accept_at,
      calls=calls,
      skip_too_long=run.data.too_long == "skip",
      names=[_name(run, *each) for each in placed],
    )

  return method


def _refine_all(
  run: schema.Config,
  share: Share,
  checked: question_files.Checked,
  folder: pathlib.Path,
  calls: calls_lib.Calls,
  method: Method,
) -> shards.Spool:
  """The records of a worker's share of the rows, window by window.

  One model is at work in memory at a time. A window that wants another waits until all
  windows have come as far as they can with this one: models are loaded once a pass over
  the file and not once a window.
  """
  spool = shards.Spool(folder, len(range(share.worker, checked.usable, share.workers)))
  calls.one_model = checked.usable > WINDOW
  while any(spool.missing(i) for i in range(0, len(spool), WINDOW)):
    calls.model = None
    mine = itertools.islice(_rows(run, checked), share.worker, None, share.workers)
    for first in range(0, len(spool), WINDOW):
      window = list(itertools.islice(mine, WINDOW))
      if spool.missing(first):
        if calls.one_model:
          last = first + len(window)
          calls.title = f"rows {first + 1:,}-{last:,} of {len(spool):,}: "
        with contextlib.suppress(calls_lib.OtherModel):
          spool.put(first, map(records.to_json, method(window, calls)))
  return spool


def check(run: schema.Config) -> None:
  """What can be wrong about a refinement before any file is read.

  Raises:
    UserError: a rewriter that is not the model that will be trained: its rewrites
      would not be in that model's words. (A server's model has a name of its own.)
  """
  rewriter = run.refine.rewriter
  if rewriter.engine != "openai" and rewriter.model not in (None, run.model.source):
    raise errors.UserError(
      f"refine.rewriter.model: {rewriter.model} is not model.source "
      f"({run.model.source}); the model to be trained must rewrite: delete the key"
    )


def _role(name: str, stage: schema.Engine, run: schema.Config) -> calls_lib.Role:
  return roles.role(
    name, stage, run.model, temperature=stage.temperature, top_p=stage.top_p
  )


def _judge(
  stage: schema.Judge, run: schema.Config, encoder: sentence_encoder.Encoder
) -> refinement.Judge:
  if stage.engine == "encoder":
    return refinement.encoder_judge(encoder)
  return refinement.language_judge(
    roles.judge("judge", stage, run.model, judging.REPLY_SCHEMA)
  )


def _inputs(
  run: schema.Config,
  questions: str,
  checked: question_files.Checked,
  encoder: sentence_encoder.Encoder,
) -> str:
  """Digest of all that the shards depend on."""
  stages: list[schema.ModelEndpoint] = [run.refine.fusion, *run.refine.judges]
  local = [stage for stage in stages if stage.engine != "openai"]
  models = {run.model.source, *(stage.model or run.model.source for stage in local)}
  return journal.content_key(
    version=raft_jax.__version__,
    questions=questions,
    settings=config_load.values(run, (*IDENTITY_KEYS, "refine.*.context_tokens")),
    records_per_shard=run.refine.records_per_shard,
    too_long=run.data.too_long,
    refused=[r.place.id for r in checked.rejects if r.kind == "refused"],
    prompts=[
      judging.template(n).template for n in (run.refine.prompt, "fuse", "judge")
    ],
    models=sorted(engines.identity(source) for source in models),
    encoder=encoder.identity,
  )


def _complete(folder: pathlib.Path, inputs: str) -> bool:
  if not (folder / "summary.json").exists():
    return False
  try:
    manifest = shards.read_manifest(folder)
  except errors.UserError:
    return False  # not there, or damaged: the journal rebuilds it
  return manifest.meta.get("inputs") == inputs


# Choosing anew


KEPT = ("tokenizer", "model", "encoder", "questions")
"""What a new choice among the answers of a run has of its manifest."""


def _select(run: schema.Config, folder: pathlib.Path, source: pathlib.Path) -> None:
  """The records of a finished run, selected by this config's rules instead."""
  if source.resolve() == folder.parent.resolve():
    raise errors.UserError(
      f"--select-only {source}: is also `output`; give the new choice an output of its "
      "own, e.g. output=runs/NAME"
    )
  if not (source / "config" / "refine.yaml").is_file():
    raise errors.UserError(
      f"--select-only {source}: holds no finished refinement (config/refine.yaml);"
      " name the `output` of one"
    )
  old = config_load.load(source / "config" / "refine.yaml", without_data=True)
  manifest = shards.read_manifest(source / "refined")
  judges = _judges_of(run, old, source)
  fixed = [key for key in IDENTITY_KEYS if not key.startswith(SELECTING)]
  changes = config_load.diff(
    config_load.values(old, fixed), config_load.values(run, fixed)
  )
  if changes:
    shown = "; ".join(f"{key}: {a} -> {b}" for key, (a, b) in changes.items())
    raise errors.UserError(
      f"--select-only {source}: was made with another config ({shown}); only "
      f"{', '.join(SELECTING)} may differ: put the others back, or leave out "
      "--select-only to ask the models"
    )
  with journal.locked(folder / "journal.jsonl"):
    spool, unwritten = shards.Spool(folder, manifest.records), 0
    for i, raw in enumerate(shards.iterate_shards(source / "refined")):
      interrupts.check()
      chosen = refinement.reselect(
        records.from_json(raw),
        threshold=run.refine.similarity_threshold,
        rounds=run.refine.fusion.rounds,
        accept_at=run.refine.fusion.accept_at,
        judges=judges,
      )
      unwritten += chosen is None
      if chosen is not None:
        spool.put(i, [records.to_json(chosen)])
    if unwritten:
      raise errors.UserError(
        f"--select-only {source}: by these rules {unwritten} of {manifest.records} "
        "questions want a fused answer that was never written; leave out --select-only "
        f"and set refine.journal={source / 'refined' / 'journal.jsonl'}, then only "
        "those are asked for"
      )
    run_lock.lock_config(run, "refine", IDENTITY_KEYS)
    kept = {k: manifest.meta.get(k) for k in KEPT}
    inputs = journal.content_key(
      source=manifest.meta.get("inputs"), settings=config_load.values(run, SELECTING)
    )
    refined_folder.seal(run, folder, spool, {}, {"inputs": inputs, **kept})


def _judges_of(
  run: schema.Config, old: schema.Config, source: pathlib.Path
) -> list[int]:
  """Where this config's judges stand among those that scored the old run."""

  def known(each: schema.Judge) -> dict[str, Any]:
    return each.model_dump(exclude=set(schema.PLACEMENT))

  panel = [known(each) for each in old.refine.judges]
  places = []
  for number, each in enumerate(run.refine.judges):
    if known(each) not in panel:
      raise errors.UserError(
        f"refine.judges[{number}]: no judge of {source} was like this one, so it has "
        "no scores there; name some of its judges, or leave out --select-only"
      )
    places.append(panel.index(known(each)))
  return places


def main() -> None:
  cli.run(
    "refine",
    fit,
    "Rewrite, filter, fuse and judge the training answers.",
    options={
      "--num-workers": {
        "type": int,
        "metavar": "N",
        "help": "share the rows among N processes or machines; afterwards merge by the"
        " same command without this",
      },
      "--worker": {"type": int, "metavar": "I", "help": "which of them, from 0"},
      "--select-only": {
        "metavar": "FOLDER",
        "help": "choose anew among the answers of a finished run's output folder, with"
        " another threshold, accept_at or fewer judges; asks no model",
      },
    },
  )


if __name__ == "__main__":
  main()
