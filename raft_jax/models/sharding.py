"""Where every array lives: one table from logical axes to the axes of the device mesh.

Mesh axes are `data`, `fsdp` and `tensor`. A batch is split over `data` and `fsdp`;
parameters, and with them optimizer state, over `fsdp` and `tensor`.
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
  "head_dim": None,
  "rank": None,
}
"""Logical axis to mesh axes. A name that is not here is an error, not a default."""

GATHERED = {"embed": "width"}
"""What a parameter's axis is where the parameter is used: whole over `fsdp`."""


def make_mesh(
  data: int, fsdp: int, tensor: int, *, devices: Sequence[Any] | None = None
) -> Mesh:
  """Builds the mesh over all devices; one size may be -1, meaning what is left.

  Args:
    devices: by default those that there are.

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
  # As `jax.make_mesh`, which refuses to split an axis of a TPU slice over two of ours.
  placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def describe(mesh: Mesh) -> str:
  """One line: the devices, and how they are shared out."""
  kind = mesh.devices.flat[0].device_kind
  sizes = ", ".join(f"{name} {mesh.shape[name]}" for name in MESH_AXES)
  return f"device: {kind}" if mesh.size == 1 else f"{mesh.size} x {kind}: {sizes}"


def spec(logical_axes: tuple[str, ...]) -> PartitionSpec:
  """Mesh axes of an array with these logical axes. KeyError for an unknown name."""
  return PartitionSpec(*(RULES[name] for name in logical_axes))


def place(
  mesh: Mesh | AbstractMesh, axes: tuple[str, ...], shape: tuple[int, ...]
) -> NamedSharding:
  """The sharding of one array; a dimension that does not divide stays whole, as does
  one whose axes a mesh of another's making lacks."""
  names = []
  for name, size in zip(axes, shape, strict=True):
    target = RULES[name]
    parts = (target,) if isinstance(target, str) else target or ()
    ours = all(part in mesh.shape for part in parts)
    divides = ours and size % math.prod(mesh.shape[part] for part in parts) == 0
    names.append(target if divides else None)
  return NamedSharding(mesh, PartitionSpec(*names))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Fixes where an activation lives, under `jax.set_mesh`; without a mesh, nothing.

  Left to itself the compiler follows the parameters, sums partial products over `fsdp`
  and sends activations around where it should gather weights.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, place(mesh, axes, x.shape).spec)


def everywhere(x: jax.Array) -> jax.Array:
  """A whole copy on every device, under `jax.set_mesh`."""
  return constrain(x, *("width",) * x.ndim)


def gathered(weight: jax.Array, *axes: str) -> jax.Array:
  """A weight whole over `fsdp`, gathered here and not wherever it is read.

  Its gradient goes back to the shares in which the weight lives: a plain constraint
  would hold every device to the whole gradient.
  """

  @jax.custom_vjp
  def gather(weight: jax.Array) -> jax.Array:
    # Held in its shares first: else a cast before this moves behind the gathering.
    weight = constrain(weight, *axes)
    return constrain(weight, *(GATHERED.get(name, name) for name in axes))

  gather.defvjp(
    lambda weight: (gather(weight), None),
    lambda _, gradient: (constrain(gradient, *axes),),
  )
  return gather(weight)


def tree(mesh: Mesh, axes: Any, shapes: Any) -> Any:
  """Shardings for a tree of arrays.

  Args:
    axes: tree of tuples of logical axis names, such as `transformer.axes(config)`.
    shapes: the same tree with `jax.ShapeDtypeStruct` or array leaves.
  """
  return jax.tree.map(
    lambda names, leaf: place(mesh, names, leaf.shape),
    axes,
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def batch(mesh: Mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`; everything else whole."""
  return NamedSharding(mesh, spec(("batch",)))


def spread(place: jax.sharding.Sharding, rows: Any) -> Any:
  """A tree of numpy arrays of the whole batch, on the devices that `place` names.

  Every process gives all rows and places those of its own devices, so that which rows
  a step reads does not depend on how many processes there are.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), rows
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
