"""Unit importance against whole logits, differences and float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.baselines import das
from raft_jax.models import transformer
from tests.helpers import tiny_step

CONFIG = tiny_step.CONFIG
WHOLE = tiny_step.SETTINGS._replace(top_k=CONFIG.vocab_size)


def log_probs(params, row, start):
  """float64 [answer tokens, V] of one row on its own."""
  hidden = tiny_step.plain_hidden(params, row, len(row))
  scores = np.array(hidden @ transformer.output_embedding(params).T, np.float64)
  scores = scores[start - 1 : -1]
  return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.fixture(name="parts", scope="module")
def _parts():
  params, batch, _, _ = tiny_step.setting()
  return params, jax.tree.map(lambda x: x[:2], batch), jax.random.key(7)


def test_disagreement_is_kl_of_the_two_dropped_models(parts):
  params, batch, key = parts
  gates = das.ones(CONFIG)
  value = das.disagreement(gates, params, batch, key, settings=WHOLE, rate=0.3)
  first, second = (
    das.gated(params, das.dropped(own, gates, 0.3), CONFIG.head_dim)
    for own in jax.random.split(key)
  )
  rows = []
  for i in range(2):
    prompt = batch.prompt_BP[i][: batch.prompt_length_B[i]].tolist()
    answer = batch.answer_BA[i][: batch.answer_length_B[i]].tolist()
    p, q = (log_probs(own, prompt + answer, len(prompt)) for own in (first, second))
    rows.append((np.exp(p) * (p - q)).sum(-1).mean())
  assert value > 1e-3
  np.testing.assert_allclose(value, np.mean(rows), rtol=1e-3)


def test_slopes_are_differences_of_the_value(parts):
  params, batch, key = parts
  gates = das.ones(CONFIG)

  @jax.jit
  def loss(gates):
    return das.disagreement(gates, params, batch, key, settings=WHOLE, rate=0.3)

  slopes = jax.grad(loss)(gates)
  direction = jax.tree.map(
    lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), gates
  )
  ahead, behind = (
    loss(jax.tree.map(lambda g, d, s=s: g + s * d, gates, direction))
    for s in (3e-3, -3e-3)
  )
  along = sum(
    jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), slopes, direction))
  )
  np.testing.assert_allclose(along, (ahead - behind) / 6e-3, rtol=2e-2)


def test_a_closed_gate_is_a_missing_head_or_unit(parts):
  """Zero columns of the next projection, in one layer only."""
  params, _, _ = parts
  gates = das.ones(CONFIG)
  gates = gates._replace(heads_LH=gates.heads_LH.at[1, 2].set(0.0))
  gates = gates._replace(units_LF=gates.units_LF.at[0, 3].set(0.0))
  closed = das.gated(params, gates, CONFIG.head_dim)["layers"]
  width = CONFIG.head_dim
  kept = np.ones_like(params["layers"]["o"])
  kept[1, :, 2 * width : 3 * width] = 0
  np.testing.assert_array_equal(closed["o"], params["layers"]["o"] * kept)
  kept = np.ones_like(params["layers"]["down"])
  kept[0, :, 3] = 0
  np.testing.assert_array_equal(closed["down"], params["layers"]["down"] * kept)


def test_dropping_keeps_the_mean_and_draws_each_unit():
  gates = das.Units(jnp.ones((50, 40)), jnp.full((50, 60), 2.0))
  found = das.dropped(jax.random.key(0), gates, 0.1)
  for leaf, gate in ((found.heads_LH, 1.0), (found.units_LF, 2.0)):
    assert {*np.unique(leaf).tolist()} <= {0.0, float(jnp.float32(gate) / 0.9)}
    np.testing.assert_allclose(np.mean(np.asarray(leaf) == 0), 0.1, atol=0.03)


def test_squashed_is_the_papers_normalisation():
  values = np.random.default_rng(0).exponential(size=(3, 7)).astype(np.float32)
  wide = values.astype(np.float64)
  expected = np.abs(
    np.tanh((wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True))
  )
  np.testing.assert_allclose(das.squashed(values), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(das.squashed(jnp.ones((2, 3))), np.zeros((2, 3)))


def test_an_important_unit_keeps_its_parameters_and_the_others_move(parts):
  """Head 1 of layer 0 and unit 5 of layer 2; 4 query heads share 2 key heads."""
  params, _, _ = parts
  soften = das.soften(CONFIG)
  state = soften.init(params)
  updates = jax.tree.map(jnp.ones_like, params)
  untouched, _ = soften.update(updates, state)
  jax.tree.map(np.testing.assert_array_equal, untouched, updates)
  state = state._replace(
    heads_LH=state.heads_LH.at[0, 1].set(1.0),
    units_LF=state.units_LF.at[2, 5].set(0.25),
  )
  softened, after = soften.update(updates, state)
  assert after is state
  width, group = CONFIG.head_dim, CONFIG.n_heads // CONFIG.n_kv_heads
  expected = jax.tree.map(np.ones_like, params)
  layers = expected["layers"]
  layers["q"][0, width : 2 * width] = 0
  layers["o"][0, :, width : 2 * width] = 0
  served = 1 // group
  for name in ("k", "v"):
    layers[name][0, served * width : (served + 1) * width] = 0
  layers["gate"][2, 5] = layers["up"][2, 5] = 0.75
  layers["down"][2, :, 5] = 0.75
  jax.tree.map(np.testing.assert_array_equal, softened, expected)


def test_importance_is_of_every_unit_and_deterministic(parts):
  params, batch, _ = parts
  found, again = (
    das.importance(params, [batch, batch], settings=WHOLE, rate=0.3, seed=0)
    for _ in range(2)
  )
  assert found.heads_LH.shape == (CONFIG.n_layers, CONFIG.n_heads)
  assert found.units_LF.shape == (CONFIG.n_layers, CONFIG.d_ff)
  for leaf, same in zip(found, again, strict=True):
    np.testing.assert_array_equal(leaf, same)
    assert 0.2 < float(leaf.mean()) < 0.9
    assert float(leaf.min()) >= 0
    assert float(leaf.max()) <= 1
