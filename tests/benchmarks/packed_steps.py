"""What `train.packing` saves: columns computed for each token, and time.

`python -m tests.benchmarks.packed_steps FOLDER [KEY=VALUE ...]`

On the quickstart's model and questions, for SFT and for RAFT on the original answers.
Both forms of a step take turns on the same batches. FOLDER gets what a run claims of
its output.
"""

import statistics
import sys
from typing import Any

import jax
import numpy as np

from raft_jax.config import load as config_load
from raft_jax.models import sharding
from raft_jax.training import loop, packed_batches, run_inputs
from raft_jax.training import programs as programs_lib
from tests.benchmarks import started_run

ROUNDS = 6
METHODS = ("sft", "raft")
PHASES = ("rollout", "teacher", "update")


def columns(parts: packed_batches.Parts, packing: Any) -> tuple[int, int]:
  """Columns that a pass over the rows computes, and tokens in them."""
  plain = len(parts.length_BS) * sum(parts.widths)
  computed = plain if packing is None else packing.token_GNL.size
  return computed, int(parts.length_BS.sum())


def compare(method: str, folder: str, *settings: str) -> None:
  config = config_load.load(
    "configs/quickstart.yaml",
    [
      f"method={method}",
      "data.answers=original",
      "train.packing=true",
      f"output={folder}/{method}",
      *settings,
    ],
  )
  plan, inputs = run_inputs.prepare(config)
  assert inputs.packer is not None
  seconds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
  compiled: set[tuple[int, ...]] = set()
  sums: dict[bool, np.ndarray] = {True: np.zeros(2, int), False: np.zeros(2, int)}
  reference, state = started_run.begin(config, plan, inputs)
  with jax.set_mesh(plan.mesh):
    for step in range(len(inputs.dataset)):
      plain = inputs.dataset[step]
      packed = packed_batches.packed(inputs.packer, plan, plain, step)
      parts = packed_batches.student_parts(plan, plain, step)
      for is_packed, batch in ((False, plain), (True, packed)):
        sums[is_packed] += columns(parts, batch.packing)
    for step in range(ROUNDS):
      plain = inputs.dataset[step]
      packed = packed_batches.packed(inputs.packer, plan, plain, step)
      for is_packed, batch in ((False, plain), (True, packed)):
        placed = sharding.spread(sharding.batch(plan.mesh), batch)
        # The first step of a shape compiles.
        for _ in range(2 if loop.is_new(loop.padded_widths(batch), compiled) else 1):
          state, done = programs_lib.run_step(
            plan.programs, state, reference, placed, step, timed=True
          )
        seconds[is_packed].append(done.seconds)
  plain_share, packed_share = (sums[key][0] / sums[key][1] for key in (False, True))
  print(
    f"{method}: {len(inputs.dataset)} batches compute {plain_share:.2f} columns for a "
    f"token, and {packed_share:.2f} packed"
  )
  for phase in PHASES:
    if phase in seconds[True][0]:
      plain, packed = ([turn[phase] for turn in seconds[key]] for key in (False, True))
      ratios = sorted(b / a for a, b in zip(plain, packed))
      print(
        f"  {phase:8} {statistics.median(plain):6.2f} s, packed "
        f"{statistics.median(packed):6.2f} s: {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
      )


if __name__ == "__main__":
  for method in METHODS:
    compare(method, *sys.argv[1:])
