"""From the run's config to the values and programs of a step.

What can be wrong about config, data and tokenizer is found here, before a weight is
read.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from raft_jax import (
  balance,
  checkpoint,
  data,
  engines,
  errors,
  hf,
  lora,
  methods,
  model,
  optim,
  records,
  refine,
  sample,
  sharding,
  shards,
  text,
  trainable,
)
from raft_jax import config as config_lib
from raft_jax import step as step_lib

CLAIMED = (
  "model",
  "data.questions",
  "data.limit",
  "data.max_prompt_tokens",
  "data.max_answer_tokens",
  "data.max_teacher_tokens",
  "data.too_long",
  "data.buckets",
  "method",
  *(
    f"train.{key}"
    for key in config_lib.Train.model_fields
    if key not in ("checkpoint_every", "keep_checkpoints", "tensorboard")
  ),
  "lora",
  "rollout",
  "distill",
  "balance",
)
"""Keys that make a run what it is: a resumed run may not change them."""

REFINED = (*refine.CLAIMED, "data.limit")
"""Keys that decide the refined records which a run learns from."""


class Examples(NamedTuple):
  """The training data, tokenised, and what identifies it."""

  rows: list[data.Row]
  skipped: int
  digest: str


class Programs(NamedTuple):
  """The three compiled parts of a step."""

  roll_out: Callable[..., tuple[step_lib.Trajectory, jax.Array | None]] | None
  teach: Callable[..., step_lib.Support] | None
  update: Callable[..., tuple[step_lib.TrainState, dict[str, jax.Array]]]


def read_examples(
  config: config_lib.Config,
  method: methods.Method,
  codec: text.Codec,
  *,
  distil: bool,
) -> Examples:
  """Reads and tokenises what `method` learns from."""
  if method.refined:
    folder = pathlib.Path(config.output) / "refined"
    if not (folder / shards.MANIFEST).exists():
      raise errors.UserError(
        f"{folder}: no refined records, which method {config.method!r} learns from; "
        "run `python -m raft_jax.refine` with this config first (or method=sft)"
      )
    # The records are of the questions and the model that this config names.
    config_lib.check_output(config, "refine", REFINED)
    refined = [records.from_json(raw) for raw in shards.read_shards(folder)]
    examples = [(r.question.messages, method.answer(r)) for r in refined]
    names = [r.question.id for r in refined]
  else:
    questions = records.read_questions(
      config.data.questions,
      limit=config.data.limit,
      reject_threshold=config.data.reject_threshold,
    )
    examples = [(q.messages, q.answer) for q in questions]
    names = [q.id for q in questions]
  rows, skipped = data.encode_rows(
    examples,
    codec=codec,
    teacher_context=config.distill.teacher_context if distil else "none",
    max_prompt_tokens=config.data.max_prompt_tokens,
    max_answer_tokens=config.data.max_answer_tokens,
    max_teacher_tokens=config.data.max_teacher_tokens,
    too_long=config.data.too_long,
    names=names,
  )
  return Examples(rows, len(skipped), hashlib.sha256(repr(rows).encode()).hexdigest())


def check(
  config: config_lib.Config,
  decoder: model.DecoderConfig,
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
  parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.micro_batches
  if config.train.batch_size % parts:
    raise errors.UserError(
      f"train.batch_size: {config.train.batch_size} rows do not divide into {parts} "
      "parts (mesh.data x mesh.fsdp x train.micro_batches); change one of them"
    )


def check_lengths(
  config: config_lib.Config,
  rows: Sequence[data.Row],
  decoder: model.DecoderConfig,
  *,
  distil: bool,
) -> None:
  """Whether every row, rollout included, fits into the model's positions."""
  new = config.rollout.max_new_tokens
  on_answer = config.distill.trajectory == "answer"
  longest = 0
  for row in rows:
    longest = max(longest, len(row.prompt) + len(row.answer))
    if distil:
      compared = len(row.answer) if on_answer else new
      longest = max(longest, max(len(row.prompt), len(row.teacher)) + compared)
  if longest > decoder.max_positions:
    raise errors.UserError(
      f"rollout.max_new_tokens={new}, data.max_*_tokens: the longest row has {longest} "
      f"tokens, but {config.model.source} was made for {decoder.max_positions}; lower "
      "the rollout, or lower the budgets and set data.too_long=skip"
    )


