"""Stage 3: scores of the trained model beside the base model's.

On the domain: held-out loss of the reference answers, ROUGE-L and sentence-encoder
similarity of greedy answers, and, if the config has them, multiple choice among the
test set's answers and the paper's judged accuracy (D-Acc). On general abilities, if the
config names their items: IFEval, MMLU, any task of lm-evaluation-harness and judged
open-ended requests, with their retention (trained in percent of base), and the drift on
general prompts and on those of the test questions. Every mean over items has a 95 %
interval, and the two models are compared item by item.

Finished items are kept in `evaluation/journal.jsonl`, keyed by the model's parameters,
the item and the settings. A second run recomputes nothing, and a run on a new
checkpoint only the scores of that checkpoint.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich import console, table

from raft_jax.config import cli, run_lock, schema
from raft_jax.config import load as config_load
from raft_jax.evaluation import (
  comparison,
  drift,
  judged_accuracy,
  scoring,
  test_sets,
)
from raft_jax.generation import engines, openai_engine, roles, sentence_encoder
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import sampling
from raft_jax.runtime import distributed, interrupts
from raft_jax.storage import journal, rejects
from raft_jax.training import metrics_log, trackers, trained_model


def main(config: schema.Config) -> None:
  """Scores the base and the trained model, and writes `output/evaluation`."""
  distributed.refuse("evaluate")
  trackers.require(config.train.trackers)
  source, settings = config.model.source, config.evaluate
  thinking = config.data.thinking == "keep"
  tokenizer = chat.load(source, config.model.chat_template, thinking=thinking)
  decoder = hf_load.load_config(source)
  interrupts.check()
  sets = test_sets.read(config.data, settings, tokenizer, decoder, source=source)
  interrupts.check()
  judges = [
    roles.judge("vote", judge, config.model, judged_accuracy.REPLY_SCHEMA)
    for judge in settings.judges
  ]
  trained_model.require(config.output, config.validation)  # before the encoder loads
  trained_server, base_server = connect(settings.servers)
  embed = sentence_encoder.load(config.refine.encoder)
  sets = test_sets.with_choices(
    sets, settings.choice, tokenizer, decoder, embed, source=source
  )
  interrupts.check()
  # Both models are in memory at once, as the drift compares them token by token; that
  # is less than training needs.
  params, step = trained_model.load(config, decoder)
  interrupts.check()
  run_lock.lock_config(config, "evaluate", ())
  folder = pathlib.Path(config.output) / "evaluation"
  folder.mkdir(exist_ok=True)
  rejects.write(folder / "rejects.jsonl", sets.rejects)
  base_params = hf_load.load_params(source, decoder)
  how = run_settings(config.model, config.rollout, settings.batch_size)
  trained = scoring.eval_model(
    params, decoder, tokenizer, how, title=f"step {step}", server=trained_server
  )
  base = scoring.eval_model(
    base_params, decoder, tokenizer, how, title="base model", server=base_server
  )
  path = settings.journal or folder / "journal.jsonl"
  with journal.open_journal(pathlib.Path(path)) as log:
    compared = comparison.compare(
      base, trained, sets, judges=judges, settings=settings, log=log, embed=embed
    )
    as_trained: dict[str, Any] = {}
    if config.lora is not None and (form := config.lora.base) is not None:
      models = {
        name: scoring.eval_model(model, decoder, tokenizer, how, title=None)
        for name, model in trained_model.load_as_trained(config, decoder, form).items()
      }
      as_trained = comparison.losses_as_trained(models, sets.test.rows, log, form=form)
  interrupts.check()
  distances = drift.weight_distances(base_params, params, decoder)
  mean_distance = float(np.mean(list(distances.values())))
  result = {
    "model": source,
    "checkpoint_step": step,
    "edits": trained_model.edits(config),
    "items": len(sets.test.rows),
    **compared.summary,
    **as_trained,
    "weight_distance": {"mean": mean_distance, "tensors": distances},
    "seconds": compared.seconds,
  }
  comparison.write(folder, result, compared)
  values = config_load.values(config, trackers.SETTINGS)
  tracked = trackers.describe(config.train, folder.parent, values)
  with metrics_log.tracked(config.train.trackers, tracked) as opened:
    opened.summarise(step, comparison.flat(result))
  show(result)


def run_settings(
  model: schema.Model, rollout: schema.Rollout, batch_size: int
) -> scoring.Settings:
  """How both models are run."""
  return scoring.Settings(
    batch_size=batch_size,
    dtype=model.dtype,
    unroll=model.unroll,
    rollout_unroll=sampling.unrolled(
      rollout.unroll, model.unroll, jax.default_backend()
    ),
  )


def connect(
  servers: schema.Servers | None,
) -> tuple[engines.Generator | None, engines.Generator | None]:
  """The servers of the trained and of the base model; None for the built-in sampler.

  Raises:
    UserError: a server cannot be reached or does not serve its model.
  """
  if servers is None:
    return None, None
  trained, base = (
    openai_engine.connect(
      server.model,
      base_url=server.base_url,
      api_key_env=server.api_key_env,
      timeout_s=server.timeout_s,
      omit=server.omit,
      marks=server.thinking_marks,
    )
    for server in (servers.trained, servers.base)
  )
  return trained, base


def show(result: Mapping[str, Any]) -> None:
  """Prints the table of scores."""
  rows = table.Table(
    title=f"{result['items']} test questions, checkpoint of step"
    f" {result['checkpoint_step']}; 95 % intervals, paired differences",
    title_justify="left",
    show_lines=True,
  )
  rows.add_column("score")
  for column in ("base", "trained", "difference", "retention"):
    rows.add_column(column, justify="right")

  def cell(value: float, interval: Mapping[str, Any], digits: int = 3) -> str:
    if "low" not in interval:
      return f"{value:.{digits}f}"
    low, high = interval["low"], interval["high"]
    return f"{value:.{digits}f}\n{low:.{digits}f} to {high:.{digits}f}"

  for name, paired in result["paired"].items():
    base, trained = (result["scores"][model][name] for model in ("base", "trained"))
    retention = result["retention"].get(name)
    rows.add_row(
      name.replace("_", " "),
      cell(base["value"], base),
      cell(trained["value"], trained),
      cell(paired["difference"], paired),
      f"{cell(retention['value'], retention, 1)} %" if retention else "",
    )
  for name in comparison.DRIFTS:
    if score := result[name]:
      title = f"{name.replace('_', ' ')} (nats)"
      rows.add_row(title, "0", cell(score["value"], score), "", "")
  if result["weight_distance"]:
    mean = result["weight_distance"]["mean"]
    rows.add_row("weight distance", "0", f"{mean:.2e}", "", "")
  console.Console().print(rows)
  if "as_trained" in result:
    losses = result["as_trained"]
    print(
      f"on the {losses['form']} base that was trained on, held-out loss: base "
      f"{losses['base']:.3f}, trained {losses['trained']:.3f}"
    )


if __name__ == "__main__":
  cli.run("evaluate", main, "Score the trained model beside the base model.")
