"""From the run's config to the values and programs of a step.

What can be wrong about config, data and tokenizer is found here, before a weight is
read.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from raft_jax import errors
from raft_jax.baselines import mssr
from raft_jax.config import load as config_load
from raft_jax.config import run_lock, schema
from raft_jax.data import batching, training_set
from raft_jax.distillation import objective, step
from raft_jax.generation import engines
from raft_jax.hf import chat, peft_adapter
from raft_jax.hf import load as hf_load
from raft_jax.models import lora, partition, sharding, transformer
from raft_jax.runtime import distributed
from raft_jax.storage import rejects
from raft_jax.training import optim, recipe
from raft_jax.training import programs as programs_lib

IDENTITY_KEYS = (
  "model.source",
  "model.chat_template",
  "model.dtype",
  "data.questions",
  "data.limit",
  "data.max_prompt_tokens",
  "data.max_answer_tokens",
  "data.max_teacher_tokens",
  "data.too_long",
  "data.unusable",
  "data.buckets",
  "method",
  *(
    f"train.{key}"
    for key in schema.Train.model_fields
    if key
    not in ("checkpoint_every", "keep_checkpoints", "tensorboard", "micro_batches")
  ),
  "data.answers",
  "lora",
  *(f"rollout.{key}" for key in schema.Rollout.model_fields if key != "unroll"),
  "distill",
  "balance",
  "anchor",
  "recadam",
  "freeze",
  "soft_mask",
  "replay",
  *(
    f"validation.{key}"
    for key in schema.Validation.model_fields
    if key not in ("patience", "keep")
  ),
)
"""Keys that make a run what it is: a resumed run may not change them. How it is
computed (`model.remat`, `train.micro_batches`) it may: that changes rounding alone, and
is the remedy where memory was too small."""


def check(
  config: schema.Config,
  decoder: transformer.DecoderConfig,
  mesh: Mesh,
  *,
  distil: bool,
) -> None:
  """What can be wrong about a run before any weight is read."""
  if distil and config.distill.top_k > decoder.vocab_size:
    raise errors.UserError(
      f"distill.top_k: {config.distill.top_k} is larger than the vocabulary of "
      f"{config.model.source} ({decoder.vocab_size}); lower it"
    )
  if config.model.attention == "cudnn":
    check_cudnn(config.model.source, decoder, mesh)
  parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.micro_batches
  rows = batch_rows(config)
  if rows % parts:
    raise errors.UserError(
      f"train.batch_size: {rows} rows (with replay and rollout.group) do not "
      f"divide into {parts} parts (mesh.data x mesh.fsdp x train.micro_batches); "
      "change one of them"
    )


def check_cudnn(source: str, decoder: transformer.DecoderConfig, mesh: Mesh) -> None:
  """Raises UserError where cuDNN's attention has no way to run."""
  platform = mesh.devices.flat[0].platform
  if platform != "gpu":
    reason = f"runs on NVIDIA GPUs, and the devices here are of platform {platform}"
  elif decoder.attention_softcap is not None:
    reason = f"cannot cap the scores of {source}"
  elif decoder.head_dim % 8 or decoder.head_dim > 256:
    reason = (
      "takes heads of a multiple of 8 and at most 256 (before H100: 128), and those of "
      f"{source} have {decoder.head_dim}"
    )
  else:
    return
  raise errors.UserError(f"model.attention: cudnn {reason}; use xla")


def replays(config: schema.Config) -> int:
  """Rows by which replay makes every batch grow."""
  if config.replay is None or mssr.adaptive(config):
    return 0
  return batching.replays(config.train.batch_size, config.replay.share)


def group(config: schema.Config) -> int:
  """Rows of each question in every batch: one for each of its rollouts."""
  return config.rollout.group if distills(config) else 1


def batch_rows(config: schema.Config) -> int:
  """Rows of every batch, with replay and with one for each rollout."""
  return (config.train.batch_size + replays(config)) * group(config)


def teacher_decoder(
  config: schema.Config,
  tokenizer: chat.ChatTokenizer,
  student: transformer.DecoderConfig,
) -> transformer.DecoderConfig | None:
  """The network of `distill.source`, which must read the same tokens; None without.

  Raises:
    errors.UserError: its tokenizer is another, or its vocabulary of another size.
  """
  source = config.distill.source
  if source is None:
    return None
  if chat.load(source, config.model.chat_template).digest != tokenizer.digest:
    raise errors.UserError(
      f"distill.source: the tokenizer or chat template of {source} is not that of "
      f"{config.model.source}; a teacher must read the same tokens"
    )
  decoder = hf_load.load_config(source)
  if decoder.vocab_size != student.vocab_size:
    raise errors.UserError(
      f"distill.source: {source} has logits of {decoder.vocab_size} tokens, and "
      f"{config.model.source} of {student.vocab_size} (some families pad them to other "
      "multiples by size); name a teacher of the same"
    )
  hf_load.check_params(source, decoder)
  return decoder


