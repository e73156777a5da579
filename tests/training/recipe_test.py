"""From sections to the chain: strengths, masks, and what a run cannot do."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax import balance, errors
from raft_jax.baselines import freezing
from raft_jax.config import load as config_load
from raft_jax.models import transformer
from raft_jax.training import optim
from tests.helpers import tiny_decoder

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = tiny_decoder.CONFIG
SHAPES = transformer.shapes(CONFIG)
RATES = np.array([1e-3, 3e-3, 2e-3])


def schedule(count):
  return jnp.array(RATES)[count]


@pytest.fixture(name="make")
def _make(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)

  def make(*overrides):
    path = tmp_path / "c.yaml"
    path.write_text(
      "model: {source: a/b}\noutput: x\n"
      "data: {questions: configs/data/wordnet/law/train.jsonl}\n"
    )
    settings = config_load.load(path, ["method=sft", *overrides])
    return optim.make_optimizer(
      settings, balance.balance_fixed(1.0), schedule, SHAPES, CONFIG, len(RATES)
    )

  return make


def run(optimizer, gradient=0.0, shift=0.0):
  """Parameters that start `shift` from the anchor, after all steps."""
  anchor = tiny_decoder.random_params()
  params = jax.tree.map(lambda leaf: leaf + shift, anchor)
  state = optimizer.init(params)
  step = jax.jit(optimizer.update)
  gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
  for _ in RATES:
    updates, state = step(gradients, state, params, losses={}, anchor=anchor)
    params = optax.apply_updates(params, updates)
  return anchor, params, state


def test_an_anchors_strength_is_of_the_whole_run(make):
  """Strength s with Σ η = 0.006: λ = s / 0.006, and each step keeps 1 / (1 + η λ)."""
  _, _, state = run(make())
  assert set(state) == {"balance", "clip", "adamw"}
  optimizer = make("anchor.strength=0.6", "train.weight_decay=0.0")
  anchor, params, state = run(optimizer, shift=0.5)
  kept = np.prod(1 / (1 + RATES * 100))
  jax.tree.map(
    lambda a, p: np.testing.assert_allclose(p - a, 0.5 * kept, rtol=1e-4),
    anchor,
    params,
  )
  assert state["anchor"].importance == ()


def test_a_coupled_anchor_goes_through_adam(make):
  """Without another gradient Adam makes steps of the learning rate of it."""
  optimizer = make("anchor={mode: coupled}", "train.weight_decay=0.0")
  anchor, params, _ = run(optimizer, shift=0.5)
  jax.tree.map(
    lambda a, p: np.testing.assert_allclose(p - a, 0.5 - RATES.sum(), rtol=1e-3),
    anchor,
    params,
  )


def test_frozen_parameters_keep_their_bits_and_do_not_count_for_clipping(make):
  names = ["freeze={mode: names, names: ['layers.0.*', final_norm]}"]
  before, after, _ = run(make(*names), gradient=1.0)
  mask = freezing.by_name(SHAPES, ["layers.0.*", "final_norm"])

  def check(free, a, b):
    free = np.broadcast_to(free, a.shape).astype(bool)
    np.testing.assert_array_equal(a[~free], b[~free])
    assert (a[free] != b[free]).all()

  jax.tree.map(check, mask, before, after)
  # Adam does not see a scale, but its moments hold the clipped gradient, 1 / norm.
  counts = jax.tree.map(lambda m, s: np.broadcast_to(m, s.shape).sum(), mask, SHAPES)
  free = sum(jax.tree.leaves(counts))
  _, _, state = run(make(*names), gradient=1.0)
  moments = [
    s for s in jax.tree.leaves(state["adamw"]) if s.shape == SHAPES["embed"].shape
  ]
  expected = free**-0.5 * (1 - 0.9**3)
  assert any(np.allclose(m, expected, rtol=1e-4) for m in moments)


def test_the_average_follows_what_was_made(make):
  optimizer = make(
    *("distill={teacher: average, teacher_context: example, average_rate: 1.0}",),
    *("balance.mode=fixed", "freeze={mode: bottom, layers: 1}"),
  )
  _, params, state = run(optimizer, gradient=1.0)
  jax.tree.map(
    lambda a, p: np.testing.assert_allclose(a, p, rtol=1e-6),
    state["average"].average,
    params,
  )


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    # η (1 - λ) γ at most 3e-3 · 5000 · (1 - λ).
    (["recadam={midpoint: 1.0, steepness: 0.1}"], r"recadam\.gamma: 5000 .* in one"),
    (["freeze={mode: bottom, layers: 9}"], r"freeze\.layers: 9, but the model has 3"),
    (["freeze={mode: names, names: [head]}"], r"freeze\.names: 'head' matches no"),
  ],
)
def test_values_that_do_not_fit_the_run_are_refused(make, overrides, message):
  with pytest.raises(errors.UserError, match=message):
    make(*overrides)
