"""Losses against float64 numpy written from the paper's Eq. 5 and 8-10."""

import functools
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax import test_util

from raft_jax import balance, losses

CASES = [
  {"kind": kind, "beta": beta, "support": support, "tail": tail}
  for kind, beta, support, tail in [
    ("forward", None, "full", "renormalize"),
    ("forward", None, "teacher", "renormalize"),
    ("forward", None, "teacher", "bucket"),
    ("forward", None, "student", "bucket"),
    ("reverse", None, "full", "renormalize"),
    ("reverse", None, "teacher", "bucket"),
    ("reverse", None, "student", "renormalize"),
    ("jsd", 0.1, "full", "renormalize"),
    ("jsd", 0.7, "teacher", "renormalize"),
    ("jsd", 0.1, "student", "bucket"),
  ]
]


@pytest.fixture(scope="module", autouse=True)
def optimised():
  """Compiled as users compile: elsewhere tests may trade rounding for compile time."""
  saved = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  jax.clear_caches()
  yield
  jax.config.update("jax_disable_most_optimizations", saved)


def _name(case):
  return "-".join(map(str, case.values()))


def _logits(seed, *shape, scale=3.0):
  student, teacher = np.random.default_rng(seed).normal(0, scale, (2, *shape))
  # Rounded to float32, so that both sides start from the same numbers.
  return student.astype(np.float32), teacher.astype(np.float32)


def _softmax(logits):
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def _reference(
  student, teacher, *, kind, beta, support, k, tail, temperature, scale_by_t2
):
  """Eq. 8-10 token by token: full softmax first, then the support, in float64."""
  vocabulary = student.shape[-1]
  p_NV = _softmax(student.reshape(-1, vocabulary).astype(np.float64) / temperature)
  q_NV = _softmax(teacher.reshape(-1, vocabulary).astype(np.float64) / temperature)
  values = []
  for p, q in zip(p_NV, q_NV):
    if support != "full":
      ids = np.argsort(-(q if support == "teacher" else p), kind="stable")[:k]
      inside_p, inside_q = p[ids], q[ids]
      if tail == "renormalize":
        p, q = inside_p / inside_p.sum(), inside_q / inside_q.sum()
      else:
        p = np.append(inside_p, np.delete(p, ids).sum())
        q = np.append(inside_q, np.delete(q, ids).sum())
    if kind == "jsd":
      m = beta * q + (1 - beta) * p
      value = beta * _kl(q, m) + (1 - beta) * _kl(p, m)
    else:
      value = _kl(q, p) if kind == "forward" else _kl(p, q)
    values.append(value * (temperature**2 if scale_by_t2 else 1))
  return np.reshape(values, student.shape[:-1])


def _kl(a, b):
  a, b = a[a > 0], b[a > 0]
  return np.sum(a * np.log(a / b))


@functools.cache
def _compiled(**options):
  return jax.jit(functools.partial(losses.divergence, **options))


def _compare(case, student, teacher):
  """Values [6] and both gradients [6, 24] at k = 6, T = 1.5: one program per case."""
  return _compare_function(**case)(student, teacher)


@functools.cache
def _compare_function(support, **case):
  k = None if support == "full" else 6

  def total(student, teacher):
    values = losses.divergence(
      student, teacher, support=support, k=k, temperature=1.5, **case
    )
    return values.sum(), values

  def run(student, teacher):
    gradients, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, *gradients

  return jax.jit(run)


SETTINGS = [
  {"shape": (2, 3, 11), "k": 4, "temperature": 0.7, "scale_by_t2": False},
  {"shape": (40, 200), "k": 150, "temperature": 2.0, "scale_by_t2": True},
]


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
  seed=strategies.integers(0, 2**31), scale=strategies.floats(0.05, 8.0)
)
@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda x: f"{x['shape']}")
def test_divergence_equals_float64_reference(case, setting, seed, scale):
  setting = dict(setting)
  student, teacher = _logits(seed, *setting.pop("shape"), scale=scale)
  options = {**case, **setting}
  if case["support"] == "full":
    options["k"] = None
  expected = _reference(student, teacher, **options)
  got = _compiled(**options)(student, teacher)
  assert got.dtype == jnp.float32
  # The absolute part is what rounding of the log-probabilities does to tiny values.
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [1, 16, 512])
def test_topk_distillation_equals_float64_reference(k):
  student, teacher = _logits(0, 4, 5, 1000)
  expected = _reference(
    student,
    teacher,
    kind="forward",
    beta=None,
    support="teacher",
    k=k,
    tail="renormalize",
    temperature=1.5,
    scale_by_t2=True,
  )
  got = losses.topk_distillation(student, teacher, k=k)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-12)


