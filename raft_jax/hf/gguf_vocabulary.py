"""A tokenizer as the data that GGUF files hold: the inverse of `tokenizer.load`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gguf

from raft_jax import errors
from raft_jax.hf import gguf_file, gguf_tokenizer

if TYPE_CHECKING:
  import transformers

INSTEAD = "delete `export.gguf` (the safetensors export keeps the tokenizer as it is)"


def vocabulary(
  tokenizer: transformers.PreTrainedTokenizerFast,
  vocab_size: int,
  ends: Sequence[int],
  place: str,
) -> gguf_file.Vocabulary:
  """The data of a byte-level BPE tokenizer.

  Ids without a token are filled with `[PAD<id>]`, as llama.cpp's converter does. Tokens
  beyond the model's `vocab_size` have no place in the file and are left out.

  Args:
    ends: from `hf_tokenizer.eos_ids`.
    place: what to name in errors.

  Raises:
    UserError: the tokenizer is of a kind that GGUF cannot say, or that we do not know.
  """
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  pre = _pre_tokenizer(backend, place)
  added = {}
  for index, token in sorted(tokenizer.added_tokens_decoder.items()):
    if token.lstrip or token.rstrip or token.single_word:
      raise errors.UserError(
        f"{place}: the token {token.content!r} takes up the spaces beside it, or only "
        f"whole words, and a GGUF file cannot say that; {INSTEAD}"
      )
    if index < vocab_size:
      added[token.content] = bool(token.special)
  by_id = {index: token for token, index in tokenizer.get_vocab().items()}
  merges = backend["model"]["merges"]
  return gguf_file.Vocabulary(
    kind="gpt2",
    pre=pre,
    tokens=[by_id.get(i, _filler(i)) for i in range(vocab_size)],
    merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    added=added,
    special_ids=_special_ids(tokenizer, vocab_size, ends),
    add_bos=adds_bos(tokenizer, place),
    chat_template=tokenizer.chat_template,
  )


def token_types(vocabulary: gguf_file.Vocabulary) -> list[gguf.TokenType]:
  """The type of every token, in order of ids."""
  added = {
    token: gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    for token, special in vocabulary.added.items()
  }
  return [
    added.get(
      token,
      gguf.TokenType.UNUSED if token == _filler(index) else gguf.TokenType.NORMAL,
    )
    for index, token in enumerate(vocabulary.tokens)
  ]


def _filler(index: int) -> str:
  return f"[PAD{index}]"


def _pre_tokenizer(backend: Mapping[str, Any], place: str) -> str:
  """The name of the pre-tokenizer, which must be exactly one that we know."""
  how = _cutting(backend)
  for name, splitter in gguf_tokenizer.SPLITTERS.items():
    known = gguf_tokenizer.byte_level_bpe({}, [], splitter)
    if _cutting(json.loads(known.to_str())) == how:
      return name
  steps = [step.get("type") for step in how["pre_tokenizer"]]
  raise errors.UserError(
    f"{place}: a tokenizer of type {how['model']['type']} that cuts text by "
    f"{', '.join(map(str, steps)) or 'nothing'} is none of the pre-tokenizers that can "
    f"be written to GGUF (byte-level BPE with {', '.join(gguf_tokenizer.SPLITTERS)}); "
    f"{INSTEAD}"
  )


def _cutting(backend: Mapping[str, Any]) -> dict[str, Any]:
  """All of a tokenizer.json that decides ids, but tokens and merges.

  The unknown token is left out: with a token for every byte there is none.
  """
  model = backend["model"]
  fields = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
  flags = ("ignore_merges", "byte_fallback")
  return {
    "model": {
      "type": model["type"],
      **{name: model.get(name) or None for name in fields},
      **{name: bool(model.get(name)) for name in flags},
    },
    "pre_tokenizer": _steps(backend["pre_tokenizer"], "pretokenizers"),
    "normalizer": _steps(backend["normalizer"], "normalizers"),
  }


def _steps(part: Mapping[str, Any] | None, name: str) -> list[dict[str, Any]]:
  """The parts of a sequence within sequences, without what moves offsets alone."""
  if part is None:
    return []
  if part["type"] == "Sequence":
    return [step for inner in part[name] for step in _steps(inner, name)]
  return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def _special_ids(
  tokenizer: transformers.PreTrainedTokenizerFast, vocab_size: int, ends: Sequence[int]
) -> dict[str, int]:
  """Ids by role. EOT ends a turn where that is another token than EOS."""
  eos = tokenizer.eos_token_id
  first = ends[0] if ends else None
  eos = first if eos is None else eos
  ids = {
    "bos": tokenizer.bos_token_id,
    "eos": eos,
    "unknown": tokenizer.unk_token_id,
    "padding": tokenizer.pad_token_id,
    "eot": first if first != eos else None,
  }
  return {role: i for role, i in ids.items() if i is not None and i < vocab_size}


def adds_bos(tokenizer: transformers.PreTrainedTokenizerFast, place: str) -> bool:
  """Whether BOS comes before a text. Raises UserError if other tokens are added."""
  bare = tokenizer("a", add_special_tokens=False).input_ids
  whole = tokenizer("a").input_ids
  if whole == bare:
    return False
  if whole == [tokenizer.bos_token_id, *bare]:
    return True
  raise errors.UserError(
    f"{place}: the tokenizer adds other tokens to a text than BOS before it; {INSTEAD}"
  )
