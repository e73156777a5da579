"""The output head without a [tokens, vocabulary] array.

`cross_entropy`, `topk` and `gather` take the last hidden states and the output
embedding and compute what they need of logits = hidden · embeddingᵀ in tiles of about
`chunk_size * V` logits, in float32 whatever the inputs are. `gather` is the one
differentiable core (custom derivatives, reverse mode only); `cross_entropy` is the
log-sum-exp minus a gather of one id, and `topk` is the teacher's side: no gradient.

Cost, for N tokens, vocabulary V, width D:
  forward   2·N·V·D FLOPs, chunks of tokens under `lax.scan`.
  backward  6·N·V·D FLOPs: logits again, then both gradients. 4·N·V·D if nothing
            differentiates the log-sum-exp (as under `stop_gradient`): no logits needed
            (but for a soft-cap, whose slope is theirs).
            It goes over blocks of the vocabulary with all tokens, so that each row of
            the embedding's gradient is summed in one float32 product and written once;
            over chunks of tokens it would be read, added to and written per chunk.
  memory    two or three tiles of logits beside inputs and outputs; between forward and
            backward only the [N] log-sum-exp.

Tokens are dealt to the chunks like cards, chunk i taking i, i + n, i + 2n, ...: hidden
states sharded over a batch axis stay sharded inside every chunk. All inner functions
see one [V, D] array and plain ids. Under plain `jax.jit` call them with `jax.set_mesh`:
without a mesh the chunks are not fitted to the devices, and where they then do not
divide, each device computes more than its share. Inside `jax.shard_map` they see their
own tokens only; a replicated embedding's gradient is summed over the devices. A mesh of
Explicit axes is not supported.

Shapes in names: N tokens, C tokens of a chunk, V vocabulary, K ids per token, D width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

# Logits in one device's tile: 32 MiB in float32. Larger tiles gain nothing on a CPU,
# where they leave the cache; smaller ones read the embedding more often per token.
_TILE = 2**23


@overload
def cross_entropy(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  *,
  chunk_size: int | None = ...,
  temperature: float = ...,
  softcap: float | None = ...,
  return_logsumexp: Literal[False] = ...,
) -> jax.Array: ...


@overload
def cross_entropy(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  *,
  chunk_size: int | None = ...,
  temperature: float = ...,
  softcap: float | None = ...,
  return_logsumexp: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def cross_entropy(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  *,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  softcap: float | None = None,
  return_logsumexp: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """`losses.cross_entropy` of the head's logits.

  .. math:: L_t = -\\log \\mathrm{softmax}(E h_t / T)_{y_t}

  Args:
    hidden: Final hidden states h, `[..., D]`.
    embedding: Output embedding E, `[V, D]`.
    targets: Token ids in [0, V), `[...]`. There is no "ignore" id: where a mask drops
      the token any valid id will do.
    chunk_size: Tokens per chunk, or None for about 2²³ logits a device in a chunk.
    temperature: Softmax temperature T > 0, static.
    softcap: c of logits c · tanh(E h / c), as in Gemma 2 (arXiv 2408.00118), or None;
      > 0, static.
    return_logsumexp: Also return the log-sum-exp.

  Returns:
    Loss in nats per token, `[...]`, float32; minus it is the token's log-probability.
    With `return_logsumexp` a pair of it and log Σ exp(logits / T), `[...]`, float32.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, temperature, softcap)
  _check_leading("targets", jnp.shape(targets), hidden)
  logits, logsumexp = _gather(
    hidden, embedding, targets[..., None], chunk_size, temperature, softcap
  )
  loss = logsumexp - logits[..., 0] / temperature
  return (loss, logsumexp) if return_logsumexp else loss


@overload
def gather(
  hidden: jax.Array,
  embedding: jax.Array,
  ids: jax.Array,
  *,
  chunk_size: int | None = ...,
  temperature: float = ...,
  softcap: float | None = ...,
  return_logsumexp: Literal[False] = ...,
) -> jax.Array: ...


