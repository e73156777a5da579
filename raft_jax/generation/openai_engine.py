"""Any OpenAI-compatible server, through the `openai` client; needs no jax, no torch.

`vllm serve` is the reference. A request that fails temporarily is repeated a bounded
number of times, after a growing wait or the one that the server requests. A parameter
that the server does not support is left out from then on. The name of its model
identifies a server; whether that name stands for the intended weights cannot be checked
from here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import functools
import importlib.util
import json
import math
import os
import sys
import threading
import time
from collections.abc import (
  AsyncIterator,
  Awaitable,
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import TYPE_CHECKING, Any, TypeVar

from raft_jax import errors
from raft_jax.generation import engines, openai_errors, openai_replies, thinking
from raft_jax.runtime import threads
from raft_jax.storage import records

if TYPE_CHECKING:
  import openai

T = TypeVar("T")

RETRIES = 8
"""Repetitions of a request: about 40 s of waits, which double from 0.5 s to 8 s."""

LONGEST_WAIT = 120.0
"""Longest wait, in seconds, that a server may request; the run gives up after that."""

LONGEST_REPLY = 2**25
"""Largest size of a reply that is read, in bytes."""

CHANGES = {
  "seed": "repeated calls may give other replies",
  "top_p": "the server's own value counts, not the config's",
  "temperature": "the server's own value counts, not the config's",
  "response_format": "replies are not constrained to their form, only prompted for it",
  "max_tokens": "sent as max_completion_tokens instead",
}
"""Parameters that a request may leave out, and what that changes."""


def connect(
  model: str,
  *,
  base_url: str,
  api_key_env: str | None = None,
  timeout_s: float = 600.0,
  omit: Sequence[str] = (),
  marks: Sequence[str] | None = None,
) -> engines.Generator:
  """A model behind a server, after checking that the server has that model.

  Args:
    model: its name there, as in `vllm serve --served-model-name`.
    base_url: ends in /v1.
    api_key_env: name of the environment variable with the key; None if the server
      needs no key.
    timeout_s: longest wait for one reply, in seconds.
    omit: parameters, of those in `CHANGES`, that are not sent. Replies have the same
      journal keys with and without them.
    marks: the model's marks around its thinking, besides <think> and </think>.

  Raises:
    UserError: the client is not installed, there is no such variable, or the server
      cannot be reached or does not serve the model.
  """
  if importlib.util.find_spec("openai") is None:
    raise errors.UserError(
      "engine openai: the openai client is not installed; run "
      f"{errors.install('refine')}"
    )
  if api_key_env is not None and not os.environ.get(api_key_env):
    raise errors.UserError(
      f"engine openai: api_key_env: no environment variable {api_key_env}; export it, "
      "or delete the key for a server that asks for none"
    )
  own = thinking.Marks(*marks) if marks else None
  engine = _OpenAIEngine(model, base_url, api_key_env, timeout_s, tuple(omit), own)
  engine.check()
  return engine


class _Failed(Exception):
  """A request that got no reply.

  Attributes:
    kind: as `openai_errors.kind`.
    remedy: what the user can do.
    fault: the error that the server reported, if it did.
    parameter: for the kind "unsupported", the parameter.
    headers: of the server's reply.
  """

  def __init__(
    self,
    message: str,
    kind: openai_errors.Kind,
    remedy: str,
    *,
    fault: openai_errors.Fault | None = None,
    parameter: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.kind, self.remedy, self.fault = kind, remedy, fault
    self.parameter, self.headers = parameter, headers or {}


AGAIN = "run the same command again: finished calls are kept"


@dataclasses.dataclass(frozen=True)
class _OpenAIEngine:
  model: str
  base_url: str
  api_key_env: str | None
  timeout_s: float
  omit: tuple[str, ...] = ()
  marks: thinking.Marks | None = None

  local = False
  gpus = 0
  prompt_limit = None  # the server's own, and its own count

  @property
  def identity(self) -> str:
    # Without the address, since a continued run may find the model elsewhere; and
    # without the parameters left out, which may only be found in the middle of a run.
    own = f" thinking in {' '.join(self.marks)}" if self.marks else ""
    return f"openai {self.model}{own}"

  def count_tokens(self, messages: Sequence[records.Message]) -> int:
    return sum(len(message.content) for message in messages)

  def check(self) -> None:
    listed = self._client().models.with_raw_response.list

    def once() -> Any:
      return self._once(listed, lambda body: body, (), min(30, self.timeout_s))

    try:
      body = _repeated(once, retries=1)
    except _Failed as failed:
      missing = failed.fault is not None and failed.fault.status in (404, 405, 501)
      if not missing:
        raise self._error(failed) from failed
      if not self.base_url.rstrip("/").endswith("/v1"):
        raise errors.UserError(
          f"engine openai: {self.base_url} has no /models; base_url should end in /v1"
        ) from failed
      return  # some servers list no models, and refuse a wrong name later
    names = _names(body)
    if names is None:
      raise self._error(_garbled(openai_replies.NoReply("another list of models"), {}))
    # Gemini and Ollama accept names with and without these.
    short = {n.removeprefix("models/").removesuffix(":latest") for n in names}
    if self.model not in {*names, *short}:
      raise errors.UserError(
        f"engine openai: {self.base_url} does not serve {self.model}, but "
        f"{', '.join(names[:8]) or 'no model'}; change `model`"
      )

  def generate(
    self, requests: Iterable[engines.Request], at_once: int
  ) -> Iterator[tuple[int, engines.Completion | errors.UserError]]:
    def ask(row: tuple[int, engines.Request]) -> engines.Completion | errors.UserError:
      return self._ask(row[1])

    for row, reply in threads.as_finished(ask, enumerate(requests), at_once):
      yield row[0], reply

  def _client(self) -> openai.AsyncOpenAI:
    key = os.environ[self.api_key_env] if self.api_key_env else "none"
    return _client(self.base_url, key)

  def _ask(self, request: engines.Request) -> engines.Completion | errors.UserError:
    while True:  # repeated for each parameter that the server does not support
      left_out = {*self.omit, *_unsupported(self.base_url, self.model)}
      once = functools.partial(self._reply, request, left_out)
      try:
        return _repeated(once, RETRIES)._replace(left_out=tuple(sorted(left_out)))
      except _Failed as failed:
        if failed.kind == "filtered" or failed.kind == "too_long":
          return engines.Completion("", failed.kind, 0, 0)
        if failed.parameter is None:
          return self._error(failed)
        self._leave_out(failed.parameter, str(failed))

  def _reply(
    self, request: engines.Request, left_out: Collection[str]
  ) -> engines.Completion:
    """The reply to one request, sent once."""
    create = self._client().chat.completions.with_raw_response.create
    marks = (thinking.THINK, *([self.marks] if self.marks else []))
    parameters, names = _parameters(request, left_out)
    return self._once(
      lambda: create(model=self.model, **parameters),
      lambda body: openai_replies.completion(body, request.max_new_tokens, marks),
      names,
      self.timeout_s,
    )

  def _leave_out(self, name: str, message: str) -> None:
    """Remembers that the server does not support a parameter; prints that once."""
    known = _unsupported(self.base_url, self.model)
    with _LOCK:
      new = name not in known
      known.add(name)
    if new:
      print(
        f"engine openai: {self.base_url} does not take {name} ({message}); it is "
        f"left out from here on: {CHANGES[name]}",
        file=sys.stderr,
        flush=True,
      )

  def _once(
    self,
    send: Callable[[], Awaitable[Any]],
    read: Callable[[Any], T],
    sent: Collection[str],
    timeout_s: float,
  ) -> T:
    """The result of one request.

    Args:
      send: sends the request and returns the raw response.
      read: makes the result from the JSON body.
      sent: parameters of the request that could be left out.
      timeout_s: longest time for all of it, in seconds.

    Raises:
      _Failed: there is no reply, or no usable one.
    """
    import openai

    headers: Mapping[str, str] = {}
    try:
      raw = _within(timeout_s, send)
      headers = raw.headers
      return read(openai_replies.parsed(raw.content, raw.text))
    except (TimeoutError, openai.APITimeoutError) as error:
      message = f"no whole reply within {timeout_s:g} s, {RETRIES + 1} times"
      remedy = "raise timeout_s or lower batch_size; finished calls are kept"
      raise _Failed(message, "temporary", remedy) from error
    except openai.APIStatusError as error:
      response = error.response
      if error.status_code < 400:
        raise _redirected(response.headers.get("location", "nowhere")) from error
      body = openai_replies.parsed(response.content, response.text)
      fault = openai_errors.of(body, error.status_code)
      assert fault is not None
      raise self._refused(fault, sent, response.headers) from error
    except openai.APIConnectionError as error:
      if isinstance(error.__cause__, openai_replies.NoReply):
        raise _garbled(error.__cause__, headers) from error
      message = f"cannot be reached ({error.__cause__ or error})"
      remedy = "start the server or mend base_url; finished calls are kept"
      raise _Failed(message, "temporary", remedy) from error
    except openai.OpenAIError as error:
      message = " ".join(str(error).split())[: openai_errors.LONGEST]
      raise _Failed(message, "permanent", "see the server's log") from error
    except openai_replies.Refused as error:
      raise self._refused(error.fault, sent, headers) from error
    except openai_replies.NoReply as error:
      raise _garbled(error, headers) from error

  def _refused(
    self,
    fault: openai_errors.Fault,
    sent: Collection[str],
    headers: Mapping[str, str],
  ) -> _Failed:
    kind = openai_errors.kind(fault, sent)
    parameter = (
      openai_errors.unsupported(fault, sent) if kind == "unsupported" else None
    )
    message = fault.message or "(no message)"
    if fault.status is not None:
      message = f"error {fault.status}: {message}"
    remedy = AGAIN if kind == "temporary" else self._remedy(fault)
    return _Failed(
      message, kind, remedy, fault=fault, parameter=parameter, headers=headers
    )

  def _remedy(self, fault: openai_errors.Fault) -> str:
    """What the user can do about a permanent error."""
    key = "set api_key_env"
    if self.api_key_env:
      key = f"check the key in {self.api_key_env}"
    if openai_errors.unpaid(fault):
      return "check the balance of the key's account; finished calls are kept"
    if fault.status == 401:
      return key
    if fault.status == 403:
      return f"check `model`, or {key}"
    if fault.status in (404, 405):
      return "check `model` and base_url (it should end in /v1)"
    return (
      "see what it does not take: `omit` leaves out "
      f"{', '.join(name for name in CHANGES if name != 'response_format')}, and "
      "`structured: false` the form of replies; finished calls are kept"
    )

  def _error(self, failed: _Failed) -> errors.UserError:
    """The server's message and what the user can do, in one line."""
    wait = pause(failed.headers, 0)
    wish = f" (it asks to wait {wait:.0f} s)" if wait > LONGEST_WAIT else ""
    kind = errors.TryAgainError if failed.kind == "temporary" else errors.UserError
    return kind(f"engine openai: {self.base_url}: {failed}{wish}; {failed.remedy}")