def make_split(
  config: config_lib.Config, decoder: model.DecoderConfig
) -> trainable.Split:
  """What the config trains; allocates nothing."""
  if config.lora is None:
    return trainable.everything(decoder)
  # Beside the keys of the rollouts, which fold a step into the seed.
  key = jax.random.fold_in(jax.random.key(config.train.seed), 2**32 - 1)
  kernels = lora.targets(hf.family(config.model.source), config.lora.targets)
  return lora.split(
    decoder, kernels, rank=config.lora.rank, alpha=config.lora.alpha, key=key
  )


def identity(config: config_lib.Config) -> dict[str, Any]:
  """What the trained parameters belong to, as it is saved beside them."""
  return {
    "model": engines.identity(config.model.source),
    "lora": config.lora and config.lora.model_dump(mode="json"),
  }


def trained(
  config: config_lib.Config, decoder: model.DecoderConfig
) -> tuple[model.Params, int]:
  """The whole model of the newest checkpoint, float32, and the step it was saved at.

  Raises:
    errors.UserError: when there is no checkpoint, or it is of another run.
  """
  split = make_split(config, decoder)
  params, step = checkpoint.restore_params(
    config.output, split.shapes, identity(config)
  )
  if split.freeze is None:
    return params, step
  base = hf.load_params(config.model.source, decoder)
  return lora.merge(trainable.combine(split.freeze(base), params)), step


