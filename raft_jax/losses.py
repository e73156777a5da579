"""Pure losses on arrays: cross-entropy, one divergence kernel, one masked mean.

Each loss returns one value per token; only `masked_mean` reduces. No function knows a
model, a batch or a config, so all of them can be used in another JAX stack: this file
needs jax only. The arithmetic is float32 or better for inputs of any type.

Shapes in names: B batch, T tokens, V vocabulary, K ids of a support (`logits_K` may
have any leading dimensions). Divergences are in nats.
"""

import jax
import jax.numpy as jnp

KINDS = ("forward", "reverse", "jsd")
SUPPORTS = ("full", "teacher", "student")
TAILS = ("renormalize", "bucket")
MEANS = ("sequence", "token")

# Stands for log 0: its exponential is 0 and, unlike -inf, 0 times it is 0.
_LOG_ZERO = -1e30


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Negative log-likelihood of each target token.

  .. math:: L_t = -\\log \\mathrm{softmax}(u_t)_{y_t}

  Eq. 5 of RAFT before its means, which `masked_mean` applies. There is no "ignore" id:
  where the mask is False, use any id of the vocabulary.

  Args:
    logits: Unnormalised log-probabilities u, `[..., V]`. Position t must predict
      target t: shift before the call.
    targets: Token ids y in [0, V), integers, `[...]`.

  Returns:
    Loss in nats per token, `[...]`, float32.

  Raises:
    ValueError: If `targets` lacks the leading shape of `logits`.
  """
  if jnp.shape(targets) != jnp.shape(logits)[:-1]:
    raise ValueError(
      f"targets has shape {jnp.shape(targets)}, "
      f"but logits {jnp.shape(logits)} needs {jnp.shape(logits)[:-1]}"
    )
  log_probs = jax.nn.log_softmax(_at_least_float32(logits), axis=-1)
  return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def divergence(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  kind: str = "forward",
  beta: float | None = None,
  support: str = "teacher",
  k: int | None = None,
  tail: str = "renormalize",
  temperature: float = 1.0,
  scale_by_t2: bool = True,
) -> jax.Array:
  """Divergence between teacher and student at each token.

  .. math::
    D_{forward} = \\sum_a q_a \\log (q_a / p_a), \\quad
    D_{reverse} = \\sum_a p_a \\log (p_a / q_a), \\quad
    D_{jsd} = \\beta KL(q \\| m) + (1 - \\beta) KL(p \\| m), \\quad
    m = \\beta q + (1 - \\beta) p

  with q the teacher's and p the student's softmax of logits / `temperature` on the
  support. Sources: forward KL, Hinton et al., arXiv 1503.02531; jsd, GKD of Agarwal et
  al., arXiv 2306.13649 (it tends to 0, not to a KL, as β goes to 0 or 1); bucket, SDPO,
  arXiv 2601.20802. No gradient reaches the teacher or the choice of the support.

  Args:
    student_logits, teacher_logits: `[..., V]`; both predict the same tokens.
    kind: "forward", "reverse" or "jsd".
    beta: Weight of the teacher in "jsd", in (0, 1); the other kinds ignore it.
    support: Tokens to compare: the "full" vocabulary, or the `k` most probable tokens
      of the "teacher" or of the "student".
    k: Size of a top-K support; None means the whole vocabulary.
    tail: Mass outside the support: "renormalize" drops it, "bucket" keeps it as one.
    temperature: Softmax temperature, a static number > 0.
    scale_by_t2: Whether to multiply by `temperature`², which makes the size of the
      gradient nearly independent of the temperature.

  Returns:
    Nats per token, `[...]`, float32, >= 0; 0 for equal logits, up to about 1e-12.

  Raises:
    ValueError: If the shapes differ, or an argument is unknown or out of range.
  """
  _check_divergence(student_logits, teacher_logits, support, k, tail, temperature)
  student = _at_least_float32(student_logits)
  teacher = _at_least_float32(teacher_logits)
  if support != "full" and k is not None:
    chooser = teacher if support == "teacher" else student
    ids_K = jax.lax.top_k(jax.lax.stop_gradient(chooser), k)[1]
    with_rest = tail == "bucket" and k < jnp.shape(student)[-1]
    student = _restrict(student, ids_K, temperature, with_rest)
    teacher = _restrict(teacher, ids_K, temperature, with_rest)
  return divergence_on_support(
    student,
    teacher,
    kind=kind,
    beta=beta,
    temperature=temperature,
    scale_by_t2=scale_by_t2,
  )


def divergence_on_support(
  student_logits_K: jax.Array,
  teacher_logits_K: jax.Array,
  *,
  kind: str = "forward",
  beta: float | None = None,
  temperature: float = 1.0,
  scale_by_t2: bool = True,
  student_logsumexp: jax.Array | None = None,
  teacher_logsumexp: jax.Array | None = None,
) -> jax.Array:
  """`divergence` of logits that were gathered at the support.

  A softmax that is restricted to K tokens and renormalised is the softmax of their K
  logits, so the rest of the vocabulary is not needed. With both log-sum-exps the K
  tokens keep their true probabilities, and one more outcome has 1 minus their sum.
  float32 resolves this difference to a unit in the last place of the log-sum-exp (1e-7
  near 0, 2e-6 at 25); `divergence` sums the mass outside the support itself.

  Args:
    student_logits_K: Student's logits at the ids of the support, `[..., K]`.
    teacher_logits_K: Teacher's logits at the same ids, `[..., K]`; no gradient.
    kind, beta, temperature, scale_by_t2: As in `divergence`.
    student_logsumexp: log Σ exp(logits / temperature) over the whole vocabulary,
      `[...]`. Together with the teacher's it adds the tail bucket.
    teacher_logsumexp: The same for the teacher; no gradient.

  Returns:
    Divergence in nats per token, `[...]`, float32.

  Raises:
    ValueError: If shapes differ, one log-sum-exp is missing, or an argument is wrong.
  """
  _check_choice("kind", kind, KINDS)
  _check_temperature(temperature)
  if jnp.shape(student_logits_K) != jnp.shape(teacher_logits_K):
    raise ValueError(
      f"student_logits_K has shape {jnp.shape(student_logits_K)}, but "
      f"teacher_logits_K {jnp.shape(teacher_logits_K)}: gather both at the same ids"
    )
  if (student_logsumexp is None) != (teacher_logsumexp is None):
    raise ValueError("give student_logsumexp and teacher_logsumexp, or neither")

  log_p = _log_probs(student_logits_K, temperature, student_logsumexp)
  log_q = jax.lax.stop_gradient(
    _log_probs(teacher_logits_K, temperature, teacher_logsumexp)
  )
  if kind == "forward":
    value = _kl(log_q, log_p)
  elif kind == "reverse":
    value = _kl(log_p, log_q)
  else:
    if beta is None or not 0 < beta < 1:
      raise ValueError(f"beta={beta}: kind='jsd' needs a beta inside (0, 1)")
    log_m = jnp.logaddexp(jnp.log(beta) + log_q, jnp.log1p(-beta) + log_p)
    value = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
  return value * temperature**2 if scale_by_t2 else value


def topk_distillation(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  k: int = 512,
  temperature: float = 1.5,
) -> jax.Array:
  """RAFT's distillation loss at each token (Eq. 8-10 of arXiv 2606.00147).

  For other programs, in one call from whole logits. A run of this project never has
  whole logits, and computes the same with `divergence_on_support`.

  .. math::
    L_t = T^2 \\, KL(\\tilde q_t \\| \\tilde p_t), \\quad
    \\tilde q_t = \\mathrm{softmax}(u_t / T)_{|S}, \\;
    \\tilde p_t = \\mathrm{softmax}(v_t / T)_{|S}, \\;
    S = \\mathrm{TopK}(u_t)

  with u the teacher's and v the student's logits, both renormalised on the teacher's
  top-K set S. The loss does not penalise the student's mass outside S, which
  `mass_on_support` measures.

  Args:
    student_logits: `[..., V]`.
    teacher_logits: `[..., V]`; no gradient.
    k: Size of S; the default is the paper's.
    temperature: T, > 0; not the temperature at which the rollout was sampled.

  Returns:
    Loss in nats per token, `[...]`, float32, >= 0.

  Raises:
    ValueError: If the shapes differ, `k` is outside 1..V or `temperature` <= 0.
  """
  return divergence(
    student_logits, teacher_logits, support="teacher", k=k, temperature=temperature
  )


def truncated_importance_weights(
  log_prob: jax.Array, sampled_log_prob: jax.Array, *, max_weight: float
) -> jax.Array:
  """Importance weights of tokens that an older policy sampled, with an upper bound.

  .. math:: w_t = \\min(\\exp(\\log p_t - \\log \\mu_t), w_{max})

  with p the current model and μ the distribution that the token was sampled from: the
  truncated importance weight of SDPO, Hübotter et al., arXiv 2601.20802. No gradient
  passes.

  Args:
    log_prob: Log-probability of each token under the current model, `[...]`.
    sampled_log_prob: Log-probability at the time of sampling, `[...]`.
    max_weight: Upper bound of the weight, > 0.

  Returns:
    Weights, `[...]`, float32.
  """
  gap = jax.lax.stop_gradient(_at_least_float32(log_prob) - sampled_log_prob)
  return jnp.minimum(jnp.exp(jnp.clip(gap, -20, 20)), max_weight)


def mass_on_support(
  logits_K: jax.Array, logsumexp: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
  """Probability that a model puts on the K tokens of a support.

  Args:
    logits_K: The model's logits at the ids of the support, `[..., K]`.
    logsumexp: log Σ exp(logits / temperature) over the whole vocabulary, `[...]`.
    temperature: Softmax temperature, > 0.

  Returns:
    Probability in [0, 1], `[...]`, float32.

  Raises:
    ValueError: If `temperature` <= 0.
  """
  _check_temperature(temperature)
  log_mass = jax.nn.logsumexp(_at_least_float32(logits_K) / temperature, axis=-1)
  return jnp.exp(jnp.minimum(log_mass - logsumexp, 0.0))


def masked_mean(
  values: jax.Array, mask: jax.Array, *, per: str = "sequence"
) -> jax.Array:
  """Mean over the tokens that count.

  "sequence" is the normaliser of RAFT's Eq. 5 and 10: the mean over sequences of the
  mean over the tokens of each; a sequence without tokens does not count. "token" is
  the mean over all tokens. Values under a False mask, even NaN, affect neither the mean
  nor its gradient. The arrays that they were computed from still can, because 0 times
  NaN is NaN: give `vocab_head` finite hidden states at every token.

  Args:
    values: One value per token, `[..., T]`; the last axis runs along a sequence.
    mask: True where a token counts, `[..., T]`, bool (or 0 and 1).
    per: "sequence" or "token".

  Returns:
    The mean, a scalar; 0 if no token counts.

  Raises:
    ValueError: If the shapes differ or `per` is unknown.
  """
  return weighted_sum(values, mean_weights(mask, per=per))


def mean_weights(mask: jax.Array, *, per: str = "sequence") -> jax.Array:
  """Weights w with `masked_mean(values, mask) == weighted_sum(values, w)`.

  A mean of means changes if a batch is split into micro-batches; a weighted sum does
  not. Take the weights of the whole batch, split them with it, and add up the sums.

  Args:
    mask: True where a token counts, `[..., T]`, bool (or 0 and 1).
    per: "sequence" or "token", as in `masked_mean`.

  Returns:
    Weights, `[..., T]`, float32, >= 0, with sum 1, or 0 if no token counts.

  Raises:
    ValueError: If `per` is unknown.
  """
  _check_choice("per", per, MEANS)
  counted = jnp.asarray(mask).astype(bool)
  # Under jax_enable_x64 a bool over an integer would be float64.
  weights = counted.astype(jnp.float32)
  if per == "token":
    return weights / jnp.maximum(jnp.sum(counted), 1)
  tokens = jnp.sum(counted, axis=-1, keepdims=True)
  return weights / jnp.maximum(tokens, 1) / jnp.maximum(jnp.sum(tokens > 0), 1)


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Σ w·x over the entries with non-zero weight; the others may be NaN.

  Args:
    values: One value per token, `[..., T]`.
    weights: From `mean_weights`, `[..., T]`; they get no gradient.

  Returns:
    The sum, a scalar, float32.

  Raises:
    ValueError: If the shapes differ.
  """
  if jnp.shape(values) != jnp.shape(weights):
    raise ValueError(
      f"values has shape {jnp.shape(values)}, but its mask {jnp.shape(weights)}"
    )
  weights = jax.lax.stop_gradient(weights)
  # Dropped before the product: 0 * NaN is NaN, in the value and in the gradient.
  counted = jnp.where(weights != 0, _at_least_float32(values), 0)
  return jnp.sum(weights * counted)


