"""Adaptive replay: the memory's rules by hand, draws against their probabilities."""

import math

import numpy as np
import pytest
import scipy.stats

from raft_jax import errors
from raft_jax.baselines import mssr
from raft_jax.config import schema
from raft_jax.data import batching, token_rows

RULES = {
  **{"growth": 1.0, "decay": 0.5, "tolerance": 0.1},
  **{"interval": 4, "factor": 1.5, "longest": 8},
}
UNIFORM = {"age_exponent": 0.0, "loss_exponent": 0.0, "floor": 0.1}
WEIGHED = {"age_exponent": 1.0, "loss_exponent": 1.0, "floor": 0.1}


def fresh(first, strength=20.0, interval=4):
  return mssr.fresh(np.array(first), strength=strength, interval=interval)


def test_a_replay_strengthens_by_the_stated_rule():
  """Example 0 kept its loss (q = 1), 2 has twice its first one (q = 1/2)."""
  before = fresh([2.0, 1.0, 1.5])
  memory = mssr.after(
    before, np.array([2, 0]), np.array([3.0, 2.0], np.float32), 4, **RULES
  )
  assert memory.strength_N.tolist() == [40.0, 20.0, 30.0]
  assert memory.replayed_N.tolist() == [4, 0, 4]
  assert memory.loss_N.tolist() == [2.0, 1.0, 2.25]
  assert memory.first_N.tolist() == [2.0, 1.0, 1.5]
  # Better than at first is no more than remembered.
  more = mssr.after(memory, np.array([0]), np.array([0.5]), 8, **RULES)
  assert more.strength_N.tolist() == [80.0, 20.0, 30.0]
  assert more.loss_N[0] == 1.25
  # A value: nothing of the one before changed.
  assert before.strength_N.tolist() == [20.0] * 3
  assert before.replayed_N.tolist() == [0] * 3


def test_intervals_grow_up_to_the_longest_and_shrink_where_losses_rise():
  memory = fresh([1.0, 1.0])
  assert (memory.interval, memory.due) == (4, 4)
  seen = []
  # 4 · 1.5 = 6, then 9 is cut to 8; the mean of 1.15 and 1.0 is within 10 %, that of
  # 1.4 and 1.0 is not: 8 / 1.5 = 5.33, then 3.56 is raised to 4.
  for losses in ([1.0, 1.0], [0.5, 0.9], [1.15, 1.0], [1.4, 1.0], [1.0, 2.0]):
    now = int(memory.due)
    memory = mssr.after(memory, np.arange(2), np.array(losses), now, **RULES)
    seen.append((round(float(memory.interval), 2), int(memory.due) - now))
  assert seen == [(6.0, 6), (8.0, 8), (8.0, 8), (5.33, 5), (4.0, 4)]


def test_without_exponents_and_growth_it_is_uniform_at_a_fixed_interval():
  rules = {**RULES, "factor": 1.0}
  memory, events = fresh([1.0, 2.0, 3.0]), []
  rng = np.random.default_rng(0)
  for _ in range(5):
    now = int(memory.due)
    events.append(now)
    chances_N = mssr.probabilities(memory, now, **UNIFORM)
    np.testing.assert_array_equal(chances_N, [1 / 3] * 3)
    memory = mssr.after(memory, np.array([1]), rng.uniform(1, 9, 1), now, **rules)
  assert events == [4, 8, 12, 16, 20]


def forgetful():
  """Five examples: just replayed, weak, strong, long ago with a loss doubled, and
  better than at first."""
  return mssr.Memory(
    np.array([20, 5, 80, 20, 20], np.float32),
    np.array([98, 90, 90, 10, 10], np.int32),
    np.array([1.0, 1.0, 1.0, 3.0, 0.5], np.float32),
    np.array([1.0, 1.0, 1.0, 1.5, 1.0], np.float32),
    np.array(4, np.float32),
    np.array(100, np.int32),
  )


def stated(exponent_a, exponent_b):
  """The docstring's formula at step 100, example by example."""
  rows = [(2, 20, 1.0), (10, 5, 1.0), (10, 80, 1.0), (90, 20, 2.0), (90, 20, 0.5)]
  weights = [
    (1 - math.exp(-age / strength)) ** exponent_a
    * (0.1 + max(0.0, ratio - 1)) ** exponent_b
    for age, strength, ratio in rows
  ]
  return np.array(weights) / sum(weights)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_probabilities_are_the_stated_ones(a, b):
  found = mssr.probabilities(
    forgetful(), 100, age_exponent=a, loss_exponent=b, floor=0.1
  )
  np.testing.assert_allclose(found, stated(a, b), rtol=1e-6)


