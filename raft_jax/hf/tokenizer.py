"""The tokenizer that belongs to a model, and the tokens that end an answer."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from raft_jax import errors
from raft_jax.hf import chat_template, gguf_file, model_source, wrappers
from raft_jax.hf import load as hf_load

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
  "qwen2": Splitter(regex=_WORDS % "", nfc=True),
}


def load(
  source: str, template: str | None = None, *, thinking: bool = False
) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer that belongs to a model, from the same source.

  It is read from a folder's tokenizer.json, or built from GGUF metadata (byte-level
  BPE). Its chat template is the chosen one, and leaves no thinking part open in a
  prompt unless thinking is on.

  Args:
    template: which chat template, as in `model.chat_template`.
    thinking: whether the model thinks before its answers.

  Raises:
    UserError: the tokenizer is missing, of a kind that is not supported, or that of
      another model; or it has no such chat template.
  """
  path = model_source.resolve(source)
  tokenizer = _from_gguf(path) if path.is_file() else _from_folder(path)
  chosen = chat_template.choose(tokenizer.chat_template, template, source)
  tokenizer.chat_template = chosen
  if chosen and not thinking:
    tokenizer.chat_template = chat_template.closed(tokenizer)
  return tokenizer


def changed_template(
  source: str, template: str | None, *, thinking: bool = False
) -> str | None:
  """The chat template of `load` if it is not the one in the source's files, else None.

  With those files alone, transformers would then use another template.
  """
  path = model_source.resolve(source)
  tokenizer = _from_gguf(path) if path.is_file() else _from_folder(path)
  default = tokenizer.chat_template
  if isinstance(default, dict):
    default = default.get("default")
  chosen = load(source, template, thinking=thinking).chat_template
  return None if chosen == default else str(chosen)


def _from_folder(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
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
  except Exception as error:  # transformers and tokenizers raise many types
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
  """Refuses a tokenizer with ordinary tokens for which the embedding has no row.

  Added tokens may lack a row; a text that needs such a token is refused later. Gemma 3
  1B has the image token of the larger models
  (github.com/huggingface/transformers/issues/37011), and padding is often added to the
  tokenizer alone.
  """
  size = _vocab_size(path)
  if size is None:
    return
  beyond = [
    (index, token)
    for token, index in tokenizer.get_vocab().items()
    if index >= size and index not in tokenizer.added_tokens_decoder
  ]
  if beyond:
    index, token = max(beyond)
    raise errors.UserError(
      f"{path}: the tokenizer knows {token!r} as {index}, but vocab_size in "
      f"config.json is {size}; fetch both from the same model"
    )


def vocab_size(source: str) -> int | None:
  """Rows of the model's embedding; None if its config does not give them."""
  return _vocab_size(model_source.resolve(source))


def _vocab_size(path: pathlib.Path) -> int | None:
  fields = wrappers.text_fields(hf_load.fields(path))
  size = fields.get("vocab_size")
  return size if isinstance(size, int) else None  # `load_config` reports the fault


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

  They come in this order, without repeats: the token that follows an assistant's
  message in the chat template, those of generation_config.json and config.json, the
  tokenizer's own, and `<|endoftext|>` if it is a control token (a base model's end of
  document).

  Raises:
    UserError: the model has no row for the first.
  """
  path = model_source.resolve(source)
  known: list[Any] = []
  if path.is_dir():
    for file in ("generation_config.json", "config.json"):
      if (path / file).is_file():
        fields = hf_load.read_json(path / file)
        for part in (fields, wrappers.text_fields(fields)):
          ids = part.get("eos_token_id")
          known.extend(ids if isinstance(ids, list) else [ids])
  else:
    known.append(hf_load.fields(path).get("eos_token_id"))
  known.append(tokenizer.eos_token_id)
  for index, token in tokenizer.added_tokens_decoder.items():
    if token.special and token.content == "<|endoftext|>":
      known.append(index)
  candidates = [_turn_end(source, tokenizer, known), *known]
  ids = tuple(dict.fromkeys(i for i in candidates if i is not None))
  size = _vocab_size(path)
  if size is None or not ids:
    return ids
  if ids[0] >= size:
    raise errors.UserError(
      f"model {source}: {tokenizer.convert_ids_to_tokens(ids[0])!r} ends an answer, "
      f"but its id {ids[0]} is beyond vocab_size {size} in config.json; fetch both "
      "from the same source, or set model.chat_template to another template"
    )
  return tuple(i for i in ids if i < size)


def _turn_end(
  source: str,
  tokenizer: transformers.PreTrainedTokenizerFast,
  known: Sequence[int | None],
) -> int | None:
  """Id of the control token that follows an assistant's message in the template.

  If several follow without a gap (the end of the answer, then of the turn), it is the
  first that is in `known`, and else the first.
  """
  if not tokenizer.chat_template:
    return None
  answer = "raft answer"
  turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
  try:
    text = chat_template.render(tokenizer, turns, prompt=False)
  except errors.UserError as error:
    raise errors.UserError(
      f"model {source}: the chat template cannot render a question and an answer "
      f"({error.__cause__}); mend chat_template.jinja, or chat_template in "
      "tokenizer_config.json, or choose another by model.chat_template"
    ) from error
  _, written, rest = text.rpartition(answer)
  if not written:
    raise errors.UserError(
      f"model {source}: the chat template leaves the answer out of a finished "
      "conversation (some templates need contents as a list of parts); choose another "
      "by model.chat_template"
    )
  rest = rest.lstrip()
  ends: list[int] = []
  while True:
    matches = [
      (len(token.content), index, token.content)
      for index, token in tokenizer.added_tokens_decoder.items()
      if rest.startswith(token.content)
    ]
    if not matches:
      break
    _, index, content = max(matches)
    ends.append(index)
    rest = rest.removeprefix(content)
  return next((i for i in ends if i in known), ends[0] if ends else None)
