"""Seconds that teacher and update take for each K.

`python -m tests.benchmarks.top_k_time FOLDER`.

On one batch of configs/sweeps/top_k.yaml with the answers as they are, and its real
rollouts. The Ks take turns, so that what else the machine does meets them all; the
fastest of four rounds counts. FOLDER gets what a run claims of its output.
"""

import sys
import time

import jax

from raft_jax import sweep
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.models import sharding
from raft_jax.training import initial_state, run_inputs, run_plan

ROUNDS = 4


def replan(run: schema.Config, plan: run_plan.RunPlan) -> run_plan.RunPlan:
  """The plan of a run that differs from a planned one only in K."""
  return run_plan.make_plan(
    run,
    plan.decoder,
    plan.teacher_decoder,
    plan.mesh,
    batch_rows=plan.batch_rows,
    widest=plan.widest,
    total_steps=plan.schedule.total_steps,
    eos_ids=plan.settings.eos_ids,
    pad_id=plan.rollouts.pad_id,
  )


def main(folder: str) -> None:
  answers = "data.answers=original"
  base = config_load.load("configs/sweeps/top_k.yaml", [f"output={folder}", answers])
  runs = [run.config for run in sweep.expand(base)]
  first, inputs = run_inputs.prepare(runs[0])
  plans = {run.distill.top_k: replan(run, first) for run in runs}
  with jax.set_mesh(first.mesh):
    shardings = first.base_shardings
    params = initial_state.load_params(
      base.model.source, first.decoder, "float32", shardings
    )
    state = initial_state.new_state(
      first, inputs, params, anchor=None, soft_mask=None, seed=base.train.seed
    )
    batch = sharding.spread(sharding.batch(first.mesh), inputs.dataset[0])
    rollout, _ = first.programs.roll_out(state.params, {}, batch, 0)
    spent: dict[int, list[tuple[float, float]]] = {k: [] for k in plans}
    for _ in range(ROUNDS + 1):
      for k, plan in plans.items():
        began = time.perf_counter()
        support = jax.block_until_ready(
          plan.programs.score_teacher(
            params, batch.teacher_BC, batch.teacher_length_B, rollout
          )
        )
        scored = time.perf_counter()
        state, metrics = plan.programs.update(
          state, {}, batch, rollout, support, anchor=None, gradient_stats=False
        )
        jax.block_until_ready((state, metrics))
        spent[k].append((scored - began, time.perf_counter() - scored))
  print("    K  teacher, s  update, s    sum")
  for k, times in spent.items():
    teacher, update = (min(column) for column in zip(*times[1:]))  # the first compiles
    print(f"{k:5}{teacher:12.2f}{update:11.2f}{teacher + update:7.2f}")


if __name__ == "__main__":
  main(sys.argv[1])
