"""Refinement of a file of questions, in windows of rows and by any number of workers.

`refinement` holds the method. Here it is applied to one window of rows at a time, so
that memory does not grow with the file. Every call to a model goes through the journal:
a run that was stopped continues where it was, and the shards are a pure function of the
questions and the journal. Several machines can share the rows as workers, each with its
own journal; a run over all rows then merges their journals.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import raft_jax
from raft_jax import errors
from raft_jax.config import data_layout, schema
from raft_jax.config import load as config_load
from raft_jax.curation import refined_folder, refinement, stage_run
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging, ray_workers, roles, sentence_encoder
from raft_jax.hf import chat
from raft_jax.runtime import interrupts
from raft_jax.storage import (
  journal,
  question_files,
  records,
  rejects,
  shards,
  sources,
)

WINDOW = 4096
"""Rows in memory at a time; with Ray, for each worker."""


class WorkerShare(NamedTuple):
  """The rows of one worker: row `worker` and every `workers`-th row after it."""

  worker: int
  workers: int


ALL_ROWS = WorkerShare(0, 1)

PlacedQuestion = tuple[rejects.Place, records.Question]
"""A question and its place."""


class Questions(NamedTuple):
  """The questions of a run.

  Attributes:
    data: the section that names their file.
    checked: how many can be refined, and the rows set aside.
    digest: of all that could be read.
  """

  data: schema.Data
  checked: question_files.Checked
  digest: str


class RefineWindow(Protocol):
  """`refinement.refine` with the engines and settings of a run."""

  def __call__(
    self,
    questions: Sequence[records.Question],
    *,
    calls: calls_lib.Calls,
    names: Sequence[str],
  ) -> Sequence[records.Refined]: ...


def begin(config: schema.Config) -> stage_run.StageRun:
  """Checks the config and makes the folder of refined records.

  Raises:
    UserError: the rewriter is not the model to be trained, whose words the rewrites
      must be, or the folder holds a refinement with other settings.
  """
  roles.check_trained_model(
    "refine.rewriter",
    config.refine.rewriter,
    config.model,
    "the model to be trained must rewrite",
  )
  run = stage_run.begin(
    config, "refine", refined_folder.IDENTITY_KEYS, refined_folder.FOLDER
  )
  stage_run.make_folder(run)
  return run


def warn_of_own_judges(settings: schema.Refine, model: schema.Model) -> None:
  """Warns if a judge is the model whose fused answers it scores.

  Panickssery et al., "LLM Evaluators Recognize and Favor Their Own Generations", arXiv
  2404.13076.
  """
  fuser = settings.fusion.model or model.source
  own = [
    f"refine.judges.{i}"
    for i, judge in enumerate(settings.judges)
    if judge.engine != "encoder" and (judge.model or model.source) == fuser
  ]
  if own and settings.fusion.rounds:
    print(
      f"warning: {', '.join(own)}: {fuser} judges the answers that it has fused, and "
      "models favour their own (arXiv 2404.13076); name a judge of another family"
    )


def refine(
  config: schema.Config,
  share: WorkerShare,
  write_report: refined_folder.WriteReport,
  ray: int | None = None,
) -> Mapping[str, Any] | None:
  """Refines `data.questions` into shards, manifest, summary and report.

  Args:
    ray: as for `stage_run.calling`.

  Returns:
    The summary; None if the folder was complete before, or if other workers have rows
    of their own to do.
  """
  model, settings = config.model, config.refine
  judges = {f"refine.judges.{i}": judge for i, judge in enumerate(settings.judges)}
  ray_workers.check(
    ray,
    {"refine.rewriter": settings.rewriter, "refine.fusion": settings.fusion, **judges},
  )
  run = begin(config)
  questions = _check_questions(config.data, model, run.folder / "rejects.jsonl")
  interrupts.check()
  encoder = sentence_encoder.load(settings.encoder)
  interrupts.check()
  # The digest of the questions stands for the keys that decide which they are.
  keys = [
    k for k in refined_folder.IDENTITY_KEYS if k not in refined_folder.LAYOUT_KEYS
  ]
  keys.append("refine.*.context_tokens")
  inputs = _inputs(
    questions, settings, model, config_load.values(config, keys), encoder.identity
  )
  with _open_journals(settings.journal, run.folder, share) as book:
    sealed_inputs = refined_folder.sealed_inputs(run.folder)
    if stage_run.is_complete(run, inputs, sealed_inputs):
      return None
    warn_of_own_judges(settings, model)
    rewriter = _role("rewrite", settings.rewriter, model)
    refine_window = _refine_window(
      settings, model, encoder, rewriter, skip_too_long=config.data.too_long == "skip"
    )
    window = WINDOW * (ray or 1)
    if questions.checked.usable > window:
      _check_lengths(questions, rewriter, settings.prompt)
    with stage_run.calling(run, book, settings.seed, ray) as calls:
      spool = _refine_share(questions, share, run.folder, window, refine_window, calls)
    if share != ALL_ROWS:
      print(
        f"worker {share.worker} of {share.workers} is done; when all are, run the same "
        "command without --num-workers and --worker to merge them"
      )
      return None
    tokenizer = engines.chat_tokenizer(model.source, model.chat_template)
    return refined_folder.finish(
      run.folder,
      spool,
      model_source=model.source,
      settings=settings,
      costs=refined_folder.call_costs(calls),
      meta={
        "inputs": inputs,
        "tokenizer": tokenizer.digest,
        "model": engines.identity(model.source),
        "encoder": encoder.identity,
        "questions": questions.digest,
        **_commits(config.data),
      },
      write_report=write_report,
    )


def _commits(data: schema.Data) -> dict[str, Mapping[str, str]]:
  """The manifest's entry on a dataset of the hub."""
  commits = sources.revisions(data.questions)
  return {"commits": commits} if commits else {}


