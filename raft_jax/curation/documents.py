"""Documents, which are read strictly from files and folders and cut at sentence ends.

A document that cannot be used is set aside with its reason, never guessed at. Line ends
become "\\n" and a byte-order mark is removed, so that a text is the same document
wherever it was saved; otherwise texts are unchanged.
"""

from __future__ import annotations

import codecs
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import semantic_text_splitter

from raft_jax import errors
from raft_jax.runtime import interrupts
from raft_jax.storage import question_files, rejects, row_files

MARKDOWN = (".md", ".markdown")
PLAIN = (".txt", ".text", *MARKDOWN)
_KINDS = ", ".join((*PLAIN, *row_files.KINDS))


class Document(NamedTuple):
  """A text. `id` is that of its row, or its path below the folder."""

  id: str
  domain: str
  text: str
  markdown: bool = False

  def place(self) -> dict[str, Any]:
    return {"document": self.id}


Unusable = tuple[str, str] | tuple[str, str, str | None]
"""Why a document cannot be used: reason, detail, and the id of its row if any."""


class Chunk(NamedTuple):
  """Part number `number` of a document: `text`, from character `start` on."""

  document: Document
  number: int
  start: int
  text: str

  def place(self) -> dict[str, Any]:
    return {**self.document.place(), "chunk": self.number}


def read(
  source: str, *, text_field: str = "text", domain: str = ""
) -> tuple[list[Document], list[dict[str, Any]]]:
  """The documents of a file or folder, in order of path and row.

  Hidden files and folders are ignored.

  Args:
    text_field: the field with the text, in files of rows (`row_files`). Rows may also
      have `id` and `domain`. A row without an id gets one derived from its text.
    domain: domain of documents that name none.

  Returns:
    The usable documents, and {what, reason, document, detail} of every other.

  Raises:
    errors.UserError: there is no such file or folder, or two texts have one id.
  """
  root = pathlib.Path(source)
  folder = root.parent if root.is_file() else root
  by_id: dict[str, tuple[str, Document]] = {}
  unusable = []
  for path in _files(root):
    interrupts.check()
    # Bytes of a name that are not UTF-8 become question marks.
    name = path.relative_to(folder).as_posix().encode("utf-8", "replace").decode()
    for place, item in _read_file(path, name, text_field, domain):
      if not isinstance(item, Document):
        unusable.append(unused(place, *item))
        continue
      first_place, first = by_id.setdefault(item.id, (place, item))
      if first.text != item.text:
        raise errors.UserError(
          f"extract.documents: id {item.id!r} stands for two texts, in {first_place} "
          f"and {place}; give every document its own id"
        )
      if first_place != place:
        unusable.append(unused(place, "duplicate", f"of {first_place}", item.id))
  return [document for _, document in by_id.values()], unusable


def check(
  source: str,
  usable: int,
  unusable: Sequence[dict[str, Any]],
  threshold: float,
  policy: str = "error",
) -> None:
  """Raises UserError if too many documents, or all, are unusable.

  Files of another type and repeated rows do not count among too many.

  Args:
    threshold: largest share of unusable documents.
    policy: with "skip", any share is allowed as long as one document is usable.
  """
  counted = [row for row in unusable if row["reason"] not in ("file_type", "duplicate")]
  within = len(counted) <= threshold * (usable + len(counted))
  if usable and (within or policy == "skip"):
    return
  if not unusable:
    raise errors.UserError(
      f"extract.documents: {source} holds no documents; give text in {_KINDS}"
    )
  first, *more = counted or unusable
  others = ", ".join(row["document"] for row in more[:4])
  raise errors.UserError(
    f"extract.documents: {source}: {first['document']}: {first['detail']}; "
    f"{len(more) + 1} of {usable + len(unusable)} documents are unusable"
    f"{f' (also {others})' if more else ''}: mend or delete them, raise "
    "data.reject_threshold, or set data.unusable=skip to set them aside"
  )


