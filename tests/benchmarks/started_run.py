"""The state from which benchmarks take a run's steps."""

import jax

from raft_jax.config import schema
from raft_jax.distillation import step
from raft_jax.training import initial_state, run_inputs, run_plan


def begin(
  config: schema.Config, plan: run_plan.RunPlan, inputs: run_inputs.RunInputs
) -> tuple[step.ReferenceParams, step.TrainState]:
  """What the steps read, and the first train state, of a run without checkpoints."""
  with jax.set_mesh(plan.mesh):
    params = initial_state.load_params(
      config.model.source, plan.decoder, plan.base_dtype, plan.base_shardings
    )
    state = initial_state.new_state(
      plan, inputs, params, anchor=None, soft_mask=None, seed=config.train.seed
    )
    return initial_state.reference_params(plan, params, None), state
