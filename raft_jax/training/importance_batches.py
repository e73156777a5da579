"""Batches that measure which parameters, heads and units matter, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching, token_rows
from raft_jax.training import optim


def anchor_batches(
  settings: schema.Anchor | None, rows: Sequence[token_rows.Row], seed: int, pad_id: int
) -> Any:
  """General questions that give the importance of parameters, or None."""
  if settings is None or not optim.weighs_pull(settings):
    return None
  # With given answers the square of a batch's mean gradient would be biased.
  size = settings.batch_size if settings.importance == "sampled" else 1
  return one_pass(rows, size, seed, pad_id, names=("anchor", "anchor.questions"))


def soft_mask_batches(
  settings: schema.SoftMask | None,
  rows: Sequence[token_rows.Row],
  seed: int,
  pad_id: int,
) -> Any:
  """Questions that give the importance of heads and units, or None."""
  if settings is None:
    return None
  rows = rows[: settings.limit]
  names = ("soft_mask", "data.questions")
  return one_pass(rows, settings.batch_size, seed, pad_id, names=names)


def one_pass(
  rows: Sequence[token_rows.Row],
  batch_size: int,
  seed: int,
  pad_id: int,
  *,
  names: tuple[str, str],
) -> Any:
  """Batches of one pass over rows, all of one padded width.

  Args:
    names: of the config's section, and of the key that names the rows' file.

  Raises:
    errors.UserError: there are fewer rows than one batch.
  """
  if len(rows) < batch_size:
    section, source = names
    raise errors.UserError(
      f"{section}.batch_size: {batch_size} is more than the {len(rows)} rows of "
      f"{source}; lower it"
    )
  return batching.dataset(
    rows,
    batch_size=batch_size,
    epochs=1,
    seed=seed,
    pad_id=pad_id,
    widths=batching.widths(rows, 1),
  )
