"""The tokenizer of a GGUF file: byte-level BPE, or SentencePiece's BPE."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

from raft_jax import errors
from raft_jax.hf import gguf_config, gguf_file

if TYPE_CHECKING:
  import transformers


class Splitter(NamedTuple):
  """How byte-level BPE cuts text before merging.

  Attributes:
    digits: whether every digit is a piece of its own.
    regex: the pattern of the pieces; None for the GPT-2 pattern of `tokenizers`'
      ByteLevel.
    nfc: whether the text is normalised to NFC first.
    ignore_merges: whether a piece that is in the vocabulary is one token without any
      merges.
  """

  digits: bool = False
  regex: str | None = None
  nfc: bool = False
  ignore_merges: bool = False


_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> how the tokenizer.json of the original models cuts. SmolLM2's
# has Digits(individual) and then ByteLevel, as in llama.cpp
# (LLAMA_VOCAB_PRE_TYPE_SMOLLM).
SPLITTERS = {
  "gpt-2": Splitter(),
  "smollm": Splitter(digits=True),
  "llama-bpe": Splitter(regex=_WORDS % "{1,3}", ignore_merges=True),
  "dbrx": Splitter(regex=_WORDS % "{1,3}"),  # OLMo 2
  "qwen2": Splitter(regex=_WORDS % "", nfc=True),
}
ALIASES = {"refact": "smollm"}
"""Further names of pre-tokenizers; `refact` is Granite's."""
SPACE = "\u2581"
"""How SentencePiece writes a space in a token."""


def load(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer that a GGUF file describes.

  Raises:
    UserError: the file is damaged, or its tokenizer is of a kind that is not supported.
  """
  import tokenizers
  import transformers

  data = gguf_file.vocabulary(path)
  spelled = _spelled(data)
  ids = {token: index for index, token in enumerate(spelled)}
  if len(ids) != len(spelled):
    raise errors.UserError(f"{path}: a token occurs twice; fetch the file again")
  splitter = SPLITTERS.get(ALIASES.get(str(data.pre), str(data.pre)))
  if data.kind == "gpt2" and splitter is not None:
    backend = byte_level_bpe(ids, data.merges, splitter)
  elif data.kind == "llama":
    backend = sentencepiece_bpe(ids, _unknown(data), data.scores, data.add_space)
  else:
    raise errors.UserError(
      f"{path}: tokenizer {data.kind!r} with pre-tokenizer {data.pre!r} is not "
      f"supported (SentencePiece, or byte-level BPE with {', '.join(SPLITTERS)}); use "
      "the safetensors folder"
    )
  added = [
    tokenizers.AddedToken(written, normalized=False, special=data.added[token])
    for token, written in zip(data.tokens, spelled, strict=True)
    if token in data.added
  ]
  backend.add_tokens(added)
  names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
  named = {
    f"{names[role]}_token": data.tokens[index]
    for role, index in data.special_ids.items()
  }
  # llama.cpp adds BOS to such a text unless the file says otherwise.
  default = data.kind == "llama" or data.pre == "llama-bpe"
  add_bos = default if data.add_bos is None else data.add_bos
  if "bos_token" in named and add_bos:
    bos = named["bos_token"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=data.chat_template,
    model_max_length=gguf_config.config_fields(path).get("max_position_embeddings"),
    clean_up_tokenization_spaces=False,
    **named,
  )


def _spelled(data: gguf_file.Vocabulary) -> list[str]:
  """The tokens as SentencePiece writes them: some files hold spaces as they are."""
  if data.kind != "llama":
    return data.tokens
  return [
    SPACE * len(token) if token and not token.strip(" ") else token
    for token in data.tokens
  ]


def _unknown(data: gguf_file.Vocabulary) -> str | None:
  index = data.special_ids.get("unknown")
  return None if index is None else data.tokens[index]


def byte_level_bpe(ids: dict[str, int], merges: list[str], splitter: Splitter) -> Any:
  """A `tokenizers.Tokenizer` from the ids of tokens and the merges in order of rank."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
  bpe = models.BPE(ids, pairs, ignore_merges=splitter.ignore_merges)
  backend = tokenizers.Tokenizer(bpe)
  steps: list[Any] = []
  if splitter.digits:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if splitter.regex is not None:
    pattern = tokenizers.Regex(splitter.regex)
    steps.append(pre_tokenizers.Split(pattern, behavior="isolated"))
  gpt2 = splitter.regex is None
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
  backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
  if splitter.nfc:
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  return backend


def sentencepiece_bpe(
  ids: dict[str, int], unknown: str | None, scores: list[float], add_space: bool
) -> Any:
  """A `tokenizers.Tokenizer` that splits as SentencePiece's BPE does.

  The file has no merges: every pair of tokens whose concatenation is a token is one,
  in order of that token's score. Gemma's tokens all have the same place in that order
  as in the file, whatever their scores.

  Args:
    scores: by id.
    add_space: whether a text begins with a space.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  order = range(len(ids), 0, -1) if not add_space else scores
  ranked: list[tuple[float, int, int, tuple[str, str]]] = []
  for token, index in ids.items():
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in ids and right in ids:
        ranked.append((-order[index], ids[left], ids[right], (left, right)))
  ranked.sort()
  bpe = models.BPE(
    ids,
    [pair for *_, pair in ranked],
    unk_token=unknown,
    fuse_unk=True,
    byte_fallback=True,
  )
  backend = tokenizers.Tokenizer(bpe)
  spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
  back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  if add_space:
    spaces.insert(0, normalizers.Prepend(SPACE))
    back.append(decoders.Strip(" ", 1, 0))
  else:
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
  backend.normalizer = normalizers.Sequence(spaces)
  backend.decoder = decoders.Sequence(back)
  return backend
