"""Where rows come from: a file, a folder or glob of files, a saved dataset, or the hub.

An address is one of

- a file of rows (`row_files`), a folder of such files, or a glob (`data/train-*.csv`);
- a folder that `datasets.Dataset.save_to_disk` wrote;
- `hub://ORG/NAME[:CONFIG][/SPLIT][@REVISION]`: a dataset of the Hugging Face hub.
"""

from __future__ import annotations

import glob
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from raft_jax import errors
from raft_jax.storage import arrow_rows, hub_datasets, row_files

_SPLIT_NAME = re.compile(
  r"(?:^|[^a-z])(train|test|valid(?:ation)?|val|dev|eval)(?:[^a-z]|$)"
)


class Part(NamedTuple):
  """A file of a source, or a whole dataset; `name` stands in places of rows.

  Attributes:
    kind: "file", "saved" (a folder of `save_to_disk`) or "hub".
  """

  name: str
  kind: str


def parts(address: str | os.PathLike[str]) -> list[Part]:
  """The files of an address, sorted by name. Reads no rows, and nothing of the hub.

  Raises:
    errors.UserError: there is no such file, or it cannot be told which are meant.
  """
  text = os.fspath(address)
  if hub_datasets.is_address(text):
    hub_datasets.parse(text)
    return [Part(text, "hub")]
  path = pathlib.Path(text)
  try:
    if path.is_dir():
      return _folder_parts(path)
    if not path.exists() and glob.has_magic(text):
      return _glob_parts(text)
    if path.is_file():
      return [Part(str(path), "file")]
  except (OSError, ValueError) as e:
    reason = getattr(e, "strerror", None) or e
    raise errors.UserError(f"{text}: cannot read: {reason}") from e
  raise errors.UserError(
    f"{path}: no such file; {row_files.USABLE}, and folders, globs and hub://ORG/NAME "
    "(relative paths start at the folder the command runs in)"
  )


def _folder_parts(folder: pathlib.Path) -> list[Part]:
  if (folder / "dataset_dict.json").is_file():
    splits = sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file())
    raise errors.UserError(
      f"{folder}: holds the splits {', '.join(splits) or '(none)'} of a dataset; name "
      f"one of them, as in {folder / (splits or ['train'])[0]}"
    )
  if (folder / "state.json").is_file():
    return [Part(str(folder), "saved")]
  files = sorted(p for p in folder.iterdir() if p.is_file() and _is_rows(p))
  if not files:
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir())
    hint = f"; it has the folders {', '.join(inside[:5])}" if inside else ""
    raise errors.UserError(
      f"{folder}: is a folder without files of rows{hint}; {row_files.USABLE}"
    )
  files_by_split = {
    m[1]: p.name for p in files if (m := _SPLIT_NAME.search(p.name.lower()))
  }
  if len(files_by_split) > 1:
    named = ", ".join(files_by_split.values())
    raise errors.UserError(
      f"{folder}: holds files of several splits ({named}); name a file, or a glob such "
      f"as {folder}/{next(iter(files_by_split))}*"
    )
  return [Part(str(p), "file") for p in files]


def _glob_parts(pattern: str) -> list[Part]:
  paths = sorted(
    path
    for path in map(pathlib.Path, glob.glob(pattern, recursive=True))
    if path.is_file()
  )
  if not paths:
    raise errors.UserError(
      f"{pattern}: no file matches (relative paths start at the folder the command "
      "runs in)"
    )
  other = next((path for path in paths if not _is_rows(path)), None)
  if other is not None:
    raise errors.UserError(
      f"{pattern}: matches {other}, which holds no rows by its name; {row_files.USABLE}"
    )
  return [Part(str(path), "file") for path in paths]


def _is_rows(path: pathlib.Path) -> bool:
  return not path.name.startswith(".") and row_files.kind(path) is not None


def is_present(address: str) -> bool:
  """Whether a file, a folder, or a file of a glob is there, or the hub is named."""
  if hub_datasets.is_address(address):
    return True
  if pathlib.Path(address).exists():
    return True
  return glob.has_magic(address) and bool(glob.glob(address, recursive=True))


def on_disk(address: str) -> bool:
  """Whether an address can be read without the hub."""
  return is_present(address) and not hub_datasets.is_address(address)


def problem(address: str) -> str | None:
  """Why an address names nothing that can be read, or None; reads no rows."""
  try:
    for part in parts(address):
      path = pathlib.Path(part.name)
      if part.kind == "file" and row_files.kind(path) is None:
        return f"{path}: unknown file type {path.suffix!r}; {row_files.USABLE}"
  except errors.UserError as error:
    return str(error)
  return None


def shared(first: str, second: str) -> str | None:
  """A file or dataset that both addresses name, or None."""
  names = []
  for address in (first, second):
    try:
      names.append({_canonical(part) for part in parts(address)})
    except errors.UserError:  # reported elsewhere
      return None
  return min(names[0] & names[1], default=None)


def _canonical(part: Part) -> str:
  return part.name if part.kind == "hub" else os.path.realpath(part.name)


def part_name(part: Part) -> str:
  """The name of a part in places of rows; of the hub with the commit."""
  return hub_datasets.resolve(part.name).name if part.kind == "hub" else part.name


def part_rows(part: Part, fields: Sequence[str]) -> Iterator[tuple[int, row_files.Row]]:
  """Each row of a part with its line or number.

  Args:
    fields: columns to read where columns are stored apart; of other columns only the
      names are kept.

  Raises:
    errors.UserError: the part cannot be read or has another format.
  """
  if part.kind == "hub":
    return hub_datasets.rows(part.name, fields)
  path = pathlib.Path(part.name)
  if part.kind == "saved":
    return arrow_rows.saved_rows(path, fields)
  if row_files.suffix_of(path) == ".parquet":
    return arrow_rows.parquet_rows(path, fields)
  return row_files.rows(path)


def revisions(*addresses: str | None) -> dict[str, str]:
  """The commit of each dataset of the hub, by its address without a revision."""
  return {
    hub_datasets.without_revision(address): hub_datasets.resolve(address).commit
    for address in addresses
    if address is not None and hub_datasets.is_address(address)
  }
