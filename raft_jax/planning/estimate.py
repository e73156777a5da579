"""Whether a run fits on a machine, and how fast it can be there at most.

`measure` compiles the step for the machine; the rest is arithmetic on its figures.
Times are rooflines of the makers' figures, not measurements.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.planning import machines
from raft_jax.runtime import interrupts
from raft_jax.training import throughput

GIB = 2.0**30


# --- Compiling in another process -----------------------------------------------------


def check_installed(machine: machines.Machine) -> None:
  """Raises a UserError if compiling for the machine needs a missing package."""
  for name in machines.PACKAGES[machine.chip.platform]:
    try:
      spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
      spec = None
    if spec is None:
      raise errors.UserError(
        f"--topology {machine.topology}: compiling for it needs the extra `plan` "
        f"(module {name} is missing; Linux x86_64 only); run {errors.install('plan')}"
      )


def measure(
  config: Mapping[str, Any],
  machine: machines.Machine,
  *,
  compare_rollouts: bool = False,
) -> dict[str, Any]:
  """The costs that `dry_run.measure` finds, in a process of its own.

  Args:
    config: the run's, as plain values.
    compare_rollouts: as there.

  Raises:
    errors.UserError: the config does not suit the machine, or the process died.
  """
  request = {
    "config": config,
    "topology": machine.topology,
    "compare_rollouts": compare_rollouts,
  }
  process = subprocess.Popen(
    [sys.executable, "-m", "raft_jax.planning.dry_run"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, **machines.environment(machine)},
    text=True,
  )
  with interrupts.passing_on(process.pid):
    out, err = process.communicate(json.dumps(request))
  interrupts.check()
  if process.returncode:
    last_line = (err.strip().splitlines() or ["no message"])[-1]
    raise errors.UserError(
      f"--topology {machine.topology}: compiling ended with status "
      f"{process.returncode} ({last_line[:300]}); another topology or mesh may work"
    )
  costs = json.loads(out)
  if "error" in costs:
    raise errors.UserError(f"--topology {machine.topology}: {costs['error']}")
  return costs


# --- Arithmetic -----------------------------------------------------------------------


class Phase(NamedTuple):
  """One program of a step on one device.

  Attributes:
    peak: bytes held while it runs, including what waits for other phases.
    compute: seconds that its FLOPs take at least; `memory` and `wire`, the same for
      memory traffic and for the bytes of collectives.
    latency: seconds of the collectives if they sent nothing. A layer waits for its sums
      over devices, so nothing hides them.
  """

  peak: float
  compute: float
  memory: float
  wire: float
  latency: float

  @property
  def seconds(self) -> float:
    """Time if everything but latency overlaps."""
    return max(self.compute, self.memory, self.wire) + self.latency

  @property
  def serial_seconds(self) -> float:
    """Time if collectives wait for the computation."""
    return max(self.compute, self.memory) + self.wire + self.latency

  @property
  def bound(self) -> str:
    """What takes the longest."""
    parts = ("compute", "memory", "wire", "latency")
    return max(parts, key=lambda name: getattr(self, name))


def resident(costs: Mapping[str, Any]) -> float:
  """Bytes that a device holds during the whole run."""
  memory = costs["memory"]
  return sum(
    memory[name] for name in ("parameters", "optimizer", "base model", "batch")
  )


def phase(
  costs: Mapping[str, Any], name: str, machine: machines.Machine
) -> Phase | None:
  """Memory and times of one phase; None if the compiler refused it."""
  return program(costs, costs["phases"][name], machine)


def program(
  costs: Mapping[str, Any], own: Mapping[str, Any], machine: machines.Machine
) -> Phase | None:
  """As `phase`, of a program whose own costs are given."""
  chip = machine.chip
  if "refused" in own:
    return None
  sent = sum(wire for _, wire in own["collectives"].values())
  return Phase(
    peak=resident(costs) + own["temporaries"] + own["output"] + own["code"],
    compute=own["flops"] / chip.peak,
    memory=own["traffic"] / chip.bandwidth,
    wire=sent / machine.link,
    latency=own["latency"],
  )


class StepTokens(NamedTuple):
  """The size of a step: rows, and the longest of each segment in tokens.

  Attributes:
    batch_size: questions of a step.
    rows: with one for each rollout of a question.
    trains_weights: whether the model's own weights get a gradient (not with LoRA).
  """

  batch_size: int
  rows: int
  prompt: int
  answer: int
  teacher: int
  rollout: int
  trains_weights: bool


def model_flops(tokens: StepTokens, active: int) -> dict[str, float]:
  """FLOPs of each phase, as `throughput.model_flops`."""
  of_row = {
    "rollout": tokens.prompt + tokens.rollout,
    "teacher": tokens.teacher + tokens.rollout,
    "update": tokens.prompt + tokens.answer + tokens.rollout,
  }
  of_step = {phase: tokens.rows * count for phase, count in of_row.items()}
  return throughput.model_flops(of_step, active, trains_weights=tokens.trains_weights)


class Verdict(NamedTuple):
  """Whether a run fits on a machine, and its times.

  Attributes:
    peak: bytes that a device needs, or None if the compiler refused a phase.
    limit: bytes that a device has for the program.
    step: seconds of a step at least, and if collectives wait for the computation.
    run: the same for the whole run, or None.
  """

  peak: float | None
  limit: float
  step: tuple[float, float] | None
  run: tuple[float, float] | None

  @property
  def fits(self) -> bool:
    return self.peak is not None and self.peak <= self.limit


def judge(
  costs: Mapping[str, Any],
  machine: machines.Machine,
  *,
  share: float,
  total_steps: int | None,
  gradient_stats_every: int,
) -> Verdict:
  """Whether the run fits, and how long it takes.

  Args:
    share: of a GPU's memory that JAX takes.
    total_steps: of the run; None if unknown.
    gradient_stats_every: steps between two measured updates; 0: never.
  """
  limit = machine.usable(share)
  phases = {}
  for name in costs["phases"]:
    one = phase(costs, name, machine)
    if one is None:
      return Verdict(None, limit, None, None)
    phases[name] = one
  usual = [one for name, one in phases.items() if name != "measured update"]
  step = (
    sum(one.seconds for one in usual),
    sum(one.serial_seconds for one in usual),
  )
  run = None
  if total_steps is not None:
    run = (step[0] * total_steps, step[1] * total_steps)
    if gradient_stats_every and "measured update" in phases:
      times = math.ceil(total_steps / gradient_stats_every)
      measured, update = phases["measured update"], phases["update"]
      run = (
        run[0] + times * (measured.seconds - update.seconds),
        run[1] + times * (measured.serial_seconds - update.serial_seconds),
      )
  return Verdict(max(one.peak for one in phases.values()), limit, step, run)


def compare_rollouts(
  costs: Mapping[str, Any], machine: machines.Machine
) -> dict[int, Phase | None]:
  """The rollouts that were compiled, by `rollout.tensor`."""
  programs = {int(tensor): own for tensor, own in costs["other rollouts"].items()}
  programs[costs["rollouts"]["tensor"]] = costs["phases"]["rollout"]
  return {
    tensor: program(costs, programs[tensor], machine) for tensor in sorted(programs)
  }


def smallest_fit(
  costs: Mapping[str, Any], machine: machines.Machine, share: float, batch_size: int
) -> str:
  """The smallest machine of the kind that surely fits, by a bound from this one.

  Parameters, optimizer state and base model are sharded over any number of devices. The
  temporaries are in part gathered weights, which do not change with the number of
  devices, and in part activations, which are sharded: on fewer devices they grow at
  most in proportion, on more devices they do not grow.
  """
  phases = [phase(costs, name, machine) for name in costs["phases"]]
  refused = None in phases
  sharded, temporaries = resident(costs), 0.0
  if not refused:
    temporaries = max(one.peak for one in phases if one is not None) - sharded
  for smaller in machines.ladder(machine.kind):
    times = machine.devices / smaller.devices
    need = sharded * times + temporaries * max(times, 1.0)
    if refused and smaller.devices <= machine.devices:
      continue
    if smaller.devices == machine.devices and smaller.topology != machine.topology:
      continue
    if need <= smaller.usable(share) and batch_size % smaller.devices == 0:
      bound = f"at most {need / GIB:.1f} GiB a device"
      if refused:
        bound = f"{need / GIB:.1f} GiB a device besides temporaries"
      return f"{smaller.topology} ({bound}, by a bound from this compilation)"
  return (
    f"none of {', '.join(known.topology for known in machines.ladder(machine.kind))}"
  )
