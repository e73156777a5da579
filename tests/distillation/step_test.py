"""The training step: null settings, the balance inside it, and splitting a batch."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from raft_jax import balance, losses
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import objective, sequences, step
from raft_jax.models import transformer
from raft_jax.training import base_losses, optim, run_plan
from tests.helpers import tiny_step

RATE = 1e-3


def with_own_prompt_as_context(batch):
  return batch._replace(
    teacher_BC=batch.prompt_BP, teacher_length_B=batch.prompt_length_B
  )


def start(params, balancer, *, skips_empty=False):
  optimizer = optim.chain(
    balancer,
    optax.constant_schedule(RATE),
    weight_decay=0.01,
    clip=1.0,
    skips_empty=skips_empty,
  )
  state = step.TrainState(jnp.int32(0), params, optimizer.init(params))

  def update(state, *batch, **static):
    return step.update(
      state, {}, *batch, optimizer=optimizer, balancer=balancer, **static
    )

  return state, jax.jit(update, static_argnames=("settings", "gradient_stats"))


def assert_trees_identical(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_packed_losses_equal_each_sequence_on_its_own():
  """Both losses from separate, unpadded forwards and `losses` on whole logits."""
  params, *whole = tiny_step.setting()
  # Three rows are enough: every one of them compiles shapes of its own.
  batch, trajectory, support = jax.tree.map(lambda x: x[:3], whole)
  teacher = params
  weights = objective.mean_weights(batch, trajectory, tiny_step.SETTINGS)
  by_row = tiny_step.SETTINGS._replace(row_losses=True)
  terms, aux = objective.loss_terms(
    params, batch, trajectory, support, weights, settings=by_row
  )
  sft, kd = [], []
  for i in range(3):
    prompt = batch.prompt_BP[i][: batch.prompt_length_B[i]].tolist()
    answer = batch.answer_BA[i][: batch.answer_length_B[i]].tolist()
    context = batch.teacher_BC[i][: batch.teacher_length_B[i]].tolist()
    rollout = trajectory.tokens_BR[i][: trajectory.length_B[i]].tolist()

    def predictions(params, before, after):
      row = before + after
      hidden = tiny_step.plain_hidden(params, row, len(row))
      scores = hidden @ transformer.output_embedding(params).T
      return scores[len(before) - 1 : len(row) - 1]

    nll = losses.cross_entropy(predictions(params, prompt, answer), jnp.array(answer))
    sft.append(nll.mean())
    divergence = losses.topk_distillation(
      predictions(params, prompt, rollout),
      predictions(teacher, context, rollout),
      k=20,
      temperature=1.5,
    )
    kd.append(divergence.mean())
  np.testing.assert_allclose(terms["sft"], np.mean(sft), rtol=1e-5)
  np.testing.assert_allclose(terms["kd"], np.mean(kd), rtol=1e-4)
  np.testing.assert_allclose(aux[objective.ROW_LOSSES], sft, rtol=1e-5)
  alone = objective.row_losses(
    params, batch, tiny_step.SETTINGS
  )  # without the trajectory
  np.testing.assert_allclose(alone, sft, rtol=1e-5)


def test_answers_that_are_compared_are_read_once():
  """The same losses and gradients as with the answer a second time, as a trajectory."""
  params, batch, _, _ = tiny_step.setting()
  answers = sequences.Trajectory(batch.answer_BA, batch.answer_length_B)
  # A teacher of its own: the student's divergence from itself has no gradient.
  teacher = jax.tree.map(lambda leaf: 1.1 * leaf, params)
  support = tiny_step.score_teacher(teacher, batch, answers)
  weights = objective.mean_weights(batch, answers, tiny_step.SETTINGS)

  @functools.partial(jax.jit, static_argnames="settings")
  def value_and_gradient(params, settings):
    def total(params):
      terms, _ = objective.loss_terms(
        params, batch, answers, support, weights, settings=settings
      )
      return terms["sft"] + 3 * terms["kd"], terms

    return jax.value_and_grad(total, has_aux=True)(params)

  twice = value_and_gradient(params, tiny_step.SETTINGS)
  settings = tiny_step.SETTINGS._replace(on_answers=True)
  once = value_and_gradient(params, settings)
  assert float(once[0][1]["kd"]) > 0.01
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), once, twice
  )
  flops = [
    value_and_gradient.lower(params, settings=each).cost_analysis()["flops"]
    for each in (settings, tiny_step.SETTINGS)
  ]
  assert flops[0] < 0.85 * flops[1]


def test_the_trajectory_cannot_see_the_answer():
  params, batch, trajectory, _ = tiny_step.setting()
  other = batch._replace(answer_BA=(batch.answer_BA + 1) % 97)
  _, hidden = sequences.student_hidden(
    params, tiny_step.CONFIG, batch, trajectory, transformer.FLOAT32
  )
  _, changed = sequences.student_hidden(
    params, tiny_step.CONFIG, other, trajectory, transformer.FLOAT32
  )
  np.testing.assert_array_equal(hidden, changed)


def test_teacher_with_the_students_context_gives_no_loss_and_no_gradient():
  params, batch, trajectory, _ = tiny_step.setting()
  batch = with_own_prompt_as_context(batch)
  support = tiny_step.score_teacher(params, batch, trajectory)
  weights = objective.mean_weights(batch, trajectory, tiny_step.SETTINGS)

  def kd(params):
    return objective.loss_terms(
      params, batch, trajectory, support, weights, settings=tiny_step.SETTINGS
    )[0]["kd"]

  value, gradient = jax.value_and_grad(kd)(params)
  assert abs(value) < 1e-6
  assert optax.tree.norm(gradient) < 1e-5


def test_step_one_balances_the_two_losses():
  """λ of the first step is L_SFT / L_KD, so that λ L_KD = L_SFT."""
  params, batch, trajectory, support = tiny_step.setting()
  state, update = start(params, balance.balance_by_ema())
  _, values = update(state, batch, trajectory, support, settings=tiny_step.SETTINGS)
  np.testing.assert_allclose(
    values["kd_weight"] * values["loss_kd"], values["loss_sft"], rtol=1e-5
  )
  np.testing.assert_allclose(values["kd_ratio"], 1.0, rtol=1e-5)


def test_one_pullback_equals_the_two_gradients_weighted():
  params, batch, trajectory, support = tiny_step.setting()
  state, update = start(params, balance.balance_by_ema())
  once, a = update(state, batch, trajectory, support, settings=tiny_step.SETTINGS)
  apart, b = update(
    state, batch, trajectory, support, settings=tiny_step.SETTINGS, gradient_stats=True
  )
  np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
  assert -1 <= b["grad_cosine"] <= 1
  weight, sft, kd = b["kd_weight"], b["grad_norm_sft"], b["grad_norm_kd"]
  # |g_sft + λ g_kd|² by the law of cosines.
  norm = np.sqrt(sft**2 + (weight * kd) ** 2 + 2 * weight * sft * kd * b["grad_cosine"])
  np.testing.assert_allclose(norm, b["grad_norm"], rtol=1e-4)
  tiny_step.assert_trees_close(once.params, apart.params, 1e-4)


def test_weight_zero_is_sft_bit_for_bit():
  """Same program: λ = 0 at run time against a rollout with no token."""
  params, batch, trajectory, support = tiny_step.setting()
  state, update = start(params, balance.balance_fixed(0.0))
  off, values = update(state, batch, trajectory, support, settings=tiny_step.SETTINGS)
  assert values["loss_kd"] > 0
  nothing = trajectory._replace(length_B=jnp.zeros_like(trajectory.length_B))
  never, _ = update(state, batch, nothing, support, settings=tiny_step.SETTINGS)
  assert_trees_identical(off.params, never.params)
  on_state, on_update = start(params, balance.balance_fixed(1.0))
  on, _ = on_update(on_state, batch, trajectory, support, settings=tiny_step.SETTINGS)
  assert optax.tree.norm(optax.tree.sub(on.params, off.params)) > 0


def test_distillation_alone_is_its_own_gradient():
  """Without cross-entropy: the same loss and gradient, and the answer is not read."""
  params, batch, trajectory, support = tiny_step.setting()
  settings = tiny_step.SETTINGS._replace(cross_entropy=False)
  weights = objective.mean_weights(batch, trajectory, settings)
  assert not step.any_token(weights)["sft"]

  def kd(settings, batch):
    def loss(params):
      weights = objective.mean_weights(batch, trajectory, settings)
      parts = (batch, trajectory, support, weights)
      return objective.loss_terms(params, *parts, settings=settings)[0]["kd"]

    return jax.value_and_grad(loss)(params)

  both, alone = kd(tiny_step.SETTINGS, batch), kd(settings, batch)
  np.testing.assert_allclose(alone[0], both[0], rtol=1e-5)
  tiny_step.assert_trees_close(alone[1], both[1], 1e-4)
  other = batch._replace(answer_BA=(batch.answer_BA + 1) % 97)
  assert_trees_identical(alone, kd(settings, other))
  state, update = start(params, balance.balance_fixed(1.0))
  _, values = update(state, batch, trajectory, support, settings=settings)
  np.testing.assert_allclose(values["grad_norm"], optax.tree.norm(both[1]), rtol=1e-4)
  assert "loss_sft" not in values
  assert np.isfinite(values["loss_kd"])


def test_a_teacher_of_another_shape_reads_with_its_own_network():
  _, batch, trajectory, support = tiny_step.setting()
  decoder = dataclasses.replace(tiny_step.CONFIG, n_layers=1, d_ff=24)
  other = transformer.init(jax.random.key(3), decoder)
  context = (batch.teacher_BC, batch.teacher_length_B, trajectory)
  settings = tiny_step.SETTINGS._replace(teacher_decoder=decoder)
  found = objective.score_teacher(other, *context, settings=settings)
  alone = objective.score_teacher(
    other, *context, settings=tiny_step.SETTINGS._replace(decoder=decoder)
  )
  assert_trees_identical(found, alone)
  assert not np.array_equal(found.ids_BRK, support.ids_BRK)


def test_rows_without_rollout_leave_the_mean_and_an_empty_batch_moves_no_average():
  params, batch, trajectory, support = tiny_step.setting()
  state, update = start(params, balance.balance_by_ema())
  some = trajectory._replace(length_B=trajectory.length_B.at[1].set(0))
  kept = np.array([0, 2, 3])
  _, all_rows = update(state, batch, some, support, settings=tiny_step.SETTINGS)
  take = functools.partial(jax.tree.map, lambda x: x[kept])
  _, three_rows = update(
    state, take(batch), take(some), take(support), settings=tiny_step.SETTINGS
  )
  np.testing.assert_allclose(all_rows["loss_kd"], three_rows["loss_kd"], rtol=1e-5)
  none = trajectory._replace(length_B=jnp.zeros_like(trajectory.length_B))
  after, values = update(state, batch, none, support, settings=tiny_step.SETTINGS)
  assert values["loss_kd"] == 0
  assert after.opt_state["balance"].counts["kd"] == 0
  assert after.opt_state["balance"].counts["sft"] == 1


def test_without_any_token_of_the_only_loss_nothing_moves_but_time():
  params, batch, trajectory, support = tiny_step.setting()
  none = trajectory._replace(length_B=jnp.zeros_like(trajectory.length_B))
  settings = tiny_step.SETTINGS._replace(cross_entropy=False)
  state, update = start(params, balance.balance_fixed(1.0), skips_empty=True)
  once, _ = update(state, batch, trajectory, support, settings=settings)
  empty, _ = update(once, batch, none, support, settings=settings)
  assert_trees_identical(empty.params, once.params)  # neither decay nor momentum
  adam, _, schedule = empty.opt_state["adamw"]
  assert_trees_identical(adam, once.opt_state["adamw"][0])
  assert (empty.step, schedule.count, adam.count) == (2, 2, 1)
  again, _ = update(empty, batch, trajectory, support, settings=settings)
  unbroken, _ = update(once, batch, trajectory, support, settings=settings)
  assert_trees_identical(again.params, unbroken.params)


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_micro_batches_change_nothing(mean):
  """Same λ and same gradients for 1, 2 and 4 parts; rows differ in length."""
  params, batch, trajectory, support = tiny_step.setting()
  results = {}
  for parts in (1, 2, 4):
    settings = tiny_step.SETTINGS._replace(
      micro_batches=parts, loss_mean=mean, row_losses=True
    )
    weights = objective.mean_weights(batch, trajectory, settings)
    balancer = balance.balance_by_ema()

    def weigh(balancer=balancer, **observed):
      _, advanced = balancer.update({}, balancer.init(params), **observed)
      return balance.loss_weights(advanced)

    def loss(p, part, settings=settings):
      return objective.loss_terms(p, *part, settings=settings)

    take = functools.partial(step.balanced_gradient, loss, loss_weights=weigh)
    if parts > 1:
      take = functools.partial(
        step.separate_gradients, loss, loss_weights=weigh, micro_batches=parts
      )
    whole = step.LossInputs(batch, trajectory, support, weights)
    results[parts] = jax.jit(take)(params, whole)
    results[parts, "weight"] = weigh(
      losses=results[parts].losses, valid=results[parts].valid
    )["kd"]
  for parts in (2, 4):
    np.testing.assert_allclose(
      results[parts, "weight"], results[1, "weight"], rtol=1e-5
    )
    tiny_step.assert_trees_close(results[parts].balanced, results[1].balanced, 1e-5)
    np.testing.assert_allclose(
      results[parts].aux[objective.ROW_LOSSES],
      results[1].aux[objective.ROW_LOSSES],
      rtol=1e-5,
    )


RULES = {
  "eaft": ("eaft", {"exponent": 1.5}),
  "dft": ("dft", {}),
  "talr": ("talr", {}),
  "talr at a fixed temperature": ("talr", {"temperature": 2.0, "floor": 0.2}),
}


def test_every_rule_that_the_step_knows_is_tested():
  """The others are weights of the batch, from the base model's losses."""
  known = typing.get_args(schema.TokenWeights.model_fields["rule"].annotation)
  assert {rule for rule, _ in RULES.values()} == set(known) - set(base_losses.RULES)