def _garbled(error: openai_replies.NoReply, headers: Mapping[str, str]) -> _Failed:
  message = f"sent a reply that is no chat completion: {error}"
  if error.temporary:
    return _Failed(
      message, "temporary", f"see what answers there, and {AGAIN}", headers=headers
    )
  remedy = "see what answers there, and correct base_url or the server's settings"
  return _Failed(message, "permanent", f"{remedy}; finished calls are kept")


def _redirected(address: str) -> _Failed:
  # Not followed: what is asked, and perhaps the key, would go to a server that the
  # user did not name.
  return _Failed(
    f"redirects to {address[: openai_errors.LONGEST]}",
    "permanent",
    "set base_url to the address that is meant, ending in /v1",
  )


def _repeated(once: Callable[[], T], retries: int) -> T:
  """The result of `once`, which is repeated after a temporary failure."""
  tries = 0
  while True:
    try:
      return once()
    except _Failed as failed:
      wait = pause(failed.headers, tries)
      if failed.kind != "temporary" or tries == retries or wait > LONGEST_WAIT:
        raise
    time.sleep(wait)
    tries += 1


def _parameters(
  request: engines.Request, left_out: Collection[str]
) -> tuple[dict[str, Any], set[str]]:
  """A request's body without the model, and the parameters that could be left out."""
  wanted: dict[str, Any] = {
    "max_tokens": request.max_new_tokens,
    "temperature": request.temperature,
    "top_p": request.top_p,
    "seed": request.seed,
  }
  if request.reply_schema is not None:
    form = {"name": "reply", "strict": True, "schema": dict(request.reply_schema)}
    wanted["response_format"] = {"type": "json_schema", "json_schema": form}
  sent = {name: value for name, value in wanted.items() if name not in left_out}
  names = set(sent)
  if "max_tokens" not in sent:
    sent["max_completion_tokens"] = request.max_new_tokens
  if tools := [json.loads(tool) for tool in request.messages[0].tools]:
    sent["tools"] = [
      tool if "function" in tool else {"type": "function", "function": tool}
      for tool in tools
    ]
  return {"messages": list(map(records.api_turn, request.messages)), **sent}, names