def test_what_is_forgotten_is_drawn_as_often_as_stated():
  chances_N = mssr.probabilities(forgetful(), 100, **WEIGHED)
  drawn = [mssr.draw(chances_N, 1, seed=7, now=now)[0] for now in range(1, 4001)]
  counts = np.bincount(drawn, minlength=5)
  # Seeds are fixed: this is no test that fails once in a thousand runs.
  assert scipy.stats.chisquare(counts, 4000 * stated(1.0, 1.0)).pvalue > 1e-3
  assert scipy.stats.chisquare(counts).pvalue < 1e-9
  assert counts.argmax() == 3  # long ago, and its loss has doubled


def test_an_event_draws_different_examples_one_after_another():
  """Pairs {i, j} come with p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
  p = stated(1.0, 0.0)
  pairs = [(i, j) for i in range(5) for j in range(i)]
  chance = [p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in pairs]
  assert sum(chance) == pytest.approx(1)
  drawn = [
    tuple(sorted(mssr.draw(p, 2, seed=0, now=now), reverse=True))
    for now in range(1, 4001)
  ]
  counts = [drawn.count(pair) for pair in pairs]
  assert sum(counts) == 4000
  assert scipy.stats.chisquare(counts, 4000 * np.array(chance)).pvalue > 1e-3


def test_draws_are_a_function_of_seed_and_step():
  p = stated(1.0, 0.0)

  def draws(seed):
    return [mssr.draw(p, 2, seed=seed, now=now).tolist() for now in range(50)]

  assert draws(0) == draws(0)
  assert draws(0) != draws(1)


def test_strength_stays_finite():
  memory = fresh([0.0])  # a loss of 0 is divided by, too
  for now in range(1, 300):
    memory = mssr.after(memory, np.array([0]), np.zeros(1), now, **RULES)
  assert memory.strength_N[0] == mssr.STRONGEST
  assert mssr.probabilities(memory, 301, **WEIGHED).tolist() == [1.0]


def rows(count, first_id, length):
  return [
    token_rows.Row((first_id + i,) * length, (i + 1,) * 2, (), first_id + i)
    for i in range(count)
  ]


def test_events_replace_the_last_rows_and_learn_from_their_losses():
  widths = [(16, 16, 0), (32, 16, 0)]
  domain = rows(8, 0, 3)
  batches = batching.dataset(
    domain, batch_size=4, seed=0, pad_id=0, widths=widths, epochs=8
  )
  general = rows(6, 100, 20)
  settings = schema.Adaptive(interval=2, factor=1.5, longest=3)
  plan = mssr.Plan(general, 2, settings, 5, 0, widths)
  replayer = mssr.Replayer(plan, fresh([1.0] * 6, interval=2))
  events, last = [], []
  for step, batch in enumerate(batches):
    mixed = replayer.mix(step, batch)
    if step:  # as the loop does: read once the next is on its way
      replayer.observe(step - 1, last)
    ids = mixed.row_id_B.tolist()
    last = np.where(mixed.row_id_B >= 100, 1.0, 9.0)  # never above the first losses
    if max(ids) < 100:
      assert all(np.array_equal(a, b) for a, b in zip(mixed, batch, strict=True))
      continue
    events.append(step + 1)
    assert ids[:2] == batch.row_id_B.tolist()[:2]
    assert min(ids[2:]) >= 100
    assert ids[2] != ids[3]
    # The wide bucket: each prompt is its id, as often as it is long.
    assert mixed.prompt_BP.shape == (4, 32)
    for i in range(4):
      length = mixed.prompt_length_B[i]
      assert length == (3, 3, 20, 20)[i]
      assert mixed.prompt_BP[i].tolist() == [ids[i]] * length + [0] * (32 - length)
  # 2 · 1.5 = 3, which is the longest: 2, 5, 8, ...
  assert events == [2, 5, 8, 11, 14]
  assert replayer.memory.strength_N.max() > 20
  assert replayer.memory.loss_N.tolist() == [1.0] * 6


def test_every_row_is_read_once_before_training():
  found = batching.sequential_batches(rows(5, 0, 3), 2, pad_id=0, width=(16, 16, 0))
  assert [b.row_id_B.tolist() for b in found] == [[0, 1], [2, 3], [4, 4]]
  assert {b.prompt_BP.shape for b in found} == {(2, 16)}


@pytest.mark.parametrize(("size", "share", "rows"), [(8, 0.5, 4), (16, 0.25, 4)])
def test_an_event_is_a_share_of_the_batch(size, share, rows):
  assert mssr.count(size, share) == rows


def test_a_share_that_is_no_number_of_rows_is_refused_with_the_nearest():
  with pytest.raises(errors.UserError, match=r"1\.60 rows; set 0\.125 or 0\.25"):
    mssr.count(8, 0.2)
