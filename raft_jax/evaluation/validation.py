"""A small fixed panel while a model trains: its best step, and when to stop.

Every `validation.every` steps the loss of a few validation questions is measured and,
where the config names items, the drift from the base model and IFEval, with the
functions of `evaluate`. Looks lie between steps and change nothing of them.

The rule: the best step is that of the lowest validation loss among the looks whose
drift is at most `validation.max_drift`; training is over after `validation.patience`
looks in a row without a new best. It reads logged rows alone, so that a resumed run
judges alike.
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
from raft_jax.data import batching
from raft_jax.distillation import step as step_lib
from raft_jax.evaluation import drift as drift_lib
from raft_jax.evaluation import intervals, scoring, test_sets
from raft_jax.hf import chat
from raft_jax.models import transformer
from raft_jax.runtime import interrupts
from raft_jax.storage import journal
from raft_jax.training import (
  checkpoint,
  metrics_log,
  run_inputs,
  run_plan,
  trained_model,
)

# --- The rule -------------------------------------------------------------------------


class Look(NamedTuple):
  """What was seen after a step, in nats per token; `drift` is None if not measured."""

  step: int
  loss: float
  drift: float | None


class Verdict(NamedTuple):
  """The best look so far, if there is one, and whether training is over.

  Attributes:
    waited: looks since the best, or since the first step.
  """

  best: Look | None
  waited: int
  over: bool


def verdict(
  looks: Sequence[Look], *, max_drift: float | None, patience: int | None
) -> Verdict:
  """What the rule says of all looks so far; of equal losses the first is the best.

  Args:
    looks: in the order of their steps.
    max_drift: nats per token; None allows any.
    patience: looks in a row without a new best; None waits for ever.
  """
  best, waited = None, 0
  for look in looks:
    allowed = max_drift is None or (look.drift is not None and look.drift <= max_drift)
    if allowed and (best is None or look.loss < best.loss):
      best, waited = look, 0
    else:
      waited += 1
  return Verdict(best, waited, patience is not None and waited >= patience)


def logged(output: pathlib.Path, until: int) -> list[Look]:
  """The looks that a run's log tells of, up to a step."""
  found = []
  for _, row in metrics_log.rows_until(output / "metrics.jsonl", until):
    values = row.get("values", {})
    if "validation_loss" in values:
      found.append(
        Look(row["step"], values["validation_loss"], values.get("validation_drift"))
      )
  return found


def judged(settings: schema.Validation, looks: Sequence[Look]) -> Verdict:
  """`verdict` by the rule of a run."""
  return verdict(looks, max_drift=settings.max_drift, patience=settings.patience)


def so_far(config: schema.Config, step: int) -> Verdict:
  """What the rule says of a run that is at a step, from its log."""
  if config.validation is None:
    return Verdict(None, 0, over=False)
  return judged(config.validation, logged(pathlib.Path(config.output), step))


# --- The panel ------------------------------------------------------------------------


class Panel(NamedTuple):
  """What is looked at; None where the config names no items."""

  rows: list[batching.Row]
  drift: list[list[int]] | None
  ifeval: test_sets.Ifeval | None


def read(
  config: schema.Config,
  tokenizer: chat.ChatTokenizer,
  decoder: transformer.DecoderConfig,
) -> Panel | None:
  """Reads and checks the panel of a run, if it has one; no weights.

  Raises:
    errors.UserError: a file is bad or too long, or there are several processes.
  """
  settings = config.validation
  if settings is None:
    return None
  if jax.process_count() > 1:
    raise errors.UserError(
      f"validation: wants one process, and these are {jax.process_count()}; set "
      "validation=null, or train with one process"
    )
  questions = test_sets.read_validation(config, tokenizer, settings.limit)
  if questions is None or not questions.rows:
    raise errors.UserError(
      f"data.validation: {config.data.validation} holds no question within "
      "data.max_*_tokens for `validation`; raise them or give another file"
    )
  panel = Panel(
    questions.rows,
    test_sets.read_drift(settings.drift, tokenizer, section="validation"),
    test_sets.read_ifeval(settings.ifeval, tokenizer, section="validation"),
  )
  need = {
    "data.max_*_tokens": max(len(row.prompt) + len(row.answer) for row in panel.rows)
  }
  if panel.drift is not None:
    new = settings.drift.max_new_tokens
    need[f"validation.drift.max_new_tokens={new}"] = max(map(len, panel.drift)) + new
  if panel.ifeval is not None:
    new = settings.ifeval.max_new_tokens
    longest = max(map(len, panel.ifeval.prompts))
    need[f"validation.ifeval.max_new_tokens={new}"] = longest + new
  batching.check_positions(need, config.model.source, decoder)
  return panel


