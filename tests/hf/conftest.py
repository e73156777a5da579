"""Fixtures of the tests of chat templates."""

import pytest

from tests.helpers import chat_templates


@pytest.fixture(scope="module")
def tokenizer(smollm):
  return chat_templates.load_tokenizer(smollm)


@pytest.fixture
def still(monkeypatch):
  chat_templates.stop_clock(monkeypatch)
