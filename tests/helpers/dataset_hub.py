"""The part of the Hugging Face hub's HTTP interface that reading a dataset needs.

Repositories are dicts of commits; a commit is a dict of files. Runs on loopback.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers import loopback

Commit = dict[str, bytes]


class Hub:
  """Datasets by name.

  Attributes:
    repos: name -> {revision: commit id}.
    commits: commit id -> its files.
    gated: names that may not be read.
    asked: paths of all requests.
  """

  def __init__(self) -> None:
    self.repos: dict[str, dict[str, str]] = {}
    self.commits: dict[str, Commit] = {}
    self.gated: set[str] = set()
    self.asked: list[str] = []
    self.url = ""

  def push(self, name: str, files: Commit) -> str:
    """Makes the files the branch `main`; returns the commit."""
    content = repr((name, len(self.commits), sorted(files.items())))
    commit = hashlib.sha1(content.encode()).hexdigest()
    self.commits[commit] = files
    revisions = self.repos.setdefault(name, {})
    revisions["main"] = revisions[commit] = commit
    return commit

  def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    self.asked.append(path)
    path = path.partition("?")[0]
    name = next((n for n in self.repos if f"datasets/{n}" in path), None)
    if name is None:
      return _refusal("RepoNotFound", 401)
    if name in self.gated:
      return _refusal("GatedRepo", 401)
    if path.endswith("/auth-check"):
      return _json({})
    match = re.search(
      rf"datasets/{name}/(revision|tree|resolve|paths-info)/([^/]+)", path
    )
    revision = match[2] if match else "main"
    commit = self.repos[name].get(revision.replace("%2F", "/"))
    if commit is None:
      return _refusal("RevisionNotFound", 404)
    files = self.commits[commit]
    kind = match[1] if match else "revision"
    if kind == "revision":
      siblings = [{"rfilename": file} for file in files]
      return _json({"id": name, "sha": commit, "siblings": siblings})
    rest = path.partition(f"/{kind}/{revision}")[2].strip("/")
    if kind == "resolve":
      if rest not in files:
        return _refusal("EntryNotFound", 404, commit)
      etag = hashlib.sha1(files[rest]).hexdigest()
      return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[rest]
    return _json(_tree(files, rest))


def _tree(files: Commit, folder: str) -> list[dict[str, Any]]:
  """All files below a folder, as if asked for recursively, and their folders."""
  items: dict[str, dict[str, Any]] = {}
  for path, content in files.items():
    if folder and not path.startswith(f"{folder}/"):
      continue
    parts = path.split("/")
    for i in range(1, len(parts)):
      parent = "/".join(parts[:i])
      if len(parent) > len(folder):
        items[parent] = {"type": "directory", "path": parent, "oid": "0", "size": 0}
    oid = hashlib.sha1(content).hexdigest()
    items[path] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
  return list(items.values())


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
  return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _refusal(code: str, status: int, commit: str = "") -> tuple[int, dict, bytes]:
  headers = {"X-Error-Code": code, "X-Error-Message": code}
  if commit:
    headers["X-Repo-Commit"] = commit
  return status, headers, b""


@contextmanager
def serving() -> Iterator[Hub]:
  """A hub at `url` while the block runs."""
  hub = Hub()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      status, headers, body = hub.answer(self.path)
      self.send_response(status)
      for key, value in headers.items():
        self.send_header(key, value)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      if self.command != "HEAD":
        self.wfile.write(body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
      size = int(self.headers.get("Content-Length", 0))
      self.rfile.read(size)
      self.do_GET()

    def log_message(self, *_: object) -> None:
      pass

  with loopback.serving(Handler) as hub.url:
    yield hub
