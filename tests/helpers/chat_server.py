"""A small OpenAI-compatible server, for what a network does: slow, busy, broken.

Not a test. `serving()` gives a server whose replies are a function of the request, or a
list of replies to give one after another. The client is the real one.
"""

from __future__ import annotations

import contextlib
import http.server
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.helpers import loopback

MODEL = "served"


class Reply(NamedTuple):
  """An HTTP reply; the default headers make the client's waiting short.

  Attributes:
    cut: bytes of the body after which the connection is closed; None sends all.
  """

  body: Any
  status: int = 200
  headers: dict[str, str] = {"retry-after-ms": "1"}  # noqa: RUF012
  cut: int | None = None


def says(text: str, finish: str = "stop", **message: Any) -> Reply:
  """A chat completion of 7 prompt and 5 completion tokens."""
  choice = {
    "index": 0,
    "finish_reason": finish,
    "message": {"role": "assistant", "content": text, **message},
  }
  usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
  head = {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL}
  return Reply({**head, "choices": [choice], "usage": usage})


def error(status: int, message: str, code: str | None = None) -> Reply:
  return Reply({"error": {"message": message, "type": "x", "code": code}}, status)


class Server(NamedTuple):
  """Where it listens, and the chat requests and keys that came in."""

  url: str
  requests: list[dict[str, Any]]
  keys: list[str | None]


@contextlib.contextmanager
def serving(
  answer: Callable[[dict[str, Any]], Reply], models: Reply | None = None
) -> Iterator[Server]:
  """A server on a free local port, for the time of the context."""
  requests: list[dict[str, Any]] = []
  keys: list[str | None] = []

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
      listed = Reply({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
      known = self.path == "/v1/models"
      self._send((models or listed) if known else error(404, "Not Found"))

    def do_POST(self) -> None:
      request = json.loads(self.rfile.read(int(self.headers["content-length"])))
      requests.append(request)
      keys.append(self.headers["authorization"])
      with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        self._send(answer(request))

    def _send(self, reply: Reply) -> None:
      raw = isinstance(reply.body, bytes)
      body = reply.body if raw else json.dumps(reply.body).encode()
      self.send_response(reply.status)
      headers = {"content-type": "application/json", **reply.headers}
      for name, value in {**headers, "content-length": str(len(body))}.items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(body[: reply.cut])
      self.close_connection = self.close_connection or reply.cut is not None

    def log_message(self, *args: Any) -> None:
      pass

  with loopback.serving(Handler) as address:
    yield Server(f"{address}/v1", requests, keys)
