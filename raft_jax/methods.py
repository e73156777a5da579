"""The table of methods: one word in the config names how a model is fine-tuned."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

from raft_jax import errors, records


class Method(NamedTuple):
  """What sets one method apart from another.

  Attributes:
    answer: the text to learn from a record.
    refined: needs the records that `raft_jax.refine` writes; otherwise the questions
      file is read as it is.
    distills: adds on-policy distillation from the base model.
  """

  answer: Callable[[records.Refined], str]
  refined: bool
  distills: bool


def final_answer(record: records.Refined) -> str:
  """The answer that refinement chose."""
  return record.answer


METHODS = {
  "sft": Method(final_answer, refined=False, distills=False),
  "fused_sft": Method(final_answer, refined=True, distills=False),
  "raft": Method(final_answer, refined=True, distills=True),
}


def get(name: str) -> Method:
  """Looks a method up.

  Raises:
    errors.UserError: for an unknown name, with the nearest known one.
  """
  if name in METHODS:
    return METHODS[name]
  near = difflib.get_close_matches(name, METHODS, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}"
  raise errors.UserError(f"method: unknown method {name!r}; {hint}")
