"""The built-in engine: our own sampler on this process's default device.

It cannot constrain a reply to a schema. Importing this module does not import jax.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from raft_jax import errors
from raft_jax.generation import engines, thinking
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.storage import records


def load(
  source: str, *, template: str | None = None, dtype: str, batch_size: int
) -> engines.Generator:
  """The built-in sampler on this process's default device.

  The weights are loaded when first needed: see `engines.resident`.

  Args:
    source: as for `model_source.resolve`.
    template: chat template, as `model.chat_template`.
    dtype: of weights and activations.
    batch_size: rows of a compiled batch. Shorter micro-batches are filled up, so that
      each width compiles once.

  Raises:
    UserError: the model's config, tokenizer or weights cannot be used.
  """
  hf_load.check_params(source, _config(source))
  engines.chat_tokenizer(source, template)
  return _JaxEngine(source, template, dtype, batch_size)


@dataclasses.dataclass(frozen=True)
class _JaxEngine:
  source: str
  template: str | None
  dtype: str
  batch_size: int

  local = True
  gpus = 0  # on a worker of Ray it computes on the CPU

  @property
  def identity(self) -> str:
    model = engines.identity_with_template(self.source, self.template)
    return f"jax {self.dtype} {model}"

  @property
  def prompt_limit(self) -> int:
    return _config(self.source).max_positions

  @property
  def _tokenizer(self) -> chat.ChatTokenizer:
    return engines.chat_tokenizer(self.source, self.template)

  def count_tokens(self, messages: Sequence[records.Message]) -> int:
    return len(chat.prompt_ids(self._tokenizer, messages))

  def generate(
    self, requests: Iterable[engines.Request], at_once: int
  ) -> Iterator[tuple[int, engines.Completion | errors.UserError]]:
    encoded = engines.encoded(self._tokenizer, requests, self.prompt_limit)
    # One program samples prompts of one width; callers bring the longest first.
    for _, same in itertools.groupby(encoded, lambda row: _shape(*row[1:])):
      while batch := list(itertools.islice(same, min(at_once, self.batch_size))):
        places, batch_requests, prompts = zip(*batch, strict=True)
        yield from zip(places, self._sample(batch_requests, prompts), strict=True)

  def _sample(
    self, requests: Sequence[engines.Request], prompts: Sequence[list[int]]
  ) -> list[engines.Completion | errors.UserError]:
    """Samples requests that have the same width and settings, in one batch."""
    import jax

    from raft_jax.models import sampling as sampling_lib

    config, tokenizer = _config(self.source), self._tokenizer
    first = requests[0]
    width = padded_width(max(map(len, prompts)))
    prompt_BP = np.full((self.batch_size, width), tokenizer.pad_id, np.int32)
    length_B = np.empty(self.batch_size, np.int32)
    seed_B = np.empty(self.batch_size, np.int32)
    for row in range(self.batch_size):
      # Rows that fill up the batch repeat the first one, and end when it ends.
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
      eos_ids=tokenizer.eos_ids,
      pad_id=tokenizer.pad_id,
      dtype=self.dtype,
      unroll=sampling_lib.unrolled(None, 1, jax.default_backend()),
    )
    tokens_BR, length_B, ended_B, finite_B = map(np.asarray, rollout[:4])
    marks = thinking.own(tokenizer.hf_tokenizer.chat_template)
    completions: list[engines.Completion | errors.UserError] = []
    for i, prompt in enumerate(prompts):
      if not finite_B[i]:
        completions.append(
          errors.UserError(f"{self.source} ({self.dtype}): {sampling_lib.NOT_FINITE}")
        )
        continue
      text_ids = tokens_BR[i, : length_B[i] - ended_B[i]].tolist()
      completion = engines.Completion(
        text=thinking.decode(tokenizer, text_ids),
        finish_reason="stop" if ended_B[i] else "length",
        prompt_tokens=len(prompt),
        completion_tokens=int(length_B[i]),
      )
      completions.append(engines.strip_thinking(completion, marks))
    return completions


def padded_width(tokens: int) -> int:
  """The width that a prompt is padded to: at most four widths per doubling.

  It depends on the prompt's own length only, so that a reply does not depend on the
  prompts in the same batch.
  """
  step = max(64, 2 ** (max(tokens, 1) - 1).bit_length() // 8)
  return -(-tokens // step) * step


def _shape(request: engines.Request, prompt: Sequence[int]) -> tuple[Any, ...]:
  """What requests that are sampled together have in common."""
  sampling = request.max_new_tokens, request.temperature, request.top_p
  return (padded_width(len(prompt)), *sampling)


@functools.cache
def _config(source: str) -> Any:
  return hf_load.load_config(source)


def _params(source: str, dtype: str) -> Any:
  def load() -> Any:
    return hf_load.load_params(source, _config(source), dtype=dtype)

  return engines.resident(("jax", source, dtype), load)
