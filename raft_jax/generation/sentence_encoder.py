"""Sentence embeddings by sentence-transformers, behind one function.

Torch is imported only when an encoder is loaded. The encoder runs on the CPU, where
equal input gives equal bits, and leaves the accelerator to the language model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from raft_jax import errors
from raft_jax.generation import engines
from raft_jax.hf import model_source


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A model that embeds texts as unit vectors: `encoder(texts)`. `load` makes one.

  Attributes:
    source: as `load` takes it.
    identity: source and digest of the model's files. Encoders with equal identities
      give equal vectors.
    batch_size: number of texts encoded together.
    threads: number of torch's threads, on which the last bits of a vector depend.
  """

  source: str
  identity: str
  batch_size: int
  threads: int
  _model: Any = dataclasses.field(repr=False)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Embeddings as float32 [len(texts), width], each of length 1.

    The model truncates texts that are longer than its limit: see `truncated`. A text
    that the model maps to zero or NaN gives such a row, and `cosine` then gives NaN.
    """
    vectors = self._model.encode(
      list(texts),
      batch_size=self.batch_size,
      normalize_embeddings=True,
      show_progress_bar=False,
      convert_to_numpy=True,
    )
    return np.asarray(vectors, np.float32).reshape(len(texts), -1 if texts else 0)

  def truncated(self, texts: Sequence[str]) -> list[bool]:
    """For each text, whether it is longer than the model's limit."""
    limit = self._model.max_seq_length
    if limit is None or not texts:
      return [False] * len(texts)
    ids = self._model.tokenizer(list(texts), truncation=False, verbose=False)
    return [len(row) > limit for row in ids["input_ids"]]


def find(source: str) -> pathlib.Path:
  """The folder of an encoder, checked without loading it.

  Raises:
    UserError: sentence-transformers is not installed, or there is no such model.
  """
  for package in ("sentence_transformers", "torch"):
    if importlib.util.find_spec(package) is None:
      raise errors.UserError(
        f"refine.encoder needs {package}; run {errors.install('refine')}"
      )
  try:
    folder = model_source.resolve(source)
  except errors.UserError as error:
    raise errors.UserError(f"refine.encoder: {error}") from error
  # Without that file the library would average the token vectors of any model.
  if not (folder / "modules.json").is_file():
    raise errors.UserError(
      f"refine.encoder {source}: {folder} has no modules.json; name the folder of a "
      "sentence-transformers model"
    )
  return folder


def load(source: str, *, batch_size: int = 1, threads: int | None = None) -> Encoder:
  """The encoder that a source names: `pkg://PACKAGE/FOLDER`, a folder or a hub name.

  Args:
    source: as for `model_source.resolve`.
    batch_size: at 1, a text's vector does not depend on its neighbours to the last bit
      (vectors from batches of 8 and 1 differed by 1e-7), so that an interrupted run
      ends with the same scores. On 2 CPU cores it costs 22 ms a text instead of 7.
    threads: number of torch's threads in this process; None leaves it as it is.

  Raises:
    UserError: as `find`, or the files are damaged or a pickle.
  """
  folder = find(source)
  model = _load_model(source, folder)
  import torch

  if threads is not None:
    torch.set_num_threads(threads)
  identity, threads = engines.identity(source), torch.get_num_threads()
  return Encoder(source, identity, batch_size, threads, model)


def _load_model(source: str, folder: pathlib.Path) -> Any:
  import sentence_transformers
  import transformers

  transformers.utils.logging.disable_progress_bar()
  try:
    model = sentence_transformers.SentenceTransformer(
      str(folder),
      device="cpu",
      trust_remote_code=False,
      local_files_only=True,
      model_kwargs={"use_safetensors": True},  # a pickle is never opened
    )
    vocabulary = model.tokenizer.vocab_size - len(model.tokenizer.all_special_ids)
  except Exception as error:  # each library below raises its own types
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise errors.UserError(
      f"refine.encoder {source}: sentence-transformers cannot load it ({reason}); "
      "fetch it again, or name another sentence-transformers model with safetensors"
    ) from error
  if vocabulary <= 0:  # the library loads without the tokenizer's files
    raise errors.UserError(
      f"refine.encoder {source}: {folder} has no vocabulary; fetch tokenizer.json again"
    )
  return model


def cosine(left_NE: np.ndarray, right_NE: np.ndarray) -> np.ndarray:
  """Row-wise cosine of two [N, E] arrays, float64 [N] in -1..1; NaN for a zero row."""
  left = np.asarray(left_NE, np.float64)
  right = np.asarray(right_NE, np.float64)
  norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
  dots = np.sum(left * right, axis=-1)
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.clip(np.where(norms > 0, dots / norms, np.nan), -1.0, 1.0)


def compare(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
  """For each pair of texts, the cosine of their embeddings (None where it is undefined)
  and whether the encoder truncated either text."""
  left, right = zip(*pairs)
  cosines = cosine(encoder(left), encoder(right)).tolist()
  truncated = zip(encoder.truncated(left), encoder.truncated(right))
  return [
    {"cosine": None if math.isnan(c) else c, "truncated": any(either)}
    for c, either in zip(cosines, truncated)
  ]
