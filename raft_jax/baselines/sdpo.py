"""Teacher contexts from a question's own rollouts (SDPO).

The teacher of each rollout reads another rollout of the same question that succeeded.
Hübotter et al., "Reinforcement Learning via Self-Distillation", arXiv 2601.20802. The
reward of an open question is ours: ROUGE-L against its answer. The host scores the
texts between rollout and teacher, so every step waits once for its rollouts. The work
is a function of tokens and answers alone, so a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from raft_jax.data import batching, rouge, token_rows
from raft_jax.distillation import sequences
from raft_jax.generation import thinking
from raft_jax.hf import chat, teacher_prompts
from raft_jax.models import sharding
from raft_jax.runtime import distributed
from raft_jax.storage import records


class Siblings(NamedTuple):
  """When a rollout serves as context for the others of its question.

  Attributes:
    group: rollouts of each question.
    success: least ROUGE-L F1 with the answer; a text without words never succeeds.
    max_tokens: longest context; a row whose context would be longer has none.
  """

  group: int
  success: float
  max_tokens: int


class TeacherContext(NamedTuple):
  """A batch and its rollouts, with the contexts that the teacher reads.

  Attributes:
    batch: rows with each teacher's context.
    trajectory: rollouts; length 0 where no other rollout of the question succeeded.
    metrics: scalars to log.
  """

  batch: batching.Batch
  trajectory: sequences.Trajectory
  metrics: dict[str, float]


def first_other_success(success_N: np.ndarray, group: int) -> np.ndarray:
  """For each rollout, the index of the first other one of its group that succeeded.

  Args:
    success_N: bool, one group after another.
    group: rollouts of each question.

  Returns:
    int [N], -1 if there is none.
  """
  success_QG = success_N.reshape(-1, group)
  other_QGG = success_QG[:, None, :] & ~np.eye(group, dtype=bool)
  first_QG = other_QGG.argmax(-1) + group * np.arange(len(success_QG))[:, None]
  return np.where(other_QGG.any(-1), first_QG, -1).reshape(-1)


def _answer(tokenizer: chat.ChatTokenizer, ids: Sequence[int]) -> str:
  """The answer in a rollout; empty if its thinking never ended."""
  marks = thinking.own(tokenizer.hf_tokenizer.chat_template)
  text = thinking.answer(thinking.decode(tokenizer, ids), marks).strip()
  return "" if thinking.left_in(text) else text


def build_teacher_context(
  batch: batching.Batch,
  trajectory: sequences.Trajectory,
  *,
  tokenizer: chat.ChatTokenizer,
  questions_by_row: Mapping[int, token_rows.Conversation],
  siblings: Siblings,
) -> TeacherContext:
  """Gives the teacher of each rollout a successful sibling to read.

  Contexts are padded to `siblings.max_tokens`, so that every step has one shape.

  Args:
    batch: the rows of each question one after another; their contexts are not read.
    trajectory: their rollouts.
    tokenizer: tokenizer and chat template.
    questions_by_row: messages and answer by row id, before rows were copied.
    siblings: settings of the run.
  """
  tokens_BR, length_B, row_id_B = distributed.to_host(
    (trajectory.tokens_BR, trajectory.length_B, batch.row_id_B)
  )
  texts = [
    _answer(tokenizer, row[:length].tolist())
    for row, length in zip(tokens_BR, length_B)
  ]
  questions = [questions_by_row[int(row_id) // siblings.group] for row_id in row_id_B]
  answers = [records.as_reply(answer).content for _, answer in questions]
  reward_B = np.array([*map(rouge.rouge_l, answers, texts)])
  success_B = (reward_B >= siblings.success) & np.array([bool(text) for text in texts])
  contexts = [
    None
    if sibling < 0
    else teacher_prompts.teacher_ids(tokenizer, messages, texts[sibling], "sibling")
    for (messages, _), sibling in zip(
      questions, first_other_success(success_B, siblings.group)
    )
  ]
  context_BC, context_length_B, taught_B = _padded(
    contexts, siblings.max_tokens, tokenizer.pad_id
  )
  # Every process has scored all rows and places those of its own devices.
  context_BC, context_length_B, compared_B = sharding.spread(
    batch.row_id_B.sharding,
    (context_BC, context_length_B, np.where(taught_B, length_B, 0)),
  )
  return TeacherContext(
    batch._replace(teacher_BC=context_BC, teacher_length_B=context_length_B),
    trajectory._replace(length_B=compared_B),
    {
      "reward": float(reward_B.mean()),
      "rollout_success": float(success_B.mean()),
      "rollout_taught": float(taught_B.mean()),
      # These two replace the update's, which count only the compared rollouts.
      "rollout_length": float(length_B.mean()),
      "rollout_empty": float((length_B == 0).mean()),
    },
  )


def _padded(
  contexts: Sequence[Sequence[int] | None], max_tokens: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Contexts as padded rows, their lengths, and which rows have one.

  A context longer than `max_tokens` is left out. The row of a missing context is a
  single pad token.
  """
  width = batching.padded_width(max_tokens)
  context_BC = np.full((len(contexts), width), pad_id, np.int32)
  context_length_B = np.ones(len(contexts), np.int32)
  taught_B = np.zeros(len(contexts), bool)
  for row, ids in enumerate(contexts):
    if ids is not None and len(ids) <= max_tokens:
      context_BC[row, : len(ids)], context_length_B[row] = ids, len(ids)
      taught_B[row] = True
  return context_BC, context_length_B, taught_B