def unused(
  place: str, reason: str, detail: str, row_id: str | None = None
) -> dict[str, Any]:
  """The row of dropped.jsonl for a text that is no usable document."""
  row = {"what": "document", "reason": reason, "document": place, "detail": detail}
  return row if row_id is None else {**row, "id": row_id}


def _files(root: pathlib.Path) -> list[pathlib.Path]:
  if root.is_file():
    if root.suffix.lower() not in PLAIN and row_files.kind(root) is None:
      raise errors.UserError(
        f"extract.documents: {root}: unknown file type {root.suffix!r}; documents are "
        f"{_KINDS}"
      )
    return [root]
  if not root.is_dir():
    raise errors.UserError(
      f"extract.documents: {root}: no such file or folder (relative paths start at the "
      "folder the command runs in)"
    )
  paths = (p for p in root.rglob("*") if p.is_file())
  shown = [
    p for p in paths if not any(n.startswith(".") for n in p.relative_to(root).parts)
  ]
  return sorted(shown, key=lambda path: path.relative_to(root).as_posix())


def _read_file(
  path: pathlib.Path, name: str, text_field: str, domain: str
) -> Iterator[tuple[str, Document | Unusable]]:
  """Yields places, each with its document or the reason why it is unusable."""
  suffix = path.suffix.lower()
  try:
    if row_files.kind(path) is not None:
      yield from _read_rows(path, name, text_field, domain)
    elif suffix not in PLAIN:
      yield name, ("file_type", f"{suffix or 'no suffix'} is none of {_KINDS}")
    else:
      text = _decoded(path.read_bytes())
      if isinstance(text, str):
        yield name, Document(name, domain, text, suffix in MARKDOWN)
      else:
        yield name, text
  except OSError as error:
    yield name, ("unreadable", f"cannot be read ({error.strerror or error})")


def _decoded(data: bytes) -> str | tuple[str, str]:
  """The text of a file, or why it is unusable."""
  if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    return "encoding", "is UTF-16; save the file as UTF-8"
  if b"\0" in data:
    return "binary", "holds NUL bytes, so it is no text"
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    return "encoding", f"is not UTF-8 (byte {error.start + 1})"
  return _lines(text) if text.strip() else ("empty", "is empty")


def _read_rows(
  path: pathlib.Path, name: str, text_field: str, domain: str
) -> Iterator[tuple[str, Document | Unusable]]:
  try:
    for at, row in question_files.read_texts(path, text_field, ("id", "domain")):
      place = f"{name}:{at.line}"
      if isinstance(row, rejects.Reject):
        no_field = row.reason.startswith("has no ")
        reason = row.reason + ("; see extract.text_field" if no_field else "")
        yield place, ("bad_row", reason, row.place.id)
      else:
        text = _lines(row[text_field])
        derived = hashlib.sha256(text.encode()).hexdigest()[:16]
        yield (
          place,
          Document(row.get("id", derived), row.get("domain", domain), text),
        )
  except errors.UserError as error:
    yield name, ("unreadable", str(error))


def _lines(text: str) -> str:
  return text.replace("\r\n", "\n").replace("\r", "\n")


def cut(
  document: Document, chunk_tokens: int, count_tokens: Callable[[str], int]
) -> list[Chunk]:
  """The document in chunks of at most `chunk_tokens`, each as long as possible.

  A chunk ends at the end of a paragraph, or else of a sentence (Unicode Standard Annex
  29, which may take an abbreviation before a capital letter for an end). In Markdown, a
  heading begins a chunk. Only a sentence longer than `chunk_tokens` is cut, between
  words or else characters. Joined together, the chunks are the document.
  """
  kind = "MarkdownSplitter" if document.markdown else "TextSplitter"
  splitter = getattr(semantic_text_splitter, kind).from_callback(
    count_tokens, chunk_tokens, trim=False
  )
  return [
    Chunk(document, number, start, text)
    for number, (start, text) in enumerate(splitter.chunk_indices(document.text))
  ]