def weighing(name):
  """The step's settings with a rule that weighs tokens."""
  rule, numbers = RULES[name]
  weights = schema.TokenWeights(rule=rule, **numbers)
  return tiny_step.SETTINGS._replace(
    token_rule=run_plan.make_token_rule(weights, "tiny", tiny_step.CONFIG.vocab_size)
  )


def expected_weights(name, logits, loss, row_losses):
  """float64 numpy of one row."""
  rule, numbers = RULES[name]
  if rule == "dft":
    return np.exp(-loss)
  if rule == "eaft":
    top = np.sort(logits, axis=-1)[:, -20:]
    q = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
    return (-(q * np.log(q)).sum(-1) / 3) ** numbers["exponent"]
  middle = sorted(row_losses)[(len(row_losses) - 1) // 2]
  powers = np.maximum(np.exp(-loss), 1e-6) ** (1 / numbers.get("temperature", middle))
  return np.maximum(powers, numbers.get("floor", 0.01))


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow) if "fixed" in name else name
    for name in RULES
  ],
)
def test_a_rule_weighs_the_answers_tokens_by_constants(name):
  """Against whole logits; the gradient is that of the loss with fixed weights."""
  params, batch, _, _ = tiny_step.setting()
  nothing = sequences.empty_trajectory(len(batch.row_id_B))
  settings = weighing(name)
  hidden_BAD, _ = jax.jit(
    lambda params: sequences.student_hidden(
      params, tiny_step.CONFIG, batch, nothing, transformer.FLOAT32
    )
  )(params)
  logits_BAV = np.float64(hidden_BAD @ transformer.output_embedding(params).T)
  rows, lengths = range(len(batch.row_id_B)), batch.answer_length_B
  logits = [logits_BAV[i, : lengths[i]] for i in rows]
  token_losses = []
  for i in rows:
    log_z = np.log(np.exp(logits[i]).sum(-1))
    answer = batch.answer_BA[i][: lengths[i]]
    token_losses.append(log_z - logits[i][np.arange(len(answer)), answer])
  means = [loss.mean() for loss in token_losses]
  weights = [expected_weights(name, logits[i], token_losses[i], means) for i in rows]

  def terms(settings, batch):
    def loss(params):
      means = objective.mean_weights(batch, nothing, settings)
      found, aux = objective.loss_terms(
        params, batch, nothing, None, means, settings=settings
      )
      return found["sft"], aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  (value, aux), gradient = terms(settings, batch)
  products = [w * loss for w, loss in zip(weights, token_losses)]
  np.testing.assert_allclose(value, np.mean([p.mean() for p in products]), rtol=1e-4)
  mean_weight = np.mean([w.mean() for w in weights])
  np.testing.assert_allclose(aux["token_weight"], mean_weight, rtol=1e-4)
  np.testing.assert_allclose(aux["loss_sft_unweighted"], np.mean(means), rtol=1e-5)
  # As weights that the batch brings, which are constants by their nature.
  given = {i: np.float32(w) for i, w in enumerate(weights)}
  weighed = batching.with_token_weights(batch, given)
  _, expected = terms(tiny_step.SETTINGS, weighed)
  tiny_step.assert_trees_close(gradient, expected, 1e-4)