def check_lengths(
  config: schema.Config,
  rows: Sequence[batching.Row],
  source: str,
  decoder: transformer.DecoderConfig,
  *,
  distil: bool,
) -> None:
  """Whether every row, rollout included, fits into the positions of a model."""
  new = config.rollout.max_new_tokens
  trajectory = config.distill.trajectory
  longest = 0
  for row in rows:
    longest = max(longest, len(row.prompt) + len(row.answer))
    if distil:
      compared = max(
        len(row.answer) if trajectory != "rollout" else 0,
        new if trajectory != "answer" else 0,
      )
      read = max(len(row.prompt), len(row.teacher))
      if config.distill.teacher_context == "sibling":
        read = max(read, config.data.max_teacher_tokens)
      longest = max(longest, read + compared)
  if longest > decoder.max_positions:
    raise errors.UserError(
      f"rollout.max_new_tokens={new}, data.max_*_tokens: the longest row has {longest} "
      f"tokens, but {source} was made for {decoder.max_positions}; lower "
      "the rollout, or lower the budgets and set data.too_long=skip"
    )


def make_split(
  config: schema.Config, decoder: transformer.DecoderConfig
) -> partition.Split:
  """What the config trains; allocates nothing."""
  if config.lora is None:
    return partition.everything(decoder)
  # Beside the keys of the rollouts, which fold a step into the seed.
  key = jax.random.fold_in(jax.random.key(config.train.seed), 2**32 - 1)
  kernels = peft_adapter.targets(
    hf_load.family(config.model.source), config.lora.targets
  )
  return lora.split(
    decoder, kernels, rank=config.lora.rank, alpha=config.lora.alpha, key=key
  )


def identity(config: schema.Config) -> dict[str, Any]:
  """What the trained parameters belong to, as it is saved beside them."""
  return {
    "model": engines.identity(config.model.source),
    "lora": config.lora and config.lora.model_dump(mode="json"),
  }


def distills(config: schema.Config) -> bool:
  """A distillation term of constant weight 0 is not computed at all."""
  never = config.balance.mode == "fixed" and config.balance.weight == 0
  return config.distill.teacher != "none" and not never


def param_shardings(
  mesh: Mesh, decoder: transformer.DecoderConfig
) -> transformer.Params:
  """Of a whole model."""
  return sharding.tree(mesh, transformer.axes(decoder), transformer.shapes(decoder))


def state_shardings(
  mesh: Mesh,
  split: partition.Split,
  optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[step.TrainState, step.TrainState]:
  """Shapes and shardings of the whole train state; allocates nothing."""
  params = split.shapes
  placed = sharding.tree(mesh, split.axes, params)
  whole = sharding.replicated(mesh)
  opt_shapes = jax.eval_shape(optimizer.init, params)
  opt_placed = optax.tree.map_params(
    optimizer,
    lambda _, where: where,
    opt_shapes,
    placed,
    transform_non_params=lambda _: whole,
  )
  step_shape = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = step.TrainState(step_shape, params, opt_shapes)
  shardings = step.TrainState(whole, placed, opt_placed)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    shardings,
  )
  return abstract, shardings


class Prepared(NamedTuple):
  """A checked run: everything that can be known before weights are read."""

  tokenizer: chat.ChatTokenizer
  decoder: transformer.DecoderConfig
  teacher: transformer.DecoderConfig | None
  mesh: Mesh
  split: partition.Split
  dataset: Any
  general: Any
  probed: Any
  total_steps: int
  identity: dict[str, Any]
  asked: Mapping[int, batching.Conversation]
  replay: mssr.Plan | None
  widest: batching.Widths


