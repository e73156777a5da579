"""Mixtures of experts: a router that chooses, and experts that get every chosen token.

A token's feed-forward is the weighted sum of the few experts that its router chooses.
No token is dropped: the choices are sorted by expert, and each expert multiplies the
rows of its group (Gale et al., "MegaBlocks", arXiv 2211.15841). The values of a token
depend on that token alone.

On a mesh, experts are sharded over `tensor`. The devices along that axis have the same
tokens; each computes its own experts' part of the sum, and the parts are added.

Shapes: B rows, T tokens of a row, N tokens, K experts of a token, M = N K choices, E
experts, F width of an expert, D model width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raft_jax.models import grouped_product, sharding

if TYPE_CHECKING:
  from raft_jax.models import transformer

Gating = Callable[[Array, Array], Array]
"""Gate and up projection, both [M, F] -> the input of the down projection."""

AXES = {
  "router": ("layers", "routes", "embed"),
  "gate": ("layers", "experts", "expert_mlp", "embed"),
  "up": ("layers", "experts", "expert_mlp", "embed"),
  "down": ("layers", "experts", "embed", "expert_mlp"),
  "router_bias": ("layers", "routes"),
  "gate_bias": ("layers", "experts", "expert_mlp"),
  "up_bias": ("layers", "experts", "expert_mlp"),
  "down_bias": ("layers", "experts", "embed"),
  "shared_gate": ("layers", "mlp", "embed"),
  "shared_up": ("layers", "mlp", "embed"),
  "shared_down": ("layers", "embed", "mlp"),
  "shared_router": ("layers", "routes", "embed"),
  "router_scale": ("layers", "embed"),
  "router_expert_scale": ("layers", "routes"),
}
"""Logical axes of a mixture's parameters, as in `param_sharding.axes`."""


class Choice(NamedTuple):
  """What a router decided.

  Attributes:
    expert_NK: int32, the chosen experts, the most probable first.
    weight_NK: float32, their weights in the sum.
    probability_NE: float32, of all experts.
  """

  expert_NK: Array
  weight_NK: Array
  probability_NE: Array


class Load(NamedTuple):
  """How the router spread the counted tokens; float32, stacked over layers.

  Attributes:
    chosen_E: tokens that chose each expert.
    probability_E: sum of each expert's probability.
    tokens: number of tokens.
  """

  chosen_E: Array
  probability_E: Array
  tokens: Array


