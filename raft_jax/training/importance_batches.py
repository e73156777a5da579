"""Batches that measure which parameters, heads and units matter, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching, token_rows
from raft_jax.training import optim


def anchor_batches(
  settings: schema.Anchor | None,
  rows: Sequence[token_rows.Row],
  seed: int,
  pad_id: int,
) -> Any:
  """General questions that give the importance of parameters, or None.

  Raises:
    errors.UserError: there are fewer rows than one batch.
  """
  if settings is None or not optim.weighs_pull(settings):
    return None
  # With given answers the square of a batch's mean gradient would be biased.
  size = settings.batch_size if settings.importance == "sampled" else 1
  if len(rows) < size:
    raise _too_few("anchor", size, len(rows), "anchor.questions")
  return one_pass(rows, size, seed=seed, pad_id=pad_id)


def soft_mask_batches(
  settings: schema.SoftMask | None,
  rows: Sequence[token_rows.Row],
  seed: int,
  pad_id: int,
) -> Any:
  """Questions that give the importance of heads and units, or None.

  Raises:
    errors.UserError: there are fewer rows than one batch.
  """
  if settings is None:
    return None
  rows = rows[: settings.limit]
  if len(rows) < settings.batch_size:
    raise _too_few("soft_mask", settings.batch_size, len(rows), "data.questions")
  return one_pass(rows, settings.batch_size, seed=seed, pad_id=pad_id)


def _too_few(section: str, size: int, count: int, source: str) -> errors.UserError:
  return errors.UserError(
    f"{section}.batch_size: {size} is more than the {count} rows of {source}; lower it"
  )


def one_pass(
  rows: Sequence[token_rows.Row], batch_size: int, *, seed: int, pad_id: int
) -> Any:
  """Batches of one pass over rows, all of one padded width."""
  return batching.dataset(
    rows,
    batch_size=batch_size,
    epochs=1,
    seed=seed,
    pad_id=pad_id,
    widths=batching.widths(rows, 1),
  )
