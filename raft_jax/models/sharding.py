"""Sharding of every array: one table from logical axes to axes of the device mesh.

Mesh axes are `data`, `fsdp` and `tensor`. A batch is sharded over `data` and `fsdp`;
parameters and optimizer state over `fsdp` and `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from raft_jax import errors

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "tokens": None,
  "width": None,
  "layers": None,
  "embed": "fsdp",
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "experts": "tensor",
  "expert_mlp": None,
  "routes": None,
  "head_dim": None,
  "rank": None,
}
"""Logical axis -> mesh axes. An unknown name is an error and has no default."""

GATHERED = {"embed": "width"}
"""A parameter's logical axis -> that axis where it is used, gathered over `fsdp`."""


def make_mesh(
  data: int, fsdp: int, tensor: int, *, devices: Sequence[Any] | None = None
) -> Mesh:
  """Builds the mesh over all devices; one size may be -1, meaning the remaining ones.

  Args:
    devices: None: all devices.

  Raises:
    errors.UserError: when the sizes do not multiply to the number of devices.
  """
  count = jax.device_count() if devices is None else len(devices)
  sizes = [data, fsdp, tensor]
  known = math.prod(size for size in sizes if size != -1)
  sizes = [count // max(known, 1) if size == -1 else size for size in sizes]
  if math.prod(sizes) != count or min(sizes) < 1:
    raise errors.UserError(
      f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not fit {count} "
      "devices; the sizes must multiply to that number (one may be -1)"
    )
  # Like `jax.make_mesh`, which refuses to split one axis of a TPU slice over two axes.
  placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def describe(mesh: Mesh) -> str:
  """One line: the devices and the sizes of the mesh."""
  kind = mesh.devices.flat[0].device_kind
  sizes = ", ".join(f"{name} {mesh.shape[name]}" for name in MESH_AXES)
  return f"device: {kind}" if mesh.size == 1 else f"{mesh.size} x {kind}: {sizes}"


def spec(logical_axes: tuple[str, ...]) -> PartitionSpec:
  """Mesh axes of an array with these logical axes. KeyError for an unknown name."""
  return PartitionSpec(*(RULES[name] for name in logical_axes))


def place(
  mesh: Mesh | AbstractMesh, axes: tuple[str, ...], shape: tuple[int, ...]
) -> NamedSharding:
  """The sharding of one array.

  A dimension is not sharded if its size does not divide or the mesh lacks its axes.
  """
  names = []
  for name, size in zip(axes, shape, strict=True):
    target = RULES[name]
    parts = (target,) if isinstance(target, str) else target or ()
    ours = all(part in mesh.shape for part in parts)
    divides = ours and size % math.prod(mesh.shape[part] for part in parts) == 0
    names.append(target if divides else None)
  return NamedSharding(mesh, PartitionSpec(*names))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Constrains the sharding of an activation under `jax.set_mesh`; else does nothing.

  Without constraints the compiler follows the parameters: it sums partial products over
  `fsdp` and moves activations where it should gather weights.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, place(mesh, axes, x.shape).spec)


def everywhere(x: jax.Array) -> jax.Array:
  """Replicates an array on every device, under `jax.set_mesh`."""
  return constrain(x, *("width",) * x.ndim)


def constrain_rows(tree: Any) -> Any:
  """Constrains arrays [B, ...] to be sharded by rows, as a batch is."""
  return jax.tree.map(lambda x: constrain(x, "batch", *("width",) * (x.ndim - 1)), tree)


def gathered(weight: jax.Array, *axes: str) -> jax.Array:
  """A weight gathered over `fsdp` here, and not wherever it is read.

  Its gradient is scattered back to the shards of the weight. With a plain constraint
  every device would hold the full gradient.
  """

  @jax.custom_vjp
  def gather(weight: jax.Array) -> jax.Array:
    # Sharded first: else the compiler moves an earlier cast behind the gathering.
    weight = constrain(weight, *axes)
    return constrain(weight, *(GATHERED.get(name, name) for name in axes))

  gather.defvjp(
    lambda weight: (gather(weight), None),
    lambda _, gradient: (constrain(gradient, *axes),),
  )
  return gather(weight)


# --- Rollouts on a mesh of their own --------------------------------------------------


def decode_mesh(mesh: Mesh, tensor: int) -> Mesh:
  """A mesh for rollouts: neighbouring devices share the weights, groups the rows.

  It has the devices of `mesh` in the same order, so that a program on one of them can
  read arrays of the other.

  Args:
    tensor: devices that share the weights. A multiple of `mesh`'s own `tensor`, by a
      number that divides its `fsdp`.
  """
  devices = mesh.devices.reshape(-1, 1, tensor)
  return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_of(x: jax.Array) -> AbstractMesh:
  """The mesh on which an argument of a program lies; that of the program by default."""
  own, mesh = jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()
  return mesh if own.empty or mesh.empty else own


def moved(weight: jax.Array, *axes: str) -> jax.Array:
  """A weight moved from its mesh to the program's, which `decode_mesh` made of it.

  In two hops, because the compiler would do it in one by gathering the whole weight on
  every device: first gathered over the groups, then exchanged within each group.
  """
  mesh, tensor = mesh_of(weight), jax.sharding.get_abstract_mesh().shape["tensor"]
  inner = tensor // mesh.shape["tensor"]
  sizes = (mesh.shape["data"], mesh.shape["fsdp"] // inner, inner, mesh.shape["tensor"])
  between = AbstractMesh(
    sizes, ("data", "groups", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 4
  )
  for hop in (mesh, between):
    with jax.sharding.use_abstract_mesh(hop):
      weight = constrain(weight, *axes)
  return constrain(weight, *axes)


# --- Trees and batches ----------------------------------------------------------------


def tree(mesh: Mesh, axes: Any, shapes: Any) -> Any:
  """Shardings for a tree of arrays.

  Args:
    axes: tree of tuples of logical axis names, such as `param_sharding.axes(config)`.
    shapes: the same tree with `jax.ShapeDtypeStruct` or array leaves.
  """
  return jax.tree.map(
    lambda names, leaf: place(mesh, names, leaf.shape),
    axes,
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def batch(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: rows over `data` and `fsdp`."""
  return NamedSharding(mesh, spec(("batch",)))


def spread(place: jax.sharding.Sharding, rows: Any) -> Any:
  """Puts a tree of numpy arrays, with all rows of the batch, on devices by a sharding.

  Every process passes all rows and places those of its own devices, so that the rows of
  a step do not depend on the number of processes.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), rows
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that is replicated on every device."""
  return NamedSharding(mesh, PartitionSpec())


def platform(mesh: Mesh) -> str:
  """The platform of a mesh's devices, as JAX names it."""
  return mesh.devices.flat[0].platform
