"""The chunked head against the formula with a whole [tokens, vocabulary] array."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import losses, vocab_head
from tests.helpers import simulated_devices

WIDTH, VOCABULARY, K = 24, 203, 9  # a prime-ish vocabulary: no block divides it


def on_devices(count: int, code: str) -> str:
  """What the code prints in a process of so many pretended devices."""
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=False,
    env={
      **os.environ,
      "XLA_FLAGS": simulated_devices.flags(count),
      "JAX_PLATFORMS": "cpu",
    },
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def _inputs(*leading, dtype=jnp.float32, vocabulary=VOCABULARY):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(*leading, WIDTH)), dtype)
  embedding = jnp.asarray(rng.normal(0, 0.3, (vocabulary, WIDTH)), dtype)
  targets = jnp.asarray(rng.integers(0, vocabulary, leading), jnp.int32)
  ids = jnp.asarray(rng.integers(0, vocabulary, (*leading, K)), jnp.int32)
  return hidden, embedding, targets, ids


def _naive_logits(hidden, embedding):
  return hidden.astype(jnp.float32) @ embedding.astype(jnp.float32).T


def _naive_cross_entropy(hidden, embedding, targets):
  return losses.cross_entropy(_naive_logits(hidden, embedding), targets)


def _naive_gather(hidden, embedding, ids, temperature):
  logits = _naive_logits(hidden, embedding)
  logsumexp = jax.nn.logsumexp(logits / temperature, -1)
  return jnp.take_along_axis(logits, ids, -1), logsumexp


def _assert_close(got, expected, tolerance=1e-5):
  """Relative in norm, per tensor."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  assert got.shape == expected.shape
  assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 7, 64])
LEADING = pytest.mark.parametrize("leading", [(13,), (3, 5), ()], ids=str)


@CHUNKS
@LEADING
def test_cross_entropy_equals_naive(leading, chunk_size):
  hidden, embedding, targets, _ = _inputs(*leading)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=leading), jnp.float32)

  def run(f):
    def total(hidden, embedding):
      value = f(hidden, embedding, targets)
      return jnp.sum(value * weights), value

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, embedding)

  got, value = run(functools.partial(vocab_head.cross_entropy, chunk_size=chunk_size))
  expected, expected_value = run(_naive_cross_entropy)
  assert value.dtype == jnp.float32
  jax.tree.map(_assert_close, (value, *got), (expected_value, *expected))


@pytest.mark.parametrize("use", ["logits", "logsumexp", "both"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_gather_equals_naive(use, chunk_size):
  hidden, embedding, _, ids = _inputs(3, 5)
  rng = np.random.default_rng(2)
  by_logits = jnp.asarray(rng.normal(size=(3, 5, K)), jnp.float32)
  by_logsumexp = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)

  def run(f):
    def total(hidden, embedding):
      logits, logsumexp = f(hidden, embedding)
      value = jnp.sum(logits * by_logits) if use != "logsumexp" else 0
      # Under stop_gradient the backward pass takes its short way.
      weighted = jnp.sum(logsumexp * by_logsumexp)
      value += jax.lax.stop_gradient(weighted) if use == "logits" else weighted
      return value, (logits, logsumexp)

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, embedding)

  got = run(
    lambda h, e: vocab_head.gather_with_logsumexp(
      h, e, ids, chunk_size=chunk_size, temperature=1.5
    )
  )
  expected = run(lambda h, e: _naive_gather(h, e, ids, 1.5))
  jax.tree.map(_assert_close, got, expected)