def test_topk_distillation_defaults_are_the_papers():
  student, teacher = _logits(1, 3, 600)
  got = losses.topk_distillation(student, teacher)
  explicit = losses.divergence(
    student, teacher, kind="forward", support="teacher", k=512, temperature=1.5
  )
  np.testing.assert_array_equal(got, explicit)


def test_golden_value():
  # Two outcomes: q = (3/4, 1/4), p = (1/2, 1/2), T = 1.
  # KL(q||p) = 3/4 log(3/2) + 1/4 log(1/2); KL(p||q) = 1/2 log(2/3) + 1/2 log 2.
  teacher, student = jnp.log(jnp.array([3.0, 1.0])), jnp.zeros(2)
  forward = losses.divergence(student, teacher, kind="forward")
  reverse = losses.divergence(student, teacher, kind="reverse")
  np.testing.assert_allclose(
    forward, 0.75 * np.log(1.5) + 0.25 * np.log(0.5), rtol=1e-6
  )
  np.testing.assert_allclose(reverse, 0.5 * np.log(2 / 3) + 0.5 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_gradient_equals_finite_differences(case):
  with jax.enable_x64():
    student, teacher = (x.astype(np.float64) for x in _logits(2, 2, 9, scale=1.0))
    k = None if case["support"] == "full" else 4
    test_util.check_grads(
      lambda x: _compiled(k=k, temperature=1.5, **case)(x, teacher),
      (jnp.asarray(student),),
      order=1,
      modes=["rev"],
      atol=1e-7,
      rtol=1e-7,
      eps=1e-6,
    )


def test_float32_gradient_equals_closed_form():
  # d KL(q||p) T² / d v = T (p - q) on the support and 0 outside.
  student, teacher = _logits(3, 6, 50)
  gradient = jax.grad(
    lambda x: losses.topk_distillation(x, teacher, k=8, temperature=1.5).sum()
  )(student)
  expected = np.zeros(student.shape)
  for row, (v, u) in enumerate(zip(student, teacher)):
    ids = np.argsort(-u)[:8]
    p, q = (_softmax(x[ids].astype(np.float64) / 1.5) for x in (v, u))
    expected[row, ids] = 1.5 * (p - q)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_no_gradient_reaches_the_teacher(case):
  _, to_student, to_teacher = _compare(case, *_logits(4, 6, 24))
  assert np.all(np.abs(to_student).max(-1) > 1e-3)
  np.testing.assert_array_equal(to_teacher, 0)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_equal_logits_give_zero_and_zero_gradient(case):
  _, logits = _logits(5, 6, 24)
  values, gradient, _ = _compare(case, logits, logits)
  # A plain sum of q log(q/p) leaves 1e-7 here, of either sign.
  np.testing.assert_allclose(values, 0, atol=1e-11)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
  seed=strategies.integers(0, 2**31),
  noise=strategies.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 1.0, 30.0]),
)
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_never_negative_however_close(case, seed, noise):
  student, teacher = _logits(seed, 6, 24)
  student = (teacher + noise * student).astype(np.float32)
  assert np.all(_compare(case, student, teacher)[0] >= 0)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_finite_at_extreme_logits(case):
  rows = np.zeros((6, 24), np.float32)
  rows[0, 1:] = -1e9
  rows[1] = np.where(np.arange(24) % 3, -1e9, 0)
  rows[2] = 5
  rows[3, :3] = 1e9, -1e9, 0
  rows[4] = np.where(np.arange(24) % 2, -np.inf, np.arange(24))
  rows[5] = -1e9
  for shift in range(6):  # each row meets every other
    for result in _compare(case, rows, np.roll(rows, shift, 0)):
      assert np.all(np.isfinite(result))


def test_forbidden_tokens_equal_their_removal():
  # A vocabulary padded with -inf on both sides is the shorter vocabulary.
  student, teacher = _logits(6, 4, 12)
  padding = np.full((4, 3), -np.inf, np.float32)
  for kind in ("forward", "reverse"):
    np.testing.assert_allclose(
      losses.divergence(
        np.concatenate([student, padding], -1),
        np.concatenate([teacher, padding], -1),
        kind=kind,
      ),
      losses.divergence(student, teacher, kind=kind),
      rtol=1e-6,
    )


