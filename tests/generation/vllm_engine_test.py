"""What the vLLM engine finds before vLLM starts; `vllm_test` has the rest."""

import importlib.util

import pytest

from raft_jax import errors
from raft_jax.generation import engines, vllm_engine
from raft_jax.hf import chat
from raft_jax.storage import records
from tests.helpers import tiny_run


@pytest.fixture
def installed(monkeypatch):
  """As where vLLM is installed; it is not imported before the first request."""
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: name == "vllm" or real(name)
  )


def test_without_vllm_the_script_that_installs_it_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match=r"not installed.*launch/refine\.sh"):
    vllm_engine.load(str(tmp_path), dtype="float32")


def test_a_gguf_file_is_refused_with_the_command_that_converts_it(installed, smollm):
  with pytest.raises(errors.UserError, match=r"is a GGUF file.*convert.*OUT") as seen:
    vllm_engine.load(smollm, dtype="float32")
  command = str(seen.value).split('python -c "')[1].rstrip('"`')
  compile(command, "command", "exec")


def test_lengths_are_checked_before_anything_is_sent(installed, smollm, tmp_path):
  source = str(tiny_run.save_model(tmp_path, smollm))  # made for 512 tokens
  with pytest.raises(errors.UserError, match=r"context_tokens=513.*made for 512"):
    vllm_engine.load(source, dtype="float32", context_tokens=513)
  assert vllm_engine.load(source, dtype="float32").prompt_limit == 512
  engine = vllm_engine.load(source, dtype="float32", context_tokens=128)
  assert engine.prompt_limit == 128
  ask = (records.Message("user", "Hi"),)
  prompt = engine.count_tokens(ask)
  assert prompt == len(chat.prompt_ids(chat.load(source), ask))
  request = engines.Request(ask, 129 - prompt, 0.0, 1.0, 0)
  with pytest.raises(ValueError, match="exceed the engine"):
    engines.in_order(engine, [request])
