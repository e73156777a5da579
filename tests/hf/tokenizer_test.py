"""The tokenizer of a model: the tokens that end an answer, and whether it belongs."""

import json
import pathlib
import re

import pytest

from raft_jax import errors
from raft_jax.hf import chat, teacher_prompts
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.storage import records
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


def test_a_tokenizer_of_another_model(complete):
  tiny_llama.edit_config(vocab_size=80)(complete)
  says = r"knows '.+' as 89, but vocab_size in config.json is 80"
  with pytest.raises(errors.UserError, match=says):
    hf_tokenizer.load(str(complete))


def edit_tokenizer_config(folder: pathlib.Path, **fields) -> None:
  path = folder / "tokenizer_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_beyond_the_model_may_be_unused(complete, special):
  """As with Gemma 3 1B, whose tokenizer is that of models with images; or for padding,
  which is masked by length and filled with an id that the model has."""
  add_token(complete, special=special)
  tiny_llama.edit_config(vocab_size=90)(complete)
  edit_tokenizer_config(complete, pad_token="<|odd|>", bos_token="<|odd|>")
  chat_tokenizer = chat.load(str(complete))
  assert chat_tokenizer.hf_tokenizer.pad_token_id == 90
  assert chat_tokenizer.pad_id == chat_tokenizer.eos_ids[0] == 2
  assert max(chat.prompt_ids(chat_tokenizer, records.user_turn("1 + 1 <|odd|>"))) < 90


def add_word(folder: pathlib.Path, word: str, index: int) -> None:
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  added = {**content["added_tokens"][0], "content": word, "special": False}
  content["added_tokens"].append({**added, "id": index})
  path.write_text(json.dumps(content))


@pytest.mark.parametrize("word", ["<extra_0>", "[GENE]", "Vertrag"])
def test_a_word_beyond_the_model_is_refused_where_it_is_used(complete, word):
  add_word(complete, word, 90)
  tiny_llama.edit_config(vocab_size=90)(complete)
  chat_tokenizer = chat.load(str(complete))
  teacher_prompts.row_ids(chat_tokenizer, records.user_turn("1"), "2", "chat")
  says = re.escape(f"needs the token {word!r}, whose id 90 is beyond")
  for question, answer in ((f"a {word} b", "2"), ("1", f"a {word}")):
    with pytest.raises(errors.UserError, match=says):
      teacher_prompts.row_ids(
        chat_tokenizer, records.user_turn(question), answer, "none"
      )
  with pytest.raises(errors.UserError, match=says):
    chat.document_ids(chat_tokenizer, word)


def test_end_tokens_beyond_the_model(complete):
  """What the template ends a turn with is needed; another end is never met."""
  add_token(complete, special=True)
  tiny_llama.edit_config(vocab_size=90)(complete)
  edit_tokenizer_config(complete, eos_token="<|odd|>")
  assert 90 not in chat.load(str(complete)).eos_ids
  template = complete / "chat_template.jinja"
  template.write_text(template.read_text().replace("<|im_end|>", "<|odd|>"))
  with pytest.raises(
    errors.UserError, match=r"'<\|odd\|>' ends an answer, but its id 90"
  ):
    chat.load(str(complete))


def test_a_beginning_beyond_the_model_that_the_template_writes(complete):
  add_token(complete, special=True)
  tiny_llama.edit_config(vocab_size=90)(complete)
  template = complete / "chat_template.jinja"
  template.write_text("<|odd|>" + template.read_text())
  chat_tokenizer = chat.load(str(complete))
  with pytest.raises(errors.UserError, match=r"needs the token '<\|odd\|>'"):
    chat.prompt_ids(chat_tokenizer, records.user_turn("1"))


@pytest.mark.parametrize(("config", "end"), [([7], 4), ([5], 5), ([5, 4], 4), ([], 4)])
def test_two_tokens_that_follow_an_answer(complete, config, end):
  """An answer's end and then the turn's, as Command R7B writes them: the one that the
  model's config knows ends an answer."""
  (complete / "generation_config.json").write_text(json.dumps({"eos_token_id": config}))
  tiny_llama.edit_config(eos_token_id=None)(complete)
  tokenizer = hf_tokenizer.load(str(complete))
  tokenizer.eos_token = None
  names = tokenizer.convert_ids_to_tokens([4, 5])
  tokenizer.chat_template = (
    "{% for m in messages %}{{ m.content }}" + "".join(names) + "{% endfor %}"
  )
  assert hf_tokenizer.eos_ids(str(complete), tokenizer)[0] == end
