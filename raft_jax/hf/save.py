"""Export of models and adapters to folders that transformers, vLLM and PEFT load."""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

import raft_jax
from raft_jax import errors
from raft_jax.hf import (
  carried_tensors,
  decoder_config,
  export_folder,
  family_row,
  model_source,
  peft_adapter,
  tensor_layout,
  wrappers,
)
from raft_jax.hf import load as hf_load
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.runtime import interrupts

if TYPE_CHECKING:
  import transformers

  from raft_jax.models import transformer

TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
)
PROCESSOR_FILES = (
  "processor_config.json",
  "preprocessor_config.json",
  "video_preprocessor_config.json",
  "audio_tokenizer_config.json",
)
"""What a model with a text tower has beside a tokenizer, for images and sound."""
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
MARK = "raft_jax_version"
"""The key that marks a folder as an earlier export."""
METADATA = {"format": "pt", MARK: raft_jax.__version__}
"""Of every safetensors file that is written."""
ADAPTER_FILE = "adapter_model.safetensors"
T = TypeVar("T")


def save(
  folder: str | os.PathLike[str],
  params: transformer.Params,
  config: transformer.DecoderConfig,
  source: str,
  *,
  dtype: str = "float32",
  template: str | None = None,
  thinking: bool = False,
  card: str,
  overwrite: bool = False,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers and vLLM load: weights, config, tokenizer, card.

  The files are written into a temporary folder beside the target. Each tensor is read
  back and compared bit for bit, and all files are synced to disk; then the folder gets
  its name. The config and the tokenizer are the source's; a folder's tokenizer files
  are copied byte for byte. Of a model with a text tower, the whole model is written:
  its other tensors and its processor's files are copied byte for byte, too.

  Args:
    folder: the target. One that exists and is not empty is refused, except with
      `overwrite` if an earlier `save` made it.
    params: tree as `transformer.shapes(config)`.
    source: of the model, as for `model_source.resolve`.
    dtype: of the written weights; tensors outside a text tower keep their own.
    template: which chat template, as in `model.chat_template`. If the source's files
      would give another one, it replaces all templates of theirs.
    thinking: whether the model was trained with thinking on. Otherwise the written
      template leaves no thinking part open.
    card: content of README.md.

  Raises:
    UserError: the target is taken, the disk is full, or a parameter is not finite.
  """
  target = pathlib.Path(folder).expanduser().absolute()
  export_folder.check_target(target, overwrite, _wrote_model)
  if hf_load.load_config(source) != config:
    raise ValueError(f"the config is not that of {source}")
  path = model_source.resolve(source)
  fields = hf_load.fields(path)
  tokenizer = hf_tokenizer.load(source, template, thinking=thinking)
  family = decoder_config.find_family(fields, source)
  leaves = traverse_util.flatten_dict(params, sep="/")
  plan = _plan_files(path, family, config, leaves, dtype, max_shard_bytes)
  with export_folder.replacing(
    target, plan.size, overwrite=overwrite, ours=_wrote_model
  ) as temporary:
    _write_weights(temporary, leaves, plan)
    exported = wrappers.exported_fields(
      fields, family, dtype=dtype, tied=config.tie_embeddings
    )
    _write_config(temporary, exported, config, dtype)
    ends = hf_tokenizer.eos_ids(source, tokenizer)
    _write_generation_config(temporary, path, tokenizer, ends, config.vocab_size)
    _write_tokenizer(temporary, path, tokenizer)
    if family.wrapped:
      _copy_files(temporary, path, PROCESSOR_FILES)
    changed = hf_tokenizer.changed_template(source, template, thinking=thinking)
    if changed is not None:
      _write_template(temporary, changed)
    (temporary / "README.md").write_text(card, encoding="utf-8")


def save_adapter(
  folder: str | os.PathLike[str],
  adapters: Mapping[str, Mapping[str, Any]],
  config: transformer.DecoderConfig,
  source: str,
  *,
  rank: int,
  alpha: float,
  base_name: str | None,
  template: str | None = None,
  card: str,
  overwrite: bool = False,
) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained` applies to the base model.

  The files are written, compared and renamed as by `save`.

  Args:
    folder: the target, as for `save`.
    adapters: kernel -> {"a", "b"}, from `lora`.
    config: of the base model.
    source: the base model, as for `model_source.resolve`.
    base_name: the base model's name in the adapter's config.
    template: the chat template to write beside it; None for the base model's own.
    card: content of README.md.

  Raises:
    UserError: the target is taken, the disk is full, or a parameter is not finite.
  """
  target = pathlib.Path(folder).expanduser().absolute()
  export_folder.check_target(target, overwrite, _wrote_adapter)
  for path, leaf in traverse_util.flatten_dict(adapters, sep="/").items():
    _check_finite(f"lora/{path}", np.asarray(leaf))
  family = hf_load.family(source)
  tensors = dict(peft_adapter.tensors(family, config, adapters))
  adapter_config = peft_adapter.config(family, tuple(adapters), rank=rank, alpha=alpha)
  adapter_config["base_model_name_or_path"] = base_name
  need = sum(tensor.nbytes for tensor in tensors.values())
  with export_folder.replacing(
    target, need, overwrite=overwrite, ours=_wrote_adapter
  ) as temporary:
    _write_tensors(temporary / ADAPTER_FILE, tensors)
    _write_json(temporary / "adapter_config.json", adapter_config)
    if template is not None:
      (temporary / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    (temporary / "README.md").write_text(card, encoding="utf-8")


class Plan(NamedTuple):
  """The files of an exported model's weights.

  Attributes:
    trained: files of our parameters; `carried`, of the tensors outside a text tower.
    dtype: of our parameters.
  """

  trained: list[list[tensor_layout.Piece]]
  carried: list[list[carried_tensors.Carried]]
  dtype: np.dtype

  @property
  def size(self) -> int:
    """Bytes of all tensors."""
    pieces = (piece for file in self.trained for piece in file)
    elements = sum(math.prod(piece.shape) for piece in pieces)
    carried = sum(tensor.size for file in self.carried for tensor in file)
    return elements * self.dtype.itemsize + carried


def _plan_files(
  path: pathlib.Path,
  family: family_row.Family,
  config: transformer.DecoderConfig,
  leaves: Mapping[str, Any],
  dtype: str,
  max_shard_bytes: int,
) -> Plan:
  """The files of a model's export, with the source's tensors outside a text tower."""
  kind = hf_load.DTYPES[dtype]
  stored = hf_load.stored_tensors(path) if path.is_dir() else {}
  family = family.as_stored(stored)
  names = tensor_layout.file_names(family, in_gguf=False)
  foreign = set(tensor_layout.constants(family, config.n_layers))
  if family.wrapped:
    names, foreign = wrappers.file_names(names, stored), wrappers.outside(stored)
  foreign |= hf_load.unused(config, names)
  trained = _shards(
    hf_load.model_pieces(family, config, leaves, names),
    lambda piece: math.prod(piece.shape) * kind.itemsize,
    max_shard_bytes,
  )
  carried = _shards(
    carried_tensors.find(path, foreign), lambda tensor: tensor.size, max_shard_bytes
  )
  return Plan(trained, carried, kind)


def _shards(items: list[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
  """Distributes whole tensors to files of at most `limit` bytes each.

  A larger tensor has a file of its own.
  """
  shards: list[list[T]] = []
  room = 0
  for item in items:
    if not shards or size(item) > room:
      shards.append([])
      room = limit
    shards[-1].append(item)
    room -= size(item)
  return shards


def _write_weights(folder: pathlib.Path, leaves: Mapping[str, Any], plan: Plan) -> None:
  weight_map: dict[str, str] = {}
  count = len(plan.trained) + len(plan.carried)
  files = ["model.safetensors"]
  if count > 1:
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
  for file, pieces in zip(files, plan.trained, strict=False):
    _write_tensors(folder / file, dict(_host_tensors(leaves, pieces, plan.dtype)))
    names = (name for piece in pieces for name, _ in piece.tensors())
    weight_map |= dict.fromkeys(names, file)
  for file, tensors in zip(files[len(plan.trained) :], plan.carried, strict=True):
    carried_tensors.copy(folder / file, tensors, METADATA)
    weight_map |= dict.fromkeys((tensor.name for tensor in tensors), file)
  if count > 1:
    index = {"metadata": {"total_size": plan.size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  safetensors.numpy.save_file(dict(tensors), path, metadata=METADATA)
  path.chmod(0o644)  # the library makes it readable to its owner only
  with safetensors.safe_open(path, framework="numpy") as written:
    for name, tensor in tensors.items():
      interrupts.check()
      stored = written.get_tensor(name)
      if stored.shape != tensor.shape or stored.tobytes() != tensor.tobytes():
        raise OSError(f"{path}: {name} on disk differs from what was written")


def _check_finite(path: str, leaf: np.ndarray) -> None:
  if not np.isfinite(leaf).all():
    raise errors.UserError(
      f"parameter {path} has values that are not finite; the run diverged: export "
      "an earlier checkpoint"
    )


def _host_tensors(
  leaves: Mapping[str, Any], pieces: list[tensor_layout.Piece], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  for paths, group in itertools.groupby(pieces, lambda piece: piece.paths):
    interrupts.check()
    arrays = [np.asarray(leaves[path]) for path in paths]
    for path, leaf in zip(paths, arrays, strict=True):
      _check_finite(path, leaf)
    for piece in group:
      parts = [leaf if piece.layer is None else leaf[piece.layer] for leaf in arrays]
      tensor = tensor_layout.joined(parts, piece)
      tensors = tensor if piece.of_experts else (tensor,)
      for (name, _), one in zip(piece.tensors(), tensors, strict=True):
        # safetensors writes the buffer as it is in memory and ignores strides.
        yield name, np.ascontiguousarray(one, dtype)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_config(
  folder: pathlib.Path,
  fields: family_row.Fields,
  config: transformer.DecoderConfig,
  dtype: str,
) -> None:
  # auto_map names files of code, which are not exported; weights are not quantised.
  dropped = ("_name_or_path", "auto_map", "quantization_config")
  fields = {name: value for name, value in fields.items() if name not in dropped}
  fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
  fields["tie_word_embeddings"] = config.tie_embeddings
  _write_json(folder / "config.json", {**fields, MARK: raft_jax.__version__})


def _write_generation_config(
  folder: pathlib.Path,
  path: pathlib.Path,
  tokenizer: transformers.PreTrainedTokenizerFast,
  ends: tuple[int, ...],
  vocab_size: int,
) -> None:
  file = path / "generation_config.json"
  bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
  base = {"bos_token_id": bos, "pad_token_id": pad}
  base = {
    name: value
    for name, value in base.items()
    if value is not None and value < vocab_size
  }
  if path.is_dir() and file.is_file():
    base = hf_load.read_json(file)
  _write_json(folder / "generation_config.json", {**base, "eos_token_id": list(ends)})


def _write_tokenizer(
  folder: pathlib.Path,
  path: pathlib.Path,
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
  if path.is_dir():
    named = sorted(path.glob(f"{TEMPLATE_FOLDER}/*.jinja"))
    templates = (f"{TEMPLATE_FOLDER}/{p.name}" for p in named)
    _copy_files(folder, path, (*TOKENIZER_FILES, *templates))
    return
  tokenizer.save_pretrained(folder)
  # The class's name in transformers 4 and vLLM; transformers 5 knows both.
  file = folder / "tokenizer_config.json"
  _write_json(
    file, {**hf_load.read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"}
  )


def _copy_files(
  folder: pathlib.Path, source: pathlib.Path, names: Iterable[str]
) -> None:
  for name in names:
    if (source / name).is_file():
      (folder / name).parent.mkdir(exist_ok=True)
      shutil.copyfile(source / name, folder / name)


def _write_template(folder: pathlib.Path, template: str) -> None:
  """Makes a chat template the only one of the folder."""
  shutil.rmtree(folder / TEMPLATE_FOLDER, ignore_errors=True)
  (folder / "chat_template.json").unlink(missing_ok=True)
  for file in (folder / "tokenizer_config.json", folder / "processor_config.json"):
    if file.is_file() and "chat_template" in (fields := hf_load.read_json(file)):
      _write_json(file, {k: v for k, v in fields.items() if k != "chat_template"})
  (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def count_tensors(folder: pathlib.Path) -> int:
  """Tensors in the weight files of a folder."""
  count = 0
  for file in folder.glob("*.safetensors"):
    with safetensors.safe_open(file, framework="numpy") as written:
      count += len(written.keys())
  return count


def _wrote_model(folder: pathlib.Path) -> bool:
  """Whether an earlier `save` wrote this folder."""
  file = folder / "config.json"
  return file.is_file() and MARK in hf_load.read_json(file)


def _wrote_adapter(folder: pathlib.Path) -> bool:
  """Whether an earlier `save_adapter` wrote this folder.

  The mark is in the metadata of the weights, because PEFT warns of a key of its config
  that it does not know.
  """
  file = folder / ADAPTER_FILE
  if not file.is_file():
    return False
  try:
    with safetensors.safe_open(file, framework="numpy") as written:
      return MARK in (written.metadata() or {})
  except safetensors.SafetensorError:
    return False