@pytest.mark.parametrize("use", ["logits", "logsumexp", "both"])
def test_softcap_equals_naive(use):
  """Values and gradients; logits of a few units under a cap of 2 bend well."""
  hidden, embedding, targets, ids = _inputs(3, 5)
  rng = np.random.default_rng(2)
  by_logits = jnp.asarray(rng.normal(size=(3, 5, K)), jnp.float32)
  by_logsumexp = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)

  def naive(hidden, embedding):
    logits = 2.0 * jnp.tanh(_naive_logits(hidden, embedding) / 2.0)
    logsumexp = jax.nn.logsumexp(logits / 1.5, -1)
    return jnp.take_along_axis(logits, ids, -1), logsumexp

  def ours(hidden, embedding):
    return vocab_head.gather_with_logsumexp(
      hidden, embedding, ids, temperature=1.5, softcap=2.0, chunk_size=4
    )

  def run(f):
    def total(hidden, embedding):
      logits, logsumexp = f(hidden, embedding)
      value = 0.0
      if use != "logsumexp":
        value += jnp.sum(logits * by_logits)
      if use != "logits":
        value += jnp.sum(logsumexp * by_logsumexp)
      return value, (logits, logsumexp)

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, embedding)

  got, expected = run(ours), run(naive)
  jax.tree.map(_assert_close, got, expected)
  (plain, _), (capped, _) = (
    vocab_head.topk(hidden, embedding, 7),
    vocab_head.topk(hidden, embedding, 7, softcap=2.0),
  )
  _assert_close(capped, 2.0 * np.tanh(np.asarray(plain) / 2.0))
  loss = vocab_head.cross_entropy(hidden, embedding, targets, softcap=2.0)
  bent = 2.0 * jnp.tanh(_naive_logits(hidden, embedding) / 2.0)
  _assert_close(loss, losses.cross_entropy(bent, targets))


def test_repeated_ids_add_up():
  hidden, embedding, _, _ = _inputs(4)
  ids = jnp.full((4, 3), 5)
  got = jax.grad(lambda e: vocab_head.gather(hidden, e, ids).sum())(embedding)
  expected = jnp.zeros_like(embedding).at[5].set(3 * hidden.sum(0))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@CHUNKS
@LEADING
def test_topk_equals_naive(leading, chunk_size):
  hidden, embedding, _, _ = _inputs(*leading)
  values, ids, logsumexp = vocab_head.topk_with_logsumexp(
    hidden, embedding, K, chunk_size=chunk_size, temperature=1.5
  )
  logits = _naive_logits(hidden, embedding)
  expected_values, expected_ids = jax.lax.top_k(logits, K)
  np.testing.assert_array_equal(ids, expected_ids)
  _assert_close(values, expected_values)
  _assert_close(logsumexp, jax.nn.logsumexp(logits / 1.5, -1))


@pytest.mark.parametrize("k", [1, K, VOCABULARY])
@pytest.mark.parametrize(("chunk_size", "softcap"), [(None, None), (4, None), (7, 2.0)])
def test_cross_entropy_with_top_k_equals_naive(chunk_size, softcap, k):
  """Loss, logits, and a gradient to which the logits are constants."""
  hidden, embedding, targets, _ = _inputs(3, 5)

  def naive(hidden, embedding):
    logits = _naive_logits(hidden, embedding)
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    top = jax.lax.stop_gradient(jax.lax.top_k(logits, k)[0])
    return losses.cross_entropy(logits, targets), top

  def ours(hidden, embedding):
    return vocab_head.cross_entropy_with_top_k(
      hidden, embedding, targets, k, chunk_size=chunk_size, softcap=softcap
    )

  def run(f):
    def total(hidden, embedding):
      loss, top = f(hidden, embedding)
      return jnp.sum(loss * jnp.tanh(top).sum(-1)), (loss, top)

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, embedding)

  jax.tree.map(_assert_close, run(ours), run(naive))
  plain = vocab_head.cross_entropy(
    hidden, embedding, targets, chunk_size=chunk_size, softcap=softcap
  )
  np.testing.assert_array_equal(ours(hidden, embedding)[0], plain)


def test_more_logits_than_the_vocabulary_are_refused():
  hidden, embedding, targets, _ = _inputs(3)
  for k in (0, VOCABULARY + 1):
    with pytest.raises(ValueError, match=rf"k={k} is outside 1\.\.{VOCABULARY}"):
      vocab_head.cross_entropy_with_top_k(hidden, embedding, targets, k)


