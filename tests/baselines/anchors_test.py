"""Pulls to the base model against their formulas in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax.baselines import anchors

RATES = (0.03, 0.05, 0.04, 0.02)


def schedule(count):
  return jnp.array(RATES)[count]


def tree_of(rng, scale=1.0):
  return {"a": rng.normal(size=(3, 4)) * scale, "b": rng.normal(size=5) * scale}


@pytest.fixture(name="setting")
def _setting():
  """Start, anchor, importance and a gradient for each rate; float64."""
  rng = np.random.default_rng(0)
  gradients = [tree_of(rng, scale) for scale in (1.0, 0.1, 3.0, 0.5)]
  importance = jax.tree.map(np.exp, tree_of(rng, 2.0))
  return tree_of(rng), tree_of(rng), importance, gradients


def single(tree):
  return jax.tree.map(jnp.float32, tree)


def follow(transformation, start, anchor, gradients, importance=None):
  """Parameters after all gradients, as a jitted step makes them."""
  params, state = single(start), transformation.init(single(start))
  if importance is not None:
    state = anchors.with_importance(state, single(importance))
  step = jax.jit(transformation.update)
  for gradient in gradients:
    updates, state = step(single(gradient), state, params, anchor=single(anchor))
    params = optax.apply_updates(params, updates)
  return params


def assert_close(ours, theirs, start):
  """What moved, not where it stands: 4 digits of the move."""
  jax.tree.map(
    lambda x, y, s: np.testing.assert_allclose(x - s, y - s, rtol=1e-4, atol=2e-6),
    ours,
    theirs,
    start,
  )


def test_pull_is_the_gradient_of_the_penalty(setting):
  """By finite differences of λ/2 Σ F (θ - θ₀)² itself."""
  start, anchor, importance, gradients = setting
  transformation = anchors.add_pull(0.7, weighted=True)
  state = anchors.with_importance(
    transformation.init(single(start)), single(importance)
  )
  got, _ = transformation.update(
    single(gradients[0]), state, single(start), anchor=single(anchor)
  )

  def penalty(name, index, shift):
    moved = {key: value.copy() for key, value in start.items()}
    moved[name][index] += shift
    return 0.35 * sum((importance[k] * (moved[k] - anchor[k]) ** 2).sum() for k in "ab")

  for name, index in (("a", (0, 0)), ("a", (2, 3)), ("b", (4,))):
    slope = (penalty(name, index, 1e-4) - penalty(name, index, -1e-4)) / 2e-4
    np.testing.assert_allclose(
      got[name][index] - gradients[0][name][index], slope, rtol=1e-4
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_shrink_is_the_proximal_step(setting, weighted):
  """θ minimises |θ - θ'|²/2 + η λ F (θ - θ₀)²/2, that is (θ' + c θ₀) / (1 + c)."""
  start, anchor, importance, gradients = setting
  transformation = anchors.shrink_to_anchor(schedule, 30.0, weighted=weighted)
  expected = start
  for rate, gradient in zip(RATES, gradients):

    def move(p, g, a, f, rate=rate):
      pull = rate * 30.0 * (f if weighted else 1.0)
      return (p + g + pull * a) / (1 + pull)

    expected = jax.tree.map(move, expected, gradient, anchor, importance)
  ours = follow(
    transformation, start, anchor, gradients, importance if weighted else None
  )
  assert_close(ours, expected, start)


def test_shrink_is_l2_sp_up_to_second_order(setting):
  """u - η α (θ - θ₀), as decoupled decay is written for a decay to 0."""
  start, anchor, _, gradients = setting
  alpha = 1e-3 / RATES[0]
  updates, _ = anchors.shrink_to_anchor(schedule, alpha).update(
    jax.tree.map(lambda g: 1e-3 * g, single(gradients[0])),
    anchors.PullState(jnp.int32(0), ()),
    single(start),
    anchor=single(anchor),
  )
  for name in "ab":
    first_order = 1e-3 * gradients[0][name] - 1e-3 * (start[name] - anchor[name])
    np.testing.assert_allclose(updates[name], first_order, rtol=0, atol=1e-5)


def test_a_weight_without_gradient_keeps_the_stated_share_of_its_distance():
  """Strength 1 / Σ η: about exp(-1) of the distance is left after the run."""
  rates = np.full(400, 5e-6)
  transformation = anchors.shrink_to_anchor(lambda _: 5e-6, 1 / rates.sum())
  params, state = jnp.float32(3.0), transformation.init(jnp.float32(3.0))
  step = jax.jit(transformation.update)
  for _ in rates:
    updates, state = step(jnp.float32(0.0), state, params, anchor=jnp.float32(2.0))
    params = params + updates
  assert float(params) - 2.0 == pytest.approx(np.exp(-1), rel=2e-3)


def float64_recadam(start, anchor, gradients, annealing, gamma, eps, decay):
  """The published optimizer, one parameter at a time."""
  result = {}
  for name, theta in start.items():
    theta, m, v = theta.copy(), 0.0, 0.0
    for t, (rate, gradient) in enumerate(zip(RATES, gradients), 1):
      weight = annealing(t)
      m = 0.9 * m + 0.1 * gradient[name]
      v = 0.999 * v + 0.001 * gradient[name] ** 2
      corrected = rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
      theta = theta - corrected * weight * m / (np.sqrt(v) + eps)
      theta = theta - rate * (1 - weight) * gamma * (theta - anchor[name])
      theta = theta - rate * decay * theta
    result[name] = theta
  return result


@pytest.mark.parametrize(("gamma", "decay"), [(0.0, 0.0), (7.0, 0.0), (7.0, 0.4)])
def test_recadam_is_its_published_form(setting, gamma, decay):
  start, anchor, _, gradients = setting
  transformation = anchors.recadam(
    schedule, anchors.sigmoid_annealing(0.8, 2.5), gamma, weight_decay=decay, eps=1e-3
  )
  expected = float64_recadam(
    start,
    anchor,
    gradients,
    lambda t: 1 / (1 + np.exp(-0.8 * (t - 2.5))),
    gamma,
    1e-3,
    decay,
  )
  assert_close(follow(transformation, start, anchor, gradients), expected, start)


def test_recadam_without_annealing_is_adamw(setting):
  """λ = 1; with ε too small to matter, its place does not either."""
  start, anchor, _, gradients = setting
  keeps = lambda tree: {"a": True, "b": False}  # noqa: E731
  ours = follow(
    anchors.recadam(
      schedule, lambda _: 1.0, 5000.0, weight_decay=0.1, mask=keeps, eps=1e-12
    ),
    start,
    anchor,
    gradients,
  )
  adamw = optax.with_extra_args_support(
    optax.adamw(schedule, eps=1e-12, weight_decay=0.1, mask=keeps)
  )
  # The published code decays what Adam made, optax what was before: η² apart.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5 * 0.1 * 0.05**2),
    ours,
    follow(adamw, start, anchor, gradients),
  )


def test_largest_pull_is_over_the_run():
  annealing = anchors.sigmoid_annealing(1.0, 2.0)
  weights = 1 / (1 + np.exp(-(np.arange(1, 5) - 2.0)))
  expected = max(np.array(RATES) * (1 - weights)) * 40
  assert anchors.largest_pull(RATES, annealing, 40, 4) == pytest.approx(expected)
  assert anchors.largest_pull([np.inf] * 4, annealing, 40, 4) == np.inf


@pytest.mark.parametrize(
  "transformation",
  [
    anchors.add_pull(0.0),
    anchors.add_pull(0.0, weighted=True),
    anchors.shrink_to_anchor(schedule, 0.0),
    anchors.shrink_to_anchor(schedule, 0.0, weighted=True),
    anchors.average_params(0.3),
  ],
)
def test_strength_0_passes_updates_bit_for_bit(setting, transformation):
  start, anchor, _, gradients = setting
  state = transformation.init(single(start))
  updates, _ = jax.jit(transformation.update)(
    single(gradients[0]), state, single(start), anchor=single(anchor)
  )
  jax.tree.map(np.testing.assert_array_equal, updates, single(gradients[0]))


@pytest.mark.parametrize("rate", [0.0, 0.01, 1.0])
def test_average_is_its_formula(setting, rate):
  start, _, _, gradients = setting
  transformation = anchors.average_params(rate)
  params, state = single(start), transformation.init(single(start))
  mean, theta = start, start
  for gradient in gradients:
    updates, state = jax.jit(transformation.update)(single(gradient), state, params)
    params = optax.apply_updates(params, updates)
    theta = jax.tree.map(np.add, theta, gradient)
    mean = jax.tree.map(lambda f, p: (1 - rate) * f + rate * p, mean, theta)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    state.average,
    mean,
  )
  if rate == 0:
    jax.tree.map(np.testing.assert_array_equal, state.average, single(start))


def test_states_keep_their_shape_and_no_anchor(setting):
  """A step compiles once, and θ₀ is no part of a checkpoint."""
  start, anchor, _, gradients = setting
  for transformation in (
    anchors.add_pull(0.1),
    anchors.shrink_to_anchor(schedule, 0.1, weighted=True),
    anchors.recadam(schedule, lambda _: 0.5, 1.0),
    anchors.average_params(0.1),
  ):
    state = transformation.init(single(start))
    _, after = transformation.update(
      single(gradients[0]), state, single(start), anchor=single(anchor)
    )
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert describe(after) == describe(state)
  pull = anchors.add_pull(0.1)
  state = pull.init(single(start))
  with pytest.raises(TypeError, match="anchor"):
    pull.update(single(gradients[0]), state, single(start))


@pytest.mark.parametrize(
  "make",
  [
    lambda: anchors.add_pull(0.5),
    lambda: anchors.add_pull(0.5, weighted=True),
    lambda: anchors.shrink_to_anchor(schedule, 0.5),
    lambda: anchors.recadam(schedule, lambda count: 0.3, 2.0, weight_decay=0.1),
  ],
)
def test_a_part_of_the_parameters_may_be_pulled(setting, make):
  """In `optax.masked`: its updates lack what it leaves out, and the anchor does not."""
  start, anchor, _, gradients = setting
  params, anchor, gradient = single(start), single(anchor), single(gradients[0])
  masked, whole = optax.masked(make(), {"a": True, "b": False}), make()
  ours, _ = masked.update(gradient, masked.init(params), params, anchor=anchor)
  theirs, _ = whole.update(gradient, whole.init(params), params, anchor=anchor)
  np.testing.assert_array_equal(ours["a"], theirs["a"])
  np.testing.assert_array_equal(ours["b"], gradient["b"])


def test_one_array_may_be_all_there_is():
  pull = anchors.add_pull(0.5, weighted=True)
  params = jnp.ones(3)
  updates, _ = pull.update(jnp.zeros(3), pull.init(params), params, anchor=0 * params)
  np.testing.assert_allclose(updates, 0.5)


@pytest.mark.parametrize(
  "make",
  [
    lambda: anchors.add_pull(-1.0),
    lambda: anchors.shrink_to_anchor(schedule, -1.0),
    lambda: anchors.recadam(schedule, schedule, -1.0),
    lambda: anchors.average_params(1.5),
  ],
)
def test_numbers_out_of_range_are_refused(make):
  with pytest.raises(ValueError, match="must be"):
    make()
