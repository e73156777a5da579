"""Fisher information against a closed form, and against gradients of single rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import losses
from raft_jax.baselines import fisher
from raft_jax.config import schema
from raft_jax.models import transformer
from raft_jax.training import run_plan
from tests.helpers import tiny_step

PROBABILITIES = np.array([0.5, 0.3, 0.15, 0.05])


def toy_log_likelihood(logits, labels_B):
  """Of a softmax over four classes, its logits the parameters."""
  return -jnp.mean(
    losses.cross_entropy(
      jnp.broadcast_to(logits, (*labels_B.shape, logits.size)), labels_B
    )
  )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sampled_labels_give_the_known_information_whatever_the_batch(size):
  """Of a softmax's logit j it is p_j (1 - p_j). Exactly, by summing over all batches
  of labels with their probability, so that the mean is the expectation."""
  logits = jnp.log(jnp.array(PROBABILITIES, jnp.float32))
  expected = np.zeros(4)
  for labels in itertools.product(range(4), repeat=size):
    found = fisher.diagonal(toy_log_likelihood, logits, [jnp.array(labels)], size)
    expected += np.prod(PROBABILITIES[list(labels)]) * np.asarray(found)
  np.testing.assert_allclose(expected, PROBABILITIES * (1 - PROBABILITIES), rtol=1e-5)


def test_the_value_is_the_mean_over_batches():
  logits = jnp.log(jnp.array(PROBABILITIES, jnp.float32))
  found = fisher.diagonal(
    toy_log_likelihood, logits, [jnp.array([0, 1]), jnp.array([2, 2])], 2
  )
  one_hot = np.eye(4)
  first = one_hot[[0, 1]].mean(0) - PROBABILITIES
  second = one_hot[2] - PROBABILITIES
  np.testing.assert_allclose(found, (first**2 + second**2), rtol=1e-5)


def test_log_likelihood_is_of_whole_answers():
  """Sums over tokens of each row on its own, without padding."""
  params, batch, _, _ = tiny_step.setting()
  settings = tiny_step.SETTINGS
  value = fisher.log_likelihood(params, batch, settings)
  rows = []
  for i in range(batch.answer_BA.shape[0]):
    prompt = batch.prompt_BP[i][: batch.prompt_length_B[i]].tolist()
    answer = batch.answer_BA[i][: batch.answer_length_B[i]].tolist()
    hidden = tiny_step.plain_hidden(params, prompt + answer, len(prompt + answer))
    scores = (hidden @ transformer.output_embedding(params).T)[len(prompt) - 1 : -1]
    rows.append(-losses.cross_entropy(scores, jnp.array(answer)).sum())
  np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)
  # A rule that weighs tokens in training does not weigh them here.
  weights = schema.TokenWeights(rule="dft")
  rule = run_plan.make_token_rule(weights, "tiny", tiny_step.CONFIG.vocab_size)
  ruled = settings._replace(token_rule=rule)
  assert fisher.log_likelihood(params, batch, ruled) == value


def test_sampled_batches_hold_the_models_own_answers_and_the_same_prompts():
  params, batch, _, _ = tiny_step.setting()
  first, second = fisher.sampled(
    params, [batch, batch], tiny_step.SETTINGS, seed=0, max_new_tokens=5, pad_id=5
  )
  np.testing.assert_array_equal(first.prompt_BP, batch.prompt_BP)
  assert first.answer_BA.shape == (4, 5)
  assert not np.array_equal(first.answer_BA, second.answer_BA)
  # Step 0 of seed 0 is the rollout of the step's own tests.
  trajectory = tiny_step.roll_out(params, batch)
  np.testing.assert_array_equal(first.answer_BA, trajectory.tokens_BR)
  np.testing.assert_array_equal(first.answer_length_B, trajectory.length_B)


def test_normalised_has_mean_1_where_no_tail_is_cut():
  tree = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([[0.0], [4.0]])}
  found = fisher.normalised(tree)
  np.testing.assert_allclose(found["a"], [0.5, 1.5])
  np.testing.assert_allclose(found["b"], [[0.0], [2.0]])
  heavy = fisher.normalised({"a": jnp.zeros(9999).at[0].set(1.0)})
  assert float(heavy["a"].max()) == fisher.LARGEST
  none = fisher.normalised({"a": jnp.zeros(3)})
  np.testing.assert_array_equal(none["a"], [1.0, 1.0, 1.0])


def test_sums_over_many_batches_of_bfloat16_parameters_keep_their_digits():
  params = {"a": jnp.ones(3, jnp.bfloat16)}
  found = fisher.diagonal(
    lambda p, batch: (p["a"] * batch).sum(), params, [1.0] * 400, 1
  )
  assert found["a"].dtype == jnp.float32
  np.testing.assert_array_equal(found["a"], 1.0)


def test_it_is_the_square_of_jaxs_own_gradient():
  params, batch, _, _ = tiny_step.setting()
  single = jax.tree.map(lambda x: x[:1], batch)

  def one(params, batch):
    return fisher.log_likelihood(params, batch, tiny_step.SETTINGS)

  found = fisher.diagonal(one, params, [single], 1)
  gradient = jax.grad(one)(params, single)
  jax.tree.map(
    lambda f, g: np.testing.assert_allclose(f, g**2, rtol=1e-3, atol=1e-9),
    found,
    gradient,
  )
