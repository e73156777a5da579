"""The card of a model of which nothing is known but its base."""

import pytest

from raft_jax.reporting import model_card


def least(base: str, monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setattr(model_card, "read_license", lambda source: None)
  return model_card.render(
    base,
    tower=None,
    method="raft",
    adapter=False,
    step=3,
    data="",
    hyperparameters={},
    scores={},
    edits={},
  )
