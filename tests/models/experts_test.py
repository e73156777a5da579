"""Mixtures of experts against a dense float64 mixture in torch, and transformers."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.models.qwen3_moe import modeling_qwen3_moe

from raft_jax import balance
from raft_jax.baselines import fapm, freezing
from raft_jax.distillation import objective, sequences, step
from raft_jax.models import experts, grouped_product, param_sharding, transformer
from raft_jax.planning import hlo_cost
from raft_jax.training import optim
from tests.helpers import simulated_devices, tiny_step

ROWS, LENGTH, WIDTH, INNER, COUNT, PER_TOKEN = 3, 11, 12, 10, 5, 2


def gating(gate, up):
  return jax.nn.silu(gate) * up


def made(case: str) -> dict[str, np.ndarray]:
  """Parameters of a layer; the case says where the router sends tokens."""
  rng = np.random.default_rng(0)
  shapes = {
    "router": (COUNT, WIDTH),
    "gate": (COUNT, INNER, WIDTH),
    "up": (COUNT, INNER, WIDTH),
    "down": (COUNT, WIDTH, INNER),
    "router_bias": (COUNT,),
    "gate_bias": (COUNT, INNER),
    "up_bias": (COUNT, INNER),
    "down_bias": (COUNT, WIDTH),
  }
  weights = {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}
  if case == "one expert is idle":
    weights["router_bias"][2] = -100
  if case == "all tokens to the same two":
    weights["router_bias"][[1, 4]] = 20, 19
  if case == "without biases":
    weights = {name: x for name, x in weights.items() if "bias" not in name}
  return {name: np.float32(x) for name, x in weights.items()}


CASES = (
  "with biases",
  "without biases",
  "one expert is idle",
  "all tokens to the same two",
  "many rows",
)


def dense(x, weights, *, normalized: bool):
  """Every expert computes every token; torch float64."""
  logits = x @ weights["router"].T + weights.get("router_bias", 0)
  probability = logits.softmax(-1)
  _, chosen = torch.topk(probability, PER_TOKEN)
  share = probability * torch.zeros_like(probability).scatter(-1, chosen, 1.0)
  if normalized:
    share = share / share.sum(-1, keepdim=True)
  out = 0
  for e in range(COUNT):
    gate, up = (
      x @ weights[name][e].T
      + (weights[f"{name}_bias"][e] if "up_bias" in weights else 0)
      for name in ("gate", "up")
    )
    down = (torch.nn.functional.silu(gate) * up) @ weights["down"][e].T
    if "down_bias" in weights:
      down = down + weights["down_bias"][e]
    out = out + share[..., e, None] * down
  return out


FAST = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=3, compiler_options=FAST)
@functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
def gradients(x, weights, slope, normalized):
  out, load = experts.mixture(
    x, weights, per_token=PER_TOKEN, normalized=normalized, gating=gating
  )
  assert load is None
  return jnp.sum(out * slope), out


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_a_dense_mixture(case, normalized):
  rng = np.random.default_rng(1)
  # Many rows are multiplied in blocks, and few by ragged_dot.
  length = 1600 if case == "many rows" else LENGTH
  x, slope = (np.float32(rng.normal(size=(ROWS, length, WIDTH))) for _ in range(2))
  weights = made(case)
  size = ROWS * length * PER_TOKEN * WIDTH * INNER
  few = size <= grouped_product.LARGEST_RAGGED["cpu"]
  assert few == (case != "many rows")

  gradient, out = gradients(x, weights, slope, normalized)
  x64, *leaves = (
    torch.tensor(leaf, dtype=torch.float64, requires_grad=True)
    for leaf in (x, *weights.values())
  )
  theirs = dense(x64, dict(zip(weights, leaves)), normalized=normalized)
  (theirs * torch.tensor(slope)).sum().backward()
  np.testing.assert_allclose(out, theirs.detach(), rtol=1e-5, atol=1e-5)
  for name, leaf, ours_leaf in (
    ("x", x64, gradient[0]),
    *((name, leaf, gradient[1][name]) for name, leaf in zip(weights, leaves)),
  ):
    scale = max(float(leaf.grad.abs().max()), 1e-6)
    assert np.abs(ours_leaf - leaf.grad.numpy()).max() <= 5e-5 * scale + 1e-6, name
  if case == "one expert is idle":
    assert not np.any(gradient[1]["down"][2])
    assert np.any(gradient[1]["down"][0])


def test_of_equal_experts_the_first_are_chosen():
  x = np.ones((4, WIDTH), np.float32)
  choice = experts.choose(
    x, np.ones((COUNT, WIDTH), np.float32), None, per_token=3, normalized=True
  )
  np.testing.assert_array_equal(choice.expert_NK, [[0, 1, 2]] * 4)
  np.testing.assert_allclose(choice.weight_NK, 1 / 3, rtol=1e-6)


def test_a_router_chooses_in_float32_whatever_the_activations_are():
  """Two logits that bfloat16 cannot tell apart: 256 and 257."""
  x = jnp.ones((1, 257), jnp.bfloat16)
  router = np.zeros((2, 257), np.float32)
  router[0, :256], router[1] = 1, 1
  choice = experts.choose(x, router, None, per_token=1, normalized=False)
  assert choice.expert_NK[0, 0] == 1


def test_a_row_does_not_depend_on_the_others_or_on_padding():
  rng = np.random.default_rng(1)
  x = np.float32(rng.normal(size=(ROWS, LENGTH, WIDTH)))
  other = x.copy()
  other[1:] = 100 * rng.normal(size=(ROWS - 1, LENGTH, WIDTH))
  other[0, 7:] = np.nan
  f = jax.jit(
    functools.partial(
      experts.mixture, per_token=PER_TOKEN, normalized=True, gating=gating
    )
  )
  ours, changed = (f(rows, made("with biases"))[0] for rows in (x, other))
  np.testing.assert_allclose(changed[0, :7], ours[0, :7], rtol=1e-6, atol=1e-6)


def test_load_and_balance_loss_equal_transformers():
  """Two layers, of which a mask counts some tokens; and the gradient of the router."""
  rng = np.random.default_rng(2)
  x = np.float32(rng.normal(size=(2, ROWS, LENGTH, WIDTH)))
  counted = rng.random((ROWS, LENGTH)) < 0.6
  router = np.float32(rng.normal(size=(2, COUNT, WIDTH)))

  def ours(router):
    loads = [
      experts.measure(
        experts.choose(
          x[layer].reshape(-1, WIDTH),
          router[layer],
          None,
          per_token=PER_TOKEN,
          normalized=True,
        ),
        counted.reshape(-1),
      )
      for layer in range(2)
    ]
    load = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loads)
    return experts.balance_loss(load), load

  (value, load), gradient = jax.value_and_grad(ours, has_aux=True)(router)
  theirs = torch.tensor(router, requires_grad=True)
  logits = tuple(
    torch.tensor(x[layer]).reshape(-1, WIDTH) @ theirs[layer].T for layer in range(2)
  )
  loss = modeling_qwen3_moe.load_balancing_loss_func(
    logits, COUNT, PER_TOKEN, torch.tensor(counted)
  )
  loss.backward()
  np.testing.assert_allclose(value, loss.detach(), rtol=1e-5)
  np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-6)
  logged = experts.metrics(load)
  share = load.chosen_E / counted.sum()
  assert logged["router_max_share"] == pytest.approx(float(share.max()), rel=1e-6)
  assert PER_TOKEN / COUNT < logged["router_max_share"] <= 1
  assert logged["router_idle"] == 0


DECODER = transformer.DecoderConfig(
  **{"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2},
  **{"head_dim": 8, "d_ff": 24, "rms_eps": 1e-5, "rope_theta": 1e4},
  **{"max_positions": 128, "tie_embeddings": True, "n_experts": 6},
  **{"experts_per_token": 2, "experts_normalized": True},
)


def test_flops_are_those_of_the_chosen_experts():
  """2 a weight and token forward, twice that backward; never all six experts."""
  c, rows, length = DECODER, 2, 10
  tokens, heads, kv = rows * length, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
  chosen = c.experts_per_token * 3 * c.d_ff
  weights = c.d_model * (2 * heads + 2 * kv + chosen + c.n_experts)
  layer = 2 * weights * tokens + 4 * rows * c.n_heads * c.head_dim * length**2

  def loss(params, tokens_BT):
    valid_BT = jnp.ones(tokens_BT.shape, bool)
    hidden_BTD, _ = transformer.forward(
      params,
      c,
      tokens_BT,
      transformer.positions(valid_BT),
      transformer.causal_mask(valid_BT),
    )
    return jnp.sum(hidden_BTD)

  tokens_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  jaxpr = jax.jit(jax.grad(loss)).trace(transformer.shapes(c), tokens_BT).jaxpr
  assert hlo_cost.flops(jaxpr.jaxpr) == c.n_layers * 3 * layer


def test_a_mixture_is_the_same_on_any_mesh(tmp_path):
  """Values, load and gradients, with experts over `tensor`, on 8 simulated devices."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.helpers.mesh_experts"],
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
    cwd=pathlib.Path(__file__).parents[2],
    env={
      **os.environ,
      "XLA_FLAGS": simulated_devices.flags(8),
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
  )
  assert done.returncode == 0, done.stderr
  differences = json.loads(done.stdout)
  assert len(differences) == 3
  for mesh, by_name in differences.items():
    assert set(by_name) >= {"out", "load", "gradient of gate", "gradient of x"}
    for name, difference in by_name.items():
      assert difference <= 2e-6, (mesh, name)