def test_support_of_the_whole_vocabulary_equals_full():
  student, teacher = _logits(7, 6, 24)
  full = losses.divergence(student, teacher, support="full")
  for support in ("teacher", "student"):
    for tail in losses.TAILS:
      for k in (None, 24):
        got = losses.divergence(student, teacher, support=support, tail=tail, k=k)
        np.testing.assert_allclose(got, full, rtol=1e-6)


def test_bucket_holds_the_rest_of_the_mass():
  student, teacher = _logits(8, 5, 24)
  ids = np.argsort(-teacher, -1)[:, :6]
  p, q = _softmax(student.astype(np.float64)), _softmax(teacher.astype(np.float64))
  masses = []
  for logits, probs in ((student, p), (teacher, q)):
    inside = np.take_along_axis(probs, ids, -1)
    logsumexp = jax.nn.logsumexp(logits, -1)
    mass = losses.mass_on_support(np.take_along_axis(logits, ids, -1), logsumexp)
    np.testing.assert_allclose(mass, inside.sum(-1), rtol=1e-5)
    masses.append(np.append(inside, 1 - np.asarray(mass)[:, None], -1))
    np.testing.assert_allclose(masses[-1].sum(-1), 1, rtol=1e-6)
  expected = [_kl(a, b) for a, b in zip(masses[1], masses[0])]
  got = losses.divergence(student, teacher, k=6, tail="bucket")
  np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_bucket_sees_mass_outside_the_support():
  # The student agrees on S but puts half of its mass outside.
  teacher = jnp.log(jnp.array([0.6, 0.39, 0.01]))
  student = jnp.log(jnp.array([0.6, 0.39, 0.99]))
  assert losses.divergence(student, teacher, k=2) < 1e-7
  assert losses.divergence(student, teacher, k=2, tail="bucket") > 0.5


def test_gathered_support_equals_whole_logits():
  student, teacher = _logits(9, 3, 4, 40)
  ids = np.argsort(-teacher, -1)[..., :7]
  at_ids = [np.take_along_axis(x, ids, -1) for x in (student, teacher)]
  logsumexps = {
    "student_logsumexp": jax.nn.logsumexp(student / 1.5, -1),
    "teacher_logsumexp": jax.nn.logsumexp(teacher / 1.5, -1),
  }
  for tail, extra in (("renormalize", {}), ("bucket", logsumexps)):
    np.testing.assert_allclose(
      losses.divergence_on_support(*at_ids, temperature=1.5, **extra),
      losses.divergence(student, teacher, k=7, tail=tail, temperature=1.5),
      rtol=1e-5,
    )


def test_jsd_limits():
  # JSD_β / β -> KL(q||p) as β -> 0 and JSD_β / (1 - β) -> KL(p||q) as β -> 1.
  student, teacher = _logits(10, 6, 15, scale=1.0)
  forward = losses.divergence(student, teacher, kind="forward")
  reverse = losses.divergence(student, teacher, kind="reverse")
  low = losses.divergence(student, teacher, kind="jsd", beta=1e-4) / 1e-4
  high = losses.divergence(student, teacher, kind="jsd", beta=1 - 1e-4) / 1e-4
  np.testing.assert_allclose(low, forward, rtol=5e-3)
  np.testing.assert_allclose(high, reverse, rtol=5e-3)
  swapped = losses.divergence(teacher, student, kind="jsd", beta=0.3)
  same = losses.divergence(student, teacher, kind="jsd", beta=0.7)
  np.testing.assert_allclose(swapped, same, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_permutations_do_not_matter(case):
  student, teacher = _logits(11, 6, 24)
  vocabulary = np.random.default_rng(0).permutation(24)
  tokens = np.random.default_rng(1).permutation(6)
  values, gradient, _ = _compare(case, student, teacher)
  permuted, permuted_gradient, _ = _compare(
    case, student[tokens][:, vocabulary], teacher[tokens][:, vocabulary]
  )
  np.testing.assert_allclose(permuted, values[tokens], rtol=1e-5)
  np.testing.assert_allclose(
    permuted_gradient, gradient[tokens][:, vocabulary], rtol=1e-5, atol=1e-6
  )


def test_t2_multiplies_by_the_square():
  student, teacher = _logits(12, 3, 20)
  scaled, plain = (
    losses.divergence(student, teacher, temperature=1.5, scale_by_t2=flag)
    for flag in (True, False)
  )
  np.testing.assert_allclose(scaled, 2.25 * plain, rtol=1e-6)


def test_shift_of_logits_does_not_matter():
  # 4096 is exact in float32, and so are these logits + 4096.
  student, teacher = (np.round(x * 64) / 64 for x in _logits(13, 4, 20))
  np.testing.assert_array_equal(
    losses.divergence(student + 4096, teacher - 4096, k=5),
    losses.divergence(student, teacher, k=5),
  )
  targets = np.array([1, 2, 3, 4])
  np.testing.assert_array_equal(
    losses.cross_entropy(student + 4096, targets),
    losses.cross_entropy(student, targets),
  )


def test_bfloat16_is_computed_in_float32():
  student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in _logits(14, 4, 30))
  got = losses.divergence(student, teacher, k=6)
  expected = losses.divergence(
    student.astype(jnp.float32), teacher.astype(jnp.float32), k=6
  )
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, expected)
  targets = jnp.arange(4)
  assert losses.cross_entropy(student, targets).dtype == jnp.float32
  gradient = jax.grad(lambda x: losses.divergence(x, teacher, k=6).sum())(student)
  assert gradient.dtype == jnp.bfloat16


