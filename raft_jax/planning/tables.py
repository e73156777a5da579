"""The figures of a planned run as text: one table and a few lines per machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from raft_jax.planning import estimate, machines
from raft_jax.runtime import progress


def show(
  tokens: estimate.StepTokens,
  machine: machines.Machine,
  costs: Mapping[str, Any],
  verdict: estimate.Verdict,
  *,
  share: float,
  total_steps: int | None,
) -> None:
  """Prints the table and the lines of one machine."""
  mesh = describe(costs["mesh"])
  if costs["rollouts"] != costs["mesh"]:
    mesh += f"; rollouts on {describe(costs['rollouts'])}"
  need = "refused by the compiler" if verdict.peak is None else gib(verdict.peak)
  of_memory = f" ({share:.0%} of it)" if machine.chip.platform == "cuda" else ""
  memory = costs["memory"]
  held = [f"{name} {gib(memory[name])}" for name in memory if name != "cache"]
  print(f"\n{machine.topology}: {machine.devices} devices, mesh {mesh}")
  print(f"  {'fits' if verdict.fits else 'DOES NOT FIT'}: {need} a device, of ", end="")
  print(f"{gib(verdict.limit)}{of_memory}")
  print(f"  always held: {', '.join(held)}")
  print(f"  the rollout's KV cache: {gib(memory['cache'])} of its temporaries")
  rich.console.Console(width=124).print(phase_table(tokens, machine, costs))
  for name, own in costs["phases"].items():
    print(f"  {name}: {own.get('refused') or details(own)}")
  if costs["other rollouts"]:
    print(f"  {rollouts_line(costs, machine, verdict.limit)}")
  if verdict.step is not None:
    print(f"  step: {span(verdict.step)}")
    print(f"  run: {run_line(verdict, total_steps)}")
  smallest = estimate.smallest_fit(costs, machine, share, tokens.batch_size)
  print(f"  smallest that fits: {smallest}")


def rollouts_line(
  costs: Mapping[str, Any], machine: machines.Machine, limit: float
) -> str:
  """Times and memory by `rollout.tensor`, and the fastest one that fits."""
  compared = estimate.compare_rollouts(costs, machine)
  fitting = {
    tensor: one.seconds
    for tensor, one in compared.items()
    if one is not None and one.peak <= limit
  }
  parts = [
    f"{tensor}: refused"
    if one is None
    else f"{tensor}: {1e3 * one.seconds:,.0f} ms, {gib(one.peak)}"
    for tensor, one in compared.items()
  ]
  best = min(fitting, key=lambda tensor: fitting[tensor], default=None)
  advice = "none fits" if best is None else f"the fastest that fits: {best}"
  return f"rollout.tensor {'; '.join(parts)}; {advice}"


def describe(mesh: Mapping[str, int]) -> str:
  """The sizes of a mesh."""
  return " x ".join(f"{name} {size}" for name, size in mesh.items())


def details(own: Mapping[str, Any]) -> str:
  """What a phase sends between devices, and the largest arrays that it makes."""
  sent = ", ".join(
    f"{times:,.0f} {kind} of {gib(wire)}"
    for kind, (times, wire) in sorted(own["collectives"].items())
    if wire >= 2**20
  )
  largest = ", ".join(f"{kind} {gib(size)}" for kind, size in own["largest"][:3])
  return f"sends {sent or 'next to nothing'};\n    largest arrays {largest}"


def phase_table(
  tokens: estimate.StepTokens, machine: machines.Machine, costs: Mapping[str, Any]
) -> rich.table.Table:
  """One row per phase, for one device; `x model` is relative to `model_flops`."""
  table = rich.table.Table()
  table.add_column("a device")
  heads = ("peak GiB", "temps GiB", "TFLOP", "x model", "memory GB", "wire GB")
  for head in (*heads, "waits ms", "least ms"):
    table.add_column(head, justify="right")
  table.add_column("bound by")
  expected = estimate.model_flops(tokens, costs["active"])
  for name, own in costs["phases"].items():
    phase = estimate.phase(costs, name, machine)
    ratio = own["flops"] * machine.devices / expected[name.split()[-1]]
    flops = (f"{own['flops'] / 1e12:,.2f}", f"{ratio:.2f}")
    if phase is None:
      table.add_row(name, "refused", "", *flops)
      continue
    sent = sum(wire for _, wire in own["collectives"].values())
    table.add_row(
      name,
      f"{phase.peak / estimate.GIB:.2f}",
      f"{own['temporaries'] / estimate.GIB:.2f}",
      *flops,
      f"{own['traffic'] / 1e9:,.1f}",
      f"{sent / 1e9:,.1f}",
      f"{1e3 * phase.latency:,.0f}",
      f"{1e3 * phase.seconds:,.0f}",
      phase.bound,
    )
  return table


def run_line(verdict: estimate.Verdict, total_steps: int | None) -> str:
  """The time of the whole run."""
  if verdict.run is None:
    return "give --questions N for its time"
  low, high = (progress.clock(seconds) for seconds in verdict.run)
  return f"{total_steps:,} steps, {low} to {high} (a roofline, not a measurement)"


def span(seconds: tuple[float, float]) -> str:
  """The time of a step."""
  return f"{seconds[0]:.2f} s at least, {seconds[1]:.2f} s if nothing overlaps"


def gib(size: float) -> str:
  """Bytes in MiB or GiB."""
  if size < 0.01 * estimate.GIB:
    return f"{size / 2**20:.2f} MiB"
  return f"{size / estimate.GIB:.2f} GiB"
