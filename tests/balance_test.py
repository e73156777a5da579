"""Balancers against the paper's Eq. 11-12, written out in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from raft_jax import balance

BALANCERS = {
  "ema": balance.balance_by_ema(max_weight=100.0),
  "fixed": balance.balance_fixed(0.3),
  "schedule": balance.balance_by_schedule(optax.linear_schedule(1.0, 0.0, 10)),
  "gradient_norm": balance.balance_by_gradient_norm(0.5, max_weight=10.0),
}


def _closed_form(sft, kd, *, decay=0.9, eps=1e-8):
  """λ after each step: m̂ˢ = (1-β) Σ_i β^(s-i) L_i / (1 - βˢ), not a recurrence."""
  weights = []
  for step in range(1, len(sft) + 1):
    powers = decay ** np.arange(step - 1, -1, -1.0)
    mean_sft, mean_kd = (
      (1 - decay)
      * np.sum(powers * np.asarray(x, np.float64)[:step])
      / (1 - decay**step)
      for x in (sft, kd)
    )
    weights.append(mean_sft / (mean_kd + eps))
  return np.array(weights)


def _curves(steps):
  rng = np.random.default_rng(0)
  sft = (3 * np.exp(-np.arange(steps) / 30) + rng.random(steps)).astype(np.float32)
  kd = (0.4 * np.exp(-np.arange(steps) / 10) + 0.01 * rng.random(steps)).astype(
    np.float32
  )
  return sft, kd


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_fifty_steps_equal_the_closed_form(decay):
  sft, kd = _curves(50)
  tx = balance.balance_by_ema(decay=decay)
  state, traces = tx.init({}), []

  @jax.jit
  def step(state, sft, kd):
    traces.append(1)
    return tx.update({}, state, losses={"sft": sft, "kd": kd})[1]

  weights = []
  for s, k in zip(sft, kd):
    state = step(state, s, k)
    weights.append(float(balance.loss_weights(state)["kd"]))
  np.testing.assert_allclose(weights, _closed_form(sft, kd, decay=decay), rtol=1e-5)
  assert len(traces) == 1
  assert int(state.counts["sft"]) == int(state.counts["kd"]) == 50
  assert float(balance.loss_weights(state)["sft"]) == 1.0


def test_first_step_balances_the_current_losses():
  state = balance.ema_init()
  assert balance.loss_weights(state) == {"sft": 1.0, "kd": 0.0}
  state = balance.ema_update(state, {"sft": 3.0, "kd": 0.25})
  np.testing.assert_allclose(state.weights["kd"], 3.0 / (0.25 + 1e-8), rtol=1e-6)
  np.testing.assert_allclose(state.ema["sft"], 3.0, rtol=1e-6)


def test_order_of_the_losses_does_not_matter():
  tx = balance.balance_by_ema()
  one = tx.update({}, tx.init({}), losses={"sft": 3.0, "kd": 0.5})[1]
  two = tx.update(updates={}, losses={"kd": 0.5, "sft": 3.0}, state=tx.init({}))[1]
  assert one == two
  assert balance.loss_weights(one)["kd"] > 5


def test_vanishing_distillation_loss():
  losses = {"sft": 2.0, "kd": 0.0}
  free = balance.ema_update(balance.ema_init(), losses, eps=1e-8)
  capped = balance.ema_update(balance.ema_init(), losses, max_weight=100.0)
  np.testing.assert_allclose(free.weights["kd"], 2e8, rtol=1e-6)
  assert capped.weights["kd"] == 100.0
  # The cap bounds λ, not the means behind it.
  assert capped.ema == free.ema


def test_invalid_steps_leave_their_loss_alone():
  # kd is valid at steps 2, 3 and 5 only: its mean is that of the three alone.
  sft, kd = _curves(6)
  valid = [False, True, True, False, True, False]
  state, weights = balance.ema_init(), []
  for s, k, is_valid in zip(sft, kd, valid):
    state = balance.ema_update(
      state,
      {"sft": s, "kd": k if is_valid else np.nan},
      valid={"sft": True, "kd": is_valid},
    )
    weights.append(float(state.weights["kd"]))
  assert weights[0] == 0.0
  assert int(state.counts["kd"]) == 3
  assert int(state.counts["sft"]) == 6

  def corrected(x):
    return np.sum(0.1 * 0.9 ** np.arange(len(x) - 1, -1, -1.0) * x) / (
      1 - 0.9 ** len(x)
    )

  expected = corrected(sft.astype(np.float64)) / (corrected(kd[[1, 2, 4]]) + 1e-8)
  np.testing.assert_allclose(weights[-1], expected, rtol=1e-5)


def test_no_gradient_through_the_weight():
  def total(x):
    losses = {"sft": x**2, "kd": x**3}
    state = balance.ema_update(balance.ema_init(), losses)
    return jnp.asarray(balance.loss_weights(state)["kd"]) + 0 * x

  assert jax.grad(total)(jnp.float32(2.0)) == 0


def _arguments(step):
  """Everything a step may hand to any balancer; two of them are for one only."""
  return {
    "losses": {"sft": 2.0 + step, "kd": jnp.float32(0.5)},
    "valid": {"sft": True, "kd": jnp.bool_(True)},
    "gradient_norms": {"sft": 1.0, "kd": 2.0},
    "step": step,
  }


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", BALANCERS)
def test_state_keeps_tree_shape_and_dtype(name, x64):
  with jax.enable_x64(x64):
    tx = BALANCERS[name]
    state = tx.init({"w": jnp.ones(3)})

    def described(tree):
      return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)

    updates = {"w": jnp.arange(3.0)}
    got, eager = tx.update(updates, state, None, **_arguments(1))
    assert got is updates
    assert described(eager) == described(state)
    jitted = jax.jit(lambda s: tx.update({}, s, **_arguments(1))[1])(state)
    assert described(jitted) == described(state)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, eager
    )

    def body(state, step):
      state = tx.update({}, state, **_arguments(step))[1]
      return state, balance.loss_weights(state)["kd"]

    last, weights = jax.lax.scan(body, state, jnp.arange(4))
    assert described(last) == described(state)
    assert np.all(np.asarray(weights) > 0)


@pytest.mark.parametrize("name", BALANCERS)
def test_in_a_chain_the_state_is_the_one_of_the_empty_update(name, tmp_path):
  params = {"w": jnp.arange(3.0)}
  balancer = BALANCERS[name]
  tx = optax.named_chain(
    ("balance", balancer),
    ("clip", optax.clip_by_global_norm(1.0)),
    ("adamw", optax.adamw(1e-2)),
  )
  plain = optax.named_chain(
    ("clip", optax.clip_by_global_norm(1.0)), ("adamw", optax.adamw(1e-2))
  )
  state, plain_state = tx.init(params), plain.init(params)
  for step in range(3):
    grads = {"w": jnp.array([1.0, -2.0, 0.5]) * (step + 1)}
    _, ahead = balancer.update({}, state["balance"], **_arguments(step))
    updates, state = tx.update(grads, state, params, **_arguments(step))
    expected, plain_state = plain.update(grads, plain_state, params)
    assert state["balance"] == ahead
    np.testing.assert_array_equal(updates["w"], expected["w"])

  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(3, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored = manager.restore(3, args=ocp.args.StandardRestore(abstract))
  assert isinstance(restored["balance"], balance.BalanceState)
  assert restored["balance"] == state["balance"]
  assert balance.loss_weights(restored["balance"])["kd"] > 0


def test_one_pullback_gives_the_gradient_of_the_weighted_sum():
  # The pattern of the module's text: d(x² + λ x³)/dx = 2x + λ 3x², λ = x²/x³ at step 1.
  balancer = balance.balance_by_ema()

  def both_losses(x):
    return {"sft": x**2, "kd": x**3}

  losses, pullback = jax.vjp(both_losses, jnp.float32(2.0))
  _, state = balancer.update({}, balancer.init({}), losses=losses)
  (gradient,) = pullback(balance.loss_weights(state))
  np.testing.assert_allclose(gradient, 4 + 0.5 * 12, rtol=1e-6)


def test_fixed_weight_is_there_from_the_start_and_stays():
  tx = balance.balance_fixed(0.3)
  state = tx.init({})
  np.testing.assert_allclose(balance.loss_weights(state)["kd"], 0.3, rtol=1e-7)
  assert tx.update({}, state)[1] == state


def test_schedule_counts_updates_from_zero():
  tx = balance.balance_by_schedule(lambda step: 10.0 * step + 1.0)
  state, seen = tx.init({}), []
  assert balance.loss_weights(state)["kd"] == 1.0
  for _ in range(3):
    _, state = tx.update({}, state, losses={"sft": 1.0, "kd": 1.0})
    seen.append(float(balance.loss_weights(state)["kd"]))
  assert seen == [1.0, 11.0, 21.0]


def test_gradient_norm_holds_between_measurements():
  tx = balance.balance_by_gradient_norm(0.5, max_weight=10.0)
  losses = {"sft": 1.0, "kd": 1.0}
  state, seen = tx.init({}), []
  both, no_rollout = {"sft": True, "kd": True}, {"sft": True, "kd": False}
  for norms, valid in (
    ({"kd": 1e-8, "sft": 8.0}, both),  # round-off
    (None, both),
    ({"kd": 2.0, "sft": 8.0}, both),
    (None, both),
    ({"kd": 3.0, "sft": 8.0}, no_rollout),
    ({"kd": 1e-3, "sft": 1.0}, None),
  ):
    _, state = tx.update({}, state, losses=losses, gradient_norms=norms, valid=valid)
    seen.append(float(balance.loss_weights(state)["kd"]))
  # 0.5 · 8 / 2 = 2, then 0.5 · 1 / 1e-3 meets the cap.
  np.testing.assert_allclose(seen, [0.0, 0.0, 2.0, 2.0, 2.0, 10.0], rtol=1e-6)
  assert int(state.counts["kd"]) == 2


def test_forgotten_or_misnamed_losses_are_errors():
  tx = balance.balance_by_ema()
  with pytest.raises(TypeError, match="losses"):
    tx.update({}, tx.init({}))
  with pytest.raises(ValueError, match="losses"):
    tx.update({}, tx.init({}), losses={"sft": 1.0})
  with pytest.raises(ValueError, match="losses"):
    tx.update({}, tx.init({}), losses={"sft": 1.0, "kl": 1.0})
  with pytest.raises(ValueError, match="valid"):
    tx.update({}, tx.init({}), losses={"sft": 1.0, "kd": 1.0}, valid={"kd": True})
  norm = balance.balance_by_gradient_norm()
  with pytest.raises(ValueError, match="gradient_norms"):
    norm.update({}, norm.init({}), gradient_norms={"sft": 1.0})


@pytest.mark.parametrize(
  ("make", "named"),
  [
    (lambda: balance.balance_by_ema(decay=1.0), "decay"),
    (lambda: balance.balance_by_ema(decay=-0.1), "decay"),
    (lambda: balance.balance_by_ema(eps=0.0), "eps"),
    (lambda: balance.balance_by_ema(max_weight=0.0), "max_weight"),
    (lambda: balance.balance_fixed(-1.0), "weight"),
    (lambda: balance.balance_by_gradient_norm(0.0), "ratio"),
  ],
)
def test_bad_numbers_are_named(make, named):
  with pytest.raises(ValueError, match=named):
    make()