def values(
  panel: Panel,
  trained: scoring.EvalModel,
  base: scoring.EvalModel | None,
  settings: schema.Validation,
  log: journal.Journal,
) -> dict[str, float]:
  """Names and values for the log; what the journal knows is not computed again.

  Args:
    base: the base model, where the panel has prompts for the drift.
  """
  losses = scoring.losses(trained, panel.rows, log, name="validation loss")
  found = {"validation_loss": intervals.Scores(np.array(losses))}
  if panel.drift is not None:
    assert base is not None
    new = settings.drift.max_new_tokens
    found["validation_drift"] = drift_lib.from_base(
      base, trained, panel.drift, new, log
    )
  if panel.ifeval is not None:
    new = settings.ifeval.max_new_tokens
    scores = test_sets.take_ifeval(trained, panel.ifeval, log, max_new_tokens=new)
    found["validation_ifeval"] = scores["ifeval_instruction_strict"]
  return {name: intervals.mean(scores) for name, scores in found.items()}


# --- While it trains ------------------------------------------------------------------


class Watcher:
  """Looks at a run between its steps, and keeps its best step.

  Attributes:
    verdict: after the last look.
  """

  def __init__(
    self,
    settings: schema.Validation,
    looks: Sequence[Look],
    *,
    measure: Callable[[transformer.Params], dict[str, float]],
    keep: Callable[[int, transformer.Params], None],
  ):
    """Goes on after earlier looks.

    Args:
      measure: trained tree -> names and values for the log.
      keep: brings step and trained tree of a new best to the disk.
    """
    self.verdict = judged(settings, looks)
    self._settings, self._looks = settings, [*looks]
    self._measure, self._keep = measure, keep

  def look(
    self, done: int, params: transformer.Params
  ) -> tuple[dict[str, float], bool]:
    """Metrics to log, and whether to stop; a new best is on the disk on return.

    Args:
      params: the trained tree after `done` steps.
    """
    with interrupts.deferred():  # a signal waits until the step is saved
      found = self._measure(params)
    self._looks.append(
      Look(done, found["validation_loss"], found.get("validation_drift"))
    )
    self.verdict = judged(self._settings, self._looks)
    best = self.verdict.best
    if best is not None:
      found["validation_best"] = float(best.step)
      if best.step == done:
        self._keep(done, params)
    return found, self.verdict.over


@contextlib.contextmanager
def watching(
  config: schema.Config,
  plan: run_plan.RunPlan,
  inputs: run_inputs.RunInputs,
  reference: step_lib.ReferenceParams,
  panel: Panel | None,
  checkpoints: Any,
  start: int,
) -> Iterator[Watcher | None]:
  """A run's watcher, if it has one; keeps `output/best` and `output/validation.jsonl`.

  Args:
    checkpoints: Orbax's manager of those that the run resumes from.
    start: the step it goes on from; a best step after it came from work that was lost.
  """
  settings = config.validation
  if panel is None or settings is None:
    yield None
    return
  output = pathlib.Path(config.output)
  subject = functools.partial(
    scoring.subject,
    config=plan.decoder,
    tokenizer=inputs.tokenizer,
    settings=scoring.Settings(
      config.evaluate.batch_size,
      plan.settings.dtype,
      plan.settings.unroll,
      plan.settings.rollout_unroll,
    ),
    title=None,
  )
  base = None if reference.base is None else subject(reference.base)
  with (
    journal.open_journal(output / "validation.jsonl") as log,
    checkpoint.manager(output, keep=None, name=checkpoint.BEST) as best,
  ):
    checkpoint.drop(best, [step for step in best.all_steps() if step > start])

    def measured(params: transformer.Params) -> dict[str, float]:
      whole = trained_model.assemble(
        params,
        reference.frozen,
        reference.base,
        prune=config.prune,
        interpolate=config.interpolate,
      )
      return values(panel, subject(whole), base, settings, log)

    def keep(step: int, params: transformer.Params) -> None:
      checkpoint.save(best, step, {"params": params}, inputs.identity)
      settle(best, checkpoints)

    looks = logged(output, start)
    watcher = Watcher(settings, looks, measure=measured, keep=keep)
    known = watcher.verdict.best
    if known is not None and known.step not in best.all_steps():
      print(
        f"WARNING: {best.directory} does not hold step {known.step}, the best so far; "
        "unless a better one comes, the last step is read"
      )
    yield watcher
    settle(best, checkpoints)


def settle(best: Any, checkpoints: Any) -> None:
  """Waits for both; of the best steps keeps the newest and the one to fall back on.

  A killed run goes on from its last checkpoint. If the newest best step came after
  that, the run is to have the one that was the best there.
  """
  checkpoint.commit(best)
  checkpoint.commit(checkpoints)
  steps, resumable = sorted(best.all_steps()), checkpoints.latest_step() or 0
  kept = [*[step for step in steps if step <= resumable][-1:], *steps[-1:]]
  checkpoint.drop(best, set(steps) - set(kept))


def summary(config: schema.Config, found: Verdict, done: int, total: int) -> str:
  """Which step was the best, and why training ended before its last step."""
  settings = config.validation
  assert settings is not None
  if found.best is not None:
    text = f"best step: {found.best.step} (validation loss {found.best.loss:.3g}"
    if found.best.drift is not None:
      text += f", drift {found.best.drift:.3g}"
    text += ")"
  elif found.waited:
    text = f"best step: none, no look's drift was within {settings.max_drift:g}"
  else:
    text = "best step: none, there was no look yet"
  if found.over and done < total:
    text += (
      f"; stopped early, at step {done} of {total}: no new best in the last "
      f"{found.waited} looks (validation.patience)"
    )
  return text
