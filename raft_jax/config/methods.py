"""The table of methods: one word in the config names how a model is fine-tuned.

A method is a set of config keys and values: answers, teacher, losses, their weights,
updates, and edits of the result. `load.load` merges the user's file over them, so any
part of a method can be changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from raft_jax import errors


class Method(NamedTuple):
  """A method: its settings, and what the user must add.

  Attributes:
    summary: one line for the table of methods.
    source: authors and place of the paper, or "".
    settings: tree of config keys with the method's values; other keys keep their
      defaults.
    needs: keys that the user must set -> what to set them to.
  """

  summary: str
  source: str
  settings: dict[str, Any]
  needs: Mapping[str, str] = {}


def _on_questions(**sections: Any) -> dict[str, Any]:
  """Settings that learn the answers of the questions, by default without a teacher."""
  return {"data": {"answers": "original"}, "distill": {"teacher": "none"}, **sections}


# The teacher reads no reference answer. The loss approximates that of the whole
# vocabulary: the mass outside the top K is one more class.
_PLAIN_TEACHER = {
  "teacher": "base",
  "teacher_context": "none",
  "temperature": 1.0,
  "tail": "bucket",
}
_REVERSE = {**_PLAIN_TEACHER, "direction": "reverse"}
_ON_ANSWERS = {**_PLAIN_TEACHER, "direction": "forward", "trajectory": "answer"}
_WEIGHT_1 = {"mode": "fixed", "weight": 1.0}
_NO_DECAY = {"weight_decay": 0.0}  # decay to 0 works against an anchor

METHODS = {
  "raft": Method(
    "refined answers, and distillation from a teacher that reads them",
    "arXiv 2606.00147",
    {},
  ),
  "sft": Method("cross-entropy on the original answers", "", _on_questions()),
  "fused_sft": Method(
    "cross-entropy on the refined answers",
    "ablation of arXiv 2606.00147",
    {"distill": {"teacher": "none"}},
  ),
  "sdft": Method(
    "cross-entropy on the model's own rewrites of the answers",
    "Yang et al., arXiv 2402.13669",
    {
      "data": {"answers": "rewritten"},
      "refine": {"prompt": "sdft", "fusion": {"rounds": 0}},
      "distill": {"teacher": "none"},
    },
  ),
  "opd": Method(
    "SFT plus reverse KL to the base model on the student's rollouts",
    "Thinking Machines 2025; the sum as in arXiv 2606.00147",
    _on_questions(distill=_REVERSE, balance=_WEIGHT_1),
  ),
  "opd_pure": Method(
    "the KL term of `opd` alone; a control that must stay at the base model",
    "",
    _on_questions(distill=_REVERSE, balance=_WEIGHT_1, train={"cross_entropy": False}),
  ),
  "opd_recover": Method(
    "the KL term of `opd` alone, on general prompts: brings a tuned model back to "
    "`distill.source`",
    "Thinking Machines 2025",
    _on_questions(distill=_REVERSE, balance=_WEIGHT_1, train={"cross_entropy": False}),
    {"distill.source": "the model before its fine-tuning"},
  ),
  "eaft": Method(
    "SFT in which tokens count by the model's uncertainty before them",
    "EAFT, arXiv 2601.02151",
    _on_questions(token_weights={"rule": "eaft"}),
  ),
  "dft": Method(
    "SFT in which tokens count by their own probability",
    "DFT, arXiv 2508.05629",
    _on_questions(token_weights={"rule": "dft"}),
  ),
  "talr": Method(
    "SFT in which improbable tokens count less, down to a floor",
    "TALR, arXiv 2509.20758",
    _on_questions(token_weights={"rule": "talr"}),
  ),
  "stm": Method(
    "SFT without the tokens that surprise the base model",
    "STM, arXiv 2501.14315",
    _on_questions(token_weights={"rule": "stm"}),
  ),
  "flow": Method(
    "SFT in which answers count more that are easy for the base model",
    "FLOW, arXiv 2502.02797",
    _on_questions(token_weights={"rule": "flow"}),
  ),
  "sft_kl": Method(
    "SFT plus forward KL to the base model on the answers",
    "a control of arXiv 2601.02151",
    _on_questions(distill=_ON_ANSWERS, balance={"mode": "fixed", "weight": 0.5}),
  ),
  "asft": Method(
    "`dft` plus forward KL to the base model on the answers",
    "ASFT, arXiv 2509.23753",
    _on_questions(
      distill=_ON_ANSWERS,
      balance={"mode": "fixed", "weight": 0.1},
      token_weights={"rule": "dft"},
    ),
  ),
  "gkd": Method(
    "SFT plus Jensen-Shannon divergence, half on rollouts and half on the answers",
    "Agarwal et al., arXiv 2306.13649",
    _on_questions(
      distill={**_PLAIN_TEACHER, "direction": "jsd", "trajectory": "mixed"},
      balance=_WEIGHT_1,
    ),
  ),
  "sdft_cl": Method(
    "forward KL to the student's own average, which reads the answer as an example",
    "Shenfeld et al., arXiv 2601.19897",
    _on_questions(
      distill={
        **_PLAIN_TEACHER,
        "teacher": "average",
        "teacher_context": "example",
        "direction": "forward",
        "skip_first": 3,
      },
      balance=_WEIGHT_1,
      train={"cross_entropy": False},
    ),
  ),
  "disc": Method(
    "forward KL on sentences of documents, alone, to the base model that has read the "
    "document up to there; learns without questions",
    "DiSC, arXiv 2602.16093",
    _on_questions(
      distill={**_ON_ANSWERS, "temperature": 2.0},
      balance=_WEIGHT_1,
      train={"cross_entropy": False, "learning_rate": 3e-6},
      sentences={},
    ),
  ),
  "sdpo": Method(
    "Jensen-Shannon divergence from the student's average, which reads a successful "
    "rollout of the same question",
    "Hübotter et al., arXiv 2601.20802",
    _on_questions(
      distill={
        **_PLAIN_TEACHER,
        **{"teacher": "average", "teacher_context": "sibling", "average_rate": 0.05},
        **{"direction": "jsd", "support": "student", "top_k": 100},
        "max_importance": 2.0,
      },
      balance=_WEIGHT_1,
      rollout={"group": 8},
      train={"cross_entropy": False, "loss_mean": "token"},
    ),
  ),
  "fapm": Method(
    "SFT; afterwards each tensor keeps the tenth of its change that costs the base "
    "model least",
    "Huang et al., arXiv 2509.08255",
    _on_questions(prune={}),
  ),
  "dg_hard": Method(
    "SFT; afterwards each matrix keeps the singular directions of its change that "
    "stand out from noise",
    "DG-Hard, arXiv 2605.20296",
    _on_questions(hard_threshold={}),
  ),
  "wise_ft": Method(
    "SFT; afterwards every weight is moved halfway back to the base model's",
    "Wortsman et al., arXiv 2109.01903",
    _on_questions(interpolate={}),
  ),
  "l2sp": Method(
    "SFT with a pull to the base model's parameters",
    "Li et al., arXiv 1802.01483",
    _on_questions(anchor={}, train=_NO_DECAY),
  ),
  "ewc": Method(
    "SFT with a pull weighted by Fisher information on general questions",
    "Kirkpatrick et al., arXiv 1612.00796",
    _on_questions(anchor={"importance": "sampled"}, train=_NO_DECAY),
  ),
  "recadam": Method(
    "SFT by an Adam that anneals from the base model's parameters to the task",
    "Chen et al., arXiv 2004.12651",
    _on_questions(recadam={}, train=_NO_DECAY),
  ),
  "freeze": Method(
    "SFT of about half the parameters, chosen at random once",
    "Hui et al., arXiv 2404.18466",
    _on_questions(freeze={}),
  ),
  "das": Method(
    "SFT with smaller updates of important heads and units",
    "Ke et al., arXiv 2302.03241",
    _on_questions(soft_mask={}),
  ),
  "lora": Method(
    "SFT of low-rank updates",
    "Hu et al., arXiv 2106.09685",
    _on_questions(lora={}, train={"learning_rate": 2e-4, **_NO_DECAY}),
  ),
  "replay": Method(
    "SFT with a share of general questions in every batch",
    "Rolnick et al., arXiv 1811.11682",
    _on_questions(replay={}),
  ),
  "ssr": Method(
    "`replay` with general questions that the model wrote and answered itself: run "
    "`synthesise` first",
    "Huang et al., arXiv 2403.01244",
    _on_questions(replay={}, synthesise={}),
  ),
  "mssr": Method(
    "SFT that replays forgotten general questions at growing intervals; our "
    "reconstruction",
    "after arXiv 2603.09892",
    _on_questions(replay={"share": 0.5, "adaptive": {}}),
  ),
}


def get(name: str) -> Method:
  """The method of that name.

  Raises:
    errors.UserError: the name is unknown; the message suggests a similar one.
  """
  if name in METHODS:
    return METHODS[name]
  near = difflib.get_close_matches(name, METHODS, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}"
  raise errors.UserError(f"unknown method {name!r}; {hint}")


def merge(settings: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
  """Both trees in one; where both have a value, that of `tree` counts."""
  merged = {**settings, **tree}
  for key, value in tree.items():
    section = settings.get(key)
    if isinstance(section, dict) and isinstance(value, dict):
      merged[key] = merge(section, value)
  return merged


def words(settings: dict[str, Any], prefix: str = "") -> list[str]:
  """Settings as overrides, e.g. `distill.teacher=none`."""
  overrides = []
  for key, value in settings.items():
    if isinstance(value, dict) and value:
      overrides += words(value, f"{prefix}{key}.")
    else:
      shown = str(value).lower() if isinstance(value, bool) else value
      overrides.append(f"{prefix}{key}={shown}")
  return overrides
