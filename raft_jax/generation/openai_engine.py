"""Any OpenAI-compatible server, asked by the `openai` client; no jax, no torch.

`vllm serve` is the reference. The client repeats a request that failed on the way or
was put off (timeouts, 408, 409, 429, 5xx), a bounded number of times, waiting longer
each time or as long as the server says. A server is known by the name it gives its
model: that this name stands for the weights one means cannot be checked from here.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raft_jax import errors
from raft_jax.generation import engines
from raft_jax.storage import records

if TYPE_CHECKING:
  import openai

RETRIES = 8
"""About 40 s of waiting, by the client's doubling from 0.5 s to 8 s."""

_FILTERED = ("content_filter", "content_policy_violation", "invalid_prompt")
"""Codes of a request that the server will not answer for what it says."""

_ENDS: dict[str, Any] = {
  "stop": "stop",
  "eos": "stop",
  "eos_token": "stop",
  "stop_sequence": "stop",
  "end_turn": "stop",
  "length": "length",
  "max_tokens": "length",
  "content_filter": "filtered",
}
"""What servers of this protocol say of a reply's end. OpenAI and vLLM say `stop`,
`length` and `content_filter`; the client of Together's API also knows `eos`."""

_TOO_LONG = re.compile(
  r"context[ _](length|size|window)|(context|model|prompt|input) .{0,40}too long|"
  r"maximum (model|input|sequence) length",
  re.IGNORECASE,
)


def connect(
  model: str, *, base_url: str, api_key_env: str | None = None, timeout_s: float = 600.0
) -> engines.Generator:
  """A model behind a server, which is asked whether it serves that model.

  Args:
    model: its name there, as in `vllm serve --served-model-name`.
    base_url: ends in /v1.
    api_key_env: name of the environment variable that holds the key; None for a server
      that asks for none.
    timeout_s: longest wait for one reply, in seconds.

  Raises:
    UserError: the client is not installed, there is no such variable, the server
      cannot be reached or does not serve the model.
  """
  if importlib.util.find_spec("openai") is None:
    raise errors.UserError(
      "engine openai: the openai client is not installed; pip install "
      "'raft_jax[refine]'"
    )
  if api_key_env is not None and not os.environ.get(api_key_env):
    raise errors.UserError(
      f"engine openai: api_key_env: no environment variable {api_key_env}; export it, "
      "or delete the key for a server that asks for none"
    )
  engine = _OpenAIEngine(model, base_url, api_key_env, timeout_s)
  engine.check()
  return engine


