"""Schedule and chain against numpy; the config's sections in the chain."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax import balance, errors
from raft_jax.baselines import anchors, freezing
from raft_jax.config import load as config_load
from raft_jax.models import transformer
from raft_jax.training import optim
from tests.helpers import tiny_decoder


def closed_form(peak, total, warmup_ratio, step):
  """Warm-up i + 1 of W, then half a cosine from the peak at W to 0 at the end."""
  warmup = min(max(1, math.ceil(warmup_ratio * total)), total)
  if step < warmup:
    return peak * (step + 1) / warmup
  share = (step - warmup) / max(total - warmup, 1)
  return peak * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
  ("total", "ratio"),
  [(1, 0.03), (2, 0.03), (3, 0.5), (10, 0.0), (100, 0.03), (250, 0.1), (7, 1.0)],
)
def test_warmup_cosine_is_its_formula(total, ratio):
  schedule = optim.warmup_cosine(2e-3, total, ratio)
  rates = np.array([schedule(step) for step in range(total)])
  expected = [closed_form(2e-3, total, ratio, step) for step in range(total)]
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=2e-3 * 1e-7)
  assert rates.max() == pytest.approx(2e-3)
  assert rates.min() > 0, "a step at rate 0 is a rollout for nothing"


def test_warmup_cosine_reaches_its_peak_and_ends_at_zero():
  # 3 % of 200 steps: 6 steps of warm-up, the sixth and seventh at the peak.
  schedule = optim.warmup_cosine(6.0, 200)
  rates = [float(schedule(step)) for step in range(7)]
  np.testing.assert_allclose(rates, [1, 2, 3, 4, 5, 6, 6], rtol=1e-6)
  assert float(schedule(103)) == pytest.approx(3.0)  # half of the cosine's 194
  assert float(schedule(200)) == pytest.approx(0, abs=1e-9)


def test_the_rate_can_be_read_under_jit_for_all_steps_at_once():
  schedule = optim.warmup_cosine(1.0, 50)
  at_once = jax.jit(jax.vmap(schedule))(jnp.arange(50))
  one_by_one = [schedule(step) for step in range(50)]
  np.testing.assert_allclose(at_once, one_by_one, rtol=1e-6, atol=1e-7)


def tree_of(rng, scale=1.0):
  return {
    "embed": scale * rng.normal(size=(5, 4)),
    "final_norm": scale * rng.normal(size=4),
    "layers": {
      "attn_norm": scale * rng.normal(size=(2, 4)),
      "q": scale * rng.normal(size=(2, 4, 4)),
    },
  }


def float64_adamw(params, gradients, rates, *, weight_decay, clip):
  """Loshchilov and Hutter's Algorithm 2, after clipping by the global norm."""
  leaves, structure = jax.tree.flatten(params)
  decays = [1.0, 0.0, 0.0, 1.0]  # embed, final_norm, attn_norm, q
  first, second = [[np.zeros_like(leaf) for leaf in leaves] for _ in range(2)]
  for step, (gradient, rate) in enumerate(zip(gradients, rates), 1):
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    scale = 1.0 if clip is None else min(1.0, clip / norm)
    for i, g in enumerate(jax.tree.leaves(gradient)):
      first[i] = 0.9 * first[i] + 0.1 * scale * g
      second[i] = 0.999 * second[i] + 0.001 * (scale * g) ** 2
      mean, square = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
      move = mean / (np.sqrt(square) + 1e-8) + weight_decay * decays[i] * leaves[i]
      leaves[i] = leaves[i] - rate * move
  return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_chain_is_clipping_then_adamw(clip):
  """Gradients of norms 0.2 to 60, so that some are clipped and some are not."""
  rng = np.random.default_rng(0)
  params = tree_of(rng)
  gradients = [tree_of(rng, scale) for scale in (5.0, 0.02, 0.5, 2.0, 0.05)]
  rates = [0.03, 0.05, 0.04, 0.02, 0.01]
  expected = float64_adamw(params, gradients, rates, weight_decay=0.3, clip=clip)

  optimizer = optim.chain(
    balance.balance_by_ema(),
    lambda count: jnp.array(rates)[count],
    weight_decay=0.3,
    clip=clip,
  )
  moved = jax.tree.map(jnp.float32, params)
  state = optimizer.init(moved)
  losses = {"sft": 2.0, "kd": 0.5}
  for gradient in gradients:
    updates, state = optimizer.update(
      jax.tree.map(jnp.float32, gradient), state, moved, losses=losses
    )
    moved = optax.apply_updates(moved, updates)
  jax.tree.map(
    lambda ours, theirs, start: np.testing.assert_allclose(
      ours - start, theirs - start, rtol=1e-4, atol=1e-6
    ),
    moved,
    expected,
    params,
  )


