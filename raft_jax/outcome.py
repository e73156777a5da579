"""What a run has trained: which checkpoint is read, and the model it stands for."""

from __future__ import annotations

import jax

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
  if split.freeze is None and config.prune is None:
    return params, step
  base = hf.load_params(config.model.source, decoder)
  frozen = split.freeze(base) if split.freeze is not None else {}
  return whole(params, frozen, base, config.prune), step


def restored(
  config: config_lib.Config, shapes: model.Params
) -> tuple[model.Params, int]:
  """The trained tree, and its step: the last, or of a run that was watched the best.

  Args:
    shapes: of the trained tree.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another run.
  """
  wants_best = config.watch is not None and config.watch.keep == "best"
  has_best = wants_best and checkpoint.steps(config.output, checkpoint.BEST)
  params, step = checkpoint.restore_params(
    config.output,
    shapes,
    wiring.identity(config),
    checkpoint.BEST if has_best else checkpoint.FOLDER,
  )
  if has_best:
    print(f"reading step {step}, the best by `watch`")
  elif wants_best:
    print(f"no step is kept as the best by `watch`; reading step {step}, the last")
  return params, step


def whole(
  params: model.Params,
  frozen: model.Params,
  base: model.Params | None,
  pruning: config_lib.Prune | None,
) -> model.Params:
  """The model that a trained tree stands for: adapters merged, and pruned if asked.

  Args:
    frozen: what lies beside the trained tree; `{}` where that is the model.
    base: the base model, on whose devices what was pruned is put; None without
      pruning.
  """
  if frozen:
    params = lora.merge(trainable.combine(frozen, params))
  if pruning is not None and base is not None:
    pruned = prune.prune(base, params, pruning.keep)
    params = jax.tree.map(
      lambda leaf, like: jax.device_put(leaf, like.sharding), pruned, base
    )
  return params
