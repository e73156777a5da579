"""Teachers among a question's own rollouts (SDPO): one that succeeded shows the others.

Hübotter et al., "Reinforcement Learning via Self-Distillation", arXiv 2601.20802. The
reward of an open question is ours: ROUGE-L with its answer. Texts are scored on the
host between rollout and teacher, so that every step waits for its rollouts once; the
work is a function of tokens and answers alone, and a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from raft_jax.data import batching, rouge
from raft_jax.distillation import objective
from raft_jax.generation import thinking
from raft_jax.hf import chat, teacher_prompts
from raft_jax.models import sharding
from raft_jax.runtime import distributed


class Instructed(NamedTuple):
  """What the teacher reads, what is compared, and what is worth logging.

  Attributes:
    batch: with each row's teacher context.
    trajectory: of length 0 where no other rollout succeeded.
    told: scalars to log.
  """

  batch: batching.Batch
  trajectory: objective.Trajectory
  told: dict[str, float]


def first_other_success(success_N: np.ndarray, group: int) -> np.ndarray:
  """Index of the first rollout of each one's group, itself aside, that succeeded.

  Args:
    success_N: bool, groups one after another.
    group: rollouts of each question.

  Returns:
    int [N], -1 where there is none.
  """
  success_QG = success_N.reshape(-1, group)
  other_QGG = success_QG[:, None, :] & ~np.eye(group, dtype=bool)
  first_QG = other_QGG.argmax(-1) + group * np.arange(len(success_QG))[:, None]
  return np.where(other_QGG.any(-1), first_QG, -1).reshape(-1)


def _said(tokenizer: chat.ChatTokenizer, ids: Sequence[int]) -> str:
  """The answer in a rollout, which is empty where its thinking never ended."""
  marks = thinking.own(tokenizer.hf_tokenizer.chat_template)
  said = thinking.answer(thinking.decode(tokenizer, ids), marks).strip()
  return "" if thinking.left_in(said) else said


def instruct(
  batch: batching.Batch,
  trajectory: objective.Trajectory,
  *,
  tokenizer: chat.ChatTokenizer,
  asked: Mapping[int, batching.Conversation],
  group: int,
  success: float,
  max_tokens: int,
) -> Instructed:
  """Gives each rollout a teacher that reads a successful other one of its question.

  Args:
    batch: rows of a question one after another; their contexts are not read.
    trajectory: their rollouts.
    asked: messages and answer by row id, of the rows before they were copied.
    group: rollouts of each question.
    success: least ROUGE-L F1 with the answer; a text without words never succeeds.
    max_tokens: budget of a context; a longer one counts as none. Contexts are as wide
      as it, so that nothing compiles anew.
  """
  tokens_BR, length_B, row_id_B = distributed.to_host(
    (trajectory.tokens_BR, trajectory.length_B, batch.row_id_B)
  )
  texts = [
    _said(tokenizer, row[:length].tolist()) for row, length in zip(tokens_BR, length_B)
  ]
  source = [asked[int(row_id) // group] for row_id in row_id_B]
  reward_B = np.array(
    [rouge.rouge_l(answer, found) for (_, answer), found in zip(source, texts)]
  )
  success_B = (reward_B >= success) & np.array([bool(found) for found in texts])
  width = batching.rounded(max_tokens)
  context_BC = np.full((len(texts), width), tokenizer.pad_id, np.int32)
  context_length_B = np.ones(len(texts), np.int32)  # a row without context reads a pad
  taught_B = np.zeros(len(texts), bool)
  for row, sibling in enumerate(first_other_success(success_B, group)):
    if sibling < 0:
      continue
    ids = teacher_prompts.teacher_ids(
      tokenizer, source[row][0], texts[sibling], "sibling"
    )
    if len(ids) <= max_tokens:
      context_BC[row, : len(ids)], context_length_B[row] = ids, len(ids)
      taught_B[row] = True
  # Every process has scored all rows, and alike; each places its own.
  context_BC, context_length_B, compared_B = sharding.spread(
    batch.row_id_B.sharding,
    (context_BC, context_length_B, np.where(taught_B, length_B, 0)),
  )
  return Instructed(
    batch._replace(teacher_BC=context_BC, teacher_length_B=context_length_B),
    trajectory._replace(length_B=compared_B),
    {
      "reward": float(reward_B.mean()),
      "rollout_success": float(success_B.mean()),
      "rollout_taught": float(taught_B.mean()),
      # Of all rollouts, where the update saw those that are compared.
      "rollout_length": float(length_B.mean()),
      "rollout_empty": float((length_B == 0).mean()),
    },
  )