def test_topk_stops_gradients():
  hidden, embedding, _, _ = _inputs(6)
  gradients = jax.grad(
    lambda h, e: (
      vocab_head.topk_with_logsumexp(h, e, 3)[2].sum()
      + vocab_head.topk(h, e, 3)[0].sum()
    ),
    (0, 1),
  )(hidden, embedding)
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients)


def test_temperature_of_cross_entropy():
  hidden, embedding, targets, _ = _inputs(6)
  loss = vocab_head.cross_entropy(hidden, embedding, targets, temperature=0.7)
  _, logsumexp = vocab_head.gather_with_logsumexp(
    hidden, embedding, targets[..., None], temperature=0.7
  )
  logits = _naive_logits(hidden, embedding) / 0.7
  _assert_close(loss, losses.cross_entropy(logits, targets))
  _assert_close(logsumexp, jax.nn.logsumexp(logits, -1))


def test_bfloat16_inputs_give_float32_logits_and_bfloat16_gradients():
  hidden, embedding, targets, ids = _inputs(40, dtype=jnp.bfloat16)
  logits = vocab_head.gather(hidden, embedding, ids)
  assert logits.dtype == jnp.float32
  _assert_close(logits, _naive_gather(hidden, embedding, ids, 1.0)[0])
  got, expected = (
    jax.grad(lambda h, e, f=f: f(h, e, targets).sum(), (0, 1))(hidden, embedding)
    for f in (vocab_head.cross_entropy, _naive_cross_entropy)
  )
  for g, e in zip(got, expected):
    assert g.dtype == jnp.bfloat16
    _assert_close(g, e, tolerance=6e-3)  # bfloat16 keeps 8 bits


def test_mixed_types_keep_their_own_gradient_type():
  hidden, _, targets, _ = _inputs(5, dtype=jnp.bfloat16)
  _, embedding, _, _ = _inputs(5)
  gradients = jax.grad(
    lambda h, e: vocab_head.cross_entropy(h, e, targets).sum(), (0, 1)
  )(hidden, embedding)
  assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


def test_embedding_gradient_is_summed_in_float32():
  # 4096 equal bfloat16 terms of 1/4096: a bfloat16 sum stops growing at about 1/16.
  hidden = jnp.full((4096, 1), 1 / 4096, jnp.bfloat16)
  embedding = jnp.ones((8, 1), jnp.bfloat16)
  gradient = jax.grad(
    lambda e: vocab_head.gather(
      hidden, e, jnp.zeros((4096, 1), jnp.int32), chunk_size=64
    ).sum()
  )(embedding)
  np.testing.assert_array_equal(np.asarray(gradient[:, 0], np.float32), [1] + [0] * 7)


@pytest.mark.parametrize(("chunk_size", "softcap"), [(None, None), (4, 1.5)])
def test_kl_divergence_equals_float64(chunk_size, softcap):
  hidden, embedding, _, _ = _inputs(3, 5)
  rng = np.random.default_rng(2)
  # The reference may be of another width: only the vocabulary is shared.
  other_hidden = rng.normal(size=(3, 5, 8)).astype(np.float32)
  other_embedding = rng.normal(0, 0.4, (VOCABULARY, 8)).astype(np.float32)

  def log_p(hidden, embedding):
    logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
    if softcap:
      logits = softcap * np.tanh(logits / softcap)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  log_q, log_p0 = log_p(hidden, embedding), log_p(other_hidden, other_embedding)
  expected = (np.exp(log_p0) * (log_p0 - log_q)).sum(-1)
  measure = functools.partial(
    vocab_head.kl_divergence, chunk_size=chunk_size, softcap=softcap
  )
  found = measure(hidden, embedding, other_hidden, other_embedding)
  assert expected.min() > 0.01
  np.testing.assert_allclose(found, expected, rtol=2e-5)
  assert np.abs(measure(hidden, embedding, hidden, embedding)).max() < 1e-6
  with pytest.raises(ValueError, match="two vocabularies"):
    measure(hidden, embedding, other_hidden, other_embedding[1:])


