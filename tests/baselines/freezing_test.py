"""Masks by their definition, and that a frozen parameter keeps its bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax import errors
from raft_jax.baselines import freezing
from raft_jax.models import transformer
from tests.helpers import tiny_decoder

CONFIG = dataclasses.replace(tiny_decoder.CONFIG, n_layers=6, qkv_bias=True)
SHAPES = transformer.shapes(CONFIG)


def test_names_freeze_what_they_match():
  mask = freezing.by_name(SHAPES, ["embed", "layers.[0-2].*", "layers.5.q"])
  assert mask["embed"].item() == 0
  assert mask["final_norm"].item() == 1
  assert mask["layers"]["q"].ravel().tolist() == [0, 0, 0, 1, 1, 0]
  assert mask["layers"]["q_bias"].ravel().tolist() == [0, 0, 0, 1, 1, 1]


def test_bottom_is_the_embedding_and_the_lowest_layers():
  mask = freezing.bottom(SHAPES, 3)
  by_name = freezing.by_name(SHAPES, ["embed", "layers.[012].*"])
  jax.tree.map(np.testing.assert_array_equal, mask, by_name)


@pytest.mark.parametrize(
  ("patterns", "message"),
  [
    (["layers.9.*", "embed"], "'layers.9.*' matches no parameter"),
    (["*"], "every parameter is frozen"),
  ],
)
def test_useless_names_are_refused(patterns, message):
  with pytest.raises(errors.UserError, match=message.replace("*", r"\*")):
    freezing.by_name(SHAPES, patterns)


@pytest.mark.parametrize("seed", range(5))
def test_half_fine_tuning_draws_its_shares(seed):
  """Per layer 2 of q, k, v, o; 2 of gate, up, down in 3 layers and 1 in 3."""
  mask = freezing.half(SHAPES, seed)
  of_layer = {name: leaf.ravel() for name, leaf in mask["layers"].items()}
  attention = sum(of_layer[name] for name in ("q", "k", "v", "o"))
  feed_forward = sum(of_layer[name] for name in ("gate", "up", "down"))
  assert attention.tolist() == [2] * 6
  assert sorted(feed_forward.tolist()) == [1, 1, 1, 2, 2, 2]
  assert sum(of_layer[name].sum() for name in ("attn_norm", "mlp_norm")) == 6
  assert mask["embed"].item() == mask["final_norm"].item() == 1
  for name in "qkv":
    np.testing.assert_array_equal(of_layer[f"{name}_bias"], of_layer[name])
  jax.tree.map(np.testing.assert_array_equal, mask, freezing.half(SHAPES, seed))
  assert any(
    (a != b).any()
    for a, b in zip(jax.tree.leaves(mask), jax.tree.leaves(freezing.half(SHAPES, 99)))
  )


def test_half_fine_tuning_without_gates():
  """Per layer 1 of up and down; the numbers of the activation go with up."""
  config = dataclasses.replace(CONFIG, gated_mlp=False, activation="xielu")
  mask = freezing.half(transformer.shapes(config), 0)["layers"]
  assert (mask["up"] + mask["down"]).ravel().tolist() == [1] * 6
  for sign in "pn":
    np.testing.assert_array_equal(mask[f"xielu_{sign}"].ravel(), mask["up"].ravel())


def test_a_pattern_of_half_the_layers_frees_the_rest_of_the_parameters():
  mask = freezing.by_name(SHAPES, ["layers.[0-2].*"])
  sizes = jax.tree.map(lambda leaf: leaf.size, SHAPES)
  layers = sum(jax.tree.leaves(sizes["layers"]))
  total = sum(jax.tree.leaves(sizes))
  free = jax.tree.map(lambda m, s: np.broadcast_to(m, s.shape).sum(), mask, SHAPES)
  assert sum(jax.tree.leaves(free)) == total - layers / 2


def test_a_mask_on_updates_freezes_bits_and_one_on_gradients_does_not_slow_adam():
  params = transformer.init(jax.random.key(0), CONFIG)
  gradients = jax.tree.map(
    lambda p: jax.random.normal(jax.random.key(1), p.shape), params
  )
  mask = freezing.half(SHAPES, 0)

  def train(optimizer):
    state, moved = optimizer.init(params), params
    for _ in range(3):
      updates, state = optimizer.update(gradients, state, moved)
      moved = optax.apply_updates(moved, updates)
    return moved

  adamw = optax.adamw(1e-2, weight_decay=0.1)
  moved = train(optax.chain(adamw, freezing.scale(mask)))
  plain = train(adamw)

  def check(free, before, after, without):
    free = np.broadcast_to(free, before.shape).astype(bool)
    np.testing.assert_array_equal(after[~free], before[~free])
    np.testing.assert_array_equal(after[free], without[free])
    assert (after[free] != before[free]).all()

  jax.tree.map(check, mask, params, moved, plain)
  tenth = jax.tree.map(lambda m: jnp.full_like(m, 0.1), mask)
  early = train(optax.chain(freezing.scale(tenth), optax.adamw(1e-2, weight_decay=0.1)))
  np.testing.assert_allclose(early["embed"], plain["embed"], rtol=0, atol=1e-4)
