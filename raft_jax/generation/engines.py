"""The protocol of engines that generate text: messages in, texts out.

The engines are `jax_engine` (built in), `vllm_engine` (vLLM in this process) and
`openai_engine` (any OpenAI-compatible server).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from raft_jax import errors
from raft_jax.generation import thinking
from raft_jax.hf import chat, model_source
from raft_jax.storage import records


class Request(NamedTuple):
  """One prompt to a language model, and how to sample the reply.

  Attributes:
    messages: ends with a user turn.
    temperature: 0 is greedy.
    seed: 31 bits that decide the reply's randomness, whatever shares its batch.
    reply_schema: a JSON schema that constrains the reply, if the engine can do that.
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
    finish_reason: `length` means that the limit cut the reply off. A server may also
      refuse a request as `too_long`, or because its content is `filtered`.
    prompt_tokens, completion_tokens: None if a server does not count them. The second
      includes the end token and the thinking.
    thinking_tokens: approximate number of tokens that `strip_thinking` removed.
    left_out: parameters that were not sent, since the server does not take them.
  """

  text: str
  finish_reason: Literal["stop", "length", "too_long", "filtered"]
  prompt_tokens: int | None
  completion_tokens: int | None
  thinking_tokens: int | None = 0
  left_out: tuple[str, ...] = ()


class Generator(Protocol):
  """A language model whose reply depends on the request's content and seed alone.

  Attributes:
    identity: model source and digest of the weights; part of the journal's keys.
    local: whether it uses this process's memory, in which `resident` keeps one model.
    gpus: number of GPUs that it takes, for Ray, which places it.
    prompt_limit: largest number of tokens of prompt and reply together; None if only
      the engine knows, whose reply is then `too_long`.
  """

  @property
  def identity(self) -> str: ...

  @property
  def local(self) -> bool: ...

  @property
  def gpus(self) -> int: ...

  @property
  def prompt_limit(self) -> int | None: ...

  def count_tokens(self, messages: Sequence[records.Message]) -> int:
    """Tokens of the prompt that these messages become, or, if `prompt_limit` is None,
    characters, which suffice for sorting."""

  def generate(
    self, requests: Iterable[Request], at_once: int
  ) -> Iterator[tuple[int, Completion | errors.UserError]]:
    """Completions as they are finished, each with its request's place in `requests`.

    `strip_thinking` removes the model's thinking from the replies. A server may give an
    error in the place of a completion; the others go on.

    Args:
      requests: the next one is taken when there is room for it. A caller that wants no
        more ends the iterator, and gets what is in progress.
      at_once: number of requests in progress.

    Raises:
      ValueError: a request exceeds `prompt_limit`, which the caller checks before.
    """


def in_order(
  generator: Generator, requests: Sequence[Request], at_once: int | None = None
) -> list[Completion | errors.UserError]:
  """One completion or error per request, in order; by default all are in progress."""
  if not requests:
    return []
  replies = dict(generator.generate(requests, at_once or len(requests)))
  return [replies[i] for i in range(len(requests))]


def strip_thinking(
  reply: Completion, marks: Sequence[thinking.Marks] = (thinking.THINK,)
) -> Completion:
  """The reply without its thinking, whose tokens are counted.

  Thinking that never ends stays: such a reply has no answer. If the engine did not
  count the tokens of thinking, they are estimated from its share of the characters.

  Args:
    marks: the model's marks around its thinking; see `thinking.answer`.
  """
  answer = thinking.answer(reply.text, marks)
  if answer == reply.text:
    return reply
  count = reply.thinking_tokens or reply.completion_tokens
  if count is not None and not reply.thinking_tokens:
    count = round(count * (1 - len(answer) / len(reply.text)))
  return reply._replace(text=answer.strip(), thinking_tokens=count)


@functools.cache
def identity(source: str) -> str:
  """The source and a sha256 over the names and contents of its files.

  Every file is read once (a few seconds for a model of some gigabytes). Otherwise the
  journal could mistake new weights for old ones, and return the old model's replies.
  """
  path = model_source.resolve(source)
  files = [path]
  if path.is_dir():
    files = sorted(
      f for p in model_source.HUB_PATTERNS for f in path.rglob(p) if f.is_file()
    )
  digest = hashlib.sha256()
  for file in files:
    name = file.relative_to(path).as_posix() if path.is_dir() else file.name
    with file.open("rb") as content:
      digest.update(f"{name}\0".encode())
      digest.update(hashlib.file_digest(content, "sha256").digest())
  return f"{source} sha256:{digest.hexdigest()[:16]}"


def identity_with_template(source: str, template: str | None) -> str:
  """The identity of a model and of the chat template that replaces its own, if any."""
  if template is None:
    return identity(source)
  return f"{identity(source)} template:{chat_tokenizer(source, template).digest[:16]}"


@functools.cache
def chat_tokenizer(source: str, template: str | None = None) -> chat.ChatTokenizer:
  """The model's tokenizer and chat template, loaded once per process."""
  return chat.load(source, template)


def encoded(
  tokenizer: chat.ChatTokenizer, requests: Iterable[Request], prompt_limit: int
) -> Iterator[tuple[int, Request, list[int]]]:
  """Each request with its place and the token ids of its prompt.

  Raises:
    ValueError: a request exceeds the limit. vLLM would end them all.
  """
  for place, request in enumerate(requests):
    prompt = chat.prompt_ids(tokenizer, request.messages)
    if len(prompt) + request.max_new_tokens > prompt_limit:
      raise ValueError(
        f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones exceed "
        f"the engine's {prompt_limit}"
      )
    yield place, request, prompt


class _Resident(NamedTuple):
  key: Any
  model: Any
  free: Callable[[Any], None]


_resident: list[_Resident] = []  # at most one


def resident(
  key: Any, load: Callable[[], Any], free: Callable[[Any], None] = lambda model: None
) -> Any:
  """The one model in this process's memory, loaded if it is not the model of `key`.

  A pass calls one model for every row. Models that do not fit into memory together are
  therefore loaded once a pass, and roles with the same model share one copy.
  """
  if not _resident or _resident[0].key != key:
    release()
    _resident.append(_Resident(key, load(), free))
  return _resident[0].model


def release() -> None:
  """Frees the model in memory, if any."""
  while _resident:
    _, model, free = _resident.pop()
    free(model)