@overload
def gather(
  hidden: jax.Array,
  embedding: jax.Array,
  ids: jax.Array,
  *,
  chunk_size: int | None = ...,
  temperature: float = ...,
  softcap: float | None = ...,
  return_logsumexp: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def gather(
  hidden: jax.Array,
  embedding: jax.Array,
  ids: jax.Array,
  *,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  softcap: float | None = None,
  return_logsumexp: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """The head's logits at given ids, as of the student at the teacher's top-K.

  Args:
    hidden: Final hidden states, `[..., D]`.
    embedding: Output embedding, `[V, D]`.
    ids: Token ids in [0, V), `[..., K]`; an id may occur twice.
    chunk_size: Tokens per chunk, or None for about 2²³ logits a device in a chunk.
    temperature: Divides the logits inside the log-sum-exp only; > 0, static.
    softcap: c of logits c · tanh(E h / c), as in Gemma 2 (arXiv 2408.00118), or None;
      > 0, static.
    return_logsumexp: Also return the log-sum-exp. It is differentiable; under
      `stop_gradient` the backward pass needs no logits.

  Returns:
    Logits (not divided by `temperature`), `[..., K]`, float32. With
    `return_logsumexp` a pair of them and log Σ exp(logits / temperature) over the
    vocabulary, `[...]`, float32.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, temperature, softcap)
  _check_leading("ids", jnp.shape(ids)[:-1], hidden)
  logits, logsumexp = _gather(hidden, embedding, ids, chunk_size, temperature, softcap)
  return (logits, logsumexp) if return_logsumexp else logits


def topk(
  hidden: jax.Array,
  embedding: jax.Array,
  k: int,
  *,
  spread: jax.P | None = None,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  softcap: float | None = None,
  return_logsumexp: bool = False,
) -> tuple[jax.Array, ...]:
  """The k largest of the head's logits and their ids: the teacher's side.

  No gradient passes (`stop_gradient`); for the student's own top-K call `gather` at
  the ids found here.

  Args:
    hidden: Final hidden states, `[..., D]`.
    embedding: Output embedding, `[V, D]`.
    k: How many, 1..V.
    spread: The mesh axes of tokens and vocabulary; see `largest`.
    chunk_size: Tokens per chunk, or None for about 2²³ logits a device in a chunk.
    temperature: Divides the logits inside the log-sum-exp only; > 0, static.
    softcap: c of logits c · tanh(E h / c), as in Gemma 2 (arXiv 2408.00118), or None;
      > 0, static.
    return_logsumexp: Also return the log-sum-exp.

  Returns:
    Logits in descending order, `[..., k]`, float32, and ids, `[..., k]`, int32; equal
    logits in ascending order of ids. With `return_logsumexp` also
    log Σ exp(logits / temperature) over the vocabulary, `[...]`, float32.

  Raises:
    ValueError: If shapes disagree or a number is out of range.
  """
  _check(hidden, embedding, chunk_size, temperature, softcap)
  vocabulary = jnp.shape(embedding)[0]
  if not 1 <= k <= vocabulary:
    raise ValueError(f"k={k} is outside 1..{vocabulary}, the vocabulary")
  embedding = jax.lax.stop_gradient(embedding)

  def of_chunk(hidden_CD):
    logits_CV = _capped(_logits(hidden_CD, embedding), softcap)
    values_CK, ids_CK = largest(logits_CV, k, spread)
    return values_CK, ids_CK, _logsumexp(logits_CV, temperature)

  hidden_ND = _flat(jax.lax.stop_gradient(hidden), 1)
  values, ids, logsumexp = (
    x.reshape(jnp.shape(hidden)[:-1] + x.shape[1:])
    for x in _over_chunks(of_chunk, _chunk(chunk_size, vocabulary), hidden_ND)
  )
  return (values, ids, logsumexp) if return_logsumexp else (values, ids)


def largest(
  logits: jax.Array, k: int, spread: jax.P | None = None
) -> tuple[jax.Array, jax.Array]:
  """`jax.lax.top_k`, each device looking at its own share of the logits.

  Left to itself XLA gathers the axis that is looked through, and on CPUs the rows. Here
  each device finds k candidates in its part of the vocabulary, and these are gathered.

  Args:
    logits: `[N, V]`.
    k: How many, 1..V.
    spread: The mesh axes of rows and vocabulary under `jax.set_mesh`, or None. An axis
      that its devices do not divide is taken as whole.

  Returns:
    Values in descending order and their places, `[N, k]`; of equal values the first.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if spread is None or mesh.empty:
    return jax.lax.top_k(logits, k)
  rows, vocabulary = (
    axes if size % _shares(mesh, axes) == 0 else None
    for axes, size in zip(spread, logits.shape, strict=True)
  )

  def own(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = logits.shape[-1]
    values, places = jax.lax.top_k(logits, min(k, length))
    if vocabulary is None:
      return values, places
    places += length * jax.lax.axis_index(vocabulary)
    # In the order of the parts, so that of equal values the first stays the first.
    values, places = (
      jax.lax.all_gather(x, vocabulary, axis=1, tiled=True) for x in (values, places)
    )
    values, chosen = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(places, chosen, axis=1)

  found = jax.P(rows, None)
  return jax.shard_map(
    own,
    in_specs=jax.P(rows, vocabulary),
    out_specs=(found, found),
    check_vma=False,  # it takes what was gathered for different on each device
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
  """How far one head's distribution is from a reference's, over the whole vocabulary.

  .. math:: D_t = \\sum_v p^0_{tv} (\\log p^0_{tv} - \\log p_{tv})

  A measure, not a loss: no gradient passes (`stop_gradient`).

  Args:
    hidden: Final hidden states of the model, `[..., D]`.
    embedding: Its output embedding, `[V, D]`.
    reference_hidden: The reference's final hidden states, `[..., D']`.
    reference_embedding: The reference's output embedding, `[V, D']`.
    chunk_size: Tokens per chunk, or None for about 2²³ logits in a chunk.
    softcap: c of logits c · tanh(E h / c) of both, or None; > 0, static.

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
      jax.nn.log_softmax(_capped(_logits(x, head), softcap))
      for x, head in ((hidden_CD, embedding), (reference_CD, reference_embedding))
    )
    return jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)

  flat = (_flat(jax.lax.stop_gradient(x), 1) for x in (hidden, reference_hidden))
  embedding = jax.lax.stop_gradient(embedding)
  reference_embedding = jax.lax.stop_gradient(reference_embedding)
  found_N = _over_chunks(of_chunk, _chunk(chunk_size, vocabulary), *flat)
  # Rounding may leave a distribution and itself a little below 0.
  return jnp.maximum(found_N, 0.0).reshape(jnp.shape(hidden)[:-1])


def _gather(
  hidden: jax.Array,
  embedding: jax.Array,
  ids: jax.Array,
  chunk_size: int | None,
  temperature: float,
  softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """`_logits_at` for any leading dimensions."""
  chunk = _chunk(chunk_size, jnp.shape(embedding)[0])
  hidden_ND, embedding, ids_NK = _alike(_flat(hidden, 1), embedding, _flat(ids, 1))
  logits_NK, logsumexp_N = _logits_at(
    chunk, temperature, softcap, hidden_ND, embedding, ids_NK
  )
  return logits_NK.reshape(jnp.shape(ids)), logsumexp_N.reshape(jnp.shape(ids)[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _logits_at(chunk, temperature, softcap, hidden_ND, embedding_VD, ids_NK):
  """Logits at ids `[N, K]` and log Σ exp(logits / temperature) `[N]`."""

  def of_chunk(hidden_CD, ids_CK):
    logits_CV = _capped(_logits(hidden_CD, embedding_VD), softcap)
    at_ids_CK = jnp.take_along_axis(logits_CV, ids_CK, axis=1)
    return at_ids_CK, _logsumexp(logits_CV, temperature)

  return _over_chunks(of_chunk, chunk, hidden_ND, ids_NK)


def _logits_at_forward(chunk, temperature, softcap, hidden_ND, embedding_VD, ids_NK):
  primals = hidden_ND.value, embedding_VD.value, ids_NK.value
  logits_NK, logsumexp_N = _logits_at(chunk, temperature, softcap, *primals)
  return (logits_NK, logsumexp_N), (*primals, logsumexp_N)


def _logits_at_backward(chunk, temperature, softcap, residuals, cotangents):
  """Both gradients, block by block of the vocabulary (see the module's text)."""
  hidden_ND, embedding_VD, ids_NK, logsumexp_N = residuals
  d_at_ids_NK, d_logsumexp_N = cotangents
  n_tokens, (vocabulary, width) = hidden_ND.shape[0], embedding_VD.shape
  # A block takes some rows of every part, so that a vocabulary spread over devices, in
  # as many parts or fewer, stays where it is.
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
    # The last block is moved back to end with the vocabulary: it writes some rows of
    # the embedding's gradient a second time, the same, but must add to the hidden
    # states' only what is new.
    start = jnp.minimum(index * block, length - block)
    rows = jax.lax.dynamic_slice_in_dim(embedding, start, block, axis=1)
    d_logits = jnp.zeros((n_tokens, parts, block), logsumexp_N.dtype)
    no_logsumexp = isinstance(d_logsumexp_N, SymbolicZero)
    if softcap or not no_logsumexp:
      logits = _capped(dot("nd,pvd->npv", hidden_ND, rows), softcap)
    if not no_logsumexp:
      probs = jnp.exp(logits / temperature - logsumexp_N[:, None, None])
      d_logits = probs * (d_logsumexp_N / temperature)[:, None, None]
    if not isinstance(d_at_ids_NK, SymbolicZero):
      d_logits = _add_at(d_logits, ids_part_NK, ids_NK - start, d_at_ids_NK)
    if softcap:
      d_logits *= 1.0 - jnp.square(logits / softcap)
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
  """Adds values at columns of parts; those outside the block are dropped."""
  # A negative index would count from the end.
  columns_NK = jnp.where(columns_NK < 0, d_logits.shape[2], columns_NK)
  # Under vmap the token is a batch axis of the scatter, which stays sharded.
  return jax.vmap(
    lambda rows, parts, columns, values: rows.at[parts, columns].add(
      values, mode="drop"
    )
  )(d_logits, parts_NK, columns_NK, values_NK)


def _logits(hidden_ND: jax.Array, embedding_VD: jax.Array) -> jax.Array:
  dtype = jnp.promote_types(jnp.result_type(hidden_ND, embedding_VD), jnp.float32)
  return jnp.einsum("nd,vd->nv", hidden_ND, embedding_VD, preferred_element_type=dtype)


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _logsumexp(logits_CV: jax.Array, temperature: float) -> jax.Array:
  return jax.nn.logsumexp(logits_CV / temperature, axis=-1)


def _chunk(chunk_size: int | None, vocabulary: int) -> int:
  # Under `jax.set_mesh` a chunk's logits are spread over all devices.
  tile = _TILE * _devices()
  return max(1, tile // vocabulary) if chunk_size is None else chunk_size


def _devices() -> int:
  """Devices among which the compiler shares out what is seen here: inside
  `jax.shard_map` those of its axes have their share already."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = zip(mesh.axis_sizes, mesh.axis_types)
  return math.prod(size for size, kind in axes if kind != AxisType.Manual)


def _alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Arrays of which none is known to be the same on more devices than the others.

  `jax.shard_map` checks that of a loop's carry, and of a gradient; to undo it there is
  the sum over these devices. Elsewhere nothing happens.
  """
  varying = [_varying(x) for x in arrays]
  every = frozenset[str]().union(*varying)
  return tuple(
    jax.lax.pcast(x, tuple(every - own), to="varying") if every - own else x
    for x, own in zip(arrays, varying)
  )


def _varying(x: jax.Array) -> frozenset[str]:
  """The axes of a `jax.shard_map` along which a value differs."""
  kind: Any = jax.typeof(x)
  return frozenset(kind.vma if hasattr(kind, "vma") else kind.mat.varying)


def _over_chunks(f: Callable, chunk: int, *arrays: jax.Array):
  """Applies `f` to chunks of the leading axis, one after the other."""
  n_tokens = arrays[0].shape[0]
  n_chunks = max(1, -(-n_tokens // chunk))
  # A chunk that does not divide among the devices is computed whole by each of them.
  spread = (
    n for n in range(n_chunks, 2 * n_chunks) if n_tokens % (n * _devices()) == 0
  )
  n_chunks = next(spread, n_chunks) if _devices() > 1 else n_chunks
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


def _flat(x: jax.Array, kept: int) -> jax.Array:
  """`[..., D]` as `[N, D]`."""
  x = jnp.asarray(x)
  tokens = 1
  for size in x.shape[: x.ndim - kept]:
    tokens *= size
  return x.reshape(tokens, *x.shape[x.ndim - kept :])


def _check(hidden, embedding, chunk_size, temperature, softcap) -> None:
  if jnp.ndim(embedding) != 2 or jnp.shape(hidden)[-1:] != jnp.shape(embedding)[1:]:
    raise ValueError(
      f"embedding has shape {jnp.shape(embedding)}, but hidden {jnp.shape(hidden)} "
      "asks for [vocabulary, hidden's last size]"
    )
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be >= 1")
  if temperature <= 0:
    raise ValueError(f"temperature={temperature} must be > 0")
  if softcap is not None and softcap <= 0:
    raise ValueError(f"softcap={softcap} must be > 0")


def _check_leading(name: str, leading: tuple[int, ...], hidden: jax.Array) -> None:
  if leading != jnp.shape(hidden)[:-1]:
    raise ValueError(
      f"{name} has leading shape {leading}, but hidden {jnp.shape(hidden)} "
      f"asks for {jnp.shape(hidden)[:-1]}"
    )