# --- In a decoder ---------------------------------------------------------------------


@functools.cache
def packed():
  """Parameters, a batch, answers of the student, and what a step reads of them."""
  params = transformer.init(jax.random.key(0), DECODER)
  batch = tiny_step.make_batch(rows=3)
  rng = np.random.default_rng(3)
  tokens = rng.integers(6, 97, (3, 5)).astype(np.int32)
  trajectory = sequences.Trajectory(tokens, np.array([5, 0, 3], np.int32))
  settings = tiny_step.SETTINGS._replace(decoder=DECODER)
  weights = objective.mean_weights(batch, trajectory, settings)
  return params, batch, trajectory, weights, settings


@functools.partial(jax.jit, compiler_options=FAST)
def alone(params, ids_BT, valid_BT):
  hidden_BTD, _ = transformer.forward(
    params,
    DECODER,
    ids_BT,
    transformer.positions(valid_BT),
    transformer.causal_mask(valid_BT),
  )
  return hidden_BTD


def test_packed_rows_equal_separate_passes_and_padding_is_not_counted():
  params, batch, trajectory, _, settings = packed()
  ours = jax.jit(sequences.student_pass, static_argnums=(1, 4))(
    params, DECODER, batch, trajectory, settings.compute
  )
  tokens = 0
  for i in range(3):
    prompt = batch.prompt_BP[i][: batch.prompt_length_B[i]].tolist()
    tokens += len(prompt)
    for length, row, hidden in (
      (batch.answer_length_B[i], batch.answer_BA[i], ours.answer_BAD[i]),
      (trajectory.length_B[i], trajectory.tokens_BR[i], ours.rollout_BRD[i]),
    ):
      tokens += length
      whole = prompt + row[:length].tolist()
      ids, valid = np.zeros((2, 1, 32), np.int32)  # of one shape, compiled once
      ids[0, : len(whole)], valid[0, : len(whole)] = whole, 1
      want = alone(params, ids, valid > 0)[0, len(prompt) - 1 : len(whole) - 1]
      np.testing.assert_allclose(hidden[:length], want, rtol=2e-5, atol=2e-5)
  assert ours.load.tokens.tolist() == [tokens] * DECODER.n_layers
  chosen = ours.load.chosen_E.sum(axis=1)
  assert chosen.tolist() == [tokens * DECODER.experts_per_token] * DECODER.n_layers


