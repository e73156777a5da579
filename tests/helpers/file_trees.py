"""Folders of small files, written and read as a whole."""

import pathlib
from collections.abc import Mapping


def write(folder: pathlib.Path, files: Mapping[str, str | bytes]) -> pathlib.Path:
  """Writes files by their paths in the folder; texts in UTF-8. Returns the folder."""
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
  return folder


def read(folder: pathlib.Path) -> dict[str, bytes]:
  """The contents of all files, by their paths in the folder."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
