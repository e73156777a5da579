"""Seconds that teacher and update take for each K.

`python -m tests.benchmarks.top_k_time FOLDER`.

On one batch of configs/sweeps/top_k.yaml with the answers as they are, and its real
rollouts. The Ks take turns, so that what else the machine does meets them all; the
fastest of four rounds counts. FOLDER gets what a run claims of its output.
"""

import sys
import time

import jax

from raft_jax.config import load as config_load
from raft_jax.config import sweep_runs
from raft_jax.models import sharding
from raft_jax.training import initial_state, setup

ROUNDS = 4


def main(folder: str) -> None:
  answers = "data.answers=original"
  base = config_load.load("configs/sweeps/top_k.yaml", [f"output={folder}", answers])
  runs = [run.config for run in sweep_runs.expand(base)]
  prepared = setup.prepare(runs[0])  # K is no part of what is prepared
  built = [setup.build(run, prepared) for run in runs]
  first = built[0]
  with jax.set_mesh(prepared.mesh):
    shards = first.base_shardings
    params = initial_state.load(base.model.source, prepared.decoder, "float32", shards)
    state = initial_state.new_state(runs[0], prepared, first, params)
    batch = sharding.spread(sharding.batch(prepared.mesh), prepared.dataset[0])
    rollout, _ = first.programs.roll_out(state.params, {}, batch, 0)
    spent: dict[int, list[tuple[float, float]]] = {
      run.distill.top_k: [] for run in runs
    }
    for _ in range(ROUNDS + 1):
      for run, (_, teach, update, *_) in zip(runs, (one.programs for one in built)):
        began = time.perf_counter()
        support = jax.block_until_ready(
          teach(params, batch.teacher_BC, batch.teacher_length_B, rollout)
        )
        taught = time.perf_counter()
        state, values = update(
          state, {}, batch, rollout, support, anchor=None, measure=False
        )
        jax.block_until_ready((state, values))
        ended = time.perf_counter()
        spent[run.distill.top_k].append((taught - began, ended - taught))
  print("    K  teacher, s  update, s    sum")
  for k, times in spent.items():
    teacher, update = (min(column) for column in zip(*times[1:]))  # the first compiles
    print(f"{k:5}{teacher:12.2f}{update:11.2f}{teacher + update:7.2f}")


if __name__ == "__main__":
  main(sys.argv[1])
