"""Accuracy by the majority vote of a panel of language models, as the paper's D-Acc.

An answer is correct if more than half of the judges say so (RAFT, arXiv 2606.00147,
section 4: three judges). A judge whose reply is not clearly yes or no abstains and
still counts as a member of the panel. An answer without a majority is not correct; the
share of such answers is reported beside the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raft_jax.evaluation import intervals
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import judging

VERDICT = "good"
"""The key of the verdict in a judge's reply."""

REPLY_SCHEMA = {
  "type": "object",
  "properties": {VERDICT: {"type": "boolean"}},
  "required": [VERDICT],
  "additionalProperties": False,
}


class Item(NamedTuple):
  """What a judge reads; `reference` is empty if there is none."""

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

  An empty answer, or one that contains a verdict of its own, is wrong without being
  judged.

  Args:
    template: name of the judges' prompt, "correct" or "open_ended".
  """
  judged = [i for i, item in enumerate(items) if _can_be_judged(item.candidate)]
  prompts = [judging.fenced(template, items[i]._asdict()) for i in judged]
  verdicts: list[list[bool | None]] = [[False] * len(judges) for _ in items]
  for number, role in enumerate(judges):
    for i, reply in zip(judged, calls.ask(role, prompts), strict=True):
      flags = None if reply is None else judging.parse_flags(reply.text, [VERDICT])
      verdicts[i][number] = None if flags is None else flags[VERDICT]
  return verdicts


def _can_be_judged(candidate: str) -> bool:
  return bool(candidate.strip()) and not judging.steers(candidate, VERDICT)


def scores(
  name: str, verdicts: Sequence[Sequence[bool | None]]
) -> dict[str, intervals.ItemScores]:
  """The share of items that a majority calls correct, and of those without a majority.

  Args:
    verdicts: as `votes` returns them.
  """
  decided = [judging.majority(panel) for panel in verdicts]
  return {
    name: _share([choice is True for choice in decided]),
    f"{name}_undecided": _share([choice is None for choice in decided]),
  }


def _share(passed: Sequence[bool]) -> intervals.ItemScores:
  return intervals.ItemScores(np.array(passed, float), share=True)
