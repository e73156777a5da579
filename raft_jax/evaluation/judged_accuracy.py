"""Accuracy by the verdicts of a panel of language models, as in the paper's D-Acc.

An answer counts as right where more than half of the judges say so (RAFT, arXiv
2606.00147, section 4: three judges). A judge whose reply is not plainly a yes or no
abstains and stays in the panel; what no majority decides is not right, and its share is
given beside the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raft_jax.evaluation import intervals
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import judging

VERDICT = "good"
"""The key of a judge's reply."""

REPLY_SCHEMA = {
  "type": "object",
  "properties": {VERDICT: {"type": "boolean"}},
  "required": [VERDICT],
  "additionalProperties": False,
}


class Item(NamedTuple):
  """What a judge reads; `reference` may be empty where there is none."""

  question: str
  reference: str
  candidate: str


def votes(
  template: str,
  items: Sequence[Item],
  judges: Sequence[calls_lib.Role],
  calls: calls_lib.Calls,
) -> list[list[bool | None]]:
  """Each judge's verdict on each item, [items][judges]; None for an abstention.

  An empty answer, or one that holds a verdict of its own, is shown to no judge and is
  wrong.

  Args:
    template: name of the prompt, "correct" or "open_ended".
  """
  shown = [i for i, item in enumerate(items) if _fair(item.candidate)]
  prompts = [judging.fenced(template, items[i]._asdict()) for i in shown]
  found: list[list[bool | None]] = [[False] * len(judges) for _ in items]
  for number, role in enumerate(judges):
    for i, reply in zip(shown, calls.ask(role, prompts), strict=True):
      said = None if reply is None else judging.parse_flags(reply.text, [VERDICT])
      found[i][number] = None if said is None else said[VERDICT]
  return found


def _fair(candidate: str) -> bool:
  return bool(candidate.strip()) and not judging.steers(candidate, VERDICT)


def scores(
  name: str, found: Sequence[Sequence[bool | None]]
) -> dict[str, intervals.Scores]:
  """The share of items that a majority calls right, and of those left undecided."""
  decided = [judging.majority(panel) for panel in found]
  return {
    name: _share([choice is True for choice in decided]),
    f"{name}_undecided": _share([choice is None for choice in decided]),
  }


def _share(passed: Sequence[bool]) -> intervals.Scores:
  return intervals.Scores(np.array(passed, float), share=True)
