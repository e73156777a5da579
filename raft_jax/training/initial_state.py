"""What a run's steps start from: the state, and the parameters and memory beside it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.baselines import anchors, das, fisher, mssr
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import objective
from raft_jax.distillation import step as step_lib
from raft_jax.hf import load as hf_load
from raft_jax.models import sharding, transformer
from raft_jax.runtime import distributed, progress
from raft_jax.training import checkpoint, recipe, setup, trained_model


class Beside(NamedTuple):
  """Parameters that the steps read and never change; `{}` or None where none do.

  All of the base model, in the same buffers where they agree in dtype: frozen ones,
  the teacher's, and those that updates stay near; and the model itself, for looks at
  how the trained one differs.
  """

  frozen: transformer.Params
  teacher: transformer.Params | None
  anchor: transformer.Params | None
  base: transformer.Params | None = None


def first_state(
  config: schema.Config,
  run: setup.Prepared,
  built: setup.Built,
  orbax: Any,
  on_corrupt: str,
) -> tuple[step_lib.TrainState, Beside, mssr.Memory | None, int]:
  """The state to go on from, the parameters and memory beside it, and the step."""
  split, dtype = run.split, config.model.dtype
  resumes = orbax.latest_step() is not None
  teaches = built.base_teaches and run.teacher is None
  anchored, compared = recipe.anchored(config), compares(config)
  # Of rounded weights others are kept: looks edit as `evaluate` does.
  edited = compared and bool(trained_model.edits(config))
  base = None
  if teaches or anchored or compared or split.freeze or not resumes:
    base = load(
      config.model.source,
      run.decoder,
      "float32" if split.trains_base or edited else dtype,
      built.base_shardings,
    )
  if resumes:
    state, memory, step = restored(orbax, run, built.abstract, on_corrupt)
    print(f"resuming after step {step} of {run.total_steps}")
  else:
    assert base is not None
    state, step = new_state(config, run, built, base), 0
    memory = first_memory(run, built, base, config.train.batch_size)
  anchor = base if anchored else None
  exact = base
  if base is not None and (teaches or compared or split.freeze):
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), base)
  frozen = split.freeze(base) if split.freeze and base is not None else {}
  teacher = base if teaches else None
  if built.base_teaches and run.teacher is not None:
    teacher = load(
      str(config.distill.source),
      run.teacher,
      dtype,
      setup.param_shardings(run.mesh, run.teacher),
    )
  compared_with = (exact if edited else base) if compared else None
  beside = Beside(frozen, teacher, anchor, compared_with)
  return state, beside, memory, step


def compares(config: schema.Config) -> bool:
  """Whether looks at the trained model read the base model, too."""
  validation = config.validation
  return validation is not None and bool(
    validation.drift.prompts or trained_model.edits(config)
  )


def load(
  source: str,
  decoder: transformer.DecoderConfig,
  dtype: str,
  shardings: transformer.Params,
) -> transformer.Params:
  """A model's parameters in their shards; each process reads those of its devices."""
  return distributed.run_on_all(
    lambda: hf_load.load_params(source, decoder, dtype=dtype, shardings=shardings)
  )


def new_state(
  config: schema.Config,
  run: setup.Prepared,
  built: setup.Built,
  base: transformer.Params,
) -> step_lib.TrainState:
  """The state before the first step."""

  @functools.partial(jax.jit, out_shardings=built.shardings)
  def start(base: transformer.Params) -> step_lib.TrainState:
    params = run.split.start(base)
    return step_lib.TrainState(jnp.int32(0), params, built.optimizer.init(params))

  state = start(base)
  found: dict[str, Any] = {}
  if run.general is not None and config.anchor is not None:
    information = importance(config.anchor, config.train.seed, run, built, base)
    pull = state.opt_state[recipe.ANCHOR]
    found[recipe.ANCHOR] = anchors.with_importance(pull, information)
  if run.probed is not None and config.soft_mask is not None:
    found[recipe.SOFT_MASK] = das.importance(
      base,
      placed(run, run.probed, "importance of units"),
      settings=built.settings,
      rate=config.soft_mask.drop,
      seed=config.train.seed,
    )
  # A copy of the same type: of another, the second step would be compiled anew.
  opt_state = state.opt_state.copy()
  opt_state.update(found)
  return state._replace(opt_state=opt_state)


def importance(
  settings: schema.Anchor,
  seed: int,
  run: setup.Prepared,
  built: setup.Built,
  base: transformer.Params,
) -> transformer.Params:
  """The Fisher information that weighs the pull to the base model."""
  batches = placed(run, run.general, "importance of parameters")
  size = 1
  if settings.importance == "sampled":
    size = settings.batch_size
    batches = fisher.sampled(
      base,
      batches,
      built.settings,
      seed=seed,
      max_new_tokens=settings.max_new_tokens,
      pad_id=run.tokenizer.pad_id,
    )
  information = fisher.diagonal(
    functools.partial(fisher.log_likelihood, settings=built.settings),
    base,
    batches,
    size,
  )
  return fisher.normalised(information)


def first_memory(
  run: setup.Prepared, built: setup.Built, base: transformer.Params, batch_size: int
) -> mssr.Memory | None:
  """Of adaptive replay, where there is any: one pass over what can be replayed."""
  plan = run.replay
  if plan is None:
    return None
  batches = batching.in_order(
    plan.rows, batch_size, pad_id=plan.pad_id, width=plan.widths[-1]
  )
  losses_of = jax.jit(functools.partial(objective.row_losses, settings=built.settings))
  found = [
    distributed.to_host(losses_of(base, batch))
    for batch in placed(run, batches, "losses before training")
  ]
  first_N = np.concatenate(found)[: len(plan.rows)]
  settings = plan.settings
  return mssr.fresh(first_N, strength=settings.strength, interval=settings.interval)


def saved(
  run: setup.Prepared, state: step_lib.TrainState, replayer: mssr.Replayer | None
) -> Any:
  """What a checkpoint holds: the train state and, where there is one, the memory."""
  if replayer is None:
    return state
  memory = sharding.spread(sharding.replicated(run.mesh), replayer.memory)
  return {**state._asdict(), "memory": memory}


def restored(
  orbax: Any, run: setup.Prepared, abstract: step_lib.TrainState, on_corrupt: str
) -> tuple[step_lib.TrainState, mssr.Memory | None, int]:
  """State, memory and step of the newest checkpoint."""
  if run.replay is None:
    state, step = checkpoint.restore(
      orbax, abstract, run.identity, on_corrupt=on_corrupt
    )
    return state, None, step
  whole = sharding.replicated(run.mesh)
  blank = mssr.fresh(np.zeros(len(run.replay.rows)), strength=0, interval=0)
  memory = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), blank
  )
  found, step = checkpoint.restore(
    orbax,
    {**abstract._asdict(), "memory": memory},
    run.identity,
    on_corrupt=on_corrupt,
  )
  memory = distributed.to_host(found.pop("memory"))
  return step_lib.TrainState(**found), memory, step


def placed(run: setup.Prepared, batches: Any, title: str) -> Iterable[batching.Batch]:
  """Batches on their devices, with a bar of how many were used."""
  if distributed.is_primary():
    batches = progress.with_bar(batches, title, unit="step")
  for batch in batches:
    # A batch may be a single row here, which every device then reads.
    rows = sharding.place(run.mesh, ("batch",), batch.row_id_B.shape)
    yield sharding.spread(rows, batch)
