"""GGUF files, written from a Hugging Face folder: for llama.cpp, Ollama and others.

The tensors are read, encoded and written one at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gguf
import numpy as np

import raft_jax
from raft_jax import errors
from raft_jax.hf import (
  decoder_config,
  gguf_file,
  gguf_vocabulary,
  model_source,
  tensor_layout,
)
from raft_jax.hf import load as hf_load
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.models import transformer
from raft_jax.runtime import interrupts
from raft_jax.storage import atomic

Type = gguf.GGMLQuantizationType

ARCHITECTURES = {
  "llama": gguf.MODEL_ARCH.LLAMA,
  "qwen2": gguf.MODEL_ARCH.QWEN2,
  "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""`model_type` -> the architecture of its files."""
KINDS = {
  "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
  "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
  "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
  "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""`export.gguf` -> how matrices are stored, and the file's type."""
LARGEST = {Type.F16: 65504.0, Type.Q8_0: 127 * 65504.0}
"""The largest value that a type can store, where float32 has larger ones."""
MARK = "raft_jax.version"
"""The key that marks a file as an earlier export."""


class Model(NamedTuple):
  """What a file says beside its tensors.

  Attributes:
    interleaved: heads of the tensors whose rows a file interleaves, by the patterns of
      their names in Hugging Face's files.
  """

  architecture: gguf.MODEL_ARCH
  decoder: transformer.DecoderConfig
  vocabulary: gguf_file.Vocabulary
  interleaved: dict[str, int]


class Tensor(NamedTuple):
  """A tensor to write: its name and type in the file, and how to read it."""

  name: str
  shape: tuple[int, ...]
  kind: Type
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    block, size = gguf.GGML_QUANT_SIZES[self.kind]
    return math.prod(self.shape) // block * size


class Written(NamedTuple):
  """What was written: the bytes of the file, and its tensors."""

  size: int
  tensors: int


def check_target(path: pathlib.Path) -> None:
  """Refuses a target that is there and that `write` did not write."""
  if path.parent.exists() and not path.parent.is_dir():
    raise errors.UserError(f"{path.parent}: is not a folder; move it away")
  if not path.exists() and not path.is_symlink():
    return
  if path.is_symlink() or not path.is_file():
    raise errors.UserError(f"{path}: exists and is not a file; move it away")
  try:
    ours = gguf.GGUFReader(path).get_field(MARK) is not None
  except Exception:  # the package raises many types for what is not a GGUF file
    ours = False
  if not ours:
    raise errors.UserError(f"{path}: is not an earlier export; move it away")


def describe(source: str, template: str | None = None) -> Model:
  """What a GGUF file of the model says beside its tensors; reads no weights.

  Args:
    source: as for `model_source.resolve`.
    template: which chat template, as in `model.chat_template`.

  Raises:
    UserError: the family, a feature of it, or the tokenizer cannot be written.
  """
  decoder = hf_load.load_config(source)
  fields = hf_load.fields(model_source.resolve(source))
  kind = fields.get("model_type")
  instead = "delete `export.gguf`, or convert the safetensors export with llama.cpp"
  if kind not in ARCHITECTURES:
    raise errors.UserError(
      f"model {source}: models of type {kind!r} cannot be written to GGUF "
      f"({', '.join(ARCHITECTURES)} can); {instead}"
    )
  scaled = any(rope.divisors for rope in decoder.ropes)
  if any(decoder.windows):
    raise errors.UserError(
      f"model {source}: layers with a sliding window cannot be written to GGUF; "
      f"{instead}"
    )
  if scaled and kind != "llama":
    raise errors.UserError(
      f"model {source}: rope scaling of a {kind!r} model cannot be written to GGUF; "
      f"{instead}"
    )
  tokenizer = hf_tokenizer.load(source, template)
  ends = hf_tokenizer.eos_ids(source, tokenizer)
  data = gguf_vocabulary.vocabulary(
    tokenizer, decoder.vocab_size, ends, f"model {source}"
  )
  family = decoder_config.find_family(fields, source)
  heads = decoder_config.interleaved_heads(family, decoder)
  interleaved = {family.names[path].hf: number for path, number in heads.items()}
  return Model(ARCHITECTURES[kind], decoder, data, interleaved)


def write(folder: pathlib.Path, path: pathlib.Path, kind: str, *, name: str) -> Written:
  """Writes a model's folder as one GGUF file, whole or not at all.

  Every tensor is read back and compared with what was meant to be written.

  Args:
    folder: a Hugging Face folder with safetensors.
    kind: one of `KINDS`. Vectors are float32 in all of them; a matrix whose rows Q8_0
      cannot divide is float16.
    name: of the model.

  Raises:
    UserError: as `check_target` and `describe`; the disk is full, or a value is too
      large for the type.
  """
  check_target(path)
  model = describe(str(folder))
  matrices, file_type = KINDS[kind]
  tensors = list(_tensors(folder, model, matrices))
  path.parent.mkdir(parents=True, exist_ok=True)
  for leftover in path.parent.glob(f"{atomic.TEMPORARY}*-{path.name}"):  # of a kill
    leftover.unlink()
  _check_space(path, sum(tensor.nbytes for tensor in tensors))
  with atomic.replacing(path) as temporary:
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[model.architecture])
    with contextlib.closing(writer):
      _add_fields(writer, model, name, file_type)
      _add_vocabulary(writer, model.vocabulary)
      sums = _write_tensors(writer, tensors, folder)
    _compare(temporary, sums)
  return Written(path.stat().st_size, len(tensors))


