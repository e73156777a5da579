"""The safetensors files of a model's folder: which they are, and what is in them.

A folder holds `model.safetensors`, or shards and their index. A folder with two sets of
weights is refused, and the error names both. Like transformers, we ignore other files:
`consolidated*.safetensors` (Mistral's own layout) and variants such as
`model.fp16.safetensors`.
"""

from __future__ import annotations

import functools
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors

from raft_jax import errors
from raft_jax.hf import tensor_layout

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
  "pickle weights are never opened; convert them where you trust them: `python -c "
  "\"import transformers as t; t.AutoModelForCausalLM.from_pretrained('IN')"
  ".save_pretrained('OUT')\"`"
)
_PART = re.compile(r"model-\d+-of-\d+\.safetensors")
_VARIANT = re.compile(r"model\.[\w-]+\.safetensors(\.index\.json)?")
_LFS = b"version https://git-lfs"

Shards = Mapping[str, set[str] | None]
"""Weight files and the tensors that each should hold; None for any tensors."""


# --- Which files ----------------------------------------------------------------------


def shards(folder: pathlib.Path, index: Mapping[str, Any] | None) -> Shards:
  """The files that make up the weights of a folder.

  Args:
    index: the content of `model.safetensors.index.json`; None if there is no such file.

  Raises:
    UserError: there are no weights, more than one set of them, or files and index do
      not belong together; the files are named.
  """
  files = {path.name for path in folder.iterdir() if path.is_file()}
  parts = sorted(filter(_PART.fullmatch, files))
  listed = None if index is None else _listed(folder / INDEX, index)
  if listed is None and SINGLE not in files:
    raise errors.UserError(f"{folder}: no {SINGLE}; {_instead(folder, files, parts)}")
  if "adapter_config.json" in files:
    raise errors.UserError(
      f"{folder}: holds a LoRA adapter (adapter_config.json) beside the model's own "
      f"weights ({SINGLE if listed is None else INDEX}); move one of them away, or "
      "merge the adapter (peft's merge_and_unload)"
    )
  expected: Shards = {SINGLE: None} if listed is None else listed
  missing = sorted(file for file in expected if file not in files)
  if listed is not None and SINGLE in files and SINGLE not in listed:
    state = f", whose {_some(missing)} is missing" if missing else ""
    _refuse_two(folder, SINGLE, INDEX + state)
  if missing:
    raise errors.UserError(
      f"{folder / INDEX}: missing shard {_some(missing)}; fetch the model again"
    )
  # A shard of the same set that is not in the index is read, too: `tensors` reports it.
  counts = {file.partition("-of-")[2] for file in listed or () if file != SINGLE}
  unlisted = {p for p in parts if p.partition("-of-")[2] in counts} - expected.keys()
  second = [part for part in parts if part not in expected and part not in unlisted]
  if second:
    _refuse_two(folder, SINGLE if listed is None else INDEX, _some(second))
  _report_variants(folder, tuple(sorted(filter(_VARIANT.fullmatch, files - {INDEX}))))
  return {**expected, **{part: set() for part in unlisted}}


def _listed(path: pathlib.Path, index: Mapping[str, Any]) -> dict[str, set[str]]:
  weight_map = index.get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise errors.UserError(
      f"{path}: missing shard (the index is empty): it has no weight_map of tensors "
      "and their files; fetch it again"
    )
  listed: dict[str, set[str]] = {}
  for name, file in weight_map.items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise errors.UserError(f"{path}: {file!r} is not a file name; fetch it again")
    listed.setdefault(file, set()).add(name)
  return listed


def _refuse_two(folder: pathlib.Path, first: str, second: str) -> None:
  raise errors.UserError(
    f"{folder}: holds two sets of weights, {first} and {second}; move away the one "
    "that you do not want"
  )


@functools.cache
def _report_variants(folder: pathlib.Path, names: tuple[str, ...]) -> None:
  if names:
    print(
      f"{folder}: {_some(names)} is another variant of the weights and is not read",
      file=sys.stderr,
    )


def _instead(folder: pathlib.Path, files: set[str], parts: Sequence[str]) -> str:
  """What a folder without readable weights holds instead, and what to do."""

  def matching(pattern: str) -> list[str]:
    return sorted(name for name in files if re.fullmatch(pattern, name, re.IGNORECASE))

  single = folder / SINGLE
  if single.is_symlink():
    return f"it is a link to {single.readlink()}, which is not there; fetch it again"
  if single.is_dir():
    return "it is a folder; the weights are a file"
  if parts:
    return f"{_some(parts)} need their {INDEX}; fetch it too"
  if matching(r"adapter_model\.(safetensors|bin)"):
    return (
      "it is a LoRA adapter; merge it into its base model (peft's merge_and_unload), "
      "and name the merged folder"
    )
  if matching(r"consolidated.*\.safetensors"):
    return (
      "consolidated.safetensors is Mistral's own layout; fetch the model's Hugging "
      "Face files"
    )
  if named := matching(re.escape(SINGLE)) + matching(_VARIANT.pattern):
    return f"rename {named[0]} to it if those are the weights you want"
  if named := matching(r".*\.safetensors"):
    return f"{_some(named)} is another file; name a folder that has one"
  if named := matching(r".*\.gguf"):
    return f"name the GGUF file itself: {' or '.join(str(folder / n) for n in named)}"
  pickles = sorted(n for n in files if pathlib.PurePath(n).suffix.lower() in PICKLES)
  return f"only {pickles[0]}: {CONVERT}" if pickles else "name a folder that has one"