@pytest.mark.parametrize(
  ("path", "decays"),
  [
    (("LayerNorm_0", "scale"), False),
    (("ln_f", "weight"), False),
    (("model", "norm", "weight"), False),
    (("layers", 3, "input_layernorm", "weight"), False),
    (("Dense_0", "bias"), False),
    (("Dense_0", "kernel"), True),
    (("lm_head", "weight"), True),
    (("layers", 3, "self_attn", "q_proj", "weight"), True),
  ],
)
def test_which_names_of_other_libraries_decay(path, decays):
  tree = 0.0
  for name in reversed(path):
    tree = [tree] * (name + 1) if isinstance(name, int) else {name: tree}
  assert set(jax.tree.leaves(optim.decays(tree))) == {decays}


def test_another_mask_may_be_given():
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  tx = optim.chain(
    balance.balance_fixed(1.0),
    optax.constant_schedule(0.1),
    weight_decay=1.0,
    clip=None,
    decay_mask=lambda tree: {"a": True, "b": False},
  )
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert float(updates["a"][0]) == pytest.approx(-0.1)
  assert float(updates["b"][0]) == 0.0


def test_norm_scales_and_numbers_of_activations_do_not_decay():
  config = dataclasses.replace(tiny_decoder.CONFIG, activation="xielu")
  kept = {
    jax.tree_util.keystr(path)
    for path, decays in jax.tree_util.tree_leaves_with_path(
      optim.decays(transformer.shapes(config))
    )
    if not decays
  }
  assert kept == {
    "['final_norm']",
    "['layers']['attn_norm']",
    "['layers']['mlp_norm']",
    "['layers']['xielu_n']",
    "['layers']['xielu_p']",
  }


def test_the_balancers_state_is_the_optimizers_under_balance():
  params = {"q": jnp.ones(3)}
  optimizer = optim.chain(
    balance.balance_by_ema(), optax.constant_schedule(0.1), weight_decay=0.0, clip=1.0
  )
  state = optimizer.init(params)
  assert isinstance(state["balance"], balance.BalanceState)
  assert float(state["balance"].weights["kd"]) == 0
  _, state = optimizer.update(
    {"q": jnp.ones(3)}, state, params, losses={"sft": 3.0, "kd": 0.5}
  )
  assert float(state["balance"].weights["kd"]) == pytest.approx(6.0)
  with pytest.raises(TypeError, match="losses"):
    optimizer.update({"q": jnp.ones(3)}, state, params)


@pytest.mark.parametrize("counters", [(), ("step",)])
def test_a_skipped_step_leaves_the_moments_as_if_it_had_not_been(counters):
  """Against the same steps without it; only the counters of the run go on."""
  params = {"q": jnp.arange(3.0)}
  inner = optax.scale_by_adam()
  if counters:
    inner = anchors.recadam(lambda n: 0.1, lambda n: 1.0, 0.0)
  options = {"anchor": params} if counters else {}
  skipping = optim.skip_empty(inner, counters=counters)
  state, expected = skipping.init(params), inner.init(params)
  for number, valid in enumerate((True, False, True)):
    gradient = {"q": jnp.array([1.0, -2.0, 0.5]) * (number + 1)}
    flags = {"sft": jnp.bool(False), "kd": jnp.bool(valid)}
    _, state = skipping.update(gradient, state, params, valid=flags, **options)
    if valid:
      _, expected = inner.update(gradient, expected, params, **options)
  if counters:
    assert (int(state.step), int(expected.step)) == (3, 2)
    expected = expected._replace(step=state.step)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


# --- From the config's sections -------------------------------------------------------

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