@pytest.mark.parametrize(
  ("name", "sizes"),
  [("talr", (1, 2)), pytest.param("eaft", (1, 2, 4), marks=pytest.mark.slow)],
)
def test_micro_batches_weigh_tokens_as_the_whole_batch_does(name, sizes):
  """Beside distillation; the median of TALR is that of all rows."""
  params, batch, trajectory, support = tiny_step.setting()
  results = []
  for parts in sizes:
    state, update = start(params, balance.balance_by_ema())
    settings = weighing(name)._replace(micro_batches=parts)
    results.append(update(state, batch, trajectory, support, settings=settings))
  (whole, values), *others = results
  assert 0 < values["token_weight"] < 1
  assert values["loss_sft"] < values["loss_sft_unweighted"]
  for state, found in others:
    for key in (
      *("token_weight", "loss_sft", "loss_sft_unweighted"),
      *("loss_kd", "kd_weight", "grad_norm"),
    ):
      np.testing.assert_allclose(found[key], values[key], rtol=1e-5)
    moments = [s.opt_state["adamw"][0].mu for s in (state, whole)]
    tiny_step.assert_trees_close(*moments, 1e-5)


@pytest.mark.slow
def test_weights_of_one_and_null_rules_train_as_sft_bit_for_bit():
  params, batch, trajectory, support = tiny_step.setting()
  del trajectory, support
  nothing = sequences.empty_trajectory(len(batch.row_id_B))
  state, update = start(params, balance.balance_by_ema())

  def trained(settings, batch=batch):
    return update(state, batch, nothing, None, settings=settings)[0]

  plain = trained(tiny_step.SETTINGS)
  ones = {i: np.ones(6, np.float32) for i in range(len(batch.row_id_B))}
  weighed = batching.with_token_weights(batch, ones)
  assert_trees_identical(trained(tiny_step.SETTINGS, weighed), plain)
  for name, numbers in (
    ("eaft", {"exponent": 0.0}),
    ("dft", {"exponent": 0.0}),
    ("talr", {"floor": 1.0}),
  ):
    settings = weighing(name)
    rule = settings.token_rule._replace(**numbers)
    assert_trees_identical(trained(settings._replace(token_rule=rule)), plain)