def prepare(config: schema.Config) -> Prepared:
  """Checks config, data and tokenizer, and claims the output folder."""
  decoder = hf_load.load_config(config.model.source)
  hf_load.check_params(config.model.source, decoder)
  split = make_split(config, decoder)
  tokenizer = chat.load(config.model.source, config.model.chat_template)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  distil = distills(config)
  teacher = teacher_decoder(config, tokenizer, decoder) if distil else None
  check(config, decoder, mesh, distil=distil)
  found = training_set.read(config, tokenizer, distil=distil)
  every = [*found.rows, *found.replayed]
  check_lengths(config, every, config.model.source, decoder, distil=distil)
  if teacher is not None:
    check_lengths(config, every, str(config.distill.source), teacher, distil=distil)
  widths = batching.widths(
    every, config.data.buckets, batch_size=config.train.batch_size
  )
  plan = mssr.plan(config, found.replayed, pad_id=tokenizer.pad_id, widths=widths)
  dataset = batching.dataset(
    found.rows,
    batch_size=config.train.batch_size,
    epochs=config.train.epochs,
    steps=config.train.max_steps,
    seed=config.train.seed,
    pad_id=tokenizer.pad_id,
    widths=widths,
    replayed=found.replayed,
    replays=replays(config),
    group=group(config),
  )
  if distributed.is_primary():
    run_lock.lock_config(config, "train", IDENTITY_KEYS)
    listed = pathlib.Path(config.output) / "rejects.jsonl"
    rejects.write(listed, found.rejects)
    rejects.report(found.rejects, listed)
  if distil and config.distill.teacher_context == "paper":
    print(
      "warning: distill.teacher_context=paper is the paper's raw form; with a student "
      "that uses a chat template it was seen to pull answers towards degenerate text"
    )
  own = {**identity(config), "data": found.digest, "tokenizer": tokenizer.digest}
  if config.distill.source is not None:
    own["teacher"] = engines.identity(config.distill.source)
  general = general_dataset(config, found.general, tokenizer)
  probed = None
  if config.soft_mask is not None:
    rows = found.rows[: config.soft_mask.limit]
    size = config.soft_mask.batch_size
    probed = one_pass(config, rows, tokenizer, size, "soft_mask", "data.questions")
  return Prepared(
    *(tokenizer, decoder, teacher, mesh, split, dataset, general, probed, len(dataset)),
    *(own, found.asked, plan, widths[-1]),
  )


def facts(config: schema.Config, run: Prepared) -> dict[str, Any]:
  """What all processes of a run must have been started with, by name."""
  keys = [key for key in schema.Config.model_fields if key != "cluster"]
  content = {f"content of {name}": value for name, value in run.identity.items()}
  return {**config_load.values(config, keys), **content}


def general_dataset(
  config: schema.Config, rows: Sequence[batching.Row], tokenizer: chat.ChatTokenizer
) -> Any:
  """Batches for the importance of parameters, or None where all count alike.

  Raises:
    errors.UserError: there are fewer rows than one batch.
  """
  anchor = config.anchor
  if anchor is None or not recipe.weighs(anchor):
    return None
  # With given answers the square of a batch's mean would be biased.
  size = anchor.batch_size if anchor.importance == "sampled" else 1
  return one_pass(config, rows, tokenizer, size, "anchor", "anchor.questions")


def one_pass(
  config: schema.Config,
  rows: Sequence[batching.Row],
  tokenizer: chat.ChatTokenizer,
  size: int,
  section: str,
  source: str,
) -> Any:
  """Batches of one pass over rows, of one padded width."""
  if len(rows) < size:
    raise errors.UserError(
      f"{section}.batch_size: {size} is more than the {len(rows)} rows of {source}; "
      "lower it"
    )
  return batching.dataset(
    rows,
    batch_size=size,
    epochs=1,
    seed=config.train.seed,
    pad_id=tokenizer.pad_id,
    widths=batching.widths(rows, 1),
  )


class Built(NamedTuple):
  """What a run computes with.

  Attributes:
    rates: float32 [steps], the learning rate of every step, on the host.
    abstract: shapes and shardings of the train state, to restore into.
    base_shardings: of the base model's parameters.
    settings: what the steps were compiled with.
    base_teaches: whether the base model, or another frozen one, is the teacher.
  """

  programs: programs_lib.Programs
  optimizer: optax.GradientTransformationExtraArgs
  rates: np.ndarray
  abstract: step.TrainState
  shardings: step.TrainState
  base_shardings: transformer.Params
  settings: objective.Settings
  base_teaches: bool


def build(config: schema.Config, run: Prepared) -> Built:
  """Optimizer, shardings and programs of a run; allocates nothing."""
  balancer = recipe.make_balancer(config.balance, run.total_steps)
  schedule = optim.warmup_cosine(
    config.train.learning_rate, run.total_steps, config.train.warmup_ratio
  )
  optimizer = recipe.make_optimizer(
    config, balancer, schedule, run.split.shapes, run.decoder, run.total_steps
  )
  distil = distills(config)
  abstract, shardings = state_shardings(run.mesh, run.split, optimizer)
  base_shardings = param_shardings(run.mesh, run.decoder)
  settings = programs_lib.make_settings(
    *(config, run.decoder, run.tokenizer, run.teacher),
    platform=run.mesh.devices.flat[0].platform,
  )
  programs = programs_lib.compile_programs(
    config,
    settings,
    run.tokenizer,
    optimizer,
    balancer,
    shardings,
    distil=distil,
    asked=run.asked,
  )
  rates = np.asarray(jax.vmap(schedule)(jnp.arange(run.total_steps)))
  teaches = distil and config.distill.teacher == "base"
  return Built(
    programs, optimizer, rates, abstract, shardings, base_shardings, settings, teaches
  )