def _check_questions(
  data: schema.Data, model: schema.Model, rejects_path: pathlib.Path
) -> Questions:
  """Checks every row, and renders its prompt.

  Training could not learn from a row that the chat template refuses. It is found here,
  before the models have worked on it.
  """
  digest = hashlib.sha256()
  tokenizer = engines.chat_tokenizer(model.source, model.chat_template)

  def fault(question: records.Question) -> str | None:
    try:
      chat.prompt_ids(tokenizer, question.messages)
    except errors.UserError as error:
      return str(error)
    return None

  checked = question_files.check_questions(
    data.questions,
    layout=data_layout.layout(data),
    limit=data.limit,
    unusable=data.unusable,
    reject_threshold=data.reject_threshold,
    rejects_path=rejects_path,
    keep=lambda place, question: digest.update(refined_folder.question_bytes(question)),
    fault=fault,
  )
  rejects.report(checked.rejects, rejects_path)
  return Questions(data, checked, digest.hexdigest())


@contextlib.contextmanager
def _open_journals(
  named: str | None, folder: pathlib.Path, share: WorkerShare
) -> Iterator[journal.Journal]:
  """Opens the journal of a worker, or of all rows; calls in the others count as made.

  A merge holds the lock of each worker's journal, so that no worker is still running.

  Args:
    named: the file that the config names for the journal of all rows.
  """
  main = pathlib.Path(named or folder / "journal.jsonl")
  path = main
  if share != ALL_ROWS:
    path = main.with_stem(f"{main.stem}-worker-{share.worker}-of-{share.workers}")
  workers = sorted(main.parent.glob(f"{main.stem}-worker-*{main.suffix}"))
  others = [p for p in (main, *workers) if p != path and p.exists()]
  with contextlib.ExitStack() as locks:
    for other in others if share == ALL_ROWS else ():
      locks.enter_context(journal.locked(other))
    with journal.open_journal(path, others=others) as book:
      yield book


def _usable_rows(questions: Questions) -> Iterator[PlacedQuestion]:
  """The questions to refine, in order."""
  data = questions.data
  return question_files.rows(
    data.questions,
    layout=data_layout.layout(data),
    limit=data.limit,
    without=questions.checked.places,
  )