def _restrict(
  logits: jax.Array, ids_K: jax.Array, temperature: float, with_rest: bool
) -> jax.Array:
  """Logits at ids, `[..., K]`, or with the rest as one more token `[..., K+1]`."""
  logits_K = jnp.take_along_axis(logits, ids_K, axis=-1)
  if not with_rest:
    return logits_K
  outside = jnp.put_along_axis(logits, ids_K, _LOG_ZERO, axis=-1, inplace=False)
  rest = jax.nn.logsumexp(outside / temperature, axis=-1, keepdims=True) * temperature
  return jnp.concatenate([logits_K, rest], axis=-1)


def _log_probs(
  logits_K: jax.Array, temperature: float, logsumexp: jax.Array | None
) -> jax.Array:
  """log-probabilities, renormalised `[..., K]` or with the bucket `[..., K+1]`."""
  scaled = _at_least_float32(logits_K) / temperature
  if logsumexp is not None:
    total = jnp.expand_dims(logsumexp, -1)
    log_mass = jax.nn.logsumexp(scaled, axis=-1, keepdims=True) - total
    # Below eps 1 - mass is not resolved, and rounding may make it negative.
    log_mass = jnp.minimum(log_mass, -jnp.finfo(log_mass.dtype).eps)
    rest = total + jnp.log(-jnp.expm1(log_mass))
    scaled = jnp.concatenate([scaled, rest], axis=-1)
  return jnp.maximum(jax.nn.log_softmax(scaled, axis=-1), _LOG_ZERO)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """Σ a log(a/b) of two normalised distributions, as Σ [a log(a/b) - a + b].

  The added terms sum to 0. With them no summand is negative and each is stationary at
  a = b, so rounding errors of the normalisers enter squared. A plain sum gives ±1e-7
  for equal distributions, which a balance by the inverse of the loss would amplify.
  """
  a, b = jnp.exp(log_a), jnp.exp(log_b)
  gap = log_a - log_b
  near = jnp.clip(gap, -1, 1)  # within, a·expm1(-gap) is b - a without cancellation
  terms = jnp.where(jnp.abs(gap) < 1, a * (near + jnp.expm1(-near)), a * (gap - 1) + b)
  return jnp.sum(terms, axis=-1)


def _at_least_float32(x: jax.Array) -> jax.Array:
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{name}={value!r} is none of {', '.join(choices)}")


def _check_divergence(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  support: str,
  k: int | None,
  tail: str,
  temperature: float,
) -> None:
  _check_choice("support", support, SUPPORTS)
  _check_choice("tail", tail, TAILS)
  if jnp.shape(student_logits) != jnp.shape(teacher_logits):
    raise ValueError(
      f"student_logits has shape {jnp.shape(student_logits)}, but teacher_logits "
      f"{jnp.shape(teacher_logits)}: both need the same tokens and one vocabulary"
    )
  _check_temperature(temperature)
  vocabulary = jnp.shape(student_logits)[-1]
  if k is not None and not 1 <= k <= vocabulary:
    raise ValueError(f"k={k} is outside 1..{vocabulary}, the vocabulary")


def _check_temperature(temperature: float) -> None:
  if temperature <= 0:
    raise ValueError(f"temperature={temperature} must be > 0")
