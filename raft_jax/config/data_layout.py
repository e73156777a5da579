"""What a config says about the rows of its files of questions."""

from __future__ import annotations

from raft_jax.config import schema
from raft_jax.storage import row_layout


def layout(data: schema.Data) -> row_layout.Layout:
  """Of `data.questions`, `data.test` and `data.validation`."""
  return row_layout.Layout(data.format, data.columns or {}, data.turns)


def general_layout(data: schema.Data) -> row_layout.Layout:
  """Of other questions, whose columns have names of their own."""
  return row_layout.Layout(turns=data.turns)
