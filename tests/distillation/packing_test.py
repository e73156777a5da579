"""A packed step is the step: losses, gradients and what is logged."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from raft_jax.data import packing
from raft_jax.distillation import answer_losses, objective, sequences
from raft_jax.models import transformer
from tests.helpers import packed_rows, tiny_decoder, tiny_step

ROWS, STEPS = 6, 5


def packed(batch, trajectory, *, answers=True):
  """Three rows in a lane."""
  steps = trajectory.tokens_BR.shape[1]
  return packed_rows.packed(
    batch, steps, packing.Groups(1, 1), per_lane=3, answers=answers
  )


def made(**changes):
  """Parameters, a batch and its rollouts, for a network with these changes."""
  decoder = dataclasses.replace(tiny_decoder.CONFIG, **changes)
  params = transformer.init(jax.random.key(1), decoder)
  params["embed"] *= 10
  batch = tiny_step.make_batch(ROWS)
  rng = np.random.default_rng(1)
  trajectory = sequences.Trajectory(
    rng.integers(6, 97, (ROWS, STEPS)).astype(np.int32),
    np.array([5, 0, 3, 5, 1, 4], np.int32),
  )
  return decoder, params, batch, trajectory


@functools.partial(jax.jit, static_argnames="settings")
def both_losses(params, batch, trajectory, settings):
  """Losses, what is logged, and the gradient of each loss."""
  teacher = jax.tree.map(lambda leaf: leaf * 1.1, params)
  support = objective.score_teacher(
    teacher,
    batch.teacher_BC,
    batch.teacher_length_B,
    trajectory,
    batch.teacher_packing,
    settings=settings,
  )
  weights = objective.mean_weights(batch, trajectory, settings)

  def losses(params):
    return objective.loss_terms(
      params, batch, trajectory, support, weights, settings=settings
    )

  terms, pullback, aux = jax.vjp(losses, params, has_aux=True)
  one = {name: np.float32(1) for name in terms}
  gradients = [pullback(one | {other: np.float32(0)})[0] for other in terms]
  return terms, aux, gradients


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=2e-5)


KINDS = {
  "dense": {},
  "windows": {"windows": (4, 0, 4)},
  "experts": {"n_experts": 4, "experts_per_token": 2, "d_ff": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_rows_by_themselves(kind):
  decoder, params, batch, trajectory = made(**KINDS[kind])
  settings = tiny_step.SETTINGS._replace(decoder=decoder, row_losses=True)
  plain = both_losses(params, batch, trajectory, settings)
  lanes = both_losses(params, packed(batch, trajectory), trajectory, settings)
  assert plain[0]["sft"] > 1
  assert plain[0]["kd"] > 1e-3
  jax.tree.map(close, plain[:2], lanes[:2])
  for ours, theirs in zip(lanes[2], plain[2], strict=True):
    tiny_step.assert_trees_close(ours, theirs, 2e-5)


RULES = {
  name: answer_losses.TokenRule(name, 0.7, 8, 2.0, 0.1, temperature)
  for name, temperature in {"eaft": None, "dft": None, "talr": 1.3}.items()
}


@pytest.mark.parametrize("rule", [*RULES, "median", "stored", "no answers"])
def test_every_weight_of_tokens_is_the_same(rule):
  decoder, params, batch, trajectory = made()
  settings = tiny_step.SETTINGS._replace(decoder=decoder)
  if rule == "stored":
    weights = np.random.default_rng(2).random(batch.answer_BA.shape)
    batch = batch._replace(token_weight_BA=weights.astype(np.float32))
  elif rule == "no answers":
    settings = settings._replace(cross_entropy=False)
  else:
    talr = RULES["talr"]._replace(temperature=None)
    settings = settings._replace(token_rule=RULES.get(rule, talr))
  plain = both_losses(params, batch, trajectory, settings)
  lanes = packed(batch, trajectory, answers=settings.cross_entropy)
  lanes = both_losses(params, lanes, trajectory, settings)
  jax.tree.map(close, plain[0], lanes[0])
  for ours, theirs in zip(lanes[2], plain[2], strict=True):
    tiny_step.assert_trees_close(ours, theirs, 2e-5)
