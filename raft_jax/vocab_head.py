"""The output head without a [tokens, vocabulary] array.

The functions take the last hidden states and the output embedding, and compute what
they need of logits = hidden · embeddingᵀ in tiles of about `chunk_size * V` logits, in
float32 for inputs of any type. `cross_entropy` (the log-sum-exp minus the logit of the
target), `cross_entropy_with_top_k`, `gather` and `gather_with_logsumexp` share one
differentiable core with custom derivatives, reverse mode only. `topk` is the teacher's
side and has no gradient.

Cost, for N tokens, vocabulary V, width D:
  forward   2·N·V·D FLOPs, chunks of tokens under `lax.scan`.
  backward  6·N·V·D FLOPs: the logits again, then both gradients. Only 4·N·V·D if
            nothing differentiates the log-sum-exp (as under `stop_gradient`): only the
            slope of a soft-cap needs the logits then. The pass goes over blocks of the
            vocabulary with all tokens, so each row of the embedding's gradient is one
            float32 product, written once. Over chunks of tokens it would be read,
            added to and written per chunk.
  memory    two or three tiles of logits besides inputs and outputs; between forward and
            backward only the [N] log-sum-exp.

Chunk i of n has the tokens i, i + n, i + 2n, ..., so hidden states that are sharded
over a batch axis stay sharded inside every chunk. Under plain `jax.jit` call the
functions with `jax.set_mesh`: without a mesh the chunks are not fitted to the devices,
and where they do not divide evenly, each device computes more than its share. Inside
`jax.shard_map` they read their own tokens only, and the gradient of a replicated
embedding is summed over the devices. A mesh of Explicit axes is not supported.

Shapes in names: N tokens, C tokens of a chunk, V vocabulary, K ids per token, D width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

# Logits in one device's tile: 32 MiB in float32. Larger tiles gain nothing on a CPU,
# because they leave the cache; smaller ones read the embedding more often per token.
_TILE = 2**23


def head_logits(
  hidden_ND: jax.Array, embedding_VD: jax.Array, softcap: float | None = None
) -> jax.Array:
  """Every logit of a few tokens, `[N, V]`, float32 or better.

  Args:
    hidden_ND: Final hidden states, such as those of the tokens to sample next.
    embedding_VD: Output embedding.
    softcap: c of logits c · tanh(E h / c), or None; static.
  """
  dtype = jnp.promote_types(jnp.result_type(hidden_ND, embedding_VD), jnp.float32)
  logits_NV = jnp.einsum(
    "nd,vd->nv", hidden_ND, embedding_VD, preferred_element_type=dtype
  )
  return _capped(logits_NV, softcap)


def cross_entropy(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  *,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  softcap: float | None = None,
) -> jax.Array:
  """`losses.cross_entropy` of the head's logits.

  .. math:: L_t = -\\log \\mathrm{softmax}(E h_t / T)_{y_t}

  Args:
    hidden: Final hidden states h, `[..., D]`.
    embedding: Output embedding E, `[V, D]`.
    targets: Token ids in [0, V), `[...]`. There is no "ignore" id: where a mask drops
      the token, use any valid id.
    chunk_size: Tokens per chunk, or None for about 2²³ logits per device and chunk.
    temperature: Softmax temperature T > 0, static.
    softcap: c > 0 of logits c · tanh(E h / c), as in Gemma 2 (arXiv 2408.00118), or
      None; static.

  Returns:
    Loss in nats per token, `[...]`, float32; its negative is the token's
    log-probability.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, temperature, softcap)
  _check_leading("targets", jnp.shape(targets), hidden)
  logits_at_target, logsumexp, _ = _gather(
    hidden, embedding, targets[..., None], chunk_size, temperature, softcap
  )
  return logsumexp - logits_at_target[..., 0] / temperature


def cross_entropy_with_top_k(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  k: int,
  *,
  partition: jax.P | None = None,
  chunk_size: int | None = None,
  softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`cross_entropy`, and the k largest logits from the same pass over the vocabulary.

  Costs `cross_entropy` and a search in each tile; the logits are computed once. No
  gradient passes through the k logits (`stop_gradient`).

  Args:
    hidden, embedding, targets, chunk_size, softcap: As in `cross_entropy`.
    k: Number of logits to keep, 1..V.
    partition: The mesh axes of tokens and vocabulary; see `sharded_top_k`.

  Returns:
    Loss in nats per token, `[...]`, and logits in descending order, `[..., k]`, both
    float32.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, 1.0, softcap)
  _check_leading("targets", jnp.shape(targets), hidden)
  _check_k(k, embedding)
  logits_at_target, logsumexp, top_logits = _gather(
    hidden, embedding, targets[..., None], chunk_size, 1.0, softcap, (k, partition)
  )
  assert top_logits is not None
  loss = logsumexp - logits_at_target[..., 0]
  return loss, jax.lax.stop_gradient(top_logits)


