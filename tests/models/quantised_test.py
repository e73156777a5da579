"""Quantised kernels against float64, and models with them against restored ones."""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import errors
from raft_jax.distillation import objective, sequences
from raft_jax.models import (
  gated_delta,
  hybrid,
  lora,
  partition,
  quantised,
  quantised_base,
  rotary,
  sampling,
  transformer,
)
from tests.helpers import tiny_decoder, tiny_step

FORMS = ("int8", "nf4")
# Whole blocks of 64 inputs, 1 to 3 of them, and no two widths alike.
CONFIG = dataclasses.replace(
  tiny_decoder.CONFIG, n_layers=2, d_model=128, head_dim=16, d_ff=192
)
SETTINGS = tiny_step.SETTINGS._replace(decoder=CONFIG)


def kernels(shape=(3, 40, 192), seed=0):
  """Rows of very different size, an outlier in each, one row and one block of zeros."""
  rng = np.random.default_rng(seed)
  values = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
  values[..., 7] *= 20
  values[0, 0], values[0, 1, 64:128] = 0, 0
  return values.astype(np.float32)


def distance_to_tie(scaled, borders):
  return np.abs(scaled[..., None] - borders).min(axis=-1)


def test_int8_is_the_nearest_of_127_steps_to_each_side():
  values = kernels()
  ours = jax.jit(quantised.quantise, static_argnums=(1, 2))(values, "int8", ("a", "b"))
  scale = np.abs(values).max(axis=-1).astype(np.float64) / 127
  scaled = values / np.where(scale > 0, scale, 1)[..., None]
  clear = distance_to_tie(scaled, np.arange(-127.5, 128)) > 1e-4
  assert clear.mean() > 0.99
  assert ours.codes.dtype == np.int8
  np.testing.assert_allclose(ours.scale, scale, rtol=1e-6)
  np.testing.assert_array_equal(np.asarray(ours.codes)[clear], np.rint(scaled)[clear])
  restored = np.asarray(quantised.restore(ours), np.float64)
  np.testing.assert_allclose(restored, ours.codes * scale[..., None], rtol=1e-6)
  assert (np.abs(restored - values) <= 0.5001 * scale[..., None]).all()
  assert np.abs(ours.codes).max() == 127


def test_the_levels_are_quantiles_of_the_normal_distribution():
  """2^3 of the negative half and 2^3 + 1 of the other, with one 0 in common.

  The outermost lie in the middle between the centres of the outermost of 16 and of 15
  equal shares; all are divided by the largest. QLoRA, section 3 and appendix E.
  """
  quantile = statistics.NormalDist().inv_cdf
  end = 1 - (1 / 32 + 1 / 30) / 2
  positive = [quantile(share) for share in np.linspace(end, 0.5, 9)[:-1]]
  negative = [-quantile(share) for share in np.linspace(end, 0.5, 8)[:-1]]
  expected = np.array(sorted([*negative, 0.0, *positive])) / quantile(end)
  np.testing.assert_allclose(quantised.LEVELS, expected, atol=3e-7)


def test_nf4_is_the_nearest_level_of_each_block():
  values = kernels()
  ours = jax.jit(quantised.quantise, static_argnums=(1, 2))(values, "nf4", ("a", "b"))
  assert (ours.codes.shape, ours.codes.dtype) == ((3, 40, 3, 32), np.uint8)
  blocks = values.reshape(3, 40, 3, 64).astype(np.float64)
  scale = np.abs(blocks).max(axis=-1)
  np.testing.assert_array_equal(ours.scale, scale)
  scaled = blocks / np.where(scale > 0, scale, 1)[..., None]
  levels = np.array(quantised.LEVELS)
  nearest = levels[np.abs(scaled[..., None] - levels).argmin(axis=-1)]
  clear = distance_to_tie(scaled, (levels[1:] + levels[:-1]) / 2) > 1e-6
  assert clear.mean() > 0.99
  expected = (nearest * scale[..., None]).reshape(values.shape)
  clear = clear.reshape(values.shape)
  restored = np.asarray(jax.jit(quantised.restore)(ours))
  np.testing.assert_allclose(restored[clear], expected[clear], rtol=1e-6)
  assert np.abs(restored).max() == np.abs(values).max()  # the level 1
  again = quantised.quantise(restored, "nf4", ("a", "b"))
  jax.tree.map(np.testing.assert_array_equal, again, ours)


def whole(tree):
  """The same model with its kernels restored."""
  layers = {
    name: quantised.restore(leaf) if quantised.is_quantised(leaf) else leaf
    for name, leaf in tree["layers"].items()
  }
  return {**tree, "layers": layers}


@functools.cache
def models():
  """A model's kernels as codes and restored, by form; adapters; a batch."""
  base = tiny_decoder.random_params(CONFIG)
  trees = {form: quantised_base.quantise(base, CONFIG, form) for form in FORMS}
  restored = {form: whole(tree) for form, tree in trees.items()}
  split = lora.split(CONFIG, lora.KERNELS, rank=3, alpha=6.0, key=jax.random.key(2))
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda leaf: jnp.array(0.1 * rng.normal(size=leaf.shape), "f4"), split.shapes
  )
  return base, trees, restored, split, adapters


@functools.partial(jax.jit, static_argnames="compute")
def losses_and_gradient(adapters, frozen, batch, trajectory, support, compute):
  settings = SETTINGS._replace(compute=compute)
  weights = objective.mean_weights(batch, trajectory, settings)

  def total(adapters):
    terms, _ = objective.loss_terms(
      partition.combine(frozen, adapters),
      batch,
      trajectory,
      support,
      weights,
      settings=settings,
    )
    return terms["sft"] + terms["kd"], terms

  (_, terms), gradient = jax.value_and_grad(total, has_aux=True)(adapters)
  return terms, gradient