def test_the_router_loss_is_in_the_gradient_alone():
  params, batch, trajectory, weights, settings = packed()

  def loss(params, router_loss):
    with_loss = settings._replace(router_loss=router_loss)
    terms, aux = objective.loss_terms(
      params, batch, trajectory, None, weights, settings=with_loss
    )
    return terms["sft"], aux[objective.EXPERT_LOAD]

  def router(params):
    hidden = sequences.student_pass(
      params, DECODER, batch, trajectory, settings.compute
    )
    return experts.balance_loss(hidden.load)

  take = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (value, load), gradient = take(params, 0.5)
  (plain_value, _), plain = take(params, 0.0)
  assert value == plain_value
  assert experts.balance_loss(load) > 1
  extra = jax.jit(jax.grad(router))(params)
  assert np.abs(extra["layers"]["router"]).max() > 1e-4
  jax.tree.map(
    lambda ours, a, b: np.testing.assert_allclose(ours, a + 0.5 * b, atol=2e-5),
    gradient,
    plain,
    extra,
  )


def test_a_step_logs_the_load():
  """Two micro-batches add up to the load of the whole batch."""
  params, batch, trajectory, _, settings = packed()
  batch, trajectory = jax.tree.map(lambda x: x[:2], (batch, trajectory))
  balancer = balance.balance_by_ema()
  optimizer = optim.chain(
    balancer, optax.constant_schedule(1e-3), weight_decay=0.0, clip=None
  )
  state = step.TrainState(jnp.int32(0), params, optimizer.init(params))
  logged = []
  for parts in (1, 2):
    update = functools.partial(
      step.update,
      optimizer=optimizer,
      balancer=balancer,
      settings=settings._replace(micro_batches=parts),
    )
    _, metrics = jax.jit(update)(state, {}, batch, trajectory, None)
    logged.append(metrics)
  whole, split = logged
  for name in ("router_max_share", "router_idle", "loss_router"):
    np.testing.assert_allclose(split[name], whole[name], rtol=1e-6)
  assert 1 / 3 <= whole["router_max_share"] <= 1


