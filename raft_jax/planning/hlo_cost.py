"""The cost of a program: FLOPs from its jaxpr, collectives and traffic from its HLO.

XLA's own figures are not usable: on TPU they count the body of a loop once, and on GPU
there are none. Here the body of a loop counts once per iteration, and a loop that may
end early (a rollout whose rows have all ended) counts with all its iterations.

The text is that of `jax.stages.Compiled.as_text`: the program of one device, so all
sizes are per device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# --- FLOPs ----------------------------------------------------------------------------


ATTENTION = {
  "dot_product_attention_fwd_wrapper": 2,
  "dot_product_attention_bwd_wrapper": 5,
}
"""Matrix products of the size queries x keys in jax's primitives for cuDNN."""

GROUPED = re.compile(r"grouped_(product|outer)_over_(\d+)")
"""Programs of `models.experts`, and among how many devices the experts are divided."""


def flops(jaxpr: Any) -> float:
  """Multiplications and additions of all matrix products in a jaxpr, on all devices.

  A product of [m, k] and [k, n] counts as 2·m·k·n, and a `cond` as its dearest branch.
  cuDNN's attention has two products forward; backward it recomputes the scores and adds
  four products for the gradients. Experts multiply only the rows that chose them, and
  the devices among which they are divided have equally many of these.

  Args:
    jaxpr: such as `jax.jit(f).trace(x).jaxpr.jaxpr`.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[axis] for axis in contracted)
      total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    elif name in ATTENTION:
      (rows, queries, heads, width), (_, keys, *_) = (
        variable.aval.shape for variable in equation.invars[:2]
      )
      total += 2.0 * ATTENTION[name] * rows * heads * queries * keys * width
    elif grouped := GROUPED.fullmatch(str(params.get("name", ""))):
      total += _grouped(params["jaxpr"].jaxpr) / int(grouped[2])
    elif name == "shard_map":
      total += params["mesh"].size * flops(params["jaxpr"])
    elif name == "cond":
      total += max(flops(branch.jaxpr) for branch in params["branches"])
    elif name == "while":
      total += _bound(params["cond_jaxpr"].jaxpr) * flops(params["body_jaxpr"].jaxpr)
    else:
      rounds = params["length"] if name == "scan" else 1
      total += rounds * sum(flops(inner) for inner in _inner(params))
  return total


def _grouped(jaxpr: Any) -> float:
  """FLOPs of the product of sorted rows with their groups' kernels, if it is in there.

  Its branch for TPUs is `ragged_dot`. A program that jax divides for the backward pass
  leaves the product in one part, and only constants in the other.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "ragged_dot_general":
      (rows, width), other = (variable.aval.shape for variable in equation.invars[:2])
      # Of the kernels' gradient both operands are rows.
      kernel = other[1:] if len(other) == 3 else (width, other[1])
      return 2.0 * rows * math.prod(kernel)
    total = max([total, *(_grouped(inner) for inner in _inner(equation.params))])
  return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def _bound(condition: Any) -> int:
  """The most iterations of a loop that counts up to n: `i < n`, and other conditions.

  A bound that is not a literal counts as one iteration; our programs have none.
  """
  bounds = [
    int(equation.invars[1].val)
    for equation in condition.eqns
    if equation.primitive.name == "lt" and hasattr(equation.invars[1], "val")
  ]
  return min(bounds, default=1)


# --- The compiled text ----------------------------------------------------------------


class Instruction(NamedTuple):
  """One line of HLO: `name = type op(operands), attributes`."""

  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  attributes: str
  root: bool


