"""A run before paying for it: `python -m raft_jax.plan --config C --topology T`.

Compiles the run's own rollout, teacher and update for machines that are absent and says
whether they fit into memory, what they compute and send, and how fast they can be at
most. Needs the extra `plan`, the model's config.json and nothing else: neither weights
nor data. Times are rooflines of the makers' figures, not measurements.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.table

from raft_jax import errors
from raft_jax.config import cli, schema
from raft_jax.planning import machines
from raft_jax.runtime import interrupts, progress
from raft_jax.storage import question_files

GIB = 2.0**30
MEM_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""JAX takes this share of a GPU's memory for itself; by default 0.75."""


# --- The machines' answers ------------------------------------------------------------


def check_installed(machine: machines.Machine) -> None:
  """Raises a UserError if compiling for the machine needs a package that is absent."""
  for name in machines.PACKAGES[machine.chip.platform]:
    try:
      found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
      found = None
    if found is None:
      raise errors.UserError(
        f"--topology {machine.topology}: compiling for it needs the extra `plan` "
        f"(module {name} is missing; Linux x86_64 only); run {errors.install('plan')}"
      )


def ask(config: schema.Config, machine: machines.Machine) -> dict[str, Any]:
  """What `dry_run.measure` says of a machine, from a process of its own.

  Raises:
    errors.UserError: the config does not suit the machine, or the process died.
  """
  asked = {"config": config.model_dump(mode="json"), "topology": machine.topology}
  process = subprocess.Popen(
    [sys.executable, "-m", "raft_jax.planning.dry_run"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, **machines.environment(machine)},
    text=True,
  )
  with interrupts.passing_on(process.pid):
    out, err = process.communicate(json.dumps(asked))
  interrupts.check()
  if process.returncode:
    last = (err.strip().splitlines() or ["no message"])[-1]
    raise errors.UserError(
      f"--topology {machine.topology}: compiling ended with status "
      f"{process.returncode} ({last[:300]}); another topology or mesh may work"
    )
  answer = json.loads(out)
  if "error" in answer:
    raise errors.UserError(f"--topology {machine.topology}: {answer['error']}")
  return answer


# --- Arithmetic -----------------------------------------------------------------------


class Phase(NamedTuple):
  """One program of a step on one device.

  Attributes:
    peak: bytes held while it runs, all that waits for other phases included.
    compute, memory, wire: seconds that FLOPs, memory and collectives take at least.
  """

  peak: float
  compute: float
  memory: float
  wire: float

  @property
  def seconds(self) -> float:
    """If all overlaps."""
    return max(self.compute, self.memory, self.wire)

  @property
  def apart(self) -> float:
    """If collectives wait for computing."""
    return max(self.compute, self.memory) + self.wire

  @property
  def bound(self) -> str:
    return max(("compute", "memory", "wire"), key=lambda name: getattr(self, name))


def resident(answer: Mapping[str, Any]) -> float:
  """Bytes a device holds during the whole run."""
  memory = answer["memory"]
  return sum(
    memory[name] for name in ("parameters", "optimizer", "base model", "batch")
  )


def phase(
  answer: Mapping[str, Any], name: str, machine: machines.Machine
) -> Phase | None:
  """Arithmetic of one phase; None where the compiler refused it."""
  found, chip = answer["phases"][name], machine.chip
  if "refused" in found:
    return None
  own = found["temporaries"] + found["output"] + found["code"]
  sent = sum(wire for _, wire in found["collectives"].values())
  return Phase(
    peak=resident(answer) + own,
    compute=found["flops"] / chip.peak,
    memory=found["traffic"] / chip.bandwidth,
    wire=sent / machine.link,
  )


def model_flops(config: schema.Config, parameters: int) -> dict[str, float]:
  """FLOPs by the usual rule: 2 a parameter and token forward, 6 with backward
  (4 where the weights themselves get no gradient: LoRA).

  Kaplan et al., "Scaling Laws for Neural Language Models", arXiv 2001.08361, 2.1.
  """
  lengths, new = config.data, config.rollout
  rows = config.train.batch_size * new.group
  prompt, answer = lengths.max_prompt_tokens, lengths.max_answer_tokens
  each = 2.0 * parameters * rows
  backward = 2 if config.lora is None else 1
  return {
    "rollout": each * (prompt + new.max_new_tokens),
    "teacher": each * (lengths.max_teacher_tokens + new.max_new_tokens),
    "update": each * (1 + backward) * (prompt + answer + new.max_new_tokens),
  }