def gather(
  hidden: jax.Array,
  embedding: jax.Array,
  ids: jax.Array,
  *,
  chunk_size: int | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """The head's logits at given ids, such as the student's at the teacher's top K.

  Args:
    hidden: Final hidden states, `[..., D]`.
    embedding: Output embedding, `[V, D]`.
    ids: Token ids in [0, V), `[..., K]`; an id may occur twice.
    chunk_size, softcap: As in `cross_entropy`.

  Returns:
    Logits, `[..., K]`, float32.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  return gather_with_logsumexp(
    hidden, embedding, ids, chunk_size=chunk_size, softcap=softcap
  )[0]


def gather_with_logsumexp(
  hidden: jax.Array,
  embedding: jax.Array,
  ids: jax.Array,
  *,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`gather`, and the log-sum-exp over the whole vocabulary.

  The log-sum-exp is differentiable; under `stop_gradient` the backward pass needs no
  logits.

  Args:
    hidden, embedding, ids, chunk_size, softcap: As in `gather`.
    temperature: Divides the logits inside the log-sum-exp only; > 0, static.

  Returns:
    Logits (not divided by `temperature`), `[..., K]`, and log Σ exp(logits /
    temperature), `[...]`, both float32.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, temperature, softcap)
  _check_leading("ids", jnp.shape(ids)[:-1], hidden)
  return _gather(hidden, embedding, ids, chunk_size, temperature, softcap)[:2]


def topk(
  hidden: jax.Array,
  embedding: jax.Array,
  k: int,
  *,
  partition: jax.P | None = None,
  chunk_size: int | None = None,
  softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The k largest of the head's logits and their ids: the teacher's side.

  No gradient passes (`stop_gradient`). For a differentiable top K of the student call
  `gather` with the ids that this returns.

  Args:
    hidden: Final hidden states, `[..., D]`.
    embedding: Output embedding, `[V, D]`.
    k: Number of logits to keep, 1..V.
    partition: The mesh axes of tokens and vocabulary; see `sharded_top_k`.
    chunk_size, softcap: As in `cross_entropy`.

  Returns:
    Logits in descending order, `[..., k]`, float32, and ids, `[..., k]`, int32. Equal
    logits are in ascending order of their ids.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  return topk_with_logsumexp(
    hidden, embedding, k, partition=partition, chunk_size=chunk_size, softcap=softcap
  )[:2]


def topk_with_logsumexp(
  hidden: jax.Array,
  embedding: jax.Array,
  k: int,
  *,
  partition: jax.P | None = None,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`topk`, and the log-sum-exp over the whole vocabulary.

  Args:
    hidden, embedding, k, partition, chunk_size, softcap: As in `topk`.
    temperature: Divides the logits inside the log-sum-exp only; > 0, static.

  Returns:
    The logits and ids of `topk`, and log Σ exp(logits / temperature), `[...]`, float32.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, temperature, softcap)
  _check_k(k, embedding)
  vocabulary = jnp.shape(embedding)[0]
  embedding = jax.lax.stop_gradient(embedding)

  def of_chunk(hidden_CD):
    logits_CV = head_logits(hidden_CD, embedding, softcap)
    values_CK, ids_CK = sharded_top_k(logits_CV, k, partition)
    return values_CK, ids_CK, _logsumexp(logits_CV, temperature)

  hidden_ND = _flat(jax.lax.stop_gradient(hidden))
  values, ids, logsumexp = (
    x.reshape(jnp.shape(hidden)[:-1] + x.shape[1:])
    for x in _over_chunks(of_chunk, _chunk(chunk_size, vocabulary), hidden_ND)
  )
  return values, ids, logsumexp


def sharded_top_k(
  logits: jax.Array, k: int, partition: jax.P | None = None
) -> tuple[jax.Array, jax.Array]:
  """`jax.lax.top_k` in which each device searches its own shard of the logits.

  By default XLA gathers the axis that is searched, and on CPUs the rows too. Here each
  device finds k candidates in its part of the vocabulary, and only these are gathered.

  Args:
    logits: `[N, V]`.
    k: Number of values to keep, 1..V.
    partition: The mesh axes of rows and vocabulary under `jax.set_mesh`, or None. An
      axis whose size the devices do not divide is treated as unsharded.

  Returns:
    Values in descending order and their indices, both `[N, k]`. Of equal values the
    first comes first.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if partition is None or mesh.empty:
    return jax.lax.top_k(logits, k)
  rows, vocabulary = (
    axes if size % _shares(mesh, axes) == 0 else None
    for axes, size in zip(partition, logits.shape, strict=True)
  )

  def of_shard(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = logits.shape[-1]
    values, indices = jax.lax.top_k(logits, min(k, length))
    if vocabulary is None:
      return values, indices
    indices += length * jax.lax.axis_index(vocabulary)
    # In the order of the shards, so that the first of equal values stays first.
    values, indices = (
      jax.lax.all_gather(x, vocabulary, axis=1, tiled=True) for x in (values, indices)
    )
    values, chosen = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(indices, chosen, axis=1)

  by_row = jax.P(rows, None)
  return jax.shard_map(
    of_shard,
    in_specs=jax.P(rows, vocabulary),
    out_specs=(by_row, by_row),
    check_vma=False,  # the check cannot see that gathered values are equal everywhere
  )(logits)


def _shares(mesh: jax.sharding.AbstractMesh, axes: str | Sequence[str] | None) -> int:
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)


def kl_divergence(
  hidden: jax.Array,
  embedding: jax.Array,
  reference_hidden: jax.Array,
  reference_embedding: jax.Array,
  *,
  chunk_size: int | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """KL divergence of a head from a reference head, over the whole vocabulary.

  .. math:: D_t = \\sum_v p^0_{tv} (\\log p^0_{tv} - \\log p_{tv})

  This is a metric, not a loss: no gradient passes (`stop_gradient`).

  Args:
    hidden: Final hidden states of the model, `[..., D]`.
    embedding: Its output embedding, `[V, D]`.
    reference_hidden: The reference's final hidden states, `[..., D']`.
    reference_embedding: The reference's output embedding, `[V, D']`.
    chunk_size, softcap: As in `cross_entropy`; the soft-cap is that of both heads.

  Returns:
    Nats per token, `[...]`, float32, at least 0.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, 1.0, softcap)
  _check(reference_hidden, reference_embedding, chunk_size, 1.0, softcap)
  _check_leading("reference_hidden", jnp.shape(reference_hidden)[:-1], hidden)
  vocabulary = jnp.shape(embedding)[0]
  if jnp.shape(reference_embedding)[0] != vocabulary:
    raise ValueError(
      f"reference_embedding has {jnp.shape(reference_embedding)[0]} rows, embedding "
      f"{vocabulary}: two vocabularies"
    )

  def of_chunk(hidden_CD, reference_CD):
    log_p, log_p0 = (
      jax.nn.log_softmax(head_logits(x, head, softcap))
      for x, head in ((hidden_CD, embedding), (reference_CD, reference_embedding))
    )
    return jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)

  flat = (_flat(jax.lax.stop_gradient(x)) for x in (hidden, reference_hidden))
  embedding = jax.lax.stop_gradient(embedding)
  reference_embedding = jax.lax.stop_gradient(reference_embedding)
  kl_N = _over_chunks(of_chunk, _chunk(chunk_size, vocabulary), *flat)
  # Rounding may put the divergence of equal distributions a little below 0.
  return jnp.maximum(kl_N, 0.0).reshape(jnp.shape(hidden)[:-1])


Top = tuple[int, jax.P | None]
"""How many of the largest logits to keep, and the `partition` of `sharded_top_k`."""


def _gather(
  hidden: jax.Array,
  embedding: jax.Array,
  ids: jax.Array,
  chunk_size: int | None,
  temperature: float,
  softcap: float | None,
  top: Top | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """`_logits_at` for any leading dimensions."""
  chunk = _chunk(chunk_size, jnp.shape(embedding)[0])
  hidden_ND, embedding, ids_NK = _alike(_flat(hidden), embedding, _flat(ids))
  logits_NK, logsumexp_N, top_logits = _logits_at(
    chunk, temperature, softcap, top, hidden_ND, embedding, ids_NK
  )
  leading = jnp.shape(ids)[:-1]
  if top_logits is not None:
    top_logits = top_logits.reshape(*leading, -1)
  return logits_NK.reshape(jnp.shape(ids)), logsumexp_N.reshape(leading), top_logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _logits_at(chunk, temperature, softcap, top, hidden_ND, embedding_VD, ids_NK):
  """Logits at ids `[N, K]`, log Σ exp(logits / temperature) `[N]`, and the largest."""

  def of_chunk(hidden_CD, ids_CK):
    logits_CV = head_logits(hidden_CD, embedding_VD, softcap)
    at_ids_CK = jnp.take_along_axis(logits_CV, ids_CK, axis=1)
    largest = None if top is None else sharded_top_k(logits_CV, *top)[0]
    return at_ids_CK, _logsumexp(logits_CV, temperature), largest

  return _over_chunks(of_chunk, chunk, hidden_ND, ids_NK)


def _logits_at_forward(
  chunk, temperature, softcap, top, hidden_ND, embedding_VD, ids_NK
):
  primals = hidden_ND.value, embedding_VD.value, ids_NK.value
  results = _logits_at(chunk, temperature, softcap, top, *primals)
  return results, (*primals, results[1])


def _logits_at_backward(chunk, temperature, softcap, top, residuals, cotangents):
  """Both gradients, block by block of the vocabulary; see the module docstring."""
  hidden_ND, embedding_VD, ids_NK, logsumexp_N = residuals
  d_at_ids_NK, d_logsumexp_N, _ = cotangents  # the largest logits are constants
  n_tokens, (vocabulary, width) = hidden_ND.shape[0], embedding_VD.shape
  # A block takes some rows of every part, so a vocabulary that is sharded over the
  # devices, in as many parts or fewer, stays in place.
  parts = _devices() if vocabulary % _devices() == 0 else 1
  length = vocabulary // parts
  tile = chunk * length
  n_blocks = -(-length // max(1, min(length, tile // max(1, n_tokens))))
  block = -(-length // n_blocks)
  embedding = embedding_VD.reshape(parts, length, width)
  ids_NK, ids_part_NK = ids_NK % length, ids_NK // length
  # The products run in the inputs' type (bfloat16 at its full rate), summed in float32.
  dot = functools.partial(jnp.einsum, preferred_element_type=logsumexp_N.dtype)

  def of_block(carry, index):
    d_hidden_ND, d_embedding = carry
    # The last block is moved back to end with the vocabulary. It writes some rows of
    # the embedding's gradient twice, with equal values, but may add only its new rows
    # to the gradient of the hidden states.
    start = jnp.minimum(index * block, length - block)
    rows = jax.lax.dynamic_slice_in_dim(embedding, start, block, axis=1)
    d_logits = jnp.zeros((n_tokens, parts, block), logsumexp_N.dtype)
    no_logsumexp = isinstance(d_logsumexp_N, SymbolicZero)
    if softcap or not no_logsumexp:
      logits_NPV = _capped(dot("nd,pvd->npv", hidden_ND, rows), softcap)
    if not no_logsumexp:
      probs = jnp.exp(logits_NPV / temperature - logsumexp_N[:, None, None])
      d_logits = probs * (d_logsumexp_N / temperature)[:, None, None]
    if not isinstance(d_at_ids_NK, SymbolicZero):
      d_logits = _add_at(d_logits, ids_part_NK, ids_NK - start, d_at_ids_NK)
    if softcap:
      d_logits *= 1.0 - jnp.square(logits_NPV / softcap)
    d_logits = d_logits.astype(jnp.result_type(hidden_ND, embedding_VD))
    is_new = start + jnp.arange(block) >= index * block
    new_rows = jnp.where(is_new[:, None], rows, 0)
    d_hidden_ND += dot("npv,pvd->nd", d_logits, new_rows)
    d_rows = dot("npv,nd->pvd", d_logits, hidden_ND)
    d_embedding = jax.lax.dynamic_update_slice_in_dim(
      d_embedding, d_rows.astype(embedding.dtype), start, axis=1
    )
    return (d_hidden_ND, d_embedding), None

  *zeros, _ = _alike(
    jnp.zeros(hidden_ND.shape, logsumexp_N.dtype), jnp.zeros_like(embedding), hidden_ND
  )
  (d_hidden_ND, d_embedding), _ = jax.lax.scan(
    of_block, tuple(zeros), jnp.arange(n_blocks)
  )
  return d_hidden_ND.astype(hidden_ND.dtype), d_embedding.reshape(-1, width), None


_logits_at.defvjp(_logits_at_forward, _logits_at_backward, symbolic_zeros=True)


def _add_at(
  d_logits: jax.Array, parts_NK: jax.Array, columns_NK: jax.Array, values_NK: jax.Array
):
  """Adds values at the given columns and parts; drops those outside the block."""
  # A negative index would count from the end.
  columns_NK = jnp.where(columns_NK < 0, d_logits.shape[2], columns_NK)
  # Under vmap the token is a batch axis of the scatter, which stays sharded.
  return jax.vmap(
    lambda rows, parts, columns, values: rows.at[parts, columns].add(
      values, mode="drop"
    )
  )(d_logits, parts_NK, columns_NK, values_NK)


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _logsumexp(logits_CV: jax.Array, temperature: float) -> jax.Array:
  return jax.nn.logsumexp(logits_CV / temperature, axis=-1)


def _chunk(chunk_size: int | None, vocabulary: int) -> int:
  # Under `jax.set_mesh` a chunk's logits are spread over all devices.
  tile = _TILE * _devices()
  return max(1, tile // vocabulary) if chunk_size is None else chunk_size


def _devices() -> int:
  """Number of devices over which the compiler shards the arrays seen here.

  Inside `jax.shard_map` its own axes do not count: they are sharded already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = zip(mesh.axis_sizes, mesh.axis_types)
  return math.prod(size for size, kind in axes if kind != AxisType.Manual)


def _alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Gives all arrays the varying axes of `jax.shard_map` that any of them has.

  `shard_map` requires this of a loop's carry and of a gradient; the transpose sums over
  the added axes. Outside `shard_map` the arrays are returned unchanged.
  """
  varying = [_varying(x) for x in arrays]
  union = frozenset[str]().union(*varying)
  return tuple(
    jax.lax.pcast(x, tuple(union - axes), to="varying") if union - axes else x
    for x, axes in zip(arrays, varying)
  )


def _varying(x: jax.Array) -> frozenset[str]:
  """The axes of a `jax.shard_map` along which a value differs."""
  kind: Any = jax.typeof(x)
  return frozenset(kind.vma if hasattr(kind, "vma") else kind.mat.varying)


def _over_chunks(f: Callable, chunk: int, *arrays: jax.Array):
  """Applies `f` to chunks of the leading axis, one at a time."""
  n_tokens = arrays[0].shape[0]
  n_chunks = max(1, -(-n_tokens // chunk))
  # Every device computes all of a chunk that does not divide among the devices.
  divisible = (
    n for n in range(n_chunks, 2 * n_chunks) if n_tokens % (n * _devices()) == 0
  )
  n_chunks = next(divisible, n_chunks) if _devices() > 1 else n_chunks
  size = -(-n_tokens // n_chunks)
  padding = n_chunks * size - n_tokens

  def deal(x):
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(size, n_chunks, *x.shape[1:]), 0, 1)

  def collect(x):
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(size * n_chunks, *x.shape[2:])[:n_tokens]

  dealt = tuple(map(deal, arrays))
  _, results = jax.lax.scan(lambda carry, xs: (carry, f(*xs)), None, dealt)
  return jax.tree.map(collect, results)


def _flat(x: jax.Array) -> jax.Array:
  """`[..., D]` as `[N, D]`."""
  x = jnp.asarray(x)
  return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check(hidden, embedding, chunk_size, temperature, softcap) -> None:
  if jnp.ndim(embedding) != 2 or jnp.shape(hidden)[-1:] != jnp.shape(embedding)[1:]:
    raise ValueError(
      f"embedding has shape {jnp.shape(embedding)}, but hidden {jnp.shape(hidden)} "
      "needs [vocabulary, last size of hidden]"
    )
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be >= 1")
  if temperature <= 0:
    raise ValueError(f"temperature={temperature} must be > 0")
  if softcap is not None and softcap <= 0:
    raise ValueError(f"softcap={softcap} must be > 0")


def _check_k(k: int, embedding: jax.Array) -> None:
  vocabulary = jnp.shape(embedding)[0]
  if not 1 <= k <= vocabulary:
    raise ValueError(f"k={k} is outside 1..{vocabulary}, the vocabulary")


def _check_leading(name: str, leading: tuple[int, ...], hidden: jax.Array) -> None:
  if leading != jnp.shape(hidden)[:-1]:
    raise ValueError(
      f"{name} has leading shape {leading}, but hidden {jnp.shape(hidden)} "
      f"needs {jnp.shape(hidden)[:-1]}"
    )