def _check_space(path: pathlib.Path, need: int) -> None:
  free = shutil.disk_usage(path.parent).free
  if need > free:
    raise errors.UserError(
      f"{path}: the file needs {need:,} bytes and {free:,} are free; make room, or "
      "choose a smaller `export.gguf`"
    )


def _tensors(folder: pathlib.Path, model: Model, matrices: Type) -> Iterator[Tensor]:
  names = gguf.get_tensor_name_map(model.architecture, model.decoder.n_layers)
  for hf_name, stored in hf_load.stored_tensors(folder).items():
    stem, _, part = hf_name.rpartition(".")
    name = names.get_name(stem)
    if name is None:
      raise ValueError(f"{folder}: {hf_name} has no name in GGUF files")
    read = _reader(stored, _heads(hf_name, model))
    kind = _kind(stored.shape, matrices)
    yield Tensor(f"{name}.{part}", stored.shape, kind, read)
  for rope in model.decoder.ropes:
    if rope.divisors:
      shape = (len(rope.divisors),)
      read = functools.partial(np.asarray, rope.divisors, np.float32)
      yield Tensor("rope_freqs.weight", shape, Type.F32, read)


def _reader(stored: tensor_layout.Stored, heads: int) -> Callable[[], np.ndarray]:
  """Reads a tensor; with `heads`, with its rows in the order of pairs.

  Rows 2i and 2i + 1 of a head then rotate together. In Hugging Face's files the second
  of them is half a head further: the inverse of `gguf_file.uninterleaved`.
  """

  def read() -> np.ndarray:
    values = stored.read((slice(None),) * len(stored.shape))
    if heads:
      halves = values.reshape(heads, 2, -1, *stored.shape[1:])
      values = halves.swapaxes(1, 2).reshape(stored.shape)
    return np.ascontiguousarray(values, np.float32)

  return read


def _heads(hf_name: str, model: Model) -> int:
  """Heads of a tensor whose rows are interleaved in the file; else 0."""
  pattern = ".".join("{}" if part.isdigit() else part for part in hf_name.split("."))
  return model.interleaved.get(pattern, 0)


def _kind(shape: tuple[int, ...], matrices: Type) -> Type:
  if len(shape) == 1:
    return Type.F32
  block, _ = gguf.GGML_QUANT_SIZES[matrices]
  return matrices if shape[-1] % block == 0 else Type.F16


def _add_fields(
  writer: gguf.GGUFWriter, model: Model, name: str, file_type: gguf.LlamaFileType
) -> None:
  decoder = model.decoder
  writer.add_type("model")
  writer.add_name(name)
  writer.add_string(MARK, raft_jax.__version__)
  writer.add_file_type(file_type)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  writer.add_vocab_size(decoder.vocab_size)
  writer.add_context_length(decoder.max_positions)
  writer.add_embedding_length(decoder.d_model)
  writer.add_block_count(decoder.n_layers)
  writer.add_feed_forward_length(decoder.d_ff)
  writer.add_head_count(decoder.n_heads)
  writer.add_head_count_kv(decoder.n_kv_heads)
  writer.add_key_length(decoder.head_dim)
  writer.add_value_length(decoder.head_dim)
  writer.add_layer_norm_rms_eps(decoder.rms_eps)
  writer.add_rope_dimension_count(decoder.head_dim)
  writer.add_rope_freq_base(decoder.rope_theta)


def _add_vocabulary(writer: gguf.GGUFWriter, data: gguf_file.Vocabulary) -> None:
  writer.add_tokenizer_model(str(data.kind))
  writer.add_tokenizer_pre(str(data.pre))
  writer.add_token_list(data.tokens)
  writer.add_token_types(gguf_vocabulary.token_types(data))
  if data.merges:
    writer.add_token_merges(data.merges)
  for role, index in data.special_ids.items():
    writer.add_uint32(f"tokenizer.ggml.{role}_token_id", index)
  writer.add_add_bos_token(bool(data.add_bos))
  writer.add_add_eos_token(False)
  if data.chat_template is not None:
    writer.add_chat_template(str(data.chat_template))


def _write_tensors(
  writer: gguf.GGUFWriter, tensors: list[Tensor], folder: pathlib.Path
) -> dict[str, int]:
  """Writes header, fields and tensors; returns the checksum of every tensor."""
  for tensor in tensors:
    writer.add_tensor_info(
      tensor.name,
      tensor.shape,
      np.dtype(np.float32),
      tensor.nbytes,
      raw_dtype=tensor.kind,
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  sums = {}
  for tensor in tensors:
    interrupts.check()
    values = tensor.read()
    largest = LARGEST.get(tensor.kind, math.inf)
    if values.size and max(values.max(), -values.min()) > largest:
      raise errors.UserError(
        f"{folder}: {tensor.name} has values beyond {largest:,.0f}, the largest that "
        f"{tensor.kind.name} can store; set export.gguf=bf16 or f32"
      )
    data = np.ascontiguousarray(gguf.quantize(values, tensor.kind))
    sums[tensor.name] = _checksum(data)
    writer.write_tensor_data(data)
  return sums


def _compare(path: pathlib.Path, sums: dict[str, int]) -> None:
  """Raises OSError if the file's tensors are not those that were written."""
  stored: dict[str, Any] = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
  for name, expected in sums.items():
    interrupts.check()
    if name not in stored or _checksum(stored[name]) != expected:
      raise OSError(f"{name} on disk differs from what was written")


def _checksum(data: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(data).view(np.uint8).data)
