"""What a run has trained: which checkpoint is read, and the model it stands for."""

from __future__ import annotations

from typing import Any

import jax
import optax

from raft_jax.baselines import fapm
from raft_jax.config import schema
from raft_jax.hf import load as hf_load
from raft_jax.models import lora, partition, transformer
from raft_jax.training import checkpoint, setup


def load(
  config: schema.Config, decoder: transformer.DecoderConfig
) -> tuple[transformer.Params, int]:
  """The whole model of the checkpoint to read, float32, and the step it was saved at.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another run.
  """
  split = setup.make_split(config, decoder)
  params, step = restored(config, split.shapes)
  if split.freeze is None and not edits(config):
    return params, step
  base = hf_load.load_params(config.model.source, decoder)
  frozen = split.freeze(base) if split.freeze is not None else {}
  return whole(params, frozen, base, config), step


def folder(config: schema.Config) -> str:
  """The name of the folder of checkpoints to read."""
  best = _wants_best(config) and checkpoint.steps(config.output, checkpoint.BEST)
  return checkpoint.BEST if best else checkpoint.FOLDER


def _wants_best(config: schema.Config) -> bool:
  return config.watch is not None and config.watch.keep == "best"


def restored(
  config: schema.Config, shapes: transformer.Params
) -> tuple[transformer.Params, int]:
  """The trained tree, and its step: the last, or of a run that was watched the best.

  Args:
    shapes: of the trained tree.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another run.
  """
  name = folder(config)
  params, step = checkpoint.restore_params(
    config.output, shapes, setup.identity(config), name
  )
  if name == checkpoint.BEST:
    print(f"reading step {step}, the best by `watch`")
  elif _wants_best(config):
    print(f"no step is kept as the best by `watch`; reading step {step}, the last")
  return params, step


def edits(config: schema.Config) -> dict[str, Any]:
  """The sections by which what was trained is changed afterwards, as plain values."""
  return config.model_dump(
    mode="json", include={"prune", "interpolate"}, exclude_none=True
  )


def whole(
  params: transformer.Params,
  frozen: transformer.Params,
  base: transformer.Params | None,
  config: schema.Config,
) -> transformer.Params:
  """The model that a trained tree stands for: adapters merged, then pruned and
  interpolated if asked.

  Args:
    frozen: what lies beside the trained tree; `{}` where that is the model.
    base: the base model, on whose devices what was pruned is put; None only where the
      config edits nothing.
  """
  if frozen:
    params = lora.merge(partition.combine(frozen, params))
  if not edits(config):
    return params
  assert base is not None
  if config.prune is not None:
    pruned = fapm.prune(base, params, config.prune.keep)
    params = jax.tree.map(
      lambda leaf, like: jax.device_put(leaf, like.sharding), pruned, base
    )
  if config.interpolate is not None:
    params = optax.incremental_update(params, base, config.interpolate.weight)
  return params
