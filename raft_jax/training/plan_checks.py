"""Whether a config fits its model and its mesh; before weights or rows are read."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from raft_jax import errors
from raft_jax.baselines import mssr
from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.models import sharding, transformer


class BatchLayout(NamedTuple):
  """How the rows of every batch come about.

  Attributes:
    questions: of the domain.
    replayed: rows that replay adds.
    group: copies of each row, one for each rollout.
  """

  questions: int
  replayed: int
  group: int

  @property
  def rows(self) -> int:
    return (self.questions + self.replayed) * self.group


def batch_layout(
  questions: int,
  replay: schema.Replay | None,
  rollout: schema.Rollout,
  *,
  distils: bool,
) -> BatchLayout:
  """The rows of a batch, by kind.

  Raises:
    errors.UserError: the share of replayed rows is not a whole number of them.
  """
  replayed = 0
  if replay is not None and not mssr.is_adaptive(replay):
    replayed = batching.count_replays(questions, replay.share)
  return BatchLayout(questions, replayed, rollout.group if distils else 1)


def check(
  model: schema.Model,
  decoder: transformer.DecoderConfig,
  mesh: Mesh,
  *,
  top_k: int | None,
  rows: int,
  micro_batches: int,
  rollout_tensor: int | None,
) -> None:
  """Checks a config against its model and mesh, before weights or rows are read.

  Args:
    top_k: tokens on which teacher and student are compared; None if nothing is
      distilled.
    rows: of every batch, from `batch_layout`.
    rollout_tensor: `rollout.tensor`.

  Raises:
    errors.UserError: they do not fit together.
  """
  if top_k is not None and top_k > decoder.vocab_size:
    raise errors.UserError(
      f"distill.top_k: {top_k} is larger than the vocabulary of {model.source} "
      f"({decoder.vocab_size}); lower it"
    )
  if model.attention == "cudnn":
    check_cudnn(model.source, decoder, mesh)
  parts = mesh.shape["data"] * mesh.shape["fsdp"] * micro_batches
  if rows % parts:
    raise errors.UserError(
      f"train.batch_size: {rows} rows (with replay and rollout.group) do not "
      f"divide into {parts} parts (mesh.data x mesh.fsdp x train.micro_batches); "
      "change one of them"
    )
  if rollout_tensor is not None:
    check_rollout_tensor(rollout_tensor, mesh)


def check_experts(
  source: str,
  decoder: transformer.DecoderConfig,
  train: schema.Train,
  soft_mask: schema.SoftMask | None,
) -> None:
  """Raises UserError for a section that needs experts, or does not know them."""
  if train.router_loss and not decoder.n_experts:
    raise errors.UserError(
      f"train.router_loss: {source} is not a mixture of experts; delete this line"
    )
  if soft_mask is not None and decoder.n_experts:
    raise errors.UserError(
      f"soft_mask: {source} is a mixture of experts, whose units are not scored; use "
      "another method"
    )


def check_packing(source: str, decoder: transformer.DecoderConfig) -> None:
  """Raises UserError if a network cannot compute several rows in one sequence."""
  reason = None
  if decoder.delta is not None:
    reason = "has layers that carry a state from token to token"
  if any(rope.long_divisors for rope in decoder.ropes):
    reason = "has rotary embeddings that depend on the length of a row"
  if reason is not None:
    raise errors.UserError(f"train.packing: {source} {reason}; delete this line")


def rollout_tensors(mesh: Mesh) -> list[int]:
  """The values of `rollout.tensor` for which a mesh can be regrouped."""
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  return [tensor * n for n in range(1, fsdp + 1) if fsdp % n == 0]


def check_rollout_tensor(rollout_tensor: int, mesh: Mesh) -> None:
  """Raises UserError if the mesh cannot be regrouped for rollouts."""
  allowed = rollout_tensors(mesh)
  if rollout_tensor not in allowed:
    raise errors.UserError(
      f"rollout.tensor: {rollout_tensor} devices cannot share the weights on a mesh of "
      f"fsdp={mesh.shape['fsdp']} x tensor={mesh.shape['tensor']}; set "
      f"{' or '.join(map(str, allowed))}, or null"
    )


def check_cudnn(source: str, decoder: transformer.DecoderConfig, mesh: Mesh) -> None:
  """Raises UserError if cuDNN's attention cannot run this model on these devices."""
  platform = sharding.platform(mesh)
  widths = [decoder.head_dim]
  if decoder.global_attention is not None:
    widths.append(decoder.global_attention.head_dim)
  if platform != "gpu":
    reason = f"runs on NVIDIA GPUs, and the devices here are of platform {platform}"
  elif decoder.attention_softcap is not None:
    reason = f"cannot cap the attention scores, as {source} does"
  elif decoder.attention_sinks:
    reason = f"has no attention sinks, as {source} does"
  elif any(width % 8 for width in widths) or max(widths) > 256:
    reason = (
      "needs a head size that is a multiple of 8 and at most 256 (128 on GPUs before "
      f"H100), and {source} has {max(widths)}"
    )
  else:
    return
  raise errors.UserError(f"model.attention: cudnn {reason}; use xla")