def test_tokens_of_weight_zero_leave_a_batch_without_loss():
  params, batch, _, _ = tiny_step.setting()
  nothing = sequences.empty_trajectory(len(batch.row_id_B))
  state, update = start(params, balance.balance_by_ema())
  none = {i: np.zeros(6, np.float32) for i in range(len(batch.row_id_B))}
  weighed = batching.with_token_weights(batch, none)
  _, values = update(state, weighed, nothing, None, settings=tiny_step.SETTINGS)
  found = [float(values[key]) for key in ("loss_sft", "token_weight", "grad_norm")]
  assert found == [0.0, 0.0, 0.0]
  assert values["loss_sft_unweighted"] > 0


def test_state_keeps_its_shape_and_compiles_once():
  params, batch, trajectory, support = tiny_step.setting()
  state, update = start(params, balance.balance_by_ema())
  state = jax.tree.map(jnp.asarray, state)
  described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
  for _ in range(3):
    state, _ = update(state, batch, trajectory, support, settings=tiny_step.SETTINGS)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == described
  assert update._cache_size() == 1
  assert int(state.step) == 3


def test_order_of_the_rows_is_immaterial():
  params, batch, trajectory, support = tiny_step.setting()
  state, update = start(params, balance.balance_by_ema())
  order = np.array([2, 0, 3, 1])
  shuffle = functools.partial(jax.tree.map, lambda x: x[order])
  _, a = update(state, batch, trajectory, support, settings=tiny_step.SETTINGS)
  _, b = update(
    state,
    shuffle(batch),
    shuffle(trajectory),
    shuffle(support),
    settings=tiny_step.SETTINGS,
  )
  for name in ("loss_sft", "loss_kd", "kd_weight", "grad_norm"):
    np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


