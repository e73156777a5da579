"""What a run reads: tokenizer, rows and probing batches; and the folder that it locks.

Every fault of config, data and tokenizer is reported here, before a weight is read.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from raft_jax import errors
from raft_jax.baselines import mssr
from raft_jax.config import run_lock, schema
from raft_jax.data import batching, token_rows, training_set
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import sharding, transformer
from raft_jax.runtime import distributed
from raft_jax.storage import rejects
from raft_jax.training import (
  base_losses,
  importance_batches,
  packed_batches,
  plan_checks,
  run_identity,
  run_plan,
)

IDENTITY_KEYS = (
  "model.source",
  "model.chat_template",
  "model.dtype",
  "data.questions",
  "data.format",
  "data.columns",
  "data.turns",
  "data.limit",
  "data.max_prompt_tokens",
  "data.max_answer_tokens",
  "data.max_teacher_tokens",
  "data.too_long",
  "data.unusable",
  "data.thinking",
  "data.buckets",
  "method",
  *(
    f"train.{key}"
    for key in schema.Train.model_fields
    if key not in ("checkpoint_every", "keep_checkpoints", "micro_batches", "packing")
    and not key.startswith("tracker")
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
  "token_weights",
  "replay",
  "sentences",
  *(
    f"validation.{key}"
    for key in schema.Validation.model_fields
    if key not in ("patience", "keep")
  ),
)
"""Keys that decide the result of a run; a resumed run may not change them.

It may change how the result is computed (`model.remat`, `train.micro_batches`,
`train.packing`): that changes rounding alone, and is the remedy if memory was too
small.
"""


class RunInputs(NamedTuple):
  """What was read for a run.

  Attributes:
    tokenizer: tokenizer and chat template.
    dataset: element n is the batch of step n.
    anchor_batches: rows that give the importance of parameters (`anchor`), or None.
    soft_mask_batches: rows that give the importance of units (`soft_mask`), or None.
    replay: the rows of adaptive replay, or None.
    packer: how batches are packed, or None if they are not.
    base_loss_rows: rows whose losses under the base model weigh their tokens, or None.
    questions_by_row: messages and answer by row id, before rows were copied.
    identity: what the run is, as checkpoints store it.
  """

  tokenizer: chat.ChatTokenizer
  dataset: Any
  anchor_batches: Any
  soft_mask_batches: Any
  replay: mssr.Plan | None
  packer: packed_batches.Packer | None
  base_loss_rows: base_losses.Rows | None
  questions_by_row: Mapping[int, token_rows.Conversation]
  identity: dict[str, Any]


def prepare(config: schema.Config) -> tuple[run_plan.RunPlan, RunInputs]:
  """Reads and checks all but the weights, plans the run, and locks its output folder.

  Raises:
    errors.UserError: naming the key that is wrong and what to do.
  """
  train = config.train
  distils = run_plan.uses_distillation(config.distill, config.balance)
  distill = config.distill if distils else None
  networks = read_networks(
    config.model,
    config.lora,
    config.mesh,
    distill,
    train.seed,
    thinking=config.data.thinking == "keep",
  )
  decoder, teacher_decoder, tokenizer, mesh = networks
  if train.packing:
    plan_checks.check_packing(config.model.source, decoder)
    if teacher_decoder is not None:
      plan_checks.check_packing(str(config.distill.source), teacher_decoder)
  layout = plan_checks.batch_layout(
    train.batch_size, config.replay, config.rollout, distils=distils
  )
  plan_checks.check(
    config.model,
    decoder,
    mesh,
    top_k=None if distill is None else distill.top_k,
    rows=layout.rows,
    micro_batches=train.micro_batches,
    rollout_tensor=config.rollout.tensor,
  )
  examples = training_set.load(config, tokenizer, distil=distils)
  rows = [*examples.rows, *examples.replayed]
  longest = longest_row(
    rows,
    distill,
    new_tokens=config.rollout.max_new_tokens,
    context=config.data.max_teacher_tokens,
  )
  token_rows.check_positions(longest, config.model.source, decoder)
  if teacher_decoder is not None:
    token_rows.check_positions(longest, str(config.distill.source), teacher_decoder)
  widths = batching.widths(rows, config.data.buckets, batch_size=train.batch_size)
  dataset = make_dataset(train, examples, layout, widths, tokenizer.pad_id)
  plan = run_plan.make_plan(
    config,
    decoder,
    teacher_decoder,
    mesh,
    batch_rows=layout.rows,
    widest=widths[-1],
    total_steps=len(dataset),
    eos_ids=tokenizer.eos_ids,
    pad_id=tokenizer.pad_id,
  )
  packer = packed_batches.make(plan, dataset) if train.packing else None
  inputs = make_inputs(
    config, tokenizer, examples, dataset, widths, layout.group, packer
  )
  if distributed.is_primary():
    run_lock.lock_config(config, "train", IDENTITY_KEYS)
    list_rejects(config.output, examples.rejects)
  warn_of_raw_context(distill)
  return plan, inputs


def list_rejects(output: str, rejected: Sequence[rejects.Reject]) -> None:
  """Writes and reports the rows that the run sets aside."""
  path = pathlib.Path(output) / "rejects.jsonl"
  rejects.write(path, rejected)
  rejects.report(rejected, path)


def make_inputs(
  config: schema.Config,
  tokenizer: chat.ChatTokenizer,
  examples: training_set.TrainingSet,
  dataset: Any,
  widths: Sequence[token_rows.Widths],
  copies: int,
  packer: packed_batches.Packer | None,
) -> RunInputs:
  """What was read for a run, with the batches that probe the base model.

  Args:
    dataset: from `make_dataset`.
    widths: padded widths of its batches.
    copies: copies of each row in a batch.
  """
  seed, pad_id = config.train.seed, tokenizer.pad_id
  base_loss_rows = None
  if base_losses.are_read(config.token_weights):
    base_loss_rows = base_losses.Rows(
      examples.rows, examples.replayed, copies, config.train.batch_size, pad_id
    )
  return RunInputs(
    tokenizer=tokenizer,
    dataset=dataset,
    anchor_batches=importance_batches.anchor_batches(
      config.anchor, examples.general, seed, pad_id
    ),
    soft_mask_batches=importance_batches.soft_mask_batches(
      config.soft_mask, examples.rows, seed, pad_id
    ),
    replay=mssr.make_plan(
      config.replay,
      examples.replayed,
      batch_size=config.train.batch_size,
      seed=seed,
      pad_id=pad_id,
      widths=widths,
    ),
    packer=packer,
    base_loss_rows=base_loss_rows,
    questions_by_row=examples.questions_by_row,
    identity={
      **run_identity.model_identity(config.model.source, config.lora),
      "data": examples.digest,
      "tokenizer": tokenizer.digest,
      **run_identity.teacher_identity(config.distill.source),
      **run_identity.dataset_identity(config.data, config.replay, config.anchor),
    },
  )


def warn_of_raw_context(distill: schema.Distill | None) -> None:
  """Warns of a teacher's context that harmed students with a chat template."""
  if distill is not None and distill.teacher_context == "paper":
    print(
      "warning: distill.teacher_context=paper is the paper's raw form; in our runs it "
      "pulled students that use a chat template towards degenerate text"
    )