def _names(body: Any) -> list[str] | None:
  """The models in a server's list, or None if it has another form."""
  rows = body.get("data", body.get("models")) if isinstance(body, Mapping) else body
  if not isinstance(rows, list):
    return None
  named = [row.get("id", row.get("name")) for row in rows if isinstance(row, Mapping)]
  return [name for name in named if isinstance(name, str)]


def pause(headers: Mapping[str, str], tries: int) -> float:
  """Seconds to wait before the next try: as the server requests, or twice the last."""
  requested = _requested_wait(headers)
  return requested if 0 < requested < math.inf else min(0.5 * 2**tries, 8.0)


def _requested_wait(headers: Mapping[str, str]) -> float:
  """Seconds until the time in Retry-After, if there is one; else NaN."""
  for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    try:
      return float(headers[name]) * unit
    except (KeyError, ValueError):
      continue
  try:
    date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    return date.timestamp() - time.time()
  except (TypeError, ValueError, OverflowError):
    return math.nan


_LOCK = threading.Lock()


@functools.cache
def _unsupported(base_url: str, model: str) -> set[str]:
  """Parameters that a server does not support, shared by all roles that use it."""
  return set()


@functools.cache
def _client(base_url: str, api_key: str) -> openai.AsyncOpenAI:
  import openai

  async def bound(response: Any) -> None:
    response.stream = _bounded(response.stream)

  http = openai.DefaultAsyncHttpxClient(
    follow_redirects=False,
    event_hooks={"response": [bound]},
  )
  return openai.AsyncOpenAI(
    base_url=base_url,
    api_key=api_key,
    timeout=None,  # see `_within`
    max_retries=0,
    http_client=http,
  )


def _bounded(stream: Any) -> Any:
  """A reply's body, which ends in NoReply if it is too long to be read."""
  import openai

  httpx = importlib.import_module(
    openai.DefaultAsyncHttpxClient.__base__.__module__.partition(".")[0]
  )

  class Bounded(httpx.AsyncByteStream):  # type: ignore[name-defined]  # or httpx2's
    async def __aiter__(self) -> AsyncIterator[bytes]:
      size = 0
      async for part in stream:
        size += len(part)
        if size > LONGEST_REPLY:
          raise openai_replies.NoReply(f"more than {LONGEST_REPLY:,} bytes")
        yield part

    async def aclose(self) -> None:
      await stream.aclose()

  return Bounded()


def _within(seconds: float, send: Callable[[], Awaitable[T]]) -> T:
  """What `send` gives, from connection to last byte within some time.

  The client's own timeouts are between two bytes, so that a server which sends one now
  and then would hold a request for ever.
  """

  async def bounded() -> T:
    async with asyncio.timeout(seconds):
      return await send()

  return asyncio.run_coroutine_threadsafe(bounded(), _loop()).result()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
  """The event loop of all connections, in a thread of its own."""
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, name="openai", daemon=True).start()
  return loop
