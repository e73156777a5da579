"""Validation during training: losses, drift and IFEval on a small fixed set.

A validation runs between two steps and leaves training bit-identical. It uses the
functions of `evaluate`, so its values equal what `evaluate` computes for the same
parameters and items. The parameters of the best step are kept in `output/best`.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import token_rows
from raft_jax.distillation import step as step_lib
from raft_jax.evaluation import drift as drift_lib
from raft_jax.evaluation import (
  early_stopping,
  intervals,
  model_scores,
  scoring,
  test_sets,
)
from raft_jax.hf import chat
from raft_jax.models import transformer
from raft_jax.runtime import interrupts
from raft_jax.storage import journal
from raft_jax.training import checkpoint, run_inputs, run_plan, trained_model


class ValidationSet(NamedTuple):
  """What a validation measures; None for what the config does not name.

  Attributes:
    rows: questions of `data.validation`.
    drift: token ids of general prompts.
  """

  rows: list[token_rows.Row]
  drift: list[list[int]] | None
  ifeval: test_sets.Ifeval | None


def read(
  settings: schema.Validation | None,
  data: schema.Data,
  tokenizer: chat.ChatTokenizer,
  decoder: transformer.DecoderConfig,
  *,
  source: str,
) -> ValidationSet | None:
  """Reads and checks the validation set of a run, if it has one; needs no weights.

  Args:
    source: the model's, for error messages.

  Raises:
    errors.UserError: a file is invalid or too long, or there are several processes.
  """
  if settings is None:
    return None
  if jax.process_count() > 1:
    raise errors.UserError(
      f"validation: needs a run of one process, but there are {jax.process_count()}; "
      "set validation=null, or train with one process"
    )
  questions = test_sets.read_validation(data, tokenizer, settings.limit)
  if questions is None or not questions.rows:
    raise errors.UserError(
      f"data.validation: {data.validation} holds no question within "
      "data.max_*_tokens for `validation`; raise them or give another file"
    )
  rows = questions.rows
  drift = test_sets.read_drift(settings.drift, tokenizer, section="validation")
  ifeval = test_sets.read_ifeval(settings.ifeval, tokenizer, section="validation")
  lengths = {
    "data.max_*_tokens": max(len(row.prompt) + len(row.answer) for row in rows)
  }
  lengths |= test_sets.general_lengths(
    settings, section="validation", ifeval=ifeval, drift=drift
  )
  token_rows.check_positions(lengths, source, decoder)
  return ValidationSet(rows, drift, ifeval)


def measure(
  validation_set: ValidationSet,
  trained: scoring.EvalModel,
  base: scoring.EvalModel | None,
  settings: schema.Validation,
  log: journal.Journal,
) -> dict[str, float]:
  """The metrics of one validation; what the journal holds is not recomputed.

  Args:
    base: the base model; needed if the set has prompts for the drift.
  """
  losses = scoring.losses(trained, validation_set.rows, log, name="validation loss")
  scores = {"validation_loss": intervals.ItemScores(np.array(losses))}
  if validation_set.drift is not None:
    assert base is not None
    new = settings.drift.max_new_tokens
    scores["validation_drift"] = drift_lib.from_base(
      base, trained, validation_set.drift, new, log
    )
  if validation_set.ifeval is not None:
    answers = model_scores.ifeval_answers(
      trained,
      validation_set.ifeval,
      log,
      max_new_tokens=settings.ifeval.max_new_tokens,
    )
    ifeval = model_scores.ifeval_scores(validation_set.ifeval, answers)
    scores["validation_ifeval"] = ifeval["ifeval_instruction_strict"]
  return {name: intervals.mean(score) for name, score in scores.items()}


class PeriodicValidation:
  """Validates a run between its steps, and keeps its best step.

  Attributes:
    status: the best step so far, and whether training is over.
  """

  def __init__(
    self,
    settings: schema.Validation,
    points: Sequence[early_stopping.ValidationPoint],
    *,
    measure: Callable[[transformer.Params], dict[str, float]],
    save_best: Callable[[int, transformer.Params], None],
  ):
    """Continues after earlier validations.

    Args:
      points: the earlier validations.
      measure: trained tree -> metrics to log.
      save_best: writes the trained tree of a new best step to disk.
    """
    self._settings, self._points = settings, [*points]
    self._measure, self._save_best = measure, save_best
    self.status = self._apply_rule()

  def _apply_rule(self) -> early_stopping.Status:
    return early_stopping.status(
      self._points,
      max_drift=self._settings.max_drift,
      patience=self._settings.patience,
    )

  def run(self, step: int, params: transformer.Params) -> tuple[dict[str, float], bool]:
    """Metrics to log, and whether training is over; a new best is on disk on return.

    Args:
      params: the trained tree after `step` steps.
    """
    with interrupts.deferred():  # a signal waits until the step is saved
      metrics = self._measure(params)
    self._points.append(
      early_stopping.ValidationPoint(
        step, metrics["validation_loss"], metrics.get("validation_drift")
      )
    )
    self.status = self._apply_rule()
    best = self.status.best
    if best is not None:
      metrics["validation_best"] = float(best.step)
      if best.step == step:
        self._save_best(step, params)
    return metrics, self.status.over


def eval_settings(plan: run_plan.RunPlan, batch_size: int) -> scoring.Settings:
  """How both models are run: as in the steps of the run."""
  return scoring.Settings(
    batch_size=batch_size,
    dtype=plan.settings.compute.dtype,
    unroll=plan.settings.compute.unroll,
    rollout_unroll=plan.settings.rollout_unroll,
  )


@contextlib.contextmanager
def during_training(
  config: schema.Config,
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  reference: step_lib.ReferenceParams,
  validation_set: ValidationSet | None,
  checkpoints: Any,
  start: int,
) -> Iterator[PeriodicValidation | None]:
  """The validation of a run, if it has one; writes `best` and `validation.jsonl`.

  Args:
    checkpoints: Orbax's manager of the checkpoints that the run resumes from.
    start: the step that the run continues from. A best step after it is deleted: it
      belongs to work that was lost.
  """
  settings = config.validation
  if validation_set is None or settings is None:
    yield None
    return
  output = pathlib.Path(config.output)
  eval_model = functools.partial(
    scoring.eval_model,
    config=plan.decoder,
    tokenizer=inputs.tokenizer,
    settings=eval_settings(plan, config.evaluate.batch_size),
    title=None,
  )
  base = None if reference.base is None else eval_model(reference.base)
  with (
    journal.open_journal(output / "validation.jsonl") as log,
    checkpoint.manager(output, keep=None, name=checkpoint.BEST) as best,
  ):
    checkpoint.drop(best, [step for step in best.all_steps() if step > start])

    def measure_tree(params: transformer.Params) -> dict[str, float]:
      model = trained_model.assemble(
        params,
        reference.frozen,
        reference.base,
        prune=config.prune,
        hard_threshold=config.hard_threshold,
        interpolate=config.interpolate,
      )
      return measure(validation_set, eval_model(model), base, settings, log)

    def save_best(step: int, params: transformer.Params) -> None:
      checkpoint.save(best, step, {"params": params}, inputs.identity)
      drop_older(best, checkpoints)

    validation = PeriodicValidation(
      settings,
      early_stopping.logged_points(output, start),
      measure=measure_tree,
      save_best=save_best,
    )
    warn_if_missing(validation.status.best, best)
    yield validation
    drop_older(best, checkpoints)


def warn_if_missing(point: early_stopping.ValidationPoint | None, best: Any) -> None:
  """Prints a warning if the checkpoint of the best step was deleted."""
  if point is not None and point.step not in best.all_steps():
    print(
      f"WARNING: {best.directory} does not hold step {point.step}, the best so far; "
      "unless a better step comes, `evaluate` and `export` read the last one"
    )


def drop_older(best: Any, checkpoints: Any) -> None:
  """Waits for both managers; keeps the newest best step and one to fall back on.

  A killed run continues from its last checkpoint. If the newest best step is later than
  that, the run needs the step that was the best at the checkpoint.
  """
  checkpoint.commit(best)
  checkpoint.commit(checkpoints)
  steps, resumable = sorted(best.all_steps()), checkpoints.latest_step() or 0
  kept = [*[step for step in steps if step <= resumable][-1:], *steps[-1:]]
  checkpoint.drop(best, set(steps) - set(kept))
