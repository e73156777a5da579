"""The model that a run has trained, from the checkpoint that is to be read."""

from __future__ import annotations

from typing import Any

import jax
import optax

from raft_jax.baselines import dg_hard, fapm
from raft_jax.config import schema
from raft_jax.hf import load as hf_load
from raft_jax.models import lora, partition, quantised_base, transformer
from raft_jax.training import checkpoint, run_identity, run_plan


def load(
  config: schema.Config, decoder: transformer.DecoderConfig
) -> tuple[transformer.Params, int]:
  """The whole trained model, float32, and the step of its checkpoint.

  Raises:
    errors.UserError: there is no checkpoint, or it belongs to another run.
  """
  source = config.model.source
  split = run_plan.make_split(config.lora, source, decoder, config.train.seed)
  identity = run_identity.model_identity(source, config.lora)
  params, step = load_trained_tree(
    config.output, config.validation, identity, split.shapes
  )
  if split.freeze is None and not edits(config):
    return params, step
  base = hf_load.load_params(source, decoder)
  frozen = split.freeze(base) if split.freeze is not None else {}
  model = assemble(
    params,
    frozen,
    base,
    prune=config.prune,
    hard_threshold=config.hard_threshold,
    interpolate=config.interpolate,
  )
  return model, step


def load_as_trained(
  config: schema.Config, decoder: transformer.DecoderConfig, form: str
) -> dict[str, transformer.Params]:
  """The quantised base model, and "trained": the same with the adapters beside it.

  Args:
    form: `lora.base`.

  Raises:
    errors.UserError: as `load`.
  """
  source = config.model.source
  split = run_plan.make_split(config.lora, source, decoder, config.train.seed)
  assert split.freeze is not None
  adapters, _ = checkpoint.restore_params(
    config.output,
    split.shapes,
    run_identity.model_identity(source, config.lora),
    checkpoint_folder(config.output, config.validation),
  )
  base = hf_load.load_params(source, decoder, dtype=config.model.dtype, form=form)
  trained = partition.combine(split.freeze(base), adapters)
  return {"base": base, "trained": trained}


def checkpoint_folder(output: str, validation: schema.Validation | None) -> str:
  """The name of the folder of checkpoints to read: the best step's or the last's."""
  has_best = _wants_best(validation) and checkpoint.steps(output, checkpoint.BEST)
  return checkpoint.BEST if has_best else checkpoint.FOLDER


def require(output: str, validation: schema.Validation | None) -> None:
  """Raises UserError if there is no checkpoint to read."""
  checkpoint.require(output, checkpoint_folder(output, validation))


def _wants_best(validation: schema.Validation | None) -> bool:
  return validation is not None and validation.keep == "best"


def load_trained_tree(
  output: str,
  validation: schema.Validation | None,
  identity: dict[str, Any],
  shapes: transformer.Params,
) -> tuple[transformer.Params, int]:
  """The trained parameters of the best step or the last one, and that step.

  Args:
    identity: from `run_identity.model_identity`.
    shapes: of the trained tree.

  Raises:
    errors.UserError: there is no checkpoint, or it belongs to another run.
  """
  name = checkpoint_folder(output, validation)
  params, step = checkpoint.restore_params(output, shapes, identity, name)
  if name == checkpoint.BEST:
    print(f"reading step {step}, the best by `validation`")
  elif _wants_best(validation):
    print(f"no step is kept as the best by `validation`; reading step {step}, the last")
  return params, step


EDITS = ("prune", "hard_threshold", "interpolate")
"""The sections that edit the model after training, in the order in which they do."""


def edits(config: schema.Config) -> dict[str, Any]:
  """The sections that edit the model after training, as plain values."""
  return config.model_dump(mode="json", include=set(EDITS), exclude_none=True)


def assemble(
  params: transformer.Params,
  frozen: transformer.Params,
  base: transformer.Params | None,
  *,
  prune: schema.Prune | None,
  hard_threshold: schema.HardThreshold | None,
  interpolate: schema.Interpolate | None,
) -> transformer.Params:
  """The model that a trained tree stands for: merged, then edited.

  On a quantised base the adapters stay beside it.

  Args:
    frozen: the tree beside the trained one; `{}` if the trained tree is the model.
    base: the base model, on whose devices edited parameters are put; None only without
      edits.
  """
  if frozen:
    params = partition.combine(frozen, params)
    if not quantised_base.is_quantised(params):
      params = lora.merge(params)
  if prune is not None:
    assert base is not None
    params = _like(base, fapm.prune(base, params, prune.keep))
  if hard_threshold is not None:
    assert base is not None
    settings = hard_threshold.model_dump()
    params = _like(base, dg_hard.threshold(base, params, **settings))
  if interpolate is not None:
    assert base is not None
    params = optax.incremental_update(params, base, interpolate.weight)
  return params


def _like(base: transformer.Params, edited: transformer.Params) -> transformer.Params:
  """Parameters from the host, on the devices of the base model's."""
  return jax.tree.map(
    lambda leaf, like: jax.device_put(leaf, like.sharding), edited, base
  )