def test_no_tokens():
  hidden, embedding, targets, ids = _inputs(0)
  assert vocab_head.cross_entropy(hidden, embedding, targets).shape == (0,)
  assert vocab_head.gather(hidden, embedding, ids).shape == (0, K)
  assert [x.shape for x in vocab_head.topk(hidden, embedding, 2)] == [(0, 2), (0, 2)]
  gradients = jax.grad(
    lambda h, e: vocab_head.cross_entropy(h, e, targets).sum(), (0, 1)
  )(hidden, embedding)
  assert gradients[0].shape == (0, WIDTH)
  np.testing.assert_array_equal(gradients[1], 0)


def test_vmap_and_jit_equal_plain():
  hidden, embedding, targets, ids = _inputs(4, 6)

  def total(hidden, embedding, targets, ids):
    logits, logsumexp = vocab_head.gather_with_logsumexp(
      hidden, embedding, ids, chunk_size=4
    )
    loss = vocab_head.cross_entropy(hidden, embedding, targets, chunk_size=4)
    return jnp.sum(logits**2) + jnp.sum(logsumexp) + jnp.sum(loss)

  f = jax.value_and_grad(total, (0, 1))
  plain = f(hidden, embedding, targets, ids)
  jax.tree.map(_assert_close, jax.jit(f)(hidden, embedding, targets, ids), plain)
  value, (to_hidden, to_embedding) = jax.vmap(f, (0, None, 0, 0))(
    hidden, embedding, targets, ids
  )
  jax.tree.map(_assert_close, (value.sum(), (to_hidden, to_embedding.sum(0))), plain)


def test_rematerialised_and_scanned_equal_plain():
  hidden, embedding, targets, _ = _inputs(4, 6)

  def total(embedding, hidden, targets):
    return vocab_head.cross_entropy(hidden, embedding, targets, chunk_size=4).sum()

  def scanned(embedding):
    body = jax.checkpoint(lambda carry, x: (carry + total(embedding, *x), None))
    return jax.lax.scan(body, jnp.float32(0), (hidden, targets))[0]

  plain = jax.grad(total)(embedding, hidden, targets)
  _assert_close(jax.grad(scanned)(embedding), plain)


