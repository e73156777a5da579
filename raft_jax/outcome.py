"""What a run has trained: which checkpoint is read, and the model it stands for."""

from __future__ import annotations

from typing import Any

import jax
import optax

from raft_jax import checkpoint, hf, lora, model, prune, trainable, wiring
from raft_jax import config as config_lib


def load(
  config: config_lib.Config, decoder: model.DecoderConfig
) -> tuple[model.Params, int]:
  """The whole model of the checkpoint to read, float32, and the step it was saved at.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another run.
  """
  split = wiring.make_split(config, decoder)
  params, step = restored(config, split.shapes)
  if split.freeze is None and not edits(config):
    return params, step
  base = hf.load_params(config.model.source, decoder)
  frozen = split.freeze(base) if split.freeze is not None else {}
  return whole(params, frozen, base, config), step


def folder(config: config_lib.Config) -> str:
  """The name of the folder of checkpoints to read."""
  best = _wants_best(config) and checkpoint.steps(config.output, checkpoint.BEST)
  return checkpoint.BEST if best else checkpoint.FOLDER


def _wants_best(config: config_lib.Config) -> bool:
  return config.validation is not None and config.validation.keep == "best"


def restored(
  config: config_lib.Config, shapes: model.Params
) -> tuple[model.Params, int]:
  """The trained tree, and its step: the last, or of a run that was watched the best.

  Args:
    shapes: of the trained tree.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another run.
  """
  name = folder(config)
  params, step = checkpoint.restore_params(
    config.output, shapes, wiring.identity(config), name
  )
  if name == checkpoint.BEST:
    print(f"reading step {step}, the best by `validation`")
  elif _wants_best(config):
    print(f"no step is kept as the best by `validation`; reading step {step}, the last")
  return params, step


def edits(config: config_lib.Config) -> dict[str, Any]:
  """The sections by which what was trained is changed afterwards, as plain values."""
  return config.model_dump(
    mode="json", include={"prune", "interpolate"}, exclude_none=True
  )


def whole(
  params: model.Params,
  frozen: model.Params,
  base: model.Params | None,
  config: config_lib.Config,
) -> model.Params:
  """The model that a trained tree stands for: adapters merged, then pruned and
  interpolated if asked.

  Args:
    frozen: what lies beside the trained tree; `{}` where that is the model.
    base: the base model, on whose devices what was pruned is put; None only where the
      config edits nothing.
  """
  if frozen:
    params = lora.merge(trainable.combine(frozen, params))
  if not edits(config):
    return params
  assert base is not None
  if config.prune is not None:
    pruned = prune.prune(base, params, config.prune.keep)
    params = jax.tree.map(
      lambda leaf, like: jax.device_put(leaf, like.sharding), pruned, base
    )
  if config.interpolate is not None:
    params = optax.incremental_update(params, base, config.interpolate.weight)
  return params
