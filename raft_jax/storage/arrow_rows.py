"""Rows of Parquet files and of saved datasets, whatever their fields mean.

A row is converted when `row_files.values` is called with it.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from raft_jax import errors
from raft_jax.storage import row_files


def parquet_rows(
  path: pathlib.Path, fields: Sequence[str]
) -> Iterator[tuple[int, row_files.Row]]:
  """Number and row of each row of a Parquet file.

  Args:
    fields: columns to read; of other columns only the names are kept.

  Raises:
    errors.UserError: the file cannot be read.
  """
  import pyarrow  # a third of a second that JSONL users need not pay
  from pyarrow import parquet

  if row_files.kind(path) != (".parquet", ""):
    raise errors.UserError(
      f"{path}: a Parquet file compresses its own columns and is not read through "
      f"{path.suffix}; uncompress it"
    )
  try:
    file = parquet.ParquetFile(path)
    columns = usable_columns(str(path), file.schema_arrow.names, fields)
    batches = file.iter_batches(columns=columns)
    yield from enumerate(batch_rows(file.schema_arrow.names, batches), start=1)
  except pyarrow.ArrowException as e:
    reason = str(e).splitlines()[0]
    raise errors.UserError(
      f"{path}: not a readable Parquet file ({reason}); write it again"
    ) from e
  except OSError as e:
    raise errors.UserError(f"{path}: cannot read: {e.strerror or e}") from e


def usable_columns(path: str, names: Sequence[str], fields: Sequence[str]) -> list[str]:
  """The columns that are among `fields`.

  Raises:
    errors.UserError: two of them have one name.
  """
  columns = [name for name in names if name in fields]
  twice = next((name for name in columns if columns.count(name) > 1), None)
  if twice is not None:
    raise errors.UserError(f"{path}: two columns are named {twice!r}; keep one")
  return columns


def batch_rows(names: Sequence[str], batches: Iterable[Any]) -> Iterator[row_files.Row]:
  """The rows of Arrow record batches.

  Args:
    names: all columns. Those that no batch holds are not read; their names serve as
      suggestions where a field is missing.
  """
  for batch in batches:
    others = {name: True for name in names if name not in batch.schema.names}
    for i in range(batch.num_rows):
      yield functools.partial(_cells, batch, i, others)


def _cells(batch: Any, i: int, others: Mapping[str, Any]) -> dict[str, Any]:
  try:
    return {
      **others,
      **{
        field.name: _decoded(batch.column(field.name)[i].as_py(), field.type)
        for field in batch.schema
      },
    }
  except UnicodeDecodeError as e:
    raise row_files.Fault("is not UTF-8") from e
  except (ValueError, OverflowError) as e:
    raise row_files.Fault(f"cannot be read: {str(e).splitlines()[0]}") from e


def _decoded(value: Any, arrow_type: Any) -> Any:
  """A value of Arrow, in which objects have no null fields and JSON texts are values.

  All rows of a column have the same fields: those that a row did not have are null.
  `datasets` keeps columns of mixed types as JSON texts.
  """
  from pyarrow import types

  if value is None:
    return None
  if types.is_struct(arrow_type):
    fields = [arrow_type.field(i) for i in range(arrow_type.num_fields)]
    present = [field for field in fields if value[field.name] is not None]
    return {field.name: _decoded(value[field.name], field.type) for field in present}
  if types.is_list(arrow_type) or types.is_large_list(arrow_type):
    return [_decoded(item, arrow_type.value_type) for item in value]
  if getattr(arrow_type, "extension_name", "") == "arrow.json":
    return row_files.parse_json(value)
  return value


def saved_rows(
  folder: pathlib.Path, fields: Sequence[str]
) -> Iterator[tuple[int, row_files.Row]]:
  """Number and row of each row of a dataset that `save_to_disk` wrote."""
  return enumerate(_saved_rows(folder, fields), start=1)


def _saved_rows(folder: pathlib.Path, fields: Sequence[str]) -> Iterator[row_files.Row]:
  """The rows of the Arrow streams that state.json names, in its order."""
  import pyarrow

  try:
    state: Any = json.loads((folder / "state.json").read_text("utf-8"))
    names = [str(item["filename"]) for item in state["_data_files"]]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"{folder}: its state.json is damaged ({e}); save the dataset again"
    ) from e
  for name in names:
    path = folder / name
    try:
      with pyarrow.memory_map(str(path)) as source:
        stream = pyarrow.ipc.open_stream(source)
        columns = usable_columns(str(folder), stream.schema.names, fields)
        batches = (batch.select(columns) for batch in stream)
        yield from batch_rows(stream.schema.names, batches)
    except (OSError, pyarrow.ArrowException) as e:
      reason = str(e).splitlines()[0]
      raise errors.UserError(
        f"{path}: not a readable Arrow file ({reason}); save the dataset again"
      ) from e