def _some(names: Sequence[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


# --- What is in them ------------------------------------------------------------------


def tensors(folder: pathlib.Path, files: Shards) -> dict[str, tensor_layout.Stored]:
  """The tensors by name, from the headers alone.

  Raises:
    UserError: a file is damaged, or holds other tensors than the index lists; both
      files are named.
  """
  stored: dict[str, tensor_layout.Stored] = {}
  holders: dict[str, str] = {}
  for file in files:
    for name, tensor in _open(folder / file):
      if name in holders:
        raise errors.UserError(
          f"{folder}: {holders[name]} and {file} both hold {name}; fetch the model "
          "again"
        )
      holders[name], stored[name] = file, tensor
  listed = {n: file for file, names in files.items() for n in names or ()}
  for name in sorted(listed.keys() | holders.keys()) if listed else ():
    expected, holder = listed.get(name), holders.get(name)
    if expected != holder and not (expected is None and is_buffer(name, stored[name])):
      raise errors.UserError(
        f"{folder / str(holder or expected)}: the index and this file disagree on "
        f"{name}: {INDEX} lists it {f'in {expected}' if expected else 'nowhere'}, and "
        f"{f'{holder} holds it' if holder else 'no file holds it'}; fetch both again"
      )
  return stored


def _open(path: pathlib.Path) -> Iterator[tuple[str, tensor_layout.Stored]]:
  try:
    with path.open("rb") as file:
      pointer = file.read(len(_LFS)) == _LFS
    if pointer:
      raise errors.UserError(
        f"{path}: is a Git LFS pointer and not the weights; run `git lfs pull` there"
      )
    handle = safetensors.safe_open(path, framework="numpy")
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.UserError(
      f"{path}: damaged or truncated safetensors file ({error}); fetch it again"
    ) from error
  for name in handle.keys():  # noqa: SIM118 (it is not a mapping)
    piece = handle.get_slice(name)
    read = functools.partial(_read, path, name)
    shape = tuple(piece.get_shape())
    yield name, tensor_layout.Stored(shape, read, str(piece.get_dtype()))


def _read(file: pathlib.Path, name: str, index: tensor_layout.Index) -> np.ndarray:
  # We open the file for each read: what an open file has read stays in memory.
  with safetensors.safe_open(file, framework="numpy") as handle:
    return handle.get_slice(name)[index]


# --- Tensors that are not parameters --------------------------------------------------


_BUFFER = re.compile(
  r"(.*\.)?(rotary\w*\.\w*(inv_freq|cos_cached|sin_cached)|position_ids"
  r"|embed_tokens\.embed_scale)"
)
_MASK = re.compile(r"(.*\.)?(\w*attn|attention)\.(bias|masked_bias|causal_mask)")


def is_buffer(name: str, tensor: tensor_layout.Stored) -> bool:
  """Whether a tensor holds what a model can compute by itself: positions, masks."""
  if _MASK.fullmatch(name):  # the bias of a projection has one axis and is a float
    is_mask = len(tensor.shape) != 1 or tensor.shape == (1,)
    return is_mask or tensor.dtype in ("BOOL", "U8")
  return bool(_BUFFER.fullmatch(name))


class Kind(NamedTuple):
  """A kind of tensors that no supported model has, and what to do about them."""

  description: str
  names: re.Pattern[str]
  remedy: str


QUANTISED = "quantised weights cannot be trained; use the unquantised checkpoint"
_MULTIMODAL = Kind(
  "parts of a multimodal model",
  re.compile(
    r"(.*\.)?(vision\w*|visual|audio\w*|image_newline|\w*projector|language_model)"
    r"(\..*)?"
  ),
  "use a model of text alone",
)
_KINDS = (
  Kind(
    "optimizer state",
    re.compile(r"(.*\.)?(exp_avg(_sq)?|momentum_buffer|optimizer\..*|state\.\d+\..*)"),
    "use the model's own weights",
  ),
  Kind(
    "LoRA adapters",
    re.compile(r".*(lora_|\.base_layer\.|base_model\.model\.|modules_to_save).*"),
    "merge the adapter into its base model (peft's merge_and_unload)",
  ),
  Kind(
    "quantised weights",
    re.compile(
      r".*[._](qweight|qzeros|scales|biases|g_idx|absmax|quant_map|quant_state\..*|SCB"
      r"|weight_(scale|scale_inv|packed|shape|zero_point|format)|input_scale"
      r"|zero_point)"
    ),
    QUANTISED,
  ),
  _MULTIMODAL,
  Kind(
    "a mixture of experts",
    re.compile(r".*\.(experts|block_sparse_moe|router|shared_expert)\..*"),
    "use a dense model",
  ),
)
_UNKNOWN = "unexpected tensors"


def unexpected(
  stored: Mapping[str, tensor_layout.Stored],
  names: Iterable[str],
  *,
  wrapped: bool = False,
) -> tuple[dict[str, list[str]], str | None]:
  """The tensors that a model does not have, by kind, and a remedy for the first.

  Args:
    wrapped: whether they are inside the text tower of a multimodal model.
  """
  kinds = [kind for kind in _KINDS if not wrapped or kind is not _MULTIMODAL]
  by_kind: dict[str, list[str]] = {}
  remedy = None
  for name in names:
    kind = next((kind for kind in kinds if kind.names.fullmatch(name)), None)
    shown = name if kind else f"{name} ({stored[name].dtype})"
    by_kind.setdefault(kind.description if kind else _UNKNOWN, []).append(shown)
    remedy = remedy or (kind.remedy if kind else None)
  return by_kind, remedy
