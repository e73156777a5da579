"""GGUF files, read: the metadata, the tensors and the tokenizer's data in them.

`gguf_config` makes a config of the metadata; `gguf_writer` and `gguf_vocabulary` write
files. No other module knows the format or imports the `gguf` package.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
from typing import Any, NamedTuple

import gguf
import numpy as np

from raft_jax import errors
from raft_jax.hf import tensor_layout


def reader(path: pathlib.Path) -> gguf.GGUFReader:
  """The file, mapped into memory. Raises UserError if it is damaged."""
  stat = path.stat()
  return _mapped(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _mapped(path: str, mtime: int, size: int) -> gguf.GGUFReader:
  """Maps the file into memory. Cached, because parsing the metadata takes seconds."""
  try:
    return gguf.GGUFReader(path)
  except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
    version = importlib.metadata.version("gguf")
    raise errors.UserError(
      f"{path}: damaged or truncated GGUF file, or of a kind that gguf {version} does "
      f"not know ({error}); fetch it again, or run `python -m pip install "
      "--upgrade gguf`"
    ) from error


def value(file: gguf.GGUFReader, key: str) -> Any:
  """A value of the metadata; None if the file does not have the key."""
  field = file.get_field(key)
  if field is None:
    return None
  content = field.contents()
  # Decimals such as 1e-5 are stored as float32; return the shortest that rounds to it.
  return float(str(np.float32(content))) if isinstance(content, float) else content


def decode(
  path: pathlib.Path, tensor: gguf.ReaderTensor, data: np.ndarray
) -> np.ndarray:
  """The float32 values of (some rows of) a tensor's data.

  Raises:
    UserError: the `gguf` package cannot decode the tensor's type.
  """
  try:
    return gguf.dequantize(data, tensor.tensor_type)
  except NotImplementedError as error:
    raise errors.UserError(
      f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the gguf "
      "package cannot decode; use a file of another quantisation"
    ) from error


def tensors(path: pathlib.Path) -> dict[str, tensor_layout.Stored]:
  """The tensors by name, dequantised to float32 as they are read.

  Raises:
    UserError: the file is damaged, or stores a tensor as `gguf` cannot decode.
  """
  stored, decodable = {}, set()
  for tensor in reader(path).tensors:
    if tensor.tensor_type not in decodable:
      decode(path, tensor, tensor.data[:1])
      decodable.add(tensor.tensor_type)

    def read(
      index: tensor_layout.Index, data=tensor.data, kind=tensor.tensor_type
    ) -> np.ndarray:
      if len(index) == 1:  # a part of a vector may begin inside a block
        return gguf.dequantize(data, kind)[index]
      return gguf.dequantize(data[index[0]], kind)[:, *index[1:]]

    # GGUF lists the fastest dimension first.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    stored[tensor.name] = tensor_layout.Stored(shape, read)
  return stored


def uninterleaved(tensor: tensor_layout.Stored, heads: int) -> tensor_layout.Stored:
  """A tensor with its rows in the order of halves.

  In the file they are interleaved: rows 2i and 2i + 1 of a head rotate together.
  """
  pairs = np.arange(tensor.shape[0]).reshape(heads, -1, 2)
  order = pairs.swapaxes(1, 2).reshape(-1)

  def read(index: tensor_layout.Index) -> np.ndarray:
    return tensor.read((order[index[0]], *index[1:]))

  return tensor_layout.Stored(tensor.shape, read)


def shifted(tensor: tensor_layout.Stored, offset: float) -> tensor_layout.Stored:
  """A tensor from whose values an offset is subtracted."""
  return tensor._replace(read=lambda index: tensor.read(index) - np.float32(offset))


class Vocabulary(NamedTuple):
  """The tokenizer's data, under the file's names.

  Attributes:
    kind: of the tokenizer's model; "gpt2" is byte-level BPE, "llama" SentencePiece.
    pre: name of the pre-tokenizer.
    tokens: in order of ids.
    merges: pairs of tokens, each with a space between the two, in order of rank.
    added: tokens that are cut out of a text before it is tokenised; True for a control
      token.
    special_ids: ids by role: "bos", "eos", "unknown", "padding"; "eot" in what is
      written.
    scores: of SentencePiece's tokens, by id.
    add_space: whether SentencePiece begins a text with a space.
    add_bos: whether texts start with BOS; None if the file does not say.
    chat_template: a dict by name if there are several; "default" is the unnamed one.
  """

  kind: str | None
  pre: str | None
  tokens: list[str]
  merges: list[str]
  added: dict[str, bool]
  special_ids: dict[str, int]
  add_bos: bool | None
  chat_template: str | dict[str, str] | None
  scores: list[float] = []  # noqa: RUF012 (never changed)
  add_space: bool = True


def templates(file: gguf.GGUFReader) -> str | dict[str, str] | None:
  """The chat template; if there are several, a dict by name, as in transformers."""
  default = value(file, "tokenizer.chat_template")
  names = value(file, "tokenizer.chat_templates")
  if not names:
    return default
  named = {name: value(file, f"tokenizer.chat_template.{name}") for name in names}
  by_name = {"default": default, **named}
  return {name: text for name, text in by_name.items() if text is not None}


def vocabulary(path: pathlib.Path) -> Vocabulary:
  """The tokenizer's data.

  Raises:
    UserError: the file is damaged.
  """
  file = reader(path)

  def meta(name: str) -> Any:
    return value(file, f"tokenizer.ggml.{name}")

  control, defined = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
  tokens = meta("tokens") or []
  with_types = zip(tokens, meta("token_type") or [], strict=False)
  ids = {
    role: meta(f"{role}_token_id") for role in ("bos", "eos", "unknown", "padding")
  }
  return Vocabulary(
    kind=meta("model"),
    pre=meta("pre"),
    tokens=tokens,
    merges=meta("merges") or [],
    added={token: t == control for token, t in with_types if t in (control, defined)},
    special_ids={role: index for role, index in ids.items() if index is not None},
    add_bos=meta("add_bos_token"),
    chat_template=templates(file),
    scores=meta("scores") or [],
    add_space=meta("add_space_prefix") is not False,
  )
