"""The openai client against a server that keeps no rule: it drips, resets, floods."""

import contextlib
import json
import re
import socket
import socketserver
import struct
import threading
import time

import pytest

from raft_jax import errors
from raft_jax.generation import engines, openai_engine
from raft_jax.storage import records
from tests.helpers import chat_server

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
BODY = json.dumps(chat_server.says("Hello.").body).encode()
WHOLE = HEAD + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)


@contextlib.contextmanager
def serving(*habits):
  """A server that lists no models and then has one habit after another; the last stays.

  A habit takes the socket of a request that was read.
  """
  left, over = list(habits), threading.Event()

  class Handler(socketserver.BaseRequestHandler):
    def handle(self):
      request = b""
      while b"\r\n\r\n" not in request:
        request += self.request.recv(65536)
      if request.startswith(b"GET"):
        self.request.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        return
      habit = left.pop(0) if len(left) > 1 else left[0]
      with contextlib.suppress(OSError):
        habit(self.request, over)

  with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
      over.set()
      server.shutdown()


def whole(connection, over):
  connection.sendall(WHOLE)


def silent(connection, over):
  connection.close()


def reset(connection, over):
  """Half the reply, and then the connection is torn down."""
  connection.sendall(WHOLE[: len(WHOLE) - len(BODY) // 2])
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
  connection.close()


def short(connection, over):
  """Less than it announced, and an orderly end."""
  connection.sendall(WHOLE[:-20])


def drip_head(connection, over):
  connection.sendall(HEAD + b"x-slow: ")
  while not over.wait(0.05):
    connection.sendall(b"x")


def drip_body(connection, over):
  connection.sendall(HEAD + b"content-length: 100000\r\n\r\n")
  while not over.wait(0.05):
    connection.sendall(b" ")


def flood(connection, over):
  connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
  while not over.is_set():
    connection.sendall(b"8000\r\n%b\r\n" % (b" " * 0x8000))


def redirect(address):
  def habit(connection, over):
    connection.sendall(
      b"HTTP/1.1 307 Temporary Redirect\r\nlocation: %b/chat/completions\r\n"
      b"content-length: 0\r\n\r\n" % address.encode()
    )

  return habit


def ask(url, **settings):
  engine = openai_engine.connect("served", base_url=url, **settings)
  request = engines.Request((records.Message("user", "Hi"),), 12, 0.5, 0.9, 11)
  (reply,) = engines.in_order(engine, [request])
  return reply


@pytest.mark.parametrize("habit", [silent, reset, short])
def test_a_connection_that_breaks_is_tried_again(habit, capfd):
  with serving(habit, habit, whole) as url:
    assert ask(url).text == "Hello."
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize("habit", [drip_head, drip_body])
def test_a_reply_that_never_ends_is_given_up_in_time(habit, monkeypatch):
  monkeypatch.setattr(openai_engine, "RETRIES", 0)
  with serving(habit) as url:
    began = time.monotonic()
    failure = ask(url, timeout_s=0.5)
    seconds = time.monotonic() - began
  assert isinstance(failure, errors.TryAgainError)
  assert "no whole reply within 0.5 s" in str(failure)
  assert seconds < 5


def test_a_flood_is_not_read_to_its_end(monkeypatch):
  monkeypatch.setattr(openai_engine, "LONGEST_REPLY", 1_000_000)
  with serving(flood) as url:
    failure = ask(url)
  assert isinstance(failure, errors.UserError)
  assert "more than 1,000,000 bytes" in str(failure)


def test_a_redirect_is_refused_and_nothing_is_sent_there(monkeypatch):
  monkeypatch.setenv("OUR_KEY", "sk-secret")
  with chat_server.serving(lambda body: chat_server.says("Hello.")) as other:
    with serving(redirect(other.url)) as url:
      failure = ask(url, api_key_env="OUR_KEY")
    assert other.requests == []
  assert isinstance(failure, errors.UserError)
  assert not isinstance(failure, errors.TryAgainError)
  assert re.search(rf"redirects to {other.url}/chat.*set base_url", str(failure))
  assert "secret" not in str(failure)