def test_routers_stay_in_float32_in_rollouts():
  params = transformer.init(jax.random.key(0), DECODER)
  layers = param_sharding.gathered(params, DECODER, "bfloat16")["layers"]
  dtypes = {name: leaf.dtype.name for name, leaf in layers.items()}
  assert dtypes["router"] == dtypes["attn_norm"] == "float32"
  assert {dtypes[name] for name in ("q", "o", "gate", "up", "down")} == {"bfloat16"}


def test_fapm_prunes_every_expert_on_its_own():
  """A tenth of each expert's tensor, however large the change of another is."""
  base = transformer.init(jax.random.key(0), DECODER)
  tuned = transformer.init(jax.random.key(1), DECODER)
  tuned["layers"]["up"] = tuned["layers"]["up"].at[:, 0].multiply(100)
  pruned = fapm.prune(base, tuned, 0.1)["layers"]["up"]
  changed = pruned != np.asarray(base["layers"]["up"])
  count = DECODER.d_ff * DECODER.d_model // 10
  assert (changed.sum(axis=(2, 3)) == count).all()


def test_half_fine_tuning_trains_experts_and_no_router():
  mask = freezing.half(transformer.shapes(DECODER), seed=0)["layers"]
  assert not mask["router"].any()
  assert mask["gate"].shape == (DECODER.n_layers, 1, 1, 1)
  free = sum(mask[name].sum() for name in freezing.FEED_FORWARD)
  assert free == DECODER.n_layers * 1.5
