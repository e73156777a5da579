"""The tokenizer that belongs to a model, and the tokens that end an answer."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

from raft_jax import errors
from raft_jax.hf import gguf_file
from raft_jax.hf import load as hf_load

if TYPE_CHECKING:
  import transformers


class Splitter(NamedTuple):
  """How byte-level BPE cuts text before merging.

  Attributes:
    digits: every digit stands alone.
    regex: cut by this; None: by the GPT-2 pattern of `tokenizers`' ByteLevel.
    nfc: text is normalised to NFC first.
    ignore_merges: a piece that is a token is taken whole, whatever the merges say.
  """

  digits: bool = False
  regex: str | None = None
  nfc: bool = False
  ignore_merges: bool = False


_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> what the tokenizer.json of the original models says: SmolLM2's
# is Digits(individual) then ByteLevel, as in llama.cpp (LLAMA_VOCAB_PRE_TYPE_SMOLLM).
SPLITTERS = {
  "gpt-2": Splitter(),
  "smollm": Splitter(digits=True),
  "llama-bpe": Splitter(regex=_WORDS % "{1,3}", ignore_merges=True),
  "qwen2": Splitter(regex=_WORDS % "", nfc=True),
}


def load(source: str) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer that belongs to a model, from the same source.

  From tokenizer.json of a folder, or built from GGUF metadata (byte-level BPE).

  Raises:
    UserError: it is absent, of a kind not supported, or another model's.
  """
  path = hf_load.resolve(source)
  if path.is_file():
    return _from_gguf(path)
  if not (path / "tokenizer.json").is_file():
    raise errors.UserError(
      f"{path}: no tokenizer.json; save one with tokenizers or transformers "
      "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
    )
  import transformers

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      path, trust_remote_code=False, use_fast=True
    )
  except Exception as error:  # each library below raises kinds of its own
    reason = str(error).strip().split("\n")[0]
    raise errors.UserError(
      f"{path}: transformers cannot load this tokenizer ({reason}); fetch its files "
      "again (trust_remote_code is never used)"
    ) from error
  if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
    raise errors.UserError(
      f"{path}: {type(tokenizer).__name__} is not a fast tokenizer; save its "
      "tokenizer.json first"
    )
  _check_vocabulary(path, tokenizer)
  return tokenizer


def _check_vocabulary(
  path: pathlib.Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
  """Refuses a tokenizer with ids that the embedding has no row for.

  A control token without a role may, since text never becomes one: Gemma 3 1B has the
  image token of its siblings (github.com/huggingface/transformers/issues/37011).
  """
  size = hf_load.fields(path).get("vocab_size")
  if not isinstance(size, int):  # named when the config is read
    return
  controls = {index for index, t in tokenizer.added_tokens_decoder.items() if t.special}
  controls -= {
    tokenizer.bos_token_id,
    tokenizer.eos_token_id,
    tokenizer.pad_token_id,
    tokenizer.unk_token_id,
  }
  beyond = [
    (index, token)
    for token, index in tokenizer.get_vocab().items()
    if index >= size and index not in controls
  ]
  if beyond:
    index, token = max(beyond)
    raise errors.UserError(
      f"{path}: the tokenizer knows {token!r} as {index}, but vocab_size in "
      f"config.json is {size}; fetch both from the same model"
    )


def _from_gguf(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  import tokenizers
  import transformers

  data = gguf_file.vocabulary(path)
  if data.kind != "gpt2" or data.pre not in SPLITTERS:
    raise errors.UserError(
      f"{path}: tokenizer {data.kind!r} with pre-tokenizer {data.pre!r} is not "
      f"supported (byte-level BPE with {', '.join(SPLITTERS)}); use the safetensors "
      "folder"
    )
  ids = {token: index for index, token in enumerate(data.tokens)}
  if len(ids) != len(data.tokens):
    raise errors.UserError(f"{path}: a token occurs twice; fetch the file again")
  backend = byte_level_bpe(ids, data.merges, SPLITTERS[data.pre])
  for token, special in data.added.items():
    added = tokenizers.AddedToken(token, normalized=False, special=special)
    backend.add_special_tokens([added]) if special else backend.add_tokens([added])
  names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
  named = {
    f"{names[role]}_token": data.tokens[index]
    for role, index in data.special_ids.items()
  }
  # llama.cpp adds BOS to a llama-bpe text unless the file says otherwise.
  add_bos = data.pre == "llama-bpe" if data.add_bos is None else data.add_bos
  if "bos_token" in named and add_bos:
    bos = named["bos_token"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=data.chat_template,
    model_max_length=gguf_file.config_fields(path).get("max_position_embeddings"),
    clean_up_tokenization_spaces=False,
    **named,
  )


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


def eos_ids(
  source: str, tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[int, ...]:
  """Ids that end an answer; the first is the one that ends an assistant turn.

  In this order, without repeats: the token that follows an assistant's message in the
  chat template, generation_config.json's and config.json's, the tokenizer's own, and
  `<|endoftext|>` where it is a control token (a base model's end of document).
  """
  path = hf_load.resolve(source)
  found: list[Any] = [_turn_end(source, tokenizer)]
  if path.is_dir():
    for file in ("generation_config.json", "config.json"):
      if (path / file).is_file():
        ids = hf_load.read_json(path / file).get("eos_token_id")
        found.extend(ids if isinstance(ids, list) else [ids])
  else:
    found.append(hf_load.fields(path).get("eos_token_id"))
  found.append(tokenizer.eos_token_id)
  for index, token in tokenizer.added_tokens_decoder.items():
    if token.special and token.content == "<|endoftext|>":
      found.append(index)
  return tuple(dict.fromkeys(i for i in found if i is not None))


def _turn_end(
  source: str, tokenizer: transformers.PreTrainedTokenizerFast
) -> int | None:
  """Id of the control token that follows an assistant's message in the template."""
  if not tokenizer.chat_template:
    return None
  answer = "raft answer"
  turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
  try:
    text = tokenizer.apply_chat_template(turns, tokenize=False)
  except Exception as error:  # the template's own, of any kind
    raise errors.UserError(
      f"model {source}: the chat template cannot render a question and an answer "
      f"({error}); mend chat_template.jinja, or chat_template in tokenizer_config.json"
    ) from error
  rest = str(text).rpartition(answer)[2].lstrip()
  ends = [
    (len(token.content), index)
    for index, token in tokenizer.added_tokens_decoder.items()
    if rest.startswith(token.content)
  ]
  return max(ends)[1] if ends else None