def make_balancer(
  config: config_lib.Balance, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """The balancer that the config asks for."""
  if config.mode == "fixed":
    return balance.balance_fixed(config.weight)
  if config.mode == "schedule":
    return balance.balance_by_schedule(
      optax.linear_schedule(config.start, config.weight, total_steps)
    )
  if config.mode == "gradient_norm":
    return balance.balance_by_gradient_norm(config.weight, config.max_weight)
  return balance.balance_by_ema(config.decay, config.eps, config.max_weight)


def make_settings(
  config: config_lib.Config, decoder: model.DecoderConfig, codec: text.Codec
) -> step_lib.Settings:
  """The few values the step needs."""
  distill = config.distill
  return step_lib.Settings(
    decoder=decoder,
    eos_ids=codec.eos_ids,
    dtype=config.model.dtype,
    remat=config.model.remat,
    unroll=config.model.unroll,
    micro_batches=config.train.micro_batches,
    loss_mean=config.train.loss_mean,
    top_k=distill.top_k,
    temperature=distill.temperature,
    direction=distill.direction,
    beta=distill.beta if distill.direction == "jsd" else None,
    tail=distill.tail,
    scale_by_t2=distill.scale_by_t2,
    skip_first=distill.skip_first,
    mask_eos=distill.mask_eos,
  )


def distills(config: config_lib.Config, method: methods.Method) -> bool:
  """A distillation term of constant weight 0 is not computed at all."""
  never = config.balance.mode == "fixed" and config.balance.weight == 0
  return method.distills and not never


def compile_programs(
  config: config_lib.Config,
  settings: step_lib.Settings,
  codec: text.Codec,
  optimizer: optax.GradientTransformationExtraArgs,
  balancer: optax.GradientTransformationExtraArgs,
  state_shardings: step_lib.TrainState,
  *,
  distil: bool,
) -> Programs:
  """Jits rollout, teacher and update; each compiles once per batch width."""
  update = jax.jit(
    functools.partial(
      step_lib.update, optimizer=optimizer, balancer=balancer, settings=settings
    ),
    static_argnames="measure",
    donate_argnums=0,
    out_shardings=(state_shardings, None),
  )
  if not distil:
    return Programs(None, None, update)

  def roll_out(
    params: model.Params, frozen: model.Params, batch: data.Batch, step: int
  ):
    if config.distill.trajectory == "answer":
      return step_lib.Trajectory(batch.answer_BA, batch.answer_length_B), None
    rollout = sample.generate(
      trainable.combine(frozen, params),
      settings.decoder,
      batch.prompt_BP,
      batch.prompt_length_B,
      batch.row_id_B,
      seed=config.train.seed,
      step=step,
      max_new_tokens=config.rollout.max_new_tokens,
      temperature=config.rollout.temperature,
      top_p=config.rollout.top_p,
      eos_ids=codec.eos_ids,
      pad_id=codec.pad_id,
      dtype=settings.dtype,
      unroll=settings.unroll,
    )
    return step_lib.Trajectory(rollout.tokens_BR, rollout.length_B), rollout.ended_B

  teach = jax.jit(functools.partial(step_lib.teach, settings=settings))
  return Programs(roll_out, teach, update)


def state_shardings(
  mesh: Mesh,
  split: trainable.Split,
  optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[step_lib.TrainState, step_lib.TrainState]:
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
  shapes = step_lib.TrainState(step_shape, params, opt_shapes)
  shardings = step_lib.TrainState(whole, placed, opt_placed)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    shardings,
  )
  return abstract, shardings


class Prepared(NamedTuple):
  """A checked run: everything that can be known before weights are read."""

  method: methods.Method
  codec: text.Codec
  decoder: model.DecoderConfig
  mesh: Mesh
  split: trainable.Split
  dataset: Any
  total_steps: int
  identity: dict[str, Any]


def prepare(config: config_lib.Config) -> Prepared:
  """Checks config, data and tokenizer, and claims the output folder."""
  method = methods.get(config.method)
  decoder = hf.load_config(config.model.source)
  hf.check_params(config.model.source, decoder)
  split = make_split(config, decoder)
  codec = text.load(config.model.source)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  distil = distills(config, method)
  check(config, decoder, mesh, distil=distil)
  examples = read_examples(config, method, codec, distil=distil)
  check_lengths(config, examples.rows, decoder, distil=distil)
  dataset = data.dataset(
    examples.rows,
    batch_size=config.train.batch_size,
    epochs=config.train.epochs,
    steps=config.train.max_steps,
    seed=config.train.seed,
    pad_id=codec.pad_id,
    widths=data.widths(
      examples.rows, config.data.buckets, batch_size=config.train.batch_size
    ),
  )
  config_lib.claim_output(config, "train", CLAIMED)
  if examples.skipped:
    print(f"{examples.skipped} rows are over a length budget and were skipped")
  if method.distills and config.distill.teacher_context == "paper":
    print(
      "warning: distill.teacher_context=paper is the paper's raw form; with a student "
      "that uses a chat template it was seen to pull answers towards degenerate text"
    )
  own = {**identity(config), "data": examples.digest, "tokenizer": codec.digest}
  return Prepared(method, codec, decoder, mesh, split, dataset, len(dataset), own)


class Built(NamedTuple):
  """What a run computes with.

  Attributes:
    rates: float32 [steps], the learning rate of every step, on the host.
    abstract: shapes and shardings of the train state, to restore into.
    base_shardings: of the base model's parameters.
    distils: whether there is a distillation term.
  """

  programs: Programs
  optimizer: optax.GradientTransformationExtraArgs
  rates: np.ndarray
  abstract: step_lib.TrainState
  shardings: step_lib.TrainState
  base_shardings: model.Params
  distils: bool


def build(config: config_lib.Config, run: Prepared) -> Built:
  """Optimizer, shardings and programs of a run; allocates nothing."""
  balancer = make_balancer(config.balance, run.total_steps)
  schedule = optim.warmup_cosine(
    config.train.learning_rate, run.total_steps, config.train.warmup_ratio
  )
  optimizer = optim.chain(
    balancer,
    schedule,
    weight_decay=config.train.weight_decay,
    clip=config.train.clip,
  )
  distil = distills(config, run.method)
  abstract, shardings = state_shardings(run.mesh, run.split, optimizer)
  base_shardings = sharding.tree(
    run.mesh, model.axes(run.decoder), model.shapes(run.decoder)
  )
  programs = compile_programs(
    config,
    make_settings(config, run.decoder, run.codec),
    run.codec,
    optimizer,
    balancer,
    shardings,
    distil=distil,
  )
  rates = np.asarray(jax.vmap(schedule)(jnp.arange(run.total_steps)))
  return Built(programs, optimizer, rates, abstract, shardings, base_shardings, distil)