def test_skip_first_and_mask_eos_drop_their_tokens():
  _, batch, trajectory, _ = tiny_step.setting()
  tokens = trajectory.tokens_BR.at[0, 2].set(5)
  trajectory = sequences.Trajectory(tokens, trajectory.length_B.at[0].set(3))
  plain = objective.mean_weights(batch, trajectory, tiny_step.SETTINGS).kd_BR
  masked = objective.mean_weights(
    batch, trajectory, tiny_step.SETTINGS._replace(skip_first=1, mask_eos=True)
  ).kd_BR
  assert (plain[0] > 0).tolist() == [True, True, True, False, False]
  assert (masked[0] > 0).tolist() == [False, True, False, False, False]


def test_training_on_one_batch_fits_it():
  params, batch, _, _ = tiny_step.setting()
  state, update = start(params, balance.balance_by_ema(max_weight=100.0))
  first = None
  for index in range(15):
    trajectory = tiny_step.roll_out(state.params, batch)
    support = tiny_step.score_teacher(params, batch, trajectory)
    state, values = update(
      state, batch, trajectory, support, settings=tiny_step.SETTINGS
    )
    first = first or values
    assert np.isfinite(values["loss_kd"]), index
  assert values["loss_sft"] < 0.9 * first["loss_sft"]


