"""A new selection among the answers of a finished refinement, without calls."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.curation import refined_folder, refinement, refinement_run, stage_run
from raft_jax.runtime import interrupts
from raft_jax.storage import journal, records, shards

KEPT_META = ("tokenizer", "model", "encoder", "questions")
"""Entries of the finished run's manifest that also hold for the new selection."""


def reselect(
  config: schema.Config, source: pathlib.Path, write_report: refined_folder.WriteReport
) -> Mapping[str, Any]:
  """Writes the records of a finished run as this config's rules select them.

  Args:
    source: output folder of the finished run.

  Returns:
    The summary.

  Raises:
    UserError: the folder holds no finished run, its run differs from this config in
      more than the rules of selection, or a rule needs an answer that was not written.
  """
  run = refinement_run.begin(config)
  old = _load_finished(source, run.folder.parent)
  manifest = shards.read_manifest(source / refined_folder.FOLDER)
  judges = _judge_positions(config.refine.judges, old.refine.judges, source)
  fixed = [
    key
    for key in refined_folder.IDENTITY_KEYS
    if not key.startswith(refined_folder.SELECTION_KEYS)
  ]
  _check_same(config_load.values(old, fixed), config_load.values(config, fixed), source)
  selection = config_load.values(config, refined_folder.SELECTION_KEYS)
  inputs = journal.content_key(source=manifest.meta.get("inputs"), settings=selection)
  with journal.locked(run.folder / "journal.jsonl"):
    spool = _select_all(run.folder, source, manifest.records, config.refine, judges)
    stage_run.lock(run)
    return refined_folder.finish(
      run.folder,
      spool,
      model_source=config.model.source,
      settings=config.refine,
      costs={},
      meta={
        "inputs": inputs,
        **{key: manifest.meta.get(key) for key in KEPT_META},
      },
      write_report=write_report,
    )


def _load_finished(source: pathlib.Path, output: pathlib.Path) -> schema.Config:
  """The config of the finished run in `source`."""
  if source.resolve() == output.resolve():
    raise errors.UserError(
      f"--select-only {source}: is also `output`; give the new selection its own "
      "output, e.g. output=runs/NAME"
    )
  path = source / "config" / "refine.yaml"
  if not path.is_file():
    raise errors.UserError(
      f"--select-only {source}: holds no finished refinement (config/refine.yaml);"
      " name the `output` of one"
    )
  return config_load.load(path, without_data=True)


def _check_same(
  old: Mapping[str, Any], new: Mapping[str, Any], source: pathlib.Path
) -> None:
  changes = config_load.diff(dict(old), dict(new))
  if changes:
    shown = "; ".join(f"{key}: {a} -> {b}" for key, (a, b) in changes.items())
    raise errors.UserError(
      f"--select-only {source}: was made with another config ({shown}); only "
      f"{', '.join(refined_folder.SELECTION_KEYS)} may differ: restore the other "
      "values, or leave out --select-only to call the models"
    )


def _select_all(
  folder: pathlib.Path,
  source: pathlib.Path,
  count: int,
  settings: schema.Refine,
  judges: Sequence[int],
) -> shards.Spool:
  """The finished run's records, each selected again."""
  spool, unwritten = shards.Spool(folder, count), 0
  for i, raw in enumerate(shards.iterate_shards(source / refined_folder.FOLDER)):
    interrupts.check()
    selected = refinement.reselect(
      records.from_json(raw),
      threshold=settings.similarity_threshold,
      rounds=settings.fusion.rounds,
      accept_at=settings.fusion.accept_at,
      judges=judges,
    )
    unwritten += selected is None
    if selected is not None:
      spool.put(i, [records.to_json(selected)])
  if unwritten:
    old_journal = source / refined_folder.FOLDER / "journal.jsonl"
    raise errors.UserError(
      f"--select-only {source}: by these rules {unwritten} of {count} questions need a "
      "fused answer that was never written; leave out --select-only and set "
      f"refine.journal={old_journal}, so that only those answers are generated"
    )
  return spool


def _judge_positions(
  judges: Sequence[schema.Judge],
  old_judges: Sequence[schema.Judge],
  source: pathlib.Path,
) -> list[int]:
  """The position of each judge in the panel of the finished run."""

  def identity(judge: schema.Judge) -> dict[str, Any]:
    return judge.model_dump(exclude=set(schema.PLACEMENT))

  panel = [identity(judge) for judge in old_judges]
  positions = []
  for number, judge in enumerate(judges):
    if identity(judge) not in panel:
      raise errors.UserError(
        f"refine.judges[{number}]: no judge of {source} was like this one, so there "
        "are no scores of it; name judges of that run, or leave out --select-only"
      )
    positions.append(panel.index(identity(judge)))
  return positions
