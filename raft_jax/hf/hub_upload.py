"""Upload of an exported folder to a repository of the Hugging Face hub.

The token is that of `hf auth login` or of the environment (HF_TOKEN), as for every
program of the hub. It is never in a config, a message or a file of ours. All files come
in one commit, so that nobody loads half a model. The hub keeps what an interrupted
upload has sent, so that running it again sends the rest.
"""

from __future__ import annotations

import contextlib
import fnmatch
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from raft_jax import errors
from raft_jax.hf import save
from raft_jax.storage import hub_errors

if TYPE_CHECKING:
  import huggingface_hub

TAG = "raft_jax"
"""The tag in a model card that marks a repository as an earlier export's."""
REPLACED = (
  *("*.safetensors", "*.safetensors.index.json", "*.jinja"),
  *("config.json", "generation_config.json", "adapter_config.json"),
  *save.TOKENIZER_FILES,
  *save.PROCESSOR_FILES,
)
"""Files of an earlier export that are deleted where this one has none of the name."""


def check(repo: str, *, public: bool) -> None:
  """Checks that the token may write to the repository, before anything heavy.

  Raises:
    UserError: there is no token, it is not valid or may not write there, or the
      repository is another's. TryAgainError if the hub cannot be reached.
  """
  import huggingface_hub
  from huggingface_hub import constants

  place = f"export.push={repo}"
  if constants.HF_HUB_OFFLINE:
    raise errors.UserError(
      f"{place}: HF_HUB_OFFLINE is set, and the upload needs the hub; unset it, or "
      "delete `export.push`"
    )
  if huggingface_hub.get_token() is None:
    raise errors.UserError(
      f"{place}: there is no token for the hub; run `hf auth login`, or set "
      "HF_TOKEN in the environment to a token with write access"
    )
  api = huggingface_hub.HfApi()
  with _explained(repo):
    account = api.whoami()
    _check_account(repo, account)
    _check_repo(repo, _info(api, repo), public=public)


def _check_account(repo: str, account: dict[str, Any]) -> None:
  place, owner = f"export.push={repo}", repo.split("/")[0]
  names = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
  if owner.lower() not in [name.lower() for name in names]:
    raise errors.UserError(
      f"{place}: {owner!r} is another's; the token may write to "
      f"{', '.join(f'{name}/...' for name in names)}"
    )
  role = account.get("auth", {}).get("accessToken", {}).get("role")
  if role == "read":
    raise errors.UserError(
      f"{place}: the token may only read; make one with write access and run `hf auth "
      "login`, or set HF_TOKEN to it"
    )


def _info(
  api: huggingface_hub.HfApi, repo: str
) -> huggingface_hub.hf_api.ModelInfo | None:
  from huggingface_hub import errors as raised

  try:
    return api.model_info(repo)
  except raised.RepositoryNotFoundError:
    return None


def _check_repo(
  repo: str, info: huggingface_hub.hf_api.ModelInfo | None, *, public: bool
) -> None:
  if info is None:
    return
  place = f"export.push={repo}"
  if not (public or info.private):
    raise errors.UserError(
      f"{place}: the repository is there and is public; set export.public=true, or "
      "choose another name"
    )
  if _files(info) - {".gitattributes"} and TAG not in (info.tags or ()):
    raise errors.UserError(
      f"{place}: the repository holds files that are not an earlier export; choose "
      "another name"
    )


def _files(info: huggingface_hub.hf_api.ModelInfo) -> set[str]:
  return {sibling.rfilename for sibling in info.siblings or ()}


def push(folder: pathlib.Path, repo: str, *, public: bool, message: str) -> str:
  """Makes the folder the content of the repository; returns the commit's address.

  Args:
    public: of a repository that is created; one that is there stays as it is.
    message: of the commit.

  Raises:
    UserError: as for `check`.
  """
  import huggingface_hub

  api = huggingface_hub.HfApi()
  with _explained(repo):
    info = _info(api, repo)
    _check_repo(repo, info, public=public)
    if info is None:
      api.create_repo(repo, private=not public, exist_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    stale = sorted(_files(info) - files.keys() if info is not None else ())
    commit = api.create_commit(
      repo,
      [
        *(
          huggingface_hub.CommitOperationDelete(name)
          for name in stale
          if any(fnmatch.fnmatch(name, pattern) for pattern in REPLACED)
        ),
        *(
          huggingface_hub.CommitOperationAdd(name, path) for name, path in files.items()
        ),
      ],
      commit_message=message,
    )
  return str(commit.commit_url)


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
  """Turns what the hub's library raises into one line about the repository."""
  from huggingface_hub import errors as raised

  try:
    yield
  except errors.UserError:
    raise
  except (raised.HTTPError, OSError, ValueError, RuntimeError) as error:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, raised.HTTPError):
      cause = cause.__cause__
    if isinstance(cause, raised.HfHubHTTPError):
      raise _refusal(repo, cause) from error
    if cause is None and isinstance(error, ValueError):
      raise errors.UserError(f"export.push={repo}: {_line(error)}") from error
    raise errors.TryAgainError(
      f"export.push={repo}: the upload did not get through ({_line(cause or error)}); "
      "check the network, then run the same command again: it sends what is missing"
    ) from error


def _refusal(repo: str, error: Any) -> errors.UserError:
  """The hub's answer to a request as one line."""
  status = error.response.status_code
  said = f" ({error.server_message})" if error.server_message else ""
  said = said.splitlines()[0][:300] if said else ""
  place = f"export.push={repo}: the hub answers {status}{said}"
  if status == 409 or hub_errors.is_temporary(status):
    return errors.TryAgainError(f"{place}; run the same command again")
  if status == 401:
    return errors.UserError(
      f"{place}: it does not accept the token; run `hf auth login`, or set HF_TOKEN "
      "to a valid one"
    )
  if status in (403, 404):
    return errors.UserError(
      f"{place}: the token may not write there; use a token with write access to "
      f"{repo.split('/')[0]}, or choose another name"
    )
  return errors.UserError(f"{place}; correct that, then run the same command again")


def _line(error: BaseException) -> str:
  """The kind of an error, and its first line."""
  return f"{type(error).__name__}: {hub_errors.line(error)}"
