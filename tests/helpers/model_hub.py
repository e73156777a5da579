"""A small Hugging Face hub: accounts, repositories, LFS storage and commits.

Not a test. `serving()` gives a hub on a free local port that speaks what
huggingface_hub's uploads ask for. The client is the real one.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from tests.helpers import loopback

LARGE = 100_000
"""Files from this size on, and all safetensors, go through LFS."""


class Refusal(NamedTuple):
  """An answer that replaces the hub's own."""

  status: int
  message: str = ""


class Repo:
  """One repository: its files and the messages of its commits."""

  def __init__(self, private: bool):
    self.private = private
    self.files: dict[str, bytes] = {}
    self.messages: list[str] = []

  def tags(self) -> list[str]:
    card = self.files.get("README.md", b"").decode()
    front = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
    return list(front.get("tags", []))


class Hub:
  """What the hub holds, and what it was asked.

  Attributes:
    accounts: token -> what whoami-v2 answers.
    refuse: the beginning of "METHOD /path" -> what it answers instead.
    asked: "METHOD /path" of every request; those with another token than one of
      `accounts` end in "!".
  """

  def __init__(self) -> None:
    self.url = ""
    self.accounts: dict[str, dict[str, Any]] = {}
    self.repos: dict[str, Repo] = {}
    self.objects: dict[str, bytes] = {}
    self.refuse: dict[str, Refusal] = {}
    self.asked: list[str] = []

  def account(self, token: str, name: str, *orgs: str, role: str = "write") -> None:
    self.accounts[token] = {
      "type": "user",
      "name": name,
      "orgs": [{"name": org} for org in orgs],
      "auth": {"type": "access_token", "accessToken": {"role": role}},
    }

  def commit(self, repo: Repo, lines: bytes) -> None:
    for line in lines.splitlines():
      item = json.loads(line)
      value = item["value"]
      if item["key"] == "header":
        repo.messages.append(value["summary"])
      elif item["key"] == "file":
        repo.files[value["path"]] = base64.b64decode(value["content"])
      elif item["key"] == "lfsFile":
        content = self.objects[value["oid"]]
        assert len(content) == value["size"]
        repo.files[value["path"]] = content
      elif item["key"] == "deletedFile":
        del repo.files[value["path"]]
      else:
        raise ValueError(item["key"])


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
  """A hub for the time of the context."""
  hub = Hub()

  class Handler(_Handler):
    state = hub

  with loopback.serving(Handler) as hub.url:
    yield hub


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  state: Hub

  def do_GET(self) -> None:
    self._handle()

  def do_POST(self) -> None:
    self._handle()

  def do_PUT(self) -> None:
    self._handle()

  def _handle(self) -> None:
    hub, path = self.state, self.path.partition("?")[0]
    body = self._body()
    token = (self.headers["authorization"] or "").removeprefix("Bearer ")
    account = hub.accounts.get(token)
    asked = f"{self.command} {path}"
    # Storage takes signed addresses and no token.
    known = account is not None or path.startswith("/storage/")
    hub.asked.append(asked if known else f"{asked}!")
    for start, refusal in hub.refuse.items():
      if asked.startswith(start):
        return self._send({"error": refusal.message}, refusal.status)
    if not known:
      return self._send({"error": "Invalid credentials"}, 401)
    return self._answer(path, body, account)

  def _answer(self, path: str, body: bytes, account: Any) -> None:
    hub, parts = self.state, path.strip("/").split("/")
    if path == "/api/whoami-v2":
      return self._send(account)
    if path == "/api/validate-yaml":
      return self._send({"errors": [], "warnings": []})
    if path == "/api/repos/create":
      return self._create(json.loads(body), account)
    if parts[0] == "storage":
      hub.objects[hashlib.sha256(body).hexdigest()] = body
      return self._send({}) if hashlib.sha256(body).hexdigest() == parts[1] else None
    if path.endswith(".git/info/lfs/objects/batch"):
      return self._send(
        {"objects": [self._lfs(o) for o in json.loads(body)["objects"]]}
      )
    name = "/".join(parts[2:4])
    repo = hub.repos.get(name)
    if parts[:2] != ["api", "models"] or repo is None:
      return self._send({"error": "Repository not found"}, 404, "RepoNotFound")
    if len(parts) == 4 or parts[4] == "revision":
      return self._send(
        {
          "id": name,
          "private": repo.private,
          "sha": f"{len(repo.messages):040d}",
          "tags": repo.tags(),
          "siblings": [{"rfilename": file} for file in repo.files],
        }
      )
    if parts[4] == "preupload":
      files = json.loads(body)["files"]
      return self._send({"files": [self._mode(repo, file) for file in files]})
    if parts[4] == "commit":
      hub.commit(repo, body)
      oid = f"{len(repo.messages):040d}"
      url = f"{hub.url}/{name}/commit/{oid}"
      return self._send({"commitUrl": url, "commitOid": oid})
    return self._send({"error": path}, 404)

  def _create(self, wanted: dict[str, Any], account: dict[str, Any]) -> None:
    owner = wanted.get("organization") or account["name"]
    name = f"{owner}/{wanted['name']}"
    if name in self.state.repos:
      return self._send({"error": "You already created this model repo"}, 409)
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    self.state.repos[name] = Repo(private)
    return self._send({"url": f"{self.state.url}/{name}", "name": name})

  def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
    if wanted["oid"] in self.state.objects:
      return wanted
    href = f"{self.state.url}/storage/{wanted['oid']}?signature=SIGNATURE"
    return {**wanted, "actions": {"upload": {"href": href}}}

  @staticmethod
  def _mode(repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
    large = file["size"] >= LARGE or file["path"].endswith(".safetensors")
    mode = {"path": file["path"], "shouldIgnore": False}
    content = repo.files.get(file["path"])
    if content is not None:
      head = b"" if large else b"blob %d\0" % len(content)
      digest = hashlib.sha256 if large else hashlib.sha1
      mode["oid"] = digest(head + content).hexdigest()
    return {**mode, "uploadMode": "lfs" if large else "regular"}

  def _body(self) -> bytes:
    if self.headers["transfer-encoding"] != "chunked":
      return self.rfile.read(int(self.headers["content-length"] or 0))
    body = b""
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _send(self, value: Any, status: int = 200, code: str = "") -> None:
    data = json.dumps(value).encode()
    self.send_response(status)
    self.send_header("content-type", "application/json")
    self.send_header("content-length", str(len(data)))
    if status >= 400:
      self.send_header("x-error-message", str(value["error"]))
    if code:
      self.send_header("x-error-code", code)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, format: str, *args: Any) -> None:
    pass