def test_logged_mass_is_of_the_distribution_that_is_sampled():
  """Softmax of whole logits at temperature 1, summed over the teacher's top K."""
  params, batch, trajectory, support = tiny_step.setting()
  weights = objective.mean_weights(batch, trajectory, tiny_step.SETTINGS)
  _, aux = objective.loss_terms(
    params, batch, trajectory, support, weights, settings=tiny_step.SETTINGS
  )
  length = int(batch.teacher_length_B[0])
  row = [
    *batch.teacher_BC[0][:length].tolist(),
    *trajectory.tokens_BR[0][: trajectory.length_B[0]].tolist(),
  ]
  hidden = tiny_step.plain_hidden(params, row, len(row))
  scores = np.array(hidden @ transformer.output_embedding(params).T, np.float64)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p = np.sort(p / p.sum(-1, keepdims=True), axis=-1)[length - 1 : -1, -20:]
  first_row = objective.score_teacher(
    params,
    batch.teacher_BC[:1],
    batch.teacher_length_B[:1],
    jax.tree.map(lambda x: x[:1], trajectory),
    settings=tiny_step.SETTINGS,
  )
  mass = losses.mass_on_support(first_row.logits_BRK, first_row.logsumexp_BR)[0]
  np.testing.assert_allclose(mass[: len(p)], p.sum(-1), rtol=1e-4)
  assert 0 < aux["student_mass_in_support"] < 1
  assert 0 < aux["teacher_mass_in_support"] < 1