class Module(NamedTuple):
  """A compiled module: its computations by name, and the one that runs first."""

  computations: dict[str, list[Instruction]]
  entry: str

  def types(self, computation: str) -> dict[str, str]:
    """The type of each instruction of a computation, by name."""
    return {line.name: line.type for line in self.computations[computation]}


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_ARRAY = re.compile(r"\b(pred|b?f\d+\w*|[suc]\d+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ROUNDS = re.compile(r"known_trip_count\W+n\W+(\d+)")


def parse(text: str) -> Module:
  """Reads the text of a compiled module."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and " = " in line:
      current.append(_instruction(line.strip()))
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  name, _, rest = line.partition(" = ")
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  kind, (op, bracket, rest) = rest[:end], rest[end:].strip().partition("(")
  end = _closing(bracket + rest)
  inside, attributes = rest[: end - 2], rest[end - 1 :]
  operands = tuple(re.split(r"[ %]", part.strip())[-1] for part in _parts(inside))
  root = name.startswith("ROOT ")
  name = name.removeprefix("ROOT ").lstrip("%")
  return Instruction(name, kind, op, operands, attributes, root)


def _closing(text: str) -> int:
  """The index after the bracket that closes the first one."""
  depth = 0
  for index, letter in enumerate(text):
    depth += (letter in "([{") - (letter in ")]}")
    if depth == 0:
      return index + 1
  return len(text)


def _parts(text: str) -> list[str]:
  """Splits a text at the commas outside of brackets."""
  depth, parts = 0, [""]
  for letter in text:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return [part for part in parts if part.strip()]


def size(kind: str) -> float:
  """Bytes of an HLO type; of a tuple, those of all its arrays."""
  return sum(_bytes(array) for array in _ARRAY.finditer(kind))


def _bytes(array: re.Match[str]) -> float:
  bits = re.search(r"\d+", array[1])
  width = int(bits[0]) / 8 if bits else 1.0  # pred
  return width * math.prod(int(length) for length in array[2].split(",") if length)


def _walk(
  module: Module, computation: str, times: int, *, into_fusions: bool
) -> Iterator[tuple[Instruction, str, int]]:
  """Every instruction that runs, with its computation and how often it runs."""
  for one in module.computations.get(computation, ()):
    yield one, computation, times
    inner, rounds = _CALLED.findall(one.attributes), 1
    if one.op == "while":
      rounds = _rounds(module, one.attributes)
    elif one.op == "conditional":
      for names in _BRANCHES.findall(one.attributes):
        inner += [name.strip().lstrip("%") for name in names.split(",")]
    elif one.op == "fusion":
      inner = inner if into_fusions else []
    elif one.op not in ("call", "async-start"):
      continue
    for name in inner:
      yield from _walk(module, name, times * rounds, into_fusions=into_fusions)


def _rounds(module: Module, attributes: str) -> int:
  """Iterations of a loop: XLA's own number, or else the bound in its condition."""
  known = _ROUNDS.search(attributes)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", attributes)
  inside = list(_walk(module, condition[1] if condition else "", 1, into_fusions=True))
  if not any("direction=LT" in one.attributes for one, _, _ in inside):
    return 1
  # TPU keeps the bound beside the comparison or passes it into a fusion.
  constants = (
    re.match(r"(\d+)$", one.operands[0])
    for one, _, _ in inside
    if one.op == "constant" and one.type.startswith("s32[]")
  )
  return max((int(bound[1]) for bound in constants if bound), default=1)


# --- Collectives ----------------------------------------------------------------------

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)


class Collective(NamedTuple):
  """A collective of the program.

  Attributes:
    kind: one of `KINDS`.
    type: HLO type of the result.
    group: devices that take part in one operation.
    times: how often it runs.
    wire: bytes that each device sends in total, with a ring algorithm.
  """

  kind: str
  type: str
  group: int
  times: int
  wire: float


def collectives(module: Module, devices: int) -> list[Collective]:
  """Every collective of the program.

  Args:
    devices: of the mesh; they are the group of a collective that names none.
  """
  result, counted = [], set()
  for one, place, times in _walk(module, module.entry, 1, into_fusions=True):
    kind = one.op.removesuffix("-start")
    if kind not in KINDS:
      continue
    channel = re.search(r"channel_id=(\d+)", one.attributes)
    # TPU splits one all-gather into several fusions that share its channel.
    if channel and (kind, times, channel[1]) in counted:
      continue
    counted.add((kind, times, channel[1] if channel else one.name))
    types = module.types(place)
    given = sum(size(types.get(name, "")) for name in one.operands)
    output = size(one.type)
    if one.op.endswith("-start") and kind != "all-reduce":
      output -= given  # its type also lists the operands
    if kind == "all-reduce" and place.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    group = _group(one.attributes, devices)
    share = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0}
    wire = max(given, output) * share.get(kind, (group - 1) / group)
    result.append(Collective(kind, one.type, group, times, times * wire))
  return result


