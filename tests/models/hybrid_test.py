"""Parameters of networks with two kinds of layers: stacks, masks, names, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax import balance, errors
from raft_jax.baselines import freezing
from raft_jax.config import schema
from raft_jax.evaluation import drift
from raft_jax.models import (
  gated_delta,
  hybrid,
  kv_cache,
  param_sharding,
  rotary,
  transformer,
)
from raft_jax.training import optim
from tests.helpers import tiny_decoder

DELTA = gated_delta.DeltaConfig(
  layers=(0, 2, 4),
  key_heads=1,
  value_heads=2,
  key_width=4,
  value_width=6,
  conv_width=3,
)
CONFIG = dataclasses.replace(
  tiny_decoder.CONFIG, n_layers=5, attention_gate=True, delta=DELTA
)
SHAPES = transformer.shapes(CONFIG)
LAYERS_OF = functools.partial(hybrid.layers_of, CONFIG)
GLOBAL = dataclasses.replace(
  tiny_decoder.CONFIG,
  n_layers=5,
  qk_norm="head",
  post_norms=True,
  layer_scales=True,
  global_attention=hybrid.GlobalAttention(
    layers=(0, 2, 4),
    n_kv_heads=1,
    head_dim=12,
    rope=rotary.Rope(1e6),
    keys_are_values=True,
  ),
)
both = pytest.mark.parametrize("config", [CONFIG, GLOBAL], ids=["linear", "global"])
# Gemma 4 E2B's kinds of layers: periods of 2, and two of the layers that share.
SHARED = dataclasses.replace(
  GLOBAL,
  n_layers=9,
  windows=(0, 4) * 4 + (0,),
  global_attention=dataclasses.replace(
    GLOBAL.global_attention, layers=(0, 2, 4, 6, 8), keys_are_values=False
  ),
  kv_sharing=hybrid.KvSharing(first=4, d_ff=80),
  per_layer_inputs=6,
)


@both
def test_a_stack_has_a_row_for_each_layer_with_the_parameter(config):
  for name, leaf in transformer.shapes(config)["layers"].items():
    assert leaf.shape[0] == len(hybrid.layers_of(config, name)), name
  assert hybrid.layers_of(config, "q") == (1, 3)
  assert hybrid.layers_of(config, "attn_post_norm") == (
    (1, 3) if config is CONFIG else (0, 1, 2, 3, 4)
  )


def test_global_layers_have_heads_of_their_own():
  layers, c = transformer.shapes(GLOBAL)["layers"], GLOBAL
  assert layers["q"].shape == (2, c.n_heads * c.head_dim, c.d_model)
  assert layers["global_q"].shape == (3, c.n_heads * 12, c.d_model)
  assert layers["global_k"].shape == (3, 12, c.d_model)
  assert "v" in layers
  assert "global_v" not in layers  # they are the keys
  cache = kv_cache.init(GLOBAL, batch=2, length=7)
  assert cache["k"].shape == (2, 2, 7, c.n_kv_heads, c.head_dim)
  assert cache["global_v"].shape == (3, 2, 7, 1, 12)


def test_names_give_the_layers_of_each_kind():
  assert LAYERS_OF("q") == (1, 3)
  assert LAYERS_OF("delta_q") == (0, 2, 4)
  assert LAYERS_OF("up") == (0, 1, 2, 3, 4)


def test_norms_of_the_kinds_may_differ():
  """As in OLMo Hybrid: after attention, but before the other mixer."""
  config = dataclasses.replace(CONFIG, pre_norms=False, post_norms=True)
  assert hybrid.layers_of(config, "attn_norm") == (0, 2, 4)
  assert hybrid.layers_of(config, "mlp_post_norm") == (1, 3)
  for name, leaf in transformer.shapes(config)["layers"].items():
    assert leaf.shape[0] == len(hybrid.layers_of(config, name)), name


@pytest.mark.parametrize("config", [CONFIG, GLOBAL, SHARED])
def test_axes_name_every_dimension_of_every_parameter(config):
  ranks = jax.tree.map(lambda leaf: leaf.ndim, transformer.shapes(config))
  named = jax.tree.map(
    len, param_sharding.axes(config), is_leaf=lambda node: isinstance(node, tuple)
  )
  assert ranks == named


def test_layers_that_share_keys_have_parameters_of_their_own():
  layers, c = transformer.shapes(SHARED)["layers"], SHARED
  for name, leaf in layers.items():
    assert leaf.shape[0] == len(hybrid.layers_of(c, name)), name
  assert hybrid.layers_of(c, "q") == (1, 3)
  assert hybrid.layers_of(c, "global_k") == (0, 2)
  assert hybrid.layers_of(c, "kv_shared_global_q") == (4, 6, 8)
  assert hybrid.layers_of(c, "kv_shared_up") == (4, 5, 6, 7, 8)
  assert hybrid.layers_of(c, "window") == tuple(range(9))
  assert layers["up"].shape == (4, c.d_ff, c.d_model)
  assert layers["kv_shared_up"].shape == (5, 80, c.d_model)
  assert layers["kv_shared_q"].shape == (2, c.n_heads * c.head_dim, c.d_model)
  shared = {hybrid.plain({name: 0}).popitem()[0] for name in layers if "shared" in name}
  assert not shared & hybrid.KEYS_VALUES


def test_layers_that_share_keys_read_the_last_of_their_kind():
  rows = [hybrid.cache_row(SHARED, layer) for layer in range(9)]
  assert rows == [0, 0, 1, 1, 1, 1, 1, 1, 1]
  cache = kv_cache.init(SHARED, batch=2, length=7)
  assert cache["k"].shape[0] == cache["global_k"].shape[0] == 2


def test_periods_before_and_among_the_layers_that_share_keys():
  """Of Gemma 4 E2B: each fifth layer is global, and the last 20 of 35 share."""
  layers = tuple(range(4, 35, 5))
  own = dataclasses.replace(SHARED.global_attention, layers=layers)
  sharing = hybrid.KvSharing(first=15, d_ff=80)
  config = dataclasses.replace(
    SHARED, n_layers=35, global_attention=own, kv_sharing=sharing
  )
  assert hybrid.period(config, 0, 15) == hybrid.period(config, 15, 35) == 5


def test_shared_keys_are_kept_once_for_the_backward_pass():
  """With recomputed layers, too: no scan stacks them, and the second has no copy."""
  shapes, ids = transformer.shapes(SHARED), jnp.arange(7)[None]
  mask = transformer.causal_mask(jnp.ones((1, 7), bool))
  compute = transformer.Compute(remat=True)

  def loss(params):
    hidden, _ = transformer.forward(params, SHARED, ids, ids, mask, compute=compute)
    return jnp.sum(hidden**2)

  program = jax.make_jaxpr(jax.grad(loss))(shapes)
  scans = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
  assert [scan.params["length"] for scan in scans] == [2, 2, 2, 2]
  # Forward twice, then back: activations, and keys and values of both kinds.
  assert [scan.params["num_carry"] for scan in scans] == [5, 1, 5, 5]
  kept = [var.aval.shape for scan in scans[:2] for var in scan.outvars]
  heads = {(SHARED.n_kv_heads, SHARED.head_dim), (1, 12)}
  stacked = [shape for shape in kept if shape[0] == 2 and len(shape) > 4]
  assert not any(shape[-2:] in heads for shape in stacked)


def test_freezing_names_the_layers_that_share_keys():
  shapes = transformer.shapes(SHARED)
  bottom = optim.make_mask(
    schema.Freeze(mode="bottom", layers=5), shapes, SHARED, seed=0
  )
  assert not bottom["embed"].any()
  assert not bottom["per_layer_embed"].any()
  assert bottom["per_layer_proj"].all()
  assert not bottom["layers"]["up"].any()
  assert bottom["layers"]["kv_shared_up"].ravel().tolist() == [0, 1, 1, 1, 1]
  named = optim.make_mask(
    schema.Freeze(mode="names", names=["layers.[67].kv_shared_*", "per_layer_*"]),
    shapes,
    SHARED,
    seed=0,
  )
  assert named["layers"]["kv_shared_global_q"].ravel().tolist() == [1, 0, 1]
  assert not named["per_layer_proj"].any()
  alone = dataclasses.replace(SHARED, global_attention=None)
  says = "the keys and values of another layer, and 5 of the model's 9 layers have it"
  with pytest.raises(errors.UserError, match=says):
    optim.make_mask(schema.Freeze(mode="half"), shapes, alone, seed=0)


def test_layers_are_taken_from_their_rows():
  numbered = {name: jnp.array(LAYERS_OF(name), jnp.int32) for name in SHAPES["layers"]}
  layers = transformer.unstack(numbered, CONFIG)
  assert [set(map(int, layer.values())) for layer in layers] == [{i} for i in range(5)]
  assert [set(layer) & {"q", "delta_q"} for layer in layers] == [
    {"delta_q"},
    {"q"},
  ] * 2 + [{"delta_q"}]


@pytest.mark.parametrize(
  ("linear", "count", "period"),
  [((0, 2, 4), 5, 2), ((0, 1, 2, 4, 5, 6), 8, 4), ((0,), 3, 3), ((1, 2), 3, 3)],
)
def test_period_is_the_least_after_which_the_kinds_repeat(linear, count, period):
  delta = dataclasses.replace(DELTA, layers=linear)
  config = dataclasses.replace(CONFIG, n_layers=count, delta=delta)
  assert hybrid.period(config) == period


def test_masks_count_layers_and_not_rows():
  mask = freezing.by_name(SHAPES, ["layers.[0-2].*", "embed"], LAYERS_OF)
  assert mask["layers"]["q"].ravel().tolist() == [0, 1]
  assert mask["layers"]["delta_q"].ravel().tolist() == [0, 0, 1]
  assert mask["layers"]["up"].ravel().tolist() == [0, 0, 0, 1, 1]
  bottom = optim.make_mask(
    schema.Freeze(mode="bottom", layers=3), SHAPES, CONFIG, seed=0
  )
  jax.tree.map(np.testing.assert_array_equal, bottom, mask)
  with pytest.raises(errors.UserError, match="matches no parameter"):
    freezing.by_name(SHAPES, ["layers.0.q"], LAYERS_OF)


@both
def test_half_of_the_attention_projections_is_refused(config):
  kind = "linear attention" if config is CONFIG else "heads of another shape"
  says = f"{kind}, and 3 of the model's 5 layers have it"
  with pytest.raises(errors.UserError, match=says):
    optim.make_mask(schema.Freeze(mode="half"), SHAPES, config, seed=0)


def test_the_scales_of_a_layer_and_of_a_router_do_not_decay():
  decays = optim.decays(transformer.shapes(SHARED))["layers"]
  assert not decays["layer_scale"]
  assert not decays["kv_shared_layer_scale"]
  assert not decays["per_layer_norm"]
  assert decays["global_q"]
  assert decays["kv_shared_per_layer_gate"]
  mixture = dataclasses.replace(
    GLOBAL, n_experts=4, experts_per_token=2, shared_d_ff=16, parallel_experts=True
  )
  decays = optim.decays(transformer.shapes(mixture))["layers"]
  assert not decays["router_scale"]
  assert not decays["router_expert_scale"]
  assert not decays["experts_post_norm"]
  assert decays["shared_gate"]
  assert decays["router"]


@pytest.mark.slow
def test_the_scale_of_a_layer_never_changes():
  """Under a loss that wants it smaller, and weight decay; bit for bit."""
  params = transformer.init(jax.random.key(0), GLOBAL)
  scale = jnp.linspace(0.03, 1.7, GLOBAL.n_layers)[:, None]
  params["layers"]["layer_scale"] = scale
  tx = optim.chain(
    balance.balance_fixed(1.0), optax.constant_schedule(0.1), weight_decay=1.0, clip=1.0
  )

  @jax.jit
  @jax.grad
  def gradient(params):
    row, valid = jnp.arange(6)[None], jnp.ones((1, 6), bool)
    mask = transformer.causal_mask(valid)
    hidden, _ = transformer.forward(params, GLOBAL, row, row, mask)
    return jnp.sum(jnp.abs(hidden))

  updates, _ = tx.update(gradient(params), tx.init(params), params)
  after = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(after["layers"]["layer_scale"], scale)
  assert jnp.abs(updates["layers"]["global_q"]).min(axis=(1, 2)).min() > 0


def test_scales_biases_and_decays_of_a_state_are_not_decayed():
  decays = optim.decays(SHAPES)["layers"]
  kept = {name for name in gated_delta.AXES if not decays[name]}
  assert kept == {"delta_norm", "delta_dt_bias", "delta_a_log"}


def test_weight_distances_name_the_layer():
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), SHAPES)
  base = jax.tree.map(lambda leaf: leaf + 1, zeros)
  tuned = {**base, "layers": dict(base["layers"])}
  tuned["layers"]["q"] = base["layers"]["q"].at[1].add(0.5)
  tuned["layers"]["delta_q"] = base["layers"]["delta_q"].at[1].add(0.25)
  distances = drift.weight_distances(base, tuned, CONFIG)
  moved = {name: x for name, x in distances.items() if x}
  assert moved == pytest.approx({"layers.q.3": 0.5, "layers.delta_q.2": 0.25})