def test_jit_equals_eager():
  student, teacher = _logits(15, 4, 30)
  targets, mask = np.arange(4), np.array([True, False, True, True])
  for f, arguments in (
    (functools.partial(losses.topk_distillation, k=8), (student, teacher)),
    (functools.partial(losses.divergence, tail="bucket", k=8), (student, teacher)),
    (losses.cross_entropy, (student, targets)),
    (losses.masked_mean, (student[:, 0], mask)),
  ):
    np.testing.assert_allclose(jax.jit(f)(*arguments), f(*arguments), rtol=1e-6)


def test_cross_entropy_equals_float64_reference():
  logits, _ = _logits(16, 3, 5, 100)
  targets = np.random.default_rng(0).integers(0, 100, (3, 5))
  probs = _softmax(logits.astype(np.float64))
  expected = -np.log(np.take_along_axis(probs, targets[..., None], -1))[..., 0]
  got = losses.cross_entropy(logits, targets)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  gradient = jax.grad(lambda x: losses.cross_entropy(x, targets).sum())(logits)
  np.testing.assert_allclose(
    gradient, probs - np.eye(100)[targets], rtol=1e-5, atol=1e-6
  )
  extreme = np.array([[0, -1e9, 1e9]], np.float32)
  np.testing.assert_array_equal(losses.cross_entropy(extreme, np.array([2])), 0)
  assert np.isfinite(losses.cross_entropy(extreme, np.array([1]))).all()


@functools.partial(jax.jit, static_argnames="per")
def _masked_mean(values, mask, per):
  value, gradient = jax.value_and_grad(losses.masked_mean)(values, mask, per=per)
  return value, gradient, losses.mean_weights(mask, per=per)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  seed=strategies.integers(0, 2**31), per=strategies.sampled_from(losses.MEANS)
)
def test_masked_mean_equals_dropping(seed, per):
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(5, 7)).astype(np.float32)
  mask = rng.random((5, 7)) < rng.random((5, 1)) * (rng.random((5, 1)) < 0.8)
  kept = [row[keep].astype(np.float64) for row, keep in zip(values, mask)]
  kept = [row for row in kept if len(row)]
  if per == "token":
    kept = [np.concatenate(kept)] if kept else []
  expected = np.mean([row.mean() for row in kept]) if kept else 0.0
  poisoned = np.where(mask, values, rng.choice([np.nan, np.inf, -np.inf], (5, 7)))
  got, gradient, weights = _masked_mean(poisoned.astype(np.float32), mask, per=per)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, weights, rtol=1e-6)
  np.testing.assert_array_equal(gradient[~mask], 0)


def test_importance_weights_are_ratios_up_to_a_bound():
  """0.5 / 0.4 below the bound, 0.9 / 0.1 above it, and a token that has become rare."""
  now, then = jnp.log(jnp.array([0.5, 0.9, 1e-4])), jnp.log(jnp.array([0.4, 0.1, 0.5]))
  weights = losses.truncated_importance_weights(now, then, max_weight=2.0)
  np.testing.assert_allclose(weights, [1.25, 2.0, 2e-4], rtol=1e-5)
  slope = jax.grad(
    lambda x: jnp.sum(losses.truncated_importance_weights(x, then, max_weight=2.0))
  )(now)
  np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("per", losses.MEANS)