def shapes(config: transformer.DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters of one layer's mixture."""
  count, width, inner = config.n_experts, config.d_model, config.d_ff
  kernels: dict[str, tuple[int, ...]] = {
    "router": (count, width),
    "gate": (count, inner, width),
    "up": (count, inner, width),
    "down": (count, width, inner),
  }
  if config.parallel_experts:
    return kernels | {"router_scale": (width,), "router_expert_scale": (count,)}
  if not config.expert_biases:
    return kernels
  return kernels | {f"{name}_bias": kernels[name][:-1] for name in tuple(kernels)}


def shared_shapes(config: transformer.DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters of one layer's shared expert, if it has one.

  A dense feed-forward beside the experts is such an expert without a router.
  """
  width, inner = config.d_model, config.shared_d_ff
  if not inner:
    return {}
  kernels: dict[str, tuple[int, ...]] = {
    "shared_gate": (inner, width),
    "shared_up": (inner, width),
    "shared_down": (width, inner),
  }
  return kernels if config.parallel_experts else kernels | {"shared_router": (1, width)}


def active_parameters(config: transformer.DecoderConfig, total: int) -> int:
  """The parameters that one token is multiplied by or added to, of `total`."""
  of_experts = sum(
    math.prod(shape) for name, shape in shapes(config).items() if "router" not in name
  )
  idle = config.n_experts - config.experts_per_token
  return total - config.n_layers * (of_experts // max(config.n_experts, 1)) * idle


def stacked_axes(name: str, params: transformer.Params) -> int:
  """Over how many axes the tensors of a parameter of the layers are stacked."""
  return 2 if "router" in params["layers"] and "experts" in AXES.get(name, ()) else 1


# --- The router -----------------------------------------------------------------------


def choose(
  x_ND: Array,
  router_ED: Array,
  bias_E: Array | None,
  *,
  per_token: int,
  normalized: bool,
  scale_E: Array | None = None,
) -> Choice:
  """Chooses the most probable experts of each token, in float32.

  Of equal probabilities the expert of the lower number is taken. Shazeer et al.,
  "Outrageously Large Neural Networks", arXiv 1701.06538.

  Args:
    router_ED: kernel of the router.
    bias_E: added to the logits; may be None.
    per_token: number of experts of a token, K.
    normalized: whether the weights of the chosen experts are made to sum to 1.
    scale_E: factor of the weight of each expert after that; may be None.
  """
  # A sum of rounded products may choose another expert, so never in bfloat16.
  logits_NE = jnp.einsum(
    "nd,ed->ne",
    x_ND.astype(jnp.float32),
    router_ED.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  if bias_E is not None:
    logits_NE = logits_NE + bias_E.astype(jnp.float32)
  probability_NE = jax.nn.softmax(logits_NE, axis=-1)
  weight_NK, expert_NK = jax.lax.top_k(probability_NE, per_token)
  if normalized:
    weight_NK = weight_NK / jnp.sum(weight_NK, axis=-1, keepdims=True)
  if scale_E is not None:
    # A sum over experts, because the gradient of a gathering adds in any order.
    is_chosen_NKE = expert_NK[..., None] == jnp.arange(probability_NE.shape[-1])
    own_NK = jnp.sum(is_chosen_NKE * scale_E.astype(jnp.float32), axis=-1)
    weight_NK = weight_NK * own_NK
  return Choice(expert_NK, weight_NK, probability_NE)


def measure(choice: Choice, counted_N: Array) -> Load:
  """The load that the counted tokens make."""
  counted_N = counted_N.astype(jnp.float32)
  experts_E = jnp.arange(choice.probability_NE.shape[-1])
  chosen_NE = jnp.sum(choice.expert_NK[..., None] == experts_E, axis=1)
  return Load(
    chosen_E=jnp.einsum("n,ne->e", counted_N, chosen_NE.astype(jnp.float32)),
    probability_E=jnp.einsum("n,ne->e", counted_N, choice.probability_NE),
    tokens=jnp.sum(counted_N),
  )


def balance_loss(load: Load) -> Array:
  """The auxiliary loss that is least if all experts get equally many tokens.

  .. math:: E \\sum_e f_e P_e

  with the share f of tokens that choose an expert and its mean probability P, over the
  tokens of all layers together; K if the load is even. Fedus et al., "Switch
  Transformers", arXiv 2101.03961, Eq. 4-6, as transformers' `load_balancing_loss_func`
  computes it. Its gradient flows through P.

  Args:
    load: of all layers, stacked.
  """
  tokens = jnp.maximum(jnp.sum(load.tokens), 1.0)
  share_E = jax.lax.stop_gradient(jnp.sum(load.chosen_E, axis=0)) / tokens
  mean_E = jnp.sum(load.probability_E, axis=0) / tokens
  return mean_E.size * jnp.sum(share_E * mean_E)


def metrics(load: Load) -> dict[str, Array]:
  """The load as scalars to log.

  Returns:
    `router_max_share`: share of the tokens that chose the busiest expert of any layer;
    `router_idle`: share of the experts that no token chose; `loss_router`: the
    `balance_loss`.
  """
  share_LE = load.chosen_E / jnp.maximum(load.tokens, 1.0)[:, None]
  return {
    "router_max_share": jnp.max(share_LE),
    "router_idle": jnp.mean(load.chosen_E == 0),
    "loss_router": balance_loss(load),
  }


# --- The mixture ----------------------------------------------------------------------


def mixture(
  x_BTD: Array,
  weights: Mapping[str, Array],
  *,
  per_token: int,
  normalized: bool,
  gating: Gating,
  routed_BTD: Array | None = None,
  counted_BT: Array | None = None,
) -> tuple[Array, Load | None]:
  """The weighted sum of each token's experts.

  Args:
    weights: the parameters of `shapes`; the experts' are cast to the dtype of x.
    per_token, normalized: as for `choose`.
    gating: what each expert computes between its projections.
    routed_BTD: what the router reads; None: x.
    counted_BT: tokens that count in the load; None: none is measured.

  Returns:
    [B, T, D] in the dtype of x, and the load.
  """
  mesh = jax.sharding.get_abstract_mesh()
  weights = {
    name: leaf if name.startswith("router") else _cast(leaf, x_BTD.dtype, AXES[name])
    for name, leaf in weights.items()
  }
  compute = functools.partial(
    _mixture_of_shard, per_token=per_token, normalized=normalized, gating=gating
  )
  if mesh.empty:
    return compute(x_BTD, weights, routed_BTD, counted_BT, rows=(), expert_axis=None)
  rows = sharding.place(mesh, ("batch",), x_BTD.shape[:1]).spec
  places = {
    name: sharding.place(mesh, AXES[name][1:2], leaf.shape[:1]).spec
    for name, leaf in weights.items()
  }
  axes = rows[0] if rows[0] is not None else ()
  return jax.shard_map(
    functools.partial(compute, rows=axes, expert_axis=places["gate"][0]),
    in_specs=(rows, places, rows, rows),
    out_specs=(rows, jax.P()),
    check_vma=False,  # the carries of the loops inside have no varying axes
  )(x_BTD, weights, routed_BTD, counted_BT)


def _cast(leaf: Array, dtype: jnp.dtype, axes: tuple[str, ...]) -> Array:
  """A leaf in the dtype of the activations, cast before it is gathered over `fsdp`."""
  if leaf.dtype == dtype:
    return leaf
  return sharding.constrain(leaf.astype(dtype), *axes[1:])


def _mixture_of_shard(
  x_BTD: Array,
  weights: Mapping[str, Array],
  routed_BTD: Array | None,
  counted_BT: Array | None,
  *,
  per_token: int,
  normalized: bool,
  gating: Gating,
  rows: tuple[str, ...],
  expert_axis: str | None,
) -> tuple[Array, Load | None]:
  """`mixture` of one device's rows and experts.

  Args:
    rows: mesh axes over which the rows are sharded.
    expert_axis: mesh axis over which the experts are sharded.
  """
  x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
  choice = choose(
    x_ND if routed_BTD is None else routed_BTD.reshape(x_ND.shape),
    weights["router"],
    weights.get("router_bias"),
    per_token=per_token,
    normalized=normalized,
    scale_E=weights.get("router_expert_scale"),
  )
  own = weights["gate"].shape[0]
  group_NK, parts = choice.expert_NK, 1
  if expert_axis is not None:
    parts = jax.sharding.get_abstract_mesh().shape[expert_axis]
    group_NK = group_NK - own * jax.lax.axis_index(expert_axis)
    group_NK = jnp.where((group_NK >= 0) & (group_NK < own), group_NK, own)
  out_ND = apply_experts(
    x_ND, group_NK, choice.weight_NK, weights, gating=gating, parts=parts
  )
  if expert_axis is not None:
    out_ND = jax.lax.psum(out_ND, expert_axis)
  load = None
  if counted_BT is not None:
    load = measure(choice, counted_BT.reshape(-1))
    load = jax.lax.psum(load, rows) if rows else load
  return out_ND.reshape(x_BTD.shape), load


def apply_experts(
  x_ND: Array,
  group_NK: Array,
  weight_NK: Array,
  weights: Mapping[str, Array],
  *,
  gating: Gating,
  parts: int = 1,
) -> Array:
  """The weighted sum of the experts that are in `weights`.

  Args:
    group_NK: the number of an expert in `weights`, or their count for an expert that is
      elsewhere, which adds nothing.
    weight_NK: float32.
    weights: kernels "gate", "up" [E, F, D] and "down" [E, D, F], and perhaps biases.
    gating: as for `mixture`.
    parts: among how many devices the experts are divided.
  """
  (count, per_token), own = group_NK.shape, weights["gate"].shape[0]
  group_M = group_NK.reshape(-1)
  order_M = jnp.argsort(group_M, stable=True)
  inverse_M = jnp.argsort(order_M)
  is_in_ME = group_M[:, None] == jnp.arange(own)
  sizes_E = jnp.sum(is_in_ME, axis=0, dtype=jnp.int32)
  sorted_ME = is_in_ME[order_M]

  def project(x_MI: Array, name: str) -> Array:
    out_MO = grouped_product.grouped_product(x_MI, weights[name], sizes_E, parts)
    if f"{name}_bias" in weights:
      # A product, because the gradient of a gathering adds in any order.
      out_MO = out_MO + sorted_ME.astype(x_MI.dtype) @ weights[f"{name}_bias"]
    return out_MO

  choices_NKD = jnp.broadcast_to(x_ND[:, None], (count, per_token, x_ND.shape[-1]))
  x_MD = _permuted(choices_NKD.reshape(-1, x_ND.shape[-1]), order_M, inverse_M)
  out_MD = project(gating(project(x_MD, "gate"), project(x_MD, "up")), "down")
  out_NKD = _permuted(out_MD, inverse_M, order_M).reshape(choices_NKD.shape)
  is_own_NK = group_NK < own
  weight_NK = jnp.where(is_own_NK, weight_NK, 0.0)
  # Not a product of matrices, which would first copy the outputs to float32.
  out_ND = jnp.sum(out_NKD.astype(jnp.float32) * weight_NK[..., None], axis=1)
  return out_ND.astype(x_ND.dtype)


@jax.custom_vjp
def _permuted(x_MD: Array, order_M: Array, inverse_M: Array) -> Array:
  """The rows in another order; so is the gradient, which needs no addition."""
  del inverse_M
  return x_MD[order_M]


_permuted.defvjp(
  lambda x_MD, order_M, inverse_M: (x_MD[order_M], inverse_M),
  lambda inverse_M, gradient_MD: (gradient_MD[inverse_M], None, None),
)
