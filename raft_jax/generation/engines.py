"""Who generates text: one protocol, messages in and texts out.

What keeps the protocol: `jax_engine` (built in), `vllm_engine` (vLLM in this process)
and `openai_engine` (any OpenAI-compatible server).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from raft_jax import errors
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.storage import records


class Request(NamedTuple):
  """One question to a language model.

  Attributes:
    messages: ends with a user turn.
    temperature: 0 is greedy.
    seed: 31 bits; the reply's randomness, whatever is asked beside it.
    reply_schema: a JSON schema that the reply is held to, if the engine can.
  """

  messages: tuple[records.Message, ...]
  max_new_tokens: int
  temperature: float
  top_p: float
  seed: int
  reply_schema: Mapping[str, Any] | None = None


class Completion(NamedTuple):
  """A reply.

  Attributes:
    finish_reason: `length` means that the limit cut it off. A server may also refuse a
      request: `too_long` for it, or `filtered` by what it lets through.
    completion_tokens: with the EOS, and with the thinking.
    thinking_tokens: of the parts that `without_thinking` takes out; about that many.
  """

  text: str
  finish_reason: Literal["stop", "length", "too_long", "filtered"]
  prompt_tokens: int
  completion_tokens: int
  thinking_tokens: int = 0


class Generator(Protocol):
  """A language model that answers requests, each from its own content and seed alone.

  Attributes:
    identity: model source and weights digest; part of the journal's keys.
    local: whether it takes up this process's memory, where `resident` keeps one model.
    prompt_limit: tokens of prompt and reply together that the model can hold; None if
      only the engine knows, whose reply is then `too_long`.
  """

  @property
  def identity(self) -> str: ...

  @property
  def local(self) -> bool: ...

  @property
  def prompt_limit(self) -> int | None: ...

  def count_tokens(self, messages: Sequence[records.Message]) -> int:
    """Length of the prompt that these messages become (characters if no limit is
    known: enough to sort by)."""

  def generate(
    self, requests: Sequence[Request]
  ) -> Sequence[Completion | errors.UserError]:
    """One completion per request, in order; its error where a server gave none.

    Called with one micro-batch at a time, so that the caller can make its results
    durable before it asks for more, or raises an error of one of them. Raises
    ValueError for a request over the limit: the caller checks before.
    """


THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


def without_thinking(reply: Completion) -> Completion:
  """The reply without its `<think>...</think>` parts, and with their tokens counted.

  Some chat templates open the first part themselves, so that the reply begins inside
  it. A part that never ends stays: such a reply has no answer. Where the engine did not
  count, the tokens are shared out by characters.
  """
  opening, closed, rest = reply.text.partition("</think>")
  answer = rest if closed and "<think>" not in opening else reply.text
  answer = THINKING.sub("", answer)
  if answer == reply.text:
    return reply
  share = 1 - len(answer) / len(reply.text)
  return reply._replace(
    text=answer.strip(),
    thinking_tokens=reply.thinking_tokens or round(reply.completion_tokens * share),
  )


@functools.cache
def identity(source: str) -> str:
  """The source and a sha256 over the names and content of its files.

  Reads every file once (a few seconds for a model of some gigabytes): a journal that
  took new weights for old ones would answer with the old model's words.
  """
  path = hf_load.resolve(source)
  files = [path]
  if path.is_dir():
    files = sorted(
      f for p in hf_load.HUB_PATTERNS for f in path.rglob(p) if f.is_file()
    )
  digest = hashlib.sha256()
  for file in files:
    name = file.relative_to(path).as_posix() if path.is_dir() else file.name
    with file.open("rb") as content:
      digest.update(f"{name}\0".encode())
      digest.update(hashlib.file_digest(content, "sha256").digest())
  return f"{source} sha256:{digest.hexdigest()[:16]}"


@functools.cache
def codec(source: str) -> chat.Codec:
  """The model's tokenizer, loaded once a process."""
  return chat.load(source)


class _Resident(NamedTuple):
  key: Any
  model: Any
  free: Callable[[Any], None]


_resident: list[_Resident] = []  # at most one


def resident(
  key: Any, load: Callable[[], Any], free: Callable[[Any], None] = lambda model: None
) -> Any:
  """The one model in this process's memory: `key`'s, loaded if it is another's.

  A pass asks one model about every row, so that models which do not fit together come
  and go once a pass; roles that share a model share its copy.
  """
  if not _resident or _resident[0].key != key:
    release()
    _resident.append(_Resident(key, load(), free))
  return _resident[0].model


def release() -> None:
  """Frees the model in memory, if there is one."""
  while _resident:
    _, model, free = _resident.pop()
    free(model)
