"""The tokenizer of a model: the tokens that end an answer, and whether it belongs."""

import json
import pathlib

import pytest

from raft_jax import errors
from raft_jax.hf import tokenizer as hf_tokenizer
from tests.helpers import tiny_llama


def test_eos_ids(smollm, complete):
  """<|im_end|> (2) ends a turn and <|endoftext|> (0) a document of SmolLM2."""
  tokenizer = hf_tokenizer.load(smollm)
  assert hf_tokenizer.eos_ids(smollm, tokenizer) == (2, 0)
  (complete / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
  assert hf_tokenizer.eos_ids(str(complete), hf_tokenizer.load(str(complete))) == (
    2,
    7,
    0,
  )


def test_turn_end_is_read_from_the_template(complete):
  """Config and tokenizer name a base model's EOS; the template has the turn's."""
  tiny_llama.edit_config(eos_token_id=0)(complete)
  (complete / "generation_config.json").unlink()
  tokenizer = hf_tokenizer.load(str(complete))
  tokenizer.eos_token = "<|endoftext|>"
  assert hf_tokenizer.eos_ids(str(complete), tokenizer) == (2, 0)
  tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
  assert hf_tokenizer.eos_ids(str(complete), tokenizer) == (0,)


def add_token(folder: pathlib.Path, *, special: bool) -> None:
  """A token <|odd|> of id 90, after those of `tokenizer_folder`."""
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  added = {**content["added_tokens"][0], "content": "<|odd|>", "special": special}
  content["added_tokens"].append({**added, "id": 90})
  path.write_text(json.dumps(content))


def test_a_tokenizer_with_more_tokens_than_the_model(complete):
  add_token(complete, special=False)
  tiny_llama.edit_config(vocab_size=91)(complete)
  assert hf_tokenizer.load(str(complete)).convert_tokens_to_ids("<|odd|>") == 90
  tiny_llama.edit_config(vocab_size=90)(complete)
  says = r"knows '<\|odd\|>' as 90, but vocab_size in config.json is 90"
  with pytest.raises(errors.UserError, match=says):
    hf_tokenizer.load(str(complete))


def test_a_control_token_beyond_the_model_may_be_unused(complete):
  """As with Gemma 3 1B, whose tokenizer is that of models with images."""
  add_token(complete, special=True)
  tiny_llama.edit_config(vocab_size=90)(complete)
  assert hf_tokenizer.load(str(complete)).convert_tokens_to_ids("<|odd|>") == 90
  path = complete / "tokenizer_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|odd|>"}))
  with pytest.raises(errors.UserError, match=r"knows '<\|odd\|>' as 90"):
    hf_tokenizer.load(str(complete))
