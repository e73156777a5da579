"""What a run's files belong to: the models, data and settings that identify it."""

from __future__ import annotations

from typing import Any

from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.generation import engines
from raft_jax.runtime import distributed
from raft_jax.storage import sources


def model_identity(source: str, lora: schema.Lora | None) -> dict[str, Any]:
  """What trained parameters belong to, as checkpoints store it."""
  return {
    "model": engines.identity(source),
    # Without None, as before `lora.base` existed.
    "lora": lora and lora.model_dump(mode="json", exclude_none=True),
  }


def teacher_identity(source: str | None) -> dict[str, Any]:
  """The part of a run's identity that names the model of `distill.source`."""
  return {} if source is None else {"teacher": engines.identity(source)}


def dataset_identity(
  data: schema.Data, replay: schema.Replay | None, anchor: schema.Anchor | None
) -> dict[str, str]:
  """The commits of the hub's datasets that a run learns from."""
  general = [section.questions for section in (replay, anchor) if section is not None]
  commits = sources.revisions(data.questions, *general)
  return {f"commit of {address}": commit for address, commit in commits.items()}


def shared_facts(config: schema.Config, identity: dict[str, Any]) -> dict[str, Any]:
  """What all processes of a run must have in common, by name."""
  keys = [key for key in schema.Config.model_fields if key != "cluster"]
  content = {f"content of {name}": value for name, value in identity.items()}
  return {**config_load.values(config, keys), **content, **distributed.versions()}