def _group(attributes: str, devices: int) -> int:
  """Devices in a collective's group, in any of HLO's three notations."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
  if tiled:
    return int(tiled[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  return len(listed[1].split(",")) if listed else devices


# --- Memory ---------------------------------------------------------------------------

# These move nothing: they name existing arrays, or are loops whose bodies count.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
  *("conditional", "after-all", "partition-id", "replica-id", "opt-barrier"),
  *("async-start", "async-update", "async-done", "copy-start", "slice-start"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape", "copy", "convert", "transpose")


def traffic(module: Module) -> float:
  """Estimate of the bytes that the program reads from and writes to a device's memory.

  It sums what each instruction outside of fusions reads and writes. Of a stacked array
  only the slice that is read counts, and of an update in place only the new part.
  Arrays in TPU's vector memory do not count. Caches between instructions are ignored.
  """
  total = 0.0
  for one, place, times in _walk(module, module.entry, 1, into_fusions=False):
    if one.op in _FREE or one.op.endswith("-done"):
      continue
    total += times * _moved(module, one, module.types(place))
  return total


def _moved(module: Module, one: Instruction, types: Mapping[str, str]) -> float:
  given = [_in_memory(types.get(name, "")) for name in one.operands]
  result = _in_memory(one.type)
  if one.op in _SLICES:
    return 2 * result
  if one.op in ("dynamic-update-slice", "scatter"):
    return 2 * sum(given[1:])
  if one.op != "fusion":
    return sum(given) + result
  called = _CALLED.search(one.attributes)
  body = module.computations[called[1]] if called else []
  reads = _reads(module, body)
  updates = [line for line in body if line.op == "dynamic-update-slice"]
  inside = {line.name: line.type for line in body}
  for line in updates:
    if line.type.split("{")[0] in one.type:  # the result, written in place
      new = _in_memory(inside.get(line.operands[1], ""))
      result += new - _in_memory(line.type)
  read = sum(min(have, reads.get(index, have)) for index, have in enumerate(given))
  return read + max(result, 0.0)


def _reads(module: Module, body: list[Instruction]) -> dict[int, float]:
  """Bytes that a fusion reads of each parameter; if it slices one, only the slices."""
  users: dict[str, list[tuple[Instruction, int]]] = {}
  for line in body:
    for index, name in enumerate(line.operands):
      users.setdefault(name, []).append((line, index))

  def read(name: str, full: float) -> float:
    total = 0.0
    for line, index in users.get(name, ()):
      if line.op in _SLICES and index == 0:
        total += size(line.type)
      elif line.op in _SAME:
        total += read(line.name, full)
      elif line.op == "fusion":  # TPU nests them
        inner = module.computations[_CALLED.findall(line.attributes)[0]]
        total += _reads(module, inner)[index]
      elif line.op != "dynamic-update-slice" or index:
        return full
    return min(total, full)

  return {
    int(line.operands[0]): read(line.name, _in_memory(line.type))
    for line in body
    if line.op == "parameter"
  }


def _in_memory(kind: str) -> float:
  """Bytes of a type, without arrays in TPU's on-chip memory: spaces S(1), ..."""
  return sum(
    _bytes(array) for array in _ARRAY.finditer(kind) if "S(" not in (array[3] or "")
  )


def largest(module: Module, count: int) -> list[tuple[str, float]]:
  """The largest arrays that the program makes: HLO type without layout, and bytes."""
  made: dict[str, float] = {}
  for one, _, _ in _walk(module, module.entry, 1, into_fusions=False):
    if one.op in _FREE or "dynamic-update-slice" in one.name + one.op:
      continue
    for array in _ARRAY.finditer(one.type):
      made[f"{array[1]}[{array[2]}]"] = _bytes(array)
  return sorted(made.items(), key=lambda item: -item[1])[:count]
