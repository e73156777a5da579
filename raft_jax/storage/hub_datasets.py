"""Datasets of the Hugging Face hub: `hub://ORG/NAME[:CONFIG][/SPLIT][@REVISION]`.

A process looks a revision up once and reads that commit ever after. Rows are read
through the `datasets` library (extra `hub`), which caches them on disk.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.storage import arrow_rows, hub_errors, row_files

PREFIX = "hub://"
GRAMMAR = "hub://ORG/NAME[:CONFIG][/SPLIT][@REVISION]"
_ADDRESS = re.compile(
  r"hub://(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[^/@:]+))?(/(?P<split>\w+(\.\w+)*))?"
  r"(@(?P<revision>\S+))?"
)
LOGIN = (
  "accept its terms on the hub's page of the dataset, then log in by `hf auth login` "
  "or set HF_TOKEN"
)


class Address(NamedTuple):
  repo: str
  config: str | None
  split: str | None
  revision: str | None


class Resolved(NamedTuple):
  """A dataset of the hub at one commit; `name` is its address with that commit."""

  name: str
  commit: str
  dataset: Any


def is_address(text: str) -> bool:
  return text.startswith(PREFIX)


def parse(text: str) -> Address:
  """The parts of an address. Raises errors.UserError if it is none."""
  match = _ADDRESS.fullmatch(text)
  if match is None:
    raise errors.UserError(
      f"{text}: is no address of a dataset; write {GRAMMAR}, as in "
      "hub://HuggingFaceH4/ultrachat_200k/train_sft"
    )
  return Address(**{key: match[key] for key in Address._fields})


def without_revision(text: str) -> str:
  """An address without its revision; other texts as they are."""
  return text.partition("@")[0] if is_address(text) else text


def rows(text: str, fields: Sequence[str]) -> Iterator[tuple[int, row_files.Row]]:
  """Number and row of each row of a dataset, as `arrow_rows.parquet_rows`."""
  resolved = resolve(text)
  table = resolved.dataset.with_format("arrow")
  names = table.column_names
  columns = arrow_rows.usable_columns(resolved.name, names, fields)
  batches = (
    batch
    for part in table.select_columns(columns).iter(1000)
    for batch in part.to_batches()
  )
  return enumerate(arrow_rows.batch_rows(names, batches), start=1)


@functools.cache
def resolve(text: str) -> Resolved:
  """Downloads a dataset, or finds it in the cache.

  Raises:
    errors.UserError: there is no such dataset, config, split or revision, or it may not
      be read.
    errors.TryAgainError: the hub cannot be reached.
  """
  address = parse(text)
  try:
    import datasets
  except ImportError as e:
    raise errors.UserError(
      f"{text}: a dataset of the hub needs the extra `hub`; run {errors.install('hub')}"
    ) from e
  commit = _commit(text, address)
  config = _config(text, address, commit)
  with _clear_errors(text):
    builder = datasets.load_dataset_builder(address.repo, config, revision=commit)
    # Without the hub the library would read any older copy that it has.
    if commit not in str(builder.base_path):
      raise errors.TryAgainError(
        f"{text}: the hub could not be reached for commit {commit}; try again"
      )
    builder.download_and_prepare()
    splits = list(builder.info.splits or {})
    split = address.split
    if split is None and len(splits) == 1:
      split = splits[0]
    if split not in splits:
      what = "names no split" if split is None else f"has no split {split!r}"
      raise errors.UserError(
        f"{text}: {what}; those of the dataset are {', '.join(splits)}: write "
        f"{_written(address._replace(split=splits[0] if splits else 'train'))}"
      )
    dataset = builder.as_dataset(split=split)
  name = _written(Address(address.repo, address.config, split, commit[:12]))
  return Resolved(name, commit, dataset)


def _written(address: Address) -> str:
  repo, config, split, revision = address
  return (
    f"{PREFIX}{repo}{f':{config}' if config else ''}{f'/{split}' if split else ''}"
    f"{f'@{revision}' if revision else ''}"
  )


def _commit(text: str, address: Address) -> str:
  """The commit of the revision, after checking that the dataset may be read."""
  import huggingface_hub

  revision = address.revision or "main"
  with _clear_errors(text):
    api = huggingface_hub.HfApi()
    api.auth_check(address.repo, repo_type="dataset")
    return str(api.dataset_info(address.repo, revision=revision).sha)


def _config(text: str, address: Address, commit: str) -> str | None:
  """The config to read, after checking that it exists."""
  import datasets

  with _clear_errors(text):
    configs = datasets.get_dataset_config_names(address.repo, revision=commit)
  if address.config in configs:
    return address.config
  if address.config is None and ("default" in configs or len(configs) == 1):
    return None
  what = "names no config"
  if address.config is not None:
    what = f"has no config {address.config!r}"
  raise errors.UserError(
    f"{text}: {what}; those of the dataset are {', '.join(configs)}: write "
    f"{_written(address._replace(config=configs[0] if configs else None))}"
  )


@contextlib.contextmanager
def _clear_errors(text: str) -> Iterator[None]:
  """Turns the libraries' errors into one line that says what to do."""
  from huggingface_hub import errors as raised

  try:
    yield
  except errors.UserError:
    raise
  except raised.GatedRepoError as e:
    raise errors.UserError(f"{text}: the dataset is gated; {LOGIN}") from e
  except raised.RevisionNotFoundError as e:
    raise errors.UserError(
      f"{text}: the dataset has no such revision; name a branch, a tag or a commit"
    ) from e
  except raised.RepositoryNotFoundError as e:
    raise errors.UserError(
      f"{text}: no such dataset, or it is private; check the name, or log in by "
      "`hf auth login` or HF_TOKEN"
    ) from e
  except raised.OfflineModeIsEnabled as e:
    raise errors.UserError(
      f"{text}: HF_HUB_OFFLINE is set, and a dataset's commit is looked up online; "
      "unset it, or save the dataset by `save_to_disk` and name its folder"
    ) from e
  except raised.HfHubHTTPError as e:
    status = getattr(e.response, "status_code", 0)
    kind = errors.TryAgainError if hub_errors.is_temporary(status) else errors.UserError
    raise kind(f"{text}: the hub refused ({_reason(e)}); try again later") from e
  except Exception as e:
    if _is_of_the_network(e):
      raise errors.TryAgainError(
        f"{text}: the hub cannot be reached ({_reason(e)}); try again"
      ) from e
    if not isinstance(e, (OSError, ValueError, RuntimeError, _datasets_error())):
      raise
    raise errors.UserError(
      f"{text}: cannot be read ({_reason(e)}); check the name, or download its files "
      "and name them"
    ) from e


def _is_of_the_network(error: Exception) -> bool:
  """Whether it is an error of a connection, of Python's or of the HTTP library."""
  library = type(error).__module__.partition(".")[0]
  return isinstance(error, ConnectionError) or library.startswith("http")


def _datasets_error() -> type[Exception]:
  import datasets

  return datasets.exceptions.DatasetsError


def _reason(error: BaseException) -> str:
  """The first line of an error, and of the error behind it."""
  lines = [hub_errors.line(e) for e in (error, error.__cause__) if e]
  return ": ".join(line.rstrip(".") for line in lines if line) or repr(error)