@jax.jit
def score(params, batch, trajectory):
  return objective.score_teacher(
    params, batch.teacher_BC, batch.teacher_length_B, trajectory, settings=SETTINGS
  )


@functools.cache
def step_inputs():
  base, *_ = models()
  batch = tiny_step.make_batch()
  rng = np.random.default_rng(1)
  trajectory = sequences.Trajectory(
    jnp.array(rng.integers(6, 97, (4, 5)), jnp.int32), jnp.array([5, 3, 0, 4])
  )
  return batch, trajectory, score(base, batch, trajectory)


@pytest.mark.parametrize(("form", "remat"), [("int8", False), ("nf4", True)])
def test_losses_and_gradients_are_those_of_the_restored_model(form, remat):
  """On the packed row of a step: answer and trajectory behind one prompt."""
  _, trees, restored, split, adapters = models()
  compute = transformer.Compute(remat=remat)
  ours, theirs = (
    losses_and_gradient(adapters, split.freeze(tree), *step_inputs(), compute)
    for tree in (trees[form], restored[form])
  )
  for name, loss in theirs[0].items():
    assert loss > 0.05
    np.testing.assert_allclose(ours[0][name], loss, rtol=1e-5)
  tiny_step.assert_trees_close(ours[1], theirs[1], 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rollouts_and_teacher_are_those_of_the_restored_model(form):
  _, trees, restored, split, adapters = models()
  batch, trajectory, before = step_inputs()
  rolled, scored = [], []
  for tree in (trees[form], restored[form]):
    params = partition.combine(split.freeze(tree), adapters)
    rolled.append(
      sampling.generate(
        params,
        CONFIG,
        batch.prompt_BP,
        batch.prompt_length_B,
        batch.row_id_B,
        seed=0,
        step=0,
        max_new_tokens=5,
        eos_ids=(5,),
        pad_id=5,
        unroll=0,
        top_tokens=3,
      )
    )
    scored.append(score(tree, batch, trajectory))
  ours, theirs = rolled
  np.testing.assert_array_equal(ours.tokens_BR, theirs.tokens_BR)
  np.testing.assert_allclose(
    ours.stats.log_prob_BR, theirs.stats.log_prob_BR, rtol=1e-5
  )
  np.testing.assert_allclose(scored[0].logsumexp_BR, scored[1].logsumexp_BR, rtol=1e-5)
  assert np.abs(scored[0].logsumexp_BR - before.logsumexp_BR).max() > 1e-3


def test_what_is_not_a_kernel_of_a_layer_stays_as_it_is():
  base, trees, *_ = models()
  for form, tree in trees.items():
    coded = {
      name for name, leaf in tree["layers"].items() if quantised.is_quantised(leaf)
    }
    assert coded == set(lora.KERNELS)
    rest = {name: leaf for name, leaf in tree["layers"].items() if name not in coded}
    assert rest.keys() == {"attn_norm", "mlp_norm"}
    for name, leaf in rest.items():
      np.testing.assert_array_equal(leaf, base["layers"][name], f"{form}: {name}")
    assert tree["embed"] is base["embed"]


LINEAR = dataclasses.replace(
  tiny_decoder.CONFIG,
  n_layers=2,
  attention_gate=True,
  delta=gated_delta.DeltaConfig(
    layers=(0,), key_heads=1, value_heads=2, key_width=8, value_width=8, conv_width=3
  ),
)
SHARING = dataclasses.replace(
  tiny_decoder.CONFIG,
  n_layers=4,
  global_attention=hybrid.GlobalAttention((1, 3), 2, 16, rotary.Rope(1e6)),
  kv_sharing=hybrid.KvSharing(first=2, d_ff=96),
  per_layer_inputs=8,
)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LINEAR, SHARING], ids=["linear", "sharing"])
def test_the_layers_of_all_kinds_are_quantised_and_the_rest_is_not(config):
  """The rest: the convolutions of linear layers, and the embeddings of each layer."""
  params = transformer.init(jax.random.key(0), config)
  tree = quantised_base.quantise(params, config, "int8")
  coded = {n for n, leaf in tree["layers"].items() if quantised.is_quantised(leaf)}
  own = {name for name in lora.ALL_KERNELS if name in tree["layers"]}
  assert coded == own
  assert coded >= {
    *lora.KERNELS,
    *(lora.DELTA_KERNELS if config is LINEAR else lora.KV_SHARED_KERNELS),
  }
  assert not any(quantised.is_quantised(tree[name]) for name in {*tree} - {"layers"})
  logits = jax.jit(tiny_decoder.logits, static_argnums=1)
  tokens_BT, valid_BT = step_inputs()[0].prompt_BP, np.ones((4, 7), bool)
  ours, theirs = (
    logits(model, config, tokens_BT, valid_BT) for model in (tree, whole(tree))
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_kernels_that_cannot_be_quantised_are_refused():
  uneven = dataclasses.replace(CONFIG, d_ff=200)
  quantised_base.check(uneven, "int8", "org/model")
  with pytest.raises(errors.UserError) as caught:
    quantised_base.check(uneven, "nf4", "org/model")
  assert str(caught.value) == (
    "lora.base: nf4 needs a multiple of 64 inputs, and the kernels down of org/model "
    "have others; use int8"
  )
  experts = dataclasses.replace(CONFIG, n_experts=4, experts_per_token=2)
  quantised_base.check(experts, None, "org/model")
  with pytest.raises(errors.UserError) as caught:
    quantised_base.check(experts, "int8", "org/model")
  assert str(caught.value) == (
    "lora.base: org/model is a mixture of experts, whose kernels are not quantised; "
    "delete this line"
  )