def test_mean_of_nothing_is_zero_with_zero_gradient(per):
  value, gradient = jax.value_and_grad(losses.masked_mean)(
    np.full((3, 4), np.nan, np.float32), np.zeros((3, 4), bool), per=per
  )
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def test_the_two_means_differ_where_lengths_do():
  # One sequence of one token worth 1, one of three tokens worth 0.
  values = np.array([[1.0, 9, 9], [0, 0, 0]], np.float32)
  mask = np.array([[1, 0, 0], [1, 1, 1]])
  np.testing.assert_allclose(losses.masked_mean(values, mask), 1 / 2)
  np.testing.assert_allclose(losses.masked_mean(values, mask, per="token"), 1 / 4)


@pytest.mark.parametrize("per", losses.MEANS)
def test_means_of_float32_stay_float32_under_x64(per):
  with jax.enable_x64(True):
    values = jnp.ones((2, 3), jnp.float32)
    assert losses.masked_mean(values, values > 0, per=per).dtype == jnp.float32
    # The recipe of the README: the weights are the cotangent.
    _, pullback = jax.vjp(
      lambda v: {name: losses.masked_mean(v, v > 0, per=per) for name in ("sft", "kd")},
      values,
    )
    (gradient,) = pullback(balance.loss_weights(balance.ema_init(2.0)))
    assert gradient.sum() == pytest.approx(3.0)


@pytest.mark.parametrize("per", losses.MEANS)
def test_micro_batches_add_up_to_the_batch(per):
  rng = np.random.default_rng(0)
  values = rng.normal(size=(8, 6)).astype(np.float32)
  mask = rng.random((8, 6)) < 0.4
  mask[2] = False
  weights = losses.mean_weights(mask, per=per)
  np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
  for parts in (1, 2, 4, 8):
    total = sum(
      losses.weighted_sum(v, w)
      for v, w in zip(np.split(values, parts), np.split(np.asarray(weights), parts))
    )
    np.testing.assert_allclose(
      total, losses.masked_mean(values, mask, per=per), rtol=1e-5
    )


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"kind": "backward"}, "kind"),
    ({"kind": "jsd"}, "beta"),
    ({"kind": "jsd", "beta": 0.0}, "beta"),
    ({"kind": "jsd", "beta": 1.0}, "beta"),
    ({"support": "both"}, "support"),
    ({"tail": "drop"}, "tail"),
    ({"k": 11}, "k=11"),
    ({"k": 0}, "k=0"),
    ({"support": "full", "k": 11}, "k=11"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": -1.0, "k": 3, "tail": "bucket"}, "temperature"),
  ],
)
def test_bad_arguments_are_named(options, named):
  student, teacher = _logits(17, 2, 10)
  with pytest.raises(ValueError, match=named):
    losses.divergence(student, teacher, **options)


def test_bad_shapes_are_named():
  student, teacher = _logits(18, 2, 10)
  with pytest.raises(ValueError, match="teacher_logits"):
    losses.divergence(student, teacher[:, :9])
  with pytest.raises(ValueError, match="teacher_logits_K"):
    losses.divergence_on_support(student, teacher[:, :9])
  with pytest.raises(ValueError, match="teacher_logsumexp"):
    losses.divergence_on_support(student, teacher, student_logsumexp=np.zeros(2))
  with pytest.raises(ValueError, match="targets"):
    losses.cross_entropy(student, np.zeros((2, 1), int))
  with pytest.raises(ValueError, match="mask"):
    losses.masked_mean(np.zeros((2, 3)), np.zeros(3, bool))
  with pytest.raises(ValueError, match="per"):
    losses.masked_mean(np.zeros((2, 3)), np.zeros((2, 3), bool), per="batch")


def test_the_three_rooms_need_only_jax_optax_numpy():
  # Top-level modules that importing jax, optax and numpy alone brings are allowed.
  code = """
import sys, jax, optax, numpy
before = {name.partition(".")[0] for name in sys.modules}
import raft_jax.losses, raft_jax.balance, raft_jax.vocab_head
print(*sorted({name.partition(".")[0] for name in sys.modules} - before))
print(*sorted(name for name in sys.modules if name.startswith("raft_jax")))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
  lines = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout.splitlines()
  assert lines[0].split() == ["raft_jax"]
  modules = {
    "raft_jax",
    "raft_jax.losses",
    "raft_jax.balance",
    "raft_jax.vocab_head",
  }
  assert set(lines[1].split()) == modules
  heavy = {"flax", "transformers", "torch", "orbax", "grain", "pydantic", "yaml"}
  assert not heavy & set(lines[2].split())