# The size of the requirement: 4096 tokens, a vocabulary of 131072, width 512, K 512.
N, V, D = 4096, 131072, 512
HIDDEN, EMBEDDING = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((N, D), (V, D)))
TARGETS, IDS = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((N,), (N, 512)))
PROGRAMS = {
  "cross_entropy": (vocab_head.cross_entropy, TARGETS),
  "gather": (vocab_head.gather_with_logsumexp, IDS),
  "topk": (lambda h, e, _: vocab_head.topk_with_logsumexp(h, e, 512), TARGETS),
  "cross_entropy_gradient": (
    jax.value_and_grad(
      lambda h, e, t: vocab_head.cross_entropy(h, e, t).mean(), (0, 1)
    ),
    TARGETS,
  ),
  "cross_entropy_with_top_k_gradient": (
    jax.value_and_grad(
      lambda h, e, t: jnp.prod(
        jnp.array([x.mean() for x in vocab_head.cross_entropy_with_top_k(h, e, t, 20)])
      ),
      (0, 1),
    ),
    TARGETS,
  ),
  "gather_gradient": (
    jax.value_and_grad(
      lambda h, e, i: (vocab_head.gather(h, e, i) ** 2).mean(), (0, 1)
    ),
    IDS,
  ),
  "gather_and_logsumexp_gradient": (
    jax.value_and_grad(
      lambda h, e, i: sum(x.mean() for x in vocab_head.gather_with_logsumexp(h, e, i)),
      (0, 1),
    ),
    IDS,
  ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_temporaries_stay_below_a_sixteenth(name):
  program, last = PROGRAMS[name]
  compiled = jax.jit(program).lower(HIDDEN, EMBEDDING, last).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert 0 < temporaries <= N * V * 4 / 16


def test_stopped_logsumexp_skips_the_logits_of_the_backward_pass():
  hidden, embedding, _, ids = _inputs(64, vocabulary=512)

  def matmuls(stop):
    def total(hidden, embedding):
      logits, logsumexp = vocab_head.gather_with_logsumexp(
        hidden, embedding, ids, chunk_size=16
      )
      logsumexp = jax.lax.stop_gradient(logsumexp) if stop else logsumexp
      return logits.sum() + logsumexp.sum()

    program = jax.jit(jax.value_and_grad(total, (0, 1)))
    text = program.lower(hidden, embedding).compile().as_text()
    return text.count(" dot(")

  # Forward 1, backward 2, and one more where the probabilities are needed again.
  assert (matmuls(stop=True), matmuls(stop=False)) == (3, 4)


def test_tokens_sharded_over_devices_stay_sharded():
  # Each of 4 devices multiplies its own 64 tokens of a chunk of 256, and nothing but
  # sums of gradients and losses crosses the devices.
  code = """
import re, jax, jax.numpy as jnp
from raft_jax import vocab_head
from tests.helpers import simulated_devices
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def array(shape, dtype, *spec):
  sharding = jax.NamedSharding(mesh, jax.P(*spec))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
hidden = array((16, 64, 8), jnp.float32, "data")
embedding = array((4096, 8), jnp.float32)
ids = array((16, 64, 5), jnp.int32, "data")
def total(hidden, embedding, ids):
  results = vocab_head.gather_with_logsumexp(hidden, embedding, ids, chunk_size=256)
  return sum(x.sum() for x in results)
program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(hidden, embedding, ids)
text = program.compile().as_text()
print("f32[64,4096]" in text, "f32[256,4096]" in text)
names = "all-reduce|all-gather|all-to-all|collective-\\w+"
print(*sorted(set(re.findall(names, text))))
"""
  lines = on_devices(4, code).splitlines()
  assert lines == ["True False", "all-reduce"]


def test_top_logits_are_found_in_shards_of_the_vocabulary():
  """Rows over 2 devices and the vocabulary over 2, against the same on one device."""
  code = """
import jax, jax.numpy as jnp, numpy as np
from raft_jax import vocab_head
from raft_jax.distillation import token_weights
mesh = jax.make_mesh((2, 2), ("data", "tensor"),
  axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
hidden = jnp.asarray(rng.normal(size=(4, 6, 8)), jnp.float32)
embedding = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
targets = jnp.asarray(rng.integers(0, 64, (4, 6)), jnp.int32)
def total(hidden, embedding, targets):
  loss, top = vocab_head.cross_entropy_with_top_k(
    hidden, embedding, targets, 20, partition=jax.P("data", "tensor"), chunk_size=8)
  return (token_weights.eaft(top) * loss).sum(), top
f = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
theirs = f(hidden, embedding, targets)
with jax.set_mesh(mesh):
  def put(x, *spec): return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
  ours = f(put(hidden, "data"), put(embedding, "tensor"), put(targets, "data"))
for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
  np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
"""
  on_devices(4, code)


def test_inside_shard_map_gradient_and_tiles_are_those_of_each_devices_tokens():
  """Against plain logits, with shard_map's own checks; the head is on every device."""
  code = """
import jax, jax.numpy as jnp, numpy as np
from raft_jax import losses, vocab_head
from tests.helpers import simulated_devices
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
hidden = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
embedding = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
targets = jnp.asarray(rng.integers(0, 64, 32), jnp.uint16)
def plain(hidden, embedding, targets):
  return losses.cross_entropy(hidden @ embedding.T, targets).sum()
def tiled(hidden, embedding, targets):
  assert vocab_head._devices() == 1
  found = vocab_head.cross_entropy(hidden, embedding, targets, chunk_size=2)
  return jax.lax.psum(found.sum(), "data")
def grads(hidden, embedding, targets):
  return jax.value_and_grad(tiled, (0, 1))(hidden, embedding, targets)
share = jax.P("data")
spread = jax.shard_map(
  grads, mesh=mesh, in_specs=(share, jax.P(), share),
  out_specs=(jax.P(), (share, jax.P())),
)
theirs = jax.value_and_grad(plain, (0, 1))(hidden, embedding, targets)
ours = jax.jit(spread)(hidden, embedding, targets)
for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
  np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
"""
  on_devices(4, code)


def test_the_top_k_of_sharded_logits_is_that_of_the_whole():
  """With ties across devices; sizes that do not divide stay whole on that axis."""
  code = """
import jax, jax.numpy as jnp, numpy as np
from raft_jax import vocab_head
from tests.helpers import simulated_devices
auto = (jax.sharding.AxisType.Auto,) * 3
mesh = jax.make_mesh((2, 1, 4), ("data", "fsdp", "tensor"), axis_types=auto)
partition = jax.P(("data", "fsdp"), "tensor")
rng = np.random.default_rng(0)
whole = [((6, 64), k) for k in (5, 40, 64)]
for shape, k in [*whole, ((5, 64), 7), ((6, 63), 7)]:
  logits = jnp.asarray(rng.integers(0, 9, shape), jnp.float32)
  expected = jax.lax.top_k(logits, k)
  with jax.set_mesh(mesh):
    top_k = jax.jit(vocab_head.sharded_top_k, static_argnums=(1, 2))
    found = top_k(logits, k, partition)
  for ours, theirs in zip(found, expected):
    np.testing.assert_array_equal(ours, theirs, err_msg=str(shape))
  for ours, theirs in zip(vocab_head.sharded_top_k(logits, k, partition), expected):
    np.testing.assert_array_equal(ours, theirs)
"""
  on_devices(8, code)


@pytest.mark.parametrize(
  ("options", "named"),
  [({"chunk_size": 0}, "chunk_size"), ({"temperature": 0.0}, "temperature")],
)
def test_bad_numbers_are_named(options, named):
  hidden, embedding, targets, ids = _inputs(3)
  with pytest.raises(ValueError, match=named):
    vocab_head.cross_entropy(hidden, embedding, targets, **options)
  with pytest.raises(ValueError, match=named):
    vocab_head.gather_with_logsumexp(hidden, embedding, ids, **options)
  with pytest.raises(ValueError, match=named):
    vocab_head.topk_with_logsumexp(hidden, embedding, 2, **options)


def test_bad_shapes_are_named():
  hidden, embedding, targets, ids = _inputs(3)
  with pytest.raises(ValueError, match="embedding"):
    vocab_head.cross_entropy(hidden, embedding.T, targets)
  with pytest.raises(ValueError, match="targets"):
    vocab_head.cross_entropy(hidden, embedding, targets[:2])
  with pytest.raises(ValueError, match="ids"):
    vocab_head.gather(hidden, embedding, ids[:2])
  for k in (0, VOCABULARY + 1):
    with pytest.raises(ValueError, match=f"k={k}"):
      vocab_head.topk(hidden, embedding, k)


def test_chunks_divide_among_the_devices_where_they_can():
  """48 tokens by about 10: five chunks of 10, or six of 8, one token to each device."""
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((48, 4), (11, 4))]

  def chunks() -> list[int]:
    jaxpr = jax.make_jaxpr(lambda h, e: vocab_head.topk(h, e, 2, chunk_size=10))
    found = jaxpr(*shapes).eqns
    return [one.params["length"] for one in found if one.primitive.name == "scan"]

  assert chunks() == [5]
  mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
  with jax.sharding.use_abstract_mesh(mesh):
    assert chunks() == [6]
