"""Checks of the sections that say where language models run.

Each problem is a dotted key and what is wrong with its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from raft_jax.config import schema

Problems = Iterator[tuple[str, str]]
"""Dotted keys, each with what is wrong and what to do."""


def panel(place: str, judges: Sequence[schema.ModelEndpoint]) -> Problems:
  """Faults in a panel of judges, which must differ from each other."""
  yield from engines({f"{place}.{i}": judge for i, judge in enumerate(judges)})
  # Replies are kept by model and request, wherever the model runs.
  requests = [judge.model_dump(exclude={*schema.PLACEMENT}) for judge in judges]
  for i, judge in enumerate(judges):
    if requests[i] in requests[:i]:
      note = " (servers tell models apart by name)" if judge.engine == "openai" else ""
      yield f"{place}.{i}", f"is the same judge again{note}; delete it or change it"


def engines(roles: Mapping[str, schema.ModelEndpoint]) -> Problems:
  """Keys of engines that a role does not use, and keys that its engine needs."""
  for place, role in roles.items():
    for engine, keys in schema.ENGINE_KEYS.items():
      for key in keys:
        default = type(role).model_fields[key].default
        if role.engine != engine and getattr(role, key) != default:
          yield (
            f"{place}.{key}",
            f"is read with engine: {engine} only; set that or delete it",
          )
    if role.engine == "openai":
      if not (role.base_url or "").startswith(("http://", "https://")):
        yield (
          f"{place}.base_url",
          "must be the server's address, like http://localhost:8000/v1",
        )
      if not role.model:
        yield f"{place}.model", "is required with engine: openai: its name there"
