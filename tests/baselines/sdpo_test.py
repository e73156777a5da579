"""SDPO: whose rollout teaches whom, and one step's loss in float64 numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.baselines import sdpo
from raft_jax.data import batching
from raft_jax.distillation import objective, sequences
from raft_jax.hf import answer_turns, chat, teacher_prompts
from raft_jax.models import sampling
from raft_jax.storage import records
from tests.helpers import tiny_decoder, tiny_step

GROUP, WATCH, NEW = 2, 20, 5


def test_a_rollout_never_teaches_itself():
  for success in itertools.product([False, True], repeat=6):
    found = sdpo.first_other_success(np.array(success), 3)
    for row, sibling in enumerate(found):
      group = range(row // 3 * 3, row // 3 * 3 + 3)
      others = [other for other in group if other != row and success[other]]
      assert sibling == (others[0] if others else -1)


@pytest.fixture(scope="module")
def codec(smollm):
  return chat.load(smollm)


def teacher_context(codec, answers, max_tokens, success=0.5):
  """Contexts for two questions with the reference answer "a b c d"."""
  ids = [answer_turns.answer_ids(codec, answer) for answer in answers]
  tokens = np.full((len(ids), 24), codec.pad_id, np.int32)
  for row, answer in zip(tokens, ids):
    row[: len(answer)] = answer
  lengths = jnp.array([len(answer) for answer in ids])
  nothing, rows = jnp.zeros((len(ids), 0), jnp.int32), jnp.arange(len(ids))
  question = [records.Message("user", f"Question {i}?") for i in range(2)]
  return sdpo.build_teacher_context(
    batching.Batch(nothing, lengths, nothing, lengths, nothing, lengths, rows),
    sequences.Trajectory(jnp.array(tokens), lengths),
    tokenizer=codec,
    questions_by_row={i: ((question[i],), "alpha beta gamma delta") for i in range(2)},
    siblings=sdpo.Siblings(group=3, success=success, max_tokens=max_tokens),
  )


def test_contexts_show_a_successful_sibling_or_leave_the_loss(codec):
  right, half = "alpha beta gamma delta", "<think>x</think> alpha beta gamma"
  answers = [right, half, "no", "no", right, "never"]
  found = teacher_context(codec, answers, 64)
  # F1 of three of four words: 2 * 1 * 0.75 / 1.75 = 0.86. Of the second question's
  # rollouts only the one that succeeded has no teacher.
  assert found.trajectory.length_B.tolist() == [
    len(answer_turns.answer_ids(codec, a)) if taught else 0
    for a, taught in zip(answers, [1, 1, 1, 1, 0, 1])
  ]
  shown = ["alpha beta gamma", right, right, right, None, right]
  for row, demonstration in enumerate(shown):
    ids = found.batch.teacher_BC[row, : found.batch.teacher_length_B[row]].tolist()
    if demonstration is None:
      assert ids == [codec.pad_id]
      continue
    asked = (records.Message("user", f"Question {row // 3}?"),)
    assert ids == teacher_prompts.teacher_ids(codec, asked, demonstration, "sibling")
  np.testing.assert_allclose(found.metrics["rollout_success"], 3 / 6)
  np.testing.assert_allclose(found.metrics["rollout_taught"], 5 / 6)
  # The same shapes whatever was sampled: nothing compiles anew.
  other = teacher_context(codec, ["no"] * 6, 64)
  assert not other.trajectory.length_B.any()
  batches = jax.tree.leaves(found.batch), jax.tree.leaves(other.batch)
  for one, two in zip(*batches, strict=True):
    assert (one.shape, one.dtype) == (two.shape, two.dtype)
  # What exceeds the budget counts as none, and so does an empty text at any bound.
  assert not teacher_context(codec, answers, 16).trajectory.length_B.any()
  assert (
    teacher_context(codec, ["", "", "x"] * 2, 64, success=0.0).metrics[
      "rollout_success"
    ]
    == 1 / 3
  )


def softmax(logits):
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def test_one_steps_loss_in_float64():
  """SDPO's equation from logits of plain forwards: top K of the student and a bucket,
  the teacher's weight of half, importance weights to 2, the mean over all tokens."""
  params = tiny_decoder.random_params()
  teacher = jax.tree.map(lambda leaf: leaf * 1.1, params)
  batch = tiny_step.make_batch()
  rollout = sampling.generate(
    params,
    tiny_decoder.CONFIG,
    *(batch.prompt_BP, batch.prompt_length_B, batch.row_id_B),
    **{"seed": 0, "step": 0, "max_new_tokens": NEW, "top_tokens": WATCH},
    **{"eos_ids": (5,), "pad_id": 0},
  )
  # The second row has no teacher. The sampler was off, so that weights differ.
  length_B = rollout.length_B.at[1].set(0)
  off_RB = np.random.default_rng(0).normal(0.7, 1, rollout.tokens_BR.shape)
  before = rollout.stats.log_prob_BR - off_RB.astype(np.float32)
  seen = rollout.stats._replace(log_prob_BR=before)
  trajectory = sequences.Trajectory(rollout.tokens_BR, length_B, seen)
  settings = tiny_step.SETTINGS._replace(
    **{
      "cross_entropy": False,
      "loss_mean": "token",
      "top_k": WATCH,
      "temperature": 1.0,
    },
    **{"support": "student", "tail": "bucket", "direction": "jsd", "beta": 0.5},
    max_importance=2.0,
  )
  context = (batch.teacher_BC, batch.teacher_length_B)

  @jax.jit
  def loss(params, teacher):
    support = objective.score_teacher(teacher, *context, trajectory, settings=settings)
    weights = objective.mean_weights(batch, trajectory, settings)
    parts = (batch, trajectory, support, weights)
    return objective.loss_terms(params, *parts, settings=settings)[0]["kd"]

  def predictions(params, before_BC, length_B):
    """Distributions at each rollout token, of rows that are not packed."""
    before = [row[:length].tolist() for row, length in zip(before_BC, length_B)]
    rows = np.zeros((len(before), 40), np.int32)
    for row, head, tail in zip(rows, before, rollouts):
      row[: len(head) + len(tail)] = head + tail
    ends = [len(head) + len(tail) for head, tail in zip(before, rollouts)]
    valid = np.arange(40) < np.array(ends)[:, None]
    scores = np.array(logits(params, jnp.array(rows), jnp.array(valid)), np.float64)
    return [
      softmax(s[len(head) - 1 : end]) for s, head, end in zip(scores, before, ends)
    ]

  logits = jax.jit(lambda p, *row: tiny_decoder.logits(p, tiny_decoder.CONFIG, *row))
  rollouts = [
    row[:length].tolist() for row, length in zip(rollout.tokens_BR, rollout.length_B)
  ]
  student = predictions(params, batch.prompt_BP, batch.prompt_length_B)
  taught = predictions(teacher, *context)
  values = []
  for row, new in enumerate(rollouts):
    for at, token in enumerate(new):
      p, q = student[row][at], taught[row][at]
      # What the sampler saw: its own distribution.
      chosen = np.log(p[token])
      np.testing.assert_allclose(rollout.stats.log_prob_BR[row, at], chosen, rtol=1e-3)
      ids = np.argsort(-p)[:WATCH]
      assert set(rollout.stats.ids_BRK[row, at].tolist()) == set(ids.tolist())
      if row == 1:
        continue
      p, q = (np.append(x[ids], 1 - x[ids].sum()) for x in (p, q))
      m = (p + q) / 2
      divergence = (np.sum(q * np.log(q / m)) + np.sum(p * np.log(p / m))) / 2
      values.append(divergence * min(np.exp(chosen - before[row, at]), 2.0))
  np.testing.assert_allclose(loss(params, teacher), np.mean(values), rtol=1e-3)
