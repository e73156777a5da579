"""Losses of the base model on every answer token, and the token weights made from them.

`token_weights.rule=stm` and `flow` weigh tokens by what the base model thinks of them.
It reads every row once, before the first step: one forward pass over the questions and
answers. `base_losses/` in the output folder keeps the losses with the identity of
model, template and rows, and a run that is resumed reads them there. If the folder is
missing or damaged, or belongs to something else, they are measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching, token_rows
from raft_jax.distillation import objective, token_weights
from raft_jax.models import transformer
from raft_jax.runtime import distributed
from raft_jax.storage import sealed_folder

FOLDER = "base_losses"
NAME = "losses"
RULES = ("stm", "flow")
"""The values of `token_weights.rule` that read losses of the base model."""

Losses = Mapping[int, np.ndarray]
"""Nats of each answer token, float32, by row id."""


class Rows(NamedTuple):
  """The rows to measure.

  Attributes:
    domain: those of the questions; the others' weights follow their median.
    replayed: general questions, or empty.
    copies: copies of each row in a batch; see `batching.dataset`.
    batch_size: rows at a time.
    pad_id: of the tokenizer.
  """

  domain: Sequence[token_rows.Row]
  replayed: Sequence[token_rows.Row]
  copies: int
  batch_size: int
  pad_id: int


def are_read(settings: schema.TokenWeights | None) -> bool:
  """Whether a run's token weights come from losses of the base model."""
  return settings is not None and settings.rule in RULES


# --- Weights --------------------------------------------------------------------------


def weights_by_row(
  settings: schema.TokenWeights, losses: Losses, rows: Rows
) -> dict[int, np.ndarray]:
  """The weight of each answer token, float32, by the row ids of the batches."""
  ids = list(losses)
  if settings.rule == "stm":
    flat = jnp.concatenate([losses[i] for i in ids])
    weights = token_weights.stm(flat, max_perplexity=settings.max_perplexity)
    ends = np.cumsum([len(losses[i]) for i in ids])[:-1]
    by_row = np.split(distributed.to_host(weights), ends)
  else:
    mean_N = jnp.array([losses[i].mean() for i in ids], jnp.float32)
    temperature: Any = settings.temperature
    if temperature is None:
      domain = {row.row_id for row in rows.domain}
      counted_N = jnp.array([i in domain for i in ids])
      temperature = token_weights.median_loss(mean_N, counted_N)
    weight_N = distributed.to_host(token_weights.flow(mean_N, temperature))
    by_row = [
      np.full(len(losses[i]), weight, np.float32) for i, weight in zip(ids, weight_N)
    ]
  return {
    row_id * rows.copies + copy: weight
    for row_id, weight in zip(ids, by_row)
    for copy in range(rows.copies)
  }


# --- Measuring ------------------------------------------------------------------------


def measure(
  params: transformer.Params,
  rows: Rows,
  settings: objective.Settings,
  place: Callable[[Iterable[batching.Batch]], Iterable[batching.Batch]],
) -> dict[int, np.ndarray]:
  """The base model's losses; takes one forward pass over all rows.

  Args:
    params: the base model's.
    place: puts batches on their devices.

  Raises:
    errors.UserError: a loss is not finite.
  """
  # The pass does not read the teacher's contexts.
  bare = [row._replace(teacher=()) for row in (*rows.domain, *rows.replayed)]
  batches = batching.sequential_batches(
    bare, rows.batch_size, pad_id=rows.pad_id, width=batching.widths(bare, 1)[-1]
  )
  losses_of = jax.jit(functools.partial(objective.answer_nll, settings=settings))
  measured = [
    line
    for batch in place(batches)
    for line in distributed.to_host(losses_of(params, batch))
  ]
  losses = {
    row.row_id: np.array(line[: len(row.answer)], np.float32)
    for row, line in zip(bare, measured)
  }
  for row_id, values in losses.items():
    if not np.isfinite(values).all():
      raise errors.UserError(
        f"token_weights: the base model's loss on row {row_id} is not finite; set "
        "model.dtype=float32, or leave the row out"
      )
  return losses


# --- On disk --------------------------------------------------------------------------


def identity(run: Mapping[str, Any], dtype: str) -> str:
  """What losses belong to: the digest of a model, its template, its type and rows.

  Args:
    run: the identity of the run, as its checkpoints store it.
    dtype: type of the activations.
  """
  facts = {name: run[name] for name in ("model", "data", "tokenizer")}
  form = (run.get("lora") or {}).get("base")
  if form is not None:  # else as before models were quantised
    facts["base"] = form
  text = json.dumps({**facts, "dtype": dtype}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def write(output: pathlib.Path, losses: Losses, inputs: str) -> None:
  """Stores losses; the folder is whole or counts as absent.

  Args:
    inputs: from `identity`.
  """
  folder = output / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  # The shortest decimals that a float32 can be read back from.
  lines = (
    {"row_id": row_id, "losses": [float(str(loss)) for loss in values]}
    for row_id, values in losses.items()
  )
  tokens = np.concatenate(list(losses.values()))
  summary = {
    "rows": len(losses),
    "tokens": len(tokens),
    "mean_loss": float(np.mean(tokens, dtype=np.float64)),
  }
  sealed_folder.write(folder, {NAME: lines}, summary, {"inputs": inputs})


def read(output: pathlib.Path, inputs: str) -> dict[int, np.ndarray] | None:
  """The stored losses; None if they are absent, damaged or of other inputs.

  Args:
    inputs: from `identity`.
  """
  folder = output / FOLDER
  if sealed_folder.inputs(folder) != inputs:
    return None
  text = (folder / f"{NAME}.jsonl").read_text(encoding="utf-8")
  rows = [json.loads(line) for line in text.splitlines()]
  return {row["row_id"]: np.array(row["losses"], np.float32) for row in rows}


def read_on_all(output: pathlib.Path, inputs: str) -> dict[int, np.ndarray] | None:
  """`read`; None if any process cannot read them, since all measure together."""
  losses = distributed.run_on_all(lambda: read(output, inputs))
  answers = distributed.gather_texts("absent" if losses is None else "read")
  return None if "absent" in answers else losses
