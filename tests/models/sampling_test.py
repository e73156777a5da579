"""The sampler: what a row depends on, and the distributions it draws from."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.models import sampling
from tests.helpers import tiny_decoder

CONFIG = tiny_decoder.CONFIG
EOS = (5, 11)


@pytest.fixture(scope="module")
def params():
  return tiny_decoder.sharp_params()


def generate(params, prompts, ids=None, **options):
  width = options.pop("width", max(map(len, prompts)))
  padded = np.full((len(prompts), width), 96)
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  options = {"max_new_tokens": 12, "seed": 3, "step": 7, **options}
  return sampling.generate(
    params,
    dataclasses.replace(CONFIG, tie_embeddings="head" not in params),
    jnp.array(padded, jnp.int32),
    jnp.array([len(p) for p in prompts], jnp.int32),
    jnp.arange(len(prompts)) if ids is None else jnp.array(ids),
    eos_ids=EOS,
    pad_id=EOS[0],
    **options,
  )


PROMPTS = [[1, 2, 3], [40, 41, 42, 43, 44, 45], [7]]


def texts(rollout):
  return [
    row[:length].tolist() for row, length in zip(rollout.tokens_BR, rollout.length_B)
  ]


def test_greedy_equals_the_argmax_of_full_forwards(params):
  got = texts(generate(params, PROMPTS, temperature=0.0))
  for prompt, new in zip(PROMPTS, got):
    # Every token at once: the argmax after each prefix is the next token.
    row = jnp.pad(jnp.array([prompt + new]), ((0, 0), (0, 18 - len(prompt + new))))
    valid = jnp.arange(18)[None] < len(prompt + new)
    best = jnp.argmax(tiny_decoder.logits(params, CONFIG, row, valid)[0], axis=-1)
    assert best[len(prompt) - 1 : len(prompt + new) - 1].tolist() == new
    assert len(new) == 12 or new[-1] in EOS


def test_a_row_depends_on_its_seed_step_and_id_only(params):
  together = texts(generate(params, PROMPTS, ids=[10, 20, 30]))
  for prompt, row_id, expected in zip(PROMPTS, (10, 20, 30), together):
    assert texts(generate(params, [prompt], ids=[row_id])) == [expected]
    assert texts(generate(params, [prompt], ids=[row_id], width=17)) == [expected]
  reordered = texts(generate(params, PROMPTS[::-1], ids=[30, 20, 10]))
  assert reordered == together[::-1]
  assert texts(generate(params, PROMPTS, ids=[10, 20, 31]))[2] != together[2]
  assert texts(generate(params, PROMPTS, ids=[10, 20, 30], step=8)) != together
  assert texts(generate(params, PROMPTS, ids=[10, 20, 30], seed=4)) != together


def test_rows_end_at_their_first_eos_and_are_padded_after_it(params):
  prompts = [[i] for i in range(12, 44)]
  rollout = generate(params, prompts, temperature=2.0, max_new_tokens=40)
  ended = np.array(rollout.ended_B)
  assert ended.any()
  assert not ended.all()
  for row, length, end in zip(rollout.tokens_BR, rollout.length_B, ended):
    row = row.tolist()
    assert (row[length - 1] in EOS) == end
    assert not set(row[: length - 1]) & set(EOS)
    assert set(row[length:]) <= {EOS[0]}
    assert end or length == 40


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_layers_apart_sample_the_same_tokens(params, temperature):
  stacked, apart = (
    generate(params, PROMPTS, temperature=temperature, unroll=unroll, top_tokens=4)
    for unroll in (1, 0)
  )
  assert texts(apart) == texts(stacked)
  np.testing.assert_array_equal(apart.stats.ids_BRK, stacked.stats.ids_BRK)


@pytest.mark.parametrize(
  ("asked", "platform", "unroll"),
  [(None, "gpu", 0), (None, "tpu", 3), (None, "cpu", 3), (1, "gpu", 1), (0, "cpu", 0)],
)
def test_only_gpus_take_layers_apart_unasked(asked, platform, unroll):
  assert sampling.unrolled(asked, 3, platform) == unroll


def test_the_loop_stops_when_every_row_has_ended(params):
  """An untied head that only scores an EOS: all rows end at once, after one pass."""
  head = jnp.zeros((97, 32)).at[EOS[1]].set(params["final_norm"])
  hidden_bias = {**params, "head": head * 1e6}
  rollout = generate(hidden_bias, [[1, 2], [3, 4]], temperature=0.0, max_new_tokens=30)
  single = np.array(rollout.length_B) == 1
  assert (np.array(rollout.tokens_BR)[single, 0] == EOS[1]).all()
  assert (np.array(rollout.tokens_BR)[single, 1:] == EOS[0]).all()


def test_sampling_frequencies_follow_the_softmax():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = sampling.choose(jnp.tile(logits, (20_000, 1)), keys, 1.0, 1.0)
  share = np.bincount(drawn, minlength=4) / 20_000
  # Three standard errors of a share p at n = 20,000 are at most 0.011.
  np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.011)
  # At temperature 2 the probabilities are their square roots, renormalised.
  drawn = sampling.choose(jnp.tile(logits, (20_000, 1)), keys, 2.0, 1.0)
  root = np.sqrt([0.5, 0.3, 0.15, 0.05])
  share = np.bincount(drawn, minlength=4) / 20_000
  np.testing.assert_allclose(share, root / root.sum(), atol=0.011)


def test_each_token_is_a_draw_of_its_own(params):
  """All 97 tokens are as probable: 12.4 of 40 x 30 neighbours are equal, give or take
  3.5. With one key for a whole row all would be."""
  uniform = {**params, "head": jnp.zeros((97, 32))}
  rollout = generate(uniform, [[1]] * 40, max_new_tokens=31)
  pairs = [pair for row in texts(rollout) for pair in itertools.pairwise(row)]
  assert len(pairs) > 500
  assert sum(first == second for first, second in pairs) < 30


@pytest.mark.parametrize(
  ("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
  logits = jnp.log(jnp.array([[0.05, 0.5, 0.15, 0.3]]))
  order = [1, 3, 2, 0]
  finite = np.isfinite(np.array(sampling.keep_top_p(logits, top_p)))[0]
  assert set(np.flatnonzero(finite)) == set(order[:kept])


def test_numbers_that_leave_no_token_are_refused():
  keys = sampling.row_keys(0, 0, jnp.arange(1))
  for temperature, top_p, named in ((1.0, 0.0, "top_p=0"), (-1.0, 1.0, "temperature")):
    with pytest.raises(ValueError, match=named):
      sampling.choose(jnp.zeros((1, 4)), keys, temperature, top_p)


def test_prompts_of_the_same_width_compile_once(params):
  before = sampling.generate._cache_size()
  for step in range(3):
    generate(params, [[1, 2, 3, step]], width=23, step=step)
  assert sampling.generate._cache_size() == before + 1


def test_zero_and_full_limits_agree_on_a_prefix(params):
  short = generate(params, PROMPTS, max_new_tokens=4)
  long = generate(params, PROMPTS, max_new_tokens=12)
  for a, b in zip(texts(short), texts(long)):
    assert a == b[:4]


def test_rows_are_finite_while_they_read_what_is(params):
  base = dict(params, head=params["embed"])
  spoiled = base | {"embed": params["embed"].at[jnp.array([7, *EOS])].set(jnp.nan)}
  options = {"temperature": 0.0, "max_new_tokens": 40}
  prompts = [[i] for i in range(12, 44)]
  good = generate(base, prompts, **options)
  got = generate(spoiled, [*prompts, [7]], **options)
  drew_7 = np.array([7 in row[:-1] for row in texts(good)])
  assert np.array(good.finite_B).all()
  # A row that has ended reads its own EOS, and what it then says is not used.
  assert np.array(good.ended_B).any()
  assert np.array(got.finite_B).tolist() == [*~drew_7, False]
  for row, expected, spoilt in zip(texts(got), texts(good), drew_7):
    assert spoilt or row == expected
