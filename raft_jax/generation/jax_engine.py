"""The built-in engine: our own sampler on this process's default device.

Its module-level imports hold no jax. It cannot hold a reply to a schema.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from raft_jax.generation import engines
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.storage import records


def load(source: str, *, dtype: str, batch_size: int) -> engines.Generator:
  """The built-in sampler on this process's default device.

  The weights are loaded when first needed: see `engines.resident`.

  Args:
    source: as for `load.resolve`.
    dtype: of weights and activations.
    batch_size: rows of a compiled batch; shorter micro-batches are filled up, so that
      each pair of widths compiles once.

  Raises:
    UserError: config, tokenizer or the weights' headers cannot be used.
  """
  hf_load.check_params(source, _config(source))
  engines.codec(source)
  return _JaxEngine(source, dtype, batch_size)


@dataclasses.dataclass(frozen=True)
class _JaxEngine:
  source: str
  dtype: str
  batch_size: int

  local = True

  @property
  def identity(self) -> str:
    return f"jax {self.dtype} {engines.identity(self.source)}"

  @property
  def prompt_limit(self) -> int:
    return _config(self.source).max_positions

  def count_tokens(self, messages: Sequence[records.Message]) -> int:
    return len(chat.prompt_ids(engines.codec(self.source), messages))

  def generate(self, requests: Sequence[engines.Request]) -> list[engines.Completion]:
    prompts = [
      chat.prompt_ids(engines.codec(self.source), request.messages)
      for request in requests
    ]
    for request, prompt in zip(requests, prompts, strict=True):
      if len(prompt) + request.max_new_tokens > self.prompt_limit:
        raise ValueError(
          f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones exceed "
          f"the model's {self.prompt_limit}"
        )
    completions: dict[int, engines.Completion] = {}
    for rows in _alike(requests, prompts, self.batch_size):
      finished = self._sample([requests[i] for i in rows], [prompts[i] for i in rows])
      completions |= zip(rows, finished, strict=True)
    return [completions[i] for i in range(len(requests))]

  def _sample(
    self, requests: Sequence[engines.Request], prompts: Sequence[list[int]]
  ) -> list[engines.Completion]:
    """One call of the sampler, for requests that share width and sampling."""
    import jax

    from raft_jax.models import sampling as sampling_lib

    config, words = _config(self.source), engines.codec(self.source)
    first = requests[0]
    width = bucket(max(map(len, prompts)))
    prompt_BP = np.full((self.batch_size, width), words.pad_id, np.int32)
    length_B = np.empty(self.batch_size, np.int32)
    seed_B = np.empty(self.batch_size, np.int32)
    for row in range(self.batch_size):
      # Rows that fill up the batch repeat the first one: they end when it ends.
      i = row if row < len(requests) else 0
      prompt_BP[row, : len(prompts[i])] = prompts[i]
      length_B[row], seed_B[row] = len(prompts[i]), requests[i].seed
    rollout = sampling_lib.generate(
      _params(self.source, self.dtype),
      config,
      prompt_BP,
      length_B,
      seed_B,
      seed=0,
      step=0,
      max_new_tokens=first.max_new_tokens,
      temperature=first.temperature,
      top_p=first.top_p,
      eos_ids=words.eos_ids,
      pad_id=words.pad_id,
      dtype=self.dtype,
      unroll=sampling_lib.unrolled(None, 1, jax.default_backend()),
    )
    tokens_BR, length_B, ended_B = map(np.asarray, rollout[:3])
    return [
      engines.Completion(
        chat.decode(words, tokens_BR[i, : length_B[i] - ended_B[i]].tolist()),
        "stop" if ended_B[i] else "length",
        len(prompts[i]),
        int(length_B[i]),
      )
      for i in range(len(requests))
    ]


def bucket(tokens: int) -> int:
  """The width that a prompt is padded to: at most four widths per doubling.

  It depends on the prompt's own length only, so that a reply cannot depend on which
  prompts happen to share its batch.
  """
  step = max(64, 2 ** (max(tokens, 1) - 1).bit_length() // 8)
  return -(-tokens // step) * step


def _alike(
  requests: Sequence[engines.Request], prompts: Sequence[list[int]], batch_size: int
) -> Iterator[tuple[int, ...]]:
  """Indices of requests that can be sampled together, at most `batch_size` a time."""

  def shape(i: int) -> tuple[Any, ...]:
    request = requests[i]
    sampling = request.max_new_tokens, request.temperature, request.top_p
    return (bucket(len(prompts[i])), *sampling)

  for _, group in itertools.groupby(sorted(range(len(requests)), key=shape), shape):
    while batch := tuple(itertools.islice(group, batch_size)):
      yield batch


@functools.cache
def _config(source: str) -> Any:
  return hf_load.load_config(source)


def _params(source: str, dtype: str) -> Any:
  def load() -> Any:
    return hf_load.load_params(source, _config(source), dtype=dtype)

  return engines.resident(("jax", source, dtype), load)