def steps(config: schema.Config, questions: int | None) -> int | None:
  """Optimizer steps; None where nothing says how many questions there are."""
  if questions is None and pathlib.Path(config.data.questions).is_file():
    questions = len(
      question_files.read_questions(
        config.data.questions,
        limit=config.data.limit,
        unusable=config.data.unusable,
        reject_threshold=config.data.reject_threshold,
      )
    )
  most = config.train.max_steps
  if questions is None:
    return most
  total = config.train.epochs * (questions // config.train.batch_size)
  return total if most is None else min(total, most)


class Verdict(NamedTuple):
  """What became of a machine.

  Attributes:
    peak: bytes a device needs, or None where a compiler refused.
    limit: bytes that a device has for the program.
    step: seconds of a step at least, and if collectives wait for computing.
    run: the same of the whole run, or None.
  """

  peak: float | None
  limit: float
  step: tuple[float, float] | None
  run: tuple[float, float] | None

  @property
  def fits(self) -> bool:
    return self.peak is not None and self.peak <= self.limit


def judge(
  answer: Mapping[str, Any],
  machine: machines.Machine,
  *,
  share: float,
  total_steps: int | None,
  gradient_stats_every: int,
) -> Verdict:
  """Whether the run fits, and how long it takes."""
  phases = {name: phase(answer, name, machine) for name in answer["phases"]}
  limit = machine.usable(share)
  if None in phases.values():
    return Verdict(None, limit, None, None)
  known = {name: found for name, found in phases.items() if found is not None}
  usual = [found for name, found in known.items() if name != "measured update"]
  step = (sum(p.seconds for p in usual), sum(p.apart for p in usual))
  run = None
  if total_steps is not None:
    run = (step[0] * total_steps, step[1] * total_steps)
    if gradient_stats_every and "measured update" in known:
      times = math.ceil(total_steps / gradient_stats_every)
      more, usual_update = known["measured update"], known["update"]
      run = (
        run[0] + times * (more.seconds - usual_update.seconds),
        run[1] + times * (more.apart - usual_update.apart),
      )
  return Verdict(max(found.peak for found in known.values()), limit, step, run)


def suggestion(
  answer: Mapping[str, Any], machine: machines.Machine, share: float, batch_size: int
) -> str:
  """The smallest machine of the kind that surely fits, by a bound from this one.

  What is spread over the devices (parameters, optimizer state, base model) is so on any
  number of them; temporaries are in part gathered weights, which stay as they are, and
  in part activations, which are spread: on fewer devices at most as many times more, on
  more devices no more.
  """
  peaks = [phase(answer, name, machine) for name in answer["phases"]]
  if None in peaks:
    spread, own = resident(answer), 0.0
  else:
    spread = resident(answer)
    own = max(found.peak for found in peaks if found is not None) - spread
  for smaller in machines.ladder(machine.kind):
    times = machine.devices / smaller.devices
    need = spread * times + own * max(times, 1.0)
    if None in peaks and smaller.devices <= machine.devices:
      continue
    if smaller.devices == machine.devices and smaller.topology != machine.topology:
      continue
    if need <= smaller.usable(share) and batch_size % smaller.devices == 0:
      bound = f"at most {need / GIB:.1f} GiB a device"
      if None in peaks:
        bound = f"{need / GIB:.1f} GiB a device beside temporaries"
      return f"{smaller.topology} ({bound}, by a bound from this compilation)"
  return (
    f"none of {', '.join(known.topology for known in machines.ladder(machine.kind))}"
  )


# --- What is printed ------------------------------------------------------------------


def show(
  config: schema.Config,
  machine: machines.Machine,
  answer: Mapping[str, Any],
  verdict: Verdict,
  *,
  share: float,
  total_steps: int | None,
) -> None:
  """One machine's table and sentences."""
  mesh = " x ".join(f"{name} {size}" for name, size in answer["mesh"].items())
  need = "refused by the compiler" if verdict.peak is None else gib(verdict.peak)
  of_memory = f" ({share:.0%} of it)" if machine.chip.platform == "cuda" else ""
  memory = answer["memory"]
  held = [f"{name} {gib(memory[name])}" for name in memory if name != "cache"]
  print(f"\n{machine.topology}: {machine.devices} devices, mesh {mesh}")
  print(f"  {'fits' if verdict.fits else 'DOES NOT FIT'}: {need} a device, of ", end="")
  print(f"{gib(verdict.limit)}{of_memory}")
  print(f"  always held: {', '.join(held)}")
  print(f"  the rollout's KV cache: {gib(memory['cache'])} of its temporaries")
  rich.console.Console(width=112).print(phase_table(config, machine, answer))
  for name, found in answer["phases"].items():
    print(f"  {name}: {found.get('refused') or details(found)}")
  if verdict.step is not None:
    print(f"  step: {span(verdict.step)}")
    print(f"  run: {run_line(verdict, total_steps)}")
  smallest = suggestion(answer, machine, share, config.train.batch_size)
  print(f"  smallest that fits: {smallest}")


def details(found: Mapping[str, Any]) -> str:
  """What a phase sends, and the largest arrays that it makes."""
  sent = ", ".join(
    f"{times:,.0f} {kind} of {gib(wire)}"
    for kind, (times, wire) in sorted(found["collectives"].items())
    if wire >= 2**20
  )
  largest = ", ".join(f"{kind} {gib(size)}" for kind, size in found["largest"][:3])
  return f"sends {sent or 'nothing to speak of'};\n    largest arrays {largest}"


def phase_table(
  config: schema.Config, machine: machines.Machine, answer: Mapping[str, Any]
) -> rich.table.Table:
  """One row a phase, of one device; `x model` compares with `model_flops`."""
  table = rich.table.Table()
  table.add_column("a device")
  heads = ("peak GiB", "temps GiB", "TFLOP", "x model", "memory GB", "wire GB")
  for head in (*heads, "least ms"):
    table.add_column(head, justify="right")
  table.add_column("bound by")
  expected = model_flops(config, answer["parameters"])
  for name, found in answer["phases"].items():
    result = phase(answer, name, machine)
    ratio = found["flops"] * machine.devices / expected[name.split()[-1]]
    flops = (f"{found['flops'] / 1e12:,.2f}", f"{ratio:.2f}")
    if result is None:
      table.add_row(name, "refused", "", *flops)
      continue
    sent = sum(wire for _, wire in found["collectives"].values())
    table.add_row(
      name,
      f"{result.peak / GIB:.2f}",
      f"{found['temporaries'] / GIB:.2f}",
      *flops,
      f"{found['traffic'] / 1e9:,.1f}",
      f"{sent / 1e9:,.1f}",
      f"{1e3 * result.seconds:,.0f}",
      result.bound,
    )
  return table


def run_line(verdict: Verdict, total_steps: int | None) -> str:
  if verdict.run is None:
    return "give --questions N for its time"
  low, high = (progress.clock(seconds) for seconds in verdict.run)
  return f"{total_steps:,} steps, {low} to {high} (a roofline, not a measurement)"


def span(seconds: tuple[float, float]) -> str:
  return f"{seconds[0]:.2f} s at least, {seconds[1]:.2f} s if nothing overlaps"


def gib(size: float) -> str:
  """Bytes in the unit that shows them."""
  if size < 0.01 * GIB:
    return f"{size / 2**20:.2f} MiB"
  return f"{size / GIB:.2f} GiB"


# --- The command ----------------------------------------------------------------------


def plan(
  config: schema.Config,
  topology: Sequence[str],
  questions: int | None = None,
) -> None:
  """Prints what the run needs on each machine.

  Raises:
    errors.UserError: a topology is unknown, a package is missing, or the config does
      not suit a machine.
  """
  if not topology:
    raise errors.UserError("--topology is missing; e.g. --topology a100_80:8 v5e:4x4")
  chosen = [machines.parse(word) for word in topology]
  for machine in chosen:
    check_installed(machine)
  share = memory_share()
  total_steps = steps(config, questions)
  for index, machine in enumerate(chosen):
    interrupts.check()
    print(f"compiling for {machine.topology} ...", file=sys.stderr, flush=True)
    answer = ask(config, machine)
    if not index:
      print(header(config, answer))
    verdict = judge(
      answer,
      machine,
      share=share,
      total_steps=total_steps,
      gradient_stats_every=config.train.gradient_stats_every,
    )
    show(config, machine, answer, verdict, share=share, total_steps=total_steps)


def memory_share() -> float:
  """The share of a GPU's memory that JAX takes."""
  word = os.environ.get(MEM_FRACTION, "0.75")
  try:
    share = float(word)
  except ValueError:
    share = math.nan
  if not 0 < share <= 1:
    raise errors.UserError(f"{MEM_FRACTION}={word}: must be a number from 0 to 1")
  return share


def header(config: schema.Config, answer: Mapping[str, Any]) -> str:
  lengths, new = config.data, config.rollout.max_new_tokens
  remat = ", remat" if config.model.remat else ""
  return (
    f"{config.model.source}: {answer['parameters']:,} parameters, "
    f"{answer['trained']:,} trained; activations {config.model.dtype}{remat}\n"
    f"{config.train.batch_size} rows a step of at most {lengths.max_prompt_tokens} "
    f"(prompt) + {lengths.max_answer_tokens} (answer) + {new} (rollout) tokens; the "
    f"teacher reads {lengths.max_teacher_tokens} + {new}"
  )


def main() -> None:
  """Command line."""
  cli.run(
    "plan",
    plan,
    __doc__,
    options={
      "--topology": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "KIND:SIZE",
        "help": "machines: a100_80:8, a100_80:2x8, h100:8, v5e:4x4, v5p:2x2x2, cpu:8",
      },
      "--questions": {
        "type": int,
        "metavar": "N",
        "help": "how many questions the run will learn from (default: data.questions)",
      },
    },
    without_data=True,
  )


if __name__ == "__main__":
  main()