def _row_name(place: rejects.Place) -> str:
  """How messages name a question."""
  return f"{place.id} ({place.file}:{place.line})"


def _check_lengths(questions: Questions, rewriter: calls_lib.Role, prompt: str) -> None:
  """Refuses a row that is too long now, and not when its window is reached."""
  limit = rewriter.generator.prompt_limit
  if limit is None or questions.data.too_long == "skip":
    return
  for place, question in _usable_rows(questions):
    if question.tool_calls:  # not rewritten
      continue
    text = refinement.rewrite_prompt(question, prompt)
    count = rewriter.generator.count_tokens(records.user_turn(text))
    if count + rewriter.max_new_tokens > limit:
      raise calls_lib.too_long(rewriter, _row_name(place), count)


def _refine_window(
  settings: schema.Refine,
  model: schema.Model,
  encoder: sentence_encoder.Encoder,
  rewriter: calls_lib.Role,
  *,
  skip_too_long: bool,
) -> RefineWindow:
  return functools.partial(
    refinement.refine,
    rewriter=rewriter,
    fusion=_role("fuse", settings.fusion, model),
    judges=[_judge(judge, model, encoder) for judge in settings.judges],
    encoder=encoder,
    prompt=settings.prompt,
    threshold=settings.similarity_threshold,
    rounds=settings.fusion.rounds,
    accept_at=settings.fusion.accept_at,
    skip_too_long=skip_too_long,
  )


def _refine_share(
  questions: Questions,
  share: WorkerShare,
  folder: pathlib.Path,
  window: int,
  refine_window: RefineWindow,
  calls: calls_lib.Calls,
) -> shards.Spool:
  """The records of a worker's rows, `window` rows at a time.

  One model is in memory at a time. A window that needs another model waits until all
  windows have come as far as they can with this one, so that each model is loaded once
  a pass over the file and not once a window.
  """
  usable = questions.checked.usable
  spool = shards.Spool(folder, len(range(share.worker, usable, share.workers)))
  calls.one_model = usable > window
  while any(spool.missing(i) for i in range(0, len(spool), window)):
    calls.model = None
    rows = itertools.islice(_usable_rows(questions), share.worker, None, share.workers)
    for first in range(0, len(spool), window):
      placed = list(itertools.islice(rows, window))
      if not spool.missing(first):
        continue
      if calls.one_model:
        last = first + len(placed)
        calls.title = f"rows {first + 1:,}-{last:,} of {len(spool):,}: "
      names = [_row_name(place) for place, _ in placed]
      with contextlib.suppress(calls_lib.OtherModel):
        refined = refine_window([q for _, q in placed], calls=calls, names=names)
        spool.put(first, map(records.to_json, refined))
  return spool


def _role(name: str, engine: schema.Engine, model: schema.Model) -> calls_lib.Role:
  return roles.role(
    name, engine, model, temperature=engine.temperature, top_p=engine.top_p
  )


def _judge(
  judge: schema.Judge, model: schema.Model, encoder: sentence_encoder.Encoder
) -> refinement.Judge:
  if judge.engine == "encoder":
    return refinement.encoder_judge(encoder)
  return refinement.language_judge(
    roles.judge("judge", judge, model, judging.REPLY_SCHEMA)
  )


def _inputs(
  questions: Questions,
  settings: schema.Refine,
  model: schema.Model,
  identity_values: Mapping[str, Any],
  encoder_identity: str,
) -> str:
  """Digest of everything that the shards depend on."""
  prompts = (settings.prompt, "fuse", "judge")
  rejected = questions.checked.rejects
  return journal.content_key(
    version=raft_jax.__version__,
    questions=questions.digest,
    settings=identity_values,
    records_per_shard=settings.records_per_shard,
    too_long=questions.data.too_long,
    refused=[reject.place.id for reject in rejected if reject.kind == "refused"],
    prompts=[judging.template(name).template for name in prompts],
    models=roles.local_identities([settings.fusion, *settings.judges], model),
    encoder=encoder_identity,
  )