@dataclasses.dataclass(frozen=True)
class _OpenAIEngine:
  model: str
  base_url: str
  api_key_env: str | None
  timeout_s: float

  local = False
  prompt_limit = None  # the server's own, and its own count

  @property
  def identity(self) -> str:
    # Not the address: the same model may be served elsewhere when a run goes on.
    return f"openai {self.model}"

  def count_tokens(self, messages: Sequence[records.Message]) -> int:
    return sum(len(message.content) for message in messages)

  def check(self) -> None:
    import openai

    client = self._client().with_options(max_retries=1, timeout=min(30, self.timeout_s))
    try:
      names = [str(model.id) for model in client.models.list().data]
    except openai.NotFoundError as error:
      raise errors.UserError(
        f"engine openai: {self.base_url} has no /models; base_url should end in /v1"
      ) from error
    except openai.OpenAIError as error:
      raise self._refusal(error) from error
    except (AttributeError, TypeError, ValueError) as error:
      raise self._garbled() from error
    if self.model not in names:
      raise errors.UserError(
        f"engine openai: {self.base_url} does not serve {self.model}, but "
        f"{', '.join(names[:8]) or 'nothing'}; change `model`"
      )

  def generate(
    self, requests: Sequence[engines.Request]
  ) -> list[engines.Completion | errors.UserError]:
    with concurrent.futures.ThreadPoolExecutor(max(len(requests), 1)) as pool:
      return list(pool.map(self._ask, requests))

  def _client(self) -> openai.OpenAI:
    key = os.environ[self.api_key_env] if self.api_key_env else "none"
    return _client(self.base_url, key, self.timeout_s)

  def _ask(self, request: engines.Request) -> engines.Completion | errors.UserError:
    import openai

    options: dict[str, Any] = {}
    if request.reply_schema is not None:
      form = {"name": "reply", "strict": True, "schema": dict(request.reply_schema)}
      options["response_format"] = {"type": "json_schema", "json_schema": form}
    messages: list[Any] = [message._asdict() for message in request.messages]
    try:
      reply = self._client().chat.completions.create(
        model=self.model,
        messages=messages,
        max_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        **options,
      )
      return self._completion(reply)
    except openai.BadRequestError as error:
      if error.code in _FILTERED:
        return engines.Completion("", "filtered", 0, 0)
      if error.code == "context_length_exceeded" or _TOO_LONG.search(error.message):
        return engines.Completion("", "too_long", 0, 0)
      return self._refusal(error)
    except openai.OpenAIError as error:
      return self._refusal(error)
    except errors.UserError as error:
      return error
    except (AttributeError, IndexError, TypeError, ValueError):
      return self._garbled()

  def _completion(self, reply: Any) -> engines.Completion:
    """Raises AttributeError, IndexError, TypeError or ValueError for another shape."""
    choice, usage = reply.choices[0], reply.usage
    content = choice.message.content or ""
    # Some servers take the thinking out by themselves; put it back to count it.
    extra = choice.message.model_extra or {}
    thought = extra.get("reasoning") or extra.get("reasoning_content")
    if thought:
      content = f"<think>{thought}</think>{content}"
    if choice.finish_reason not in _ENDS:
      raise errors.UserError(
        f"engine openai: {self.base_url} ended a reply with finish_reason "
        f"{choice.finish_reason!r}, and whether it is whole is not known (known are "
        f"{', '.join(_ENDS)}); use another server"
      )
    details = usage.completion_tokens_details
    return engines.Completion(
      # A cut may leave half a surrogate pair, which no file takes.
      str(content).encode("utf-8", "replace").decode(),
      _ENDS[choice.finish_reason],
      int(usage.prompt_tokens),
      int(usage.completion_tokens),
      int((details and details.reasoning_tokens) or 0),
    )

  def _garbled(self) -> errors.UserError:
    return errors.UserError(
      f"engine openai: {self.base_url} sent a reply that is no chat completion; see "
      "what answers there, and run the same command again: finished calls are kept"
    )

  def _refusal(self, error: openai.OpenAIError) -> errors.UserError:
    """Says in one line what the server said, and what can be done."""
    import openai

    kind = errors.UserError
    what = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    remedy = "run the same command again: finished calls are kept"
    if isinstance(error, openai.APIStatusError) and (
      error.status_code in (408, 409, 429) or error.status_code >= 500
    ):
      kind = errors.TryAgainError
    elif isinstance(error, openai.APITimeoutError):
      kind = errors.TryAgainError
      what = f"no reply within {self.timeout_s:g} s, {RETRIES + 1} times"
      remedy = "raise timeout_s or lower batch_size; finished calls are kept"
    elif isinstance(error, openai.APIConnectionError):
      kind = errors.TryAgainError
      what = f"cannot be reached ({error.__cause__ or what})"
      remedy = "start the server or mend base_url; finished calls are kept"
    elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
      name = self.api_key_env
      remedy = f"check the key in {name}" if name else "set api_key_env"
    elif isinstance(error, openai.NotFoundError):
      remedy = "check `model` and base_url (it should end in /v1)"
    elif isinstance(error, openai.BadRequestError):
      remedy = "see what it does not take (of a judge perhaps structured: true)"
    return kind(f"engine openai: {self.base_url}: {what}; {remedy}")


@functools.cache
def _client(base_url: str, api_key: str, timeout_s: float) -> openai.OpenAI:
  import openai

  return openai.OpenAI(
    base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=RETRIES
  )