def make_dataset(
  train: schema.Train,
  examples: training_set.TrainingSet,
  layout: plan_checks.BatchLayout,
  widths: Sequence[token_rows.Widths],
  pad_id: int,
) -> Any:
  """All batches of a run; element n is the batch of step n."""
  return batching.dataset(
    examples.rows,
    batch_size=layout.questions,
    epochs=train.epochs,
    steps=train.max_steps,
    seed=train.seed,
    pad_id=pad_id,
    widths=widths,
    replayed=examples.replayed,
    replays_per_batch=layout.replayed,
    copies=layout.group,
  )


# --- Networks and lengths -------------------------------------------------------------


class Networks(NamedTuple):
  """What the models' configs and tokenizer say, and the devices to use."""

  decoder: transformer.DecoderConfig
  teacher_decoder: transformer.DecoderConfig | None
  tokenizer: chat.ChatTokenizer
  mesh: Mesh


def read_networks(
  model: schema.Model,
  lora: schema.Lora | None,
  mesh_sizes: schema.Mesh,
  distill: schema.Distill | None,
  seed: int,
  *,
  thinking: bool,
) -> Networks:
  """Reads the models' configs and the tokenizer, and makes the mesh of devices.

  Args:
    distill: None if nothing is distilled.
    seed: `train.seed`.
    thinking: whether `data.thinking` is `keep`.

  Raises:
    errors.UserError: a model cannot be read or trained, or the devices do not suffice.
  """
  source = model.source
  decoder = hf_load.load_config(source)
  hf_load.check_params(source, decoder)
  run_plan.make_split(lora, source, decoder, seed)  # checks `lora`
  tokenizer = chat.load(source, model.chat_template, thinking=thinking)
  mesh = sharding.make_mesh(mesh_sizes.data, mesh_sizes.fsdp, mesh_sizes.tensor)
  teacher_decoder = None
  if distill is not None and distill.source is not None:
    teacher_decoder = read_teacher(
      distill.source, source, tokenizer, decoder, template=model.chat_template
    )
  return Networks(decoder, teacher_decoder, tokenizer, mesh)


def read_teacher(
  teacher: str,
  student: str,
  tokenizer: chat.ChatTokenizer,
  decoder: transformer.DecoderConfig,
  *,
  template: str | None,
) -> transformer.DecoderConfig:
  """The network of `distill.source`, which must read the student's tokens.

  Raises:
    errors.UserError: its tokenizer differs, or the size of its vocabulary.
  """
  if (
    chat.load(teacher, template, thinking=tokenizer.thinking).digest != tokenizer.digest
  ):
    raise errors.UserError(
      f"distill.source: the tokenizer or chat template of {teacher} is not that of "
      f"{student}; a teacher must read the same tokens"
    )
  network = hf_load.load_config(teacher)
  if network.vocab_size != decoder.vocab_size:
    raise errors.UserError(
      f"distill.source: {teacher} has logits of {network.vocab_size} tokens, and "
      f"{student} of {decoder.vocab_size} (in some families each size pads the "
      "vocabulary differently); name a teacher with the same number"
    )
  hf_load.check_params(teacher, network)
  return network


def longest_row(
  rows: Sequence[token_rows.Row],
  distill: schema.Distill | None,
  *,
  new_tokens: int,
  context: int,
) -> dict[str, int]:
  """Tokens of the longest row that a model reads, by the config keys that set it.

  Args:
    distill: None if nothing is distilled.
    new_tokens: longest rollout.
    context: longest teacher context, if it depends on the rollouts.
  """
  longest = max(len(row.prompt) + len(row.answer) for row in rows)
  if distill is not None:
    sibling = context if distill.teacher_context == "sibling" else 0
    for row in rows:
      compared = {
        "answer": len(row.answer),
        "rollout": new_tokens,
        "mixed": max(len(row.answer), new_tokens),
      }
      before = max(len(row.prompt), len(row.teacher), sibling)
      longest = max(longest, before + compared[distill.trajectory])
  return {f"rollout.max_new_tokens={new_tokens}, data.max_*_tokens": longest}
