"""Chat templates to compare with transformers, and a tokenizer for them.

They are those that TRL ships, and short ones in the manner of known families. Tokens
are SmolLM2's, cut as Qwen2's, so that a prompt's last line ends are the same tokens
whatever follows.
"""

import copy
import datetime
import importlib.util
import pathlib
import re

import pytest
import transformers
from transformers.utils import chat_template_utils

from raft_jax.hf import (
  chat,
  chat_template,
  gguf_file,
  gguf_tokenizer,
  model_source,
)
from raft_jax.hf import tokenizer as hf_tokenizer

TURNS = "{% for m in messages %}"
ASKS = "{% if add_generation_prompt %}"
CHATML = (
  TURNS
  + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
)
HEAD = "<|im_start|>assistant\\n"
LLAMA_2 = (
  "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
  "{% set messages = messages[1:] %}{% endif %}"
  + TURNS
  + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}{% if s and loop.first %}"
  "{{ '<<SYS>>\\n' + s + '\\n<</SYS>>\\n\\n' }}{% endif %}{{ m.content.strip() }}"
  "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
  "{% endfor %}"
)
THINKS_LAST = (
  TURNS
  + "{% if m.role == 'assistant' and loop.last %}{{ '"
  + HEAD
  + "<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' + "
  "m.content + '<|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m.role + '\\n' + "
  "m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


def opens(part: str, turns: str = CHATML) -> str:
  """A template whose prompts open a thinking part."""
  return turns + ASKS + "{{ '" + HEAD + part + "' }}{% endif %}"


MANNERS = {
  "chatml": opens(""),
  "llama2": LLAMA_2,
  "mistral": LLAMA_2.replace("<<SYS>>\\n", "").replace("\\n<</SYS>>", ""),
  # Mistral 0.3: the system's words stand in the last turn, if that is the user's.
  "system_in_last_turn": TURNS
  + "{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.last and messages[0].role == "
  "'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' "
  "}}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
  "{% endfor %}",
  "zephyr": TURNS
  + "{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
  + ASKS
  + "{{ '<|assistant|>\\n' }}{% endif %}",
  "olmo": "{{ bos_token }}"
  + TURNS
  + "{{ '<|' + m.role + '|>\\n' + m.content }}{% if m.role == 'assistant' %}"
  "{{ eos_token }}{% endif %}{{ '\\n' if not loop.last }}{% endfor %}"
  + ASKS
  + "{{ '\\n<|assistant|>\\n' }}{% endif %}",
  "vicuna": TURNS
  + "{{ m.role.upper() + ': ' + m.content + (eos_token if m.role == 'assistant' else "
  "' ') }}{% endfor %}" + ASKS + "{{ 'ASSISTANT:' }}{% endif %}",
  # The header is the same words, and the white space is not.
  "alpaca": TURNS
  + "{{ '### ' + m.role + ': ' + m.content + eos_token }}{% endfor %}"
  + ASKS
  + "{{ '### assistant:\\n' }}{% endif %}",
  "granite": TURNS
  + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
  "'<|end_of_text|>\\n' }}{% endfor %}" + ASKS + "{{ '<|start_of_role|>assistant"
  "<|end_of_role|>' }}{% if thinking %}{{ '<think>' }}{% endif %}{% endif %}",
  # A switch; finished turns have no thinking part.
  "smollm3": "{{ '<|im_start|>system\\nToday: ' + strftime_now('%d %B %Y') + "
  "'<|im_end|>\\n' }}"
  + opens("' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') + '"),
  # Another shape of the empty part than in finished turns.
  "two_shapes": THINKS_LAST
  + ASKS
  + "{{ '"
  + HEAD
  + "' + ('' if enable_thinking else '<think></think>') }}{% endif %}",
  "qwen3_thinking": opens("<think>\\n", THINKS_LAST),
  "always_thinks": CHATML.replace(
    "m.content", "m.content.split('</think>')[-1].lstrip('\\n')"
  )
  + ASKS
  + "{{ '"
  + HEAD
  + "<think>\\n' }}{% endif %}",
  "magistral": CHATML.replace("m.content", "m.content.split('[/THINK]')[-1]")
  + ASKS
  + "{{ '"
  + HEAD
  + "[THINK]' }}{% endif %}",
  "seed": CHATML.replace("m.content", "m.content.split('</seed:think>')[-1]")
  + ASKS
  + "{{ '"
  + HEAD
  + "<seed:think>\\n' }}{% endif %}\n",
  # Nothing says how the part ends.
  "never_closes": opens("<think>\\n"),
  "no_end": TURNS + "{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}" + ASKS + "{{"
  " 'assistant: ' }}{% endif %}",
  "prefilled": opens("Answer: "),
}


def trl_templates() -> dict[str, str]:
  spec = importlib.util.find_spec("trl")
  folder = pathlib.Path(spec.origin).parent / "chat_templates"
  files = sorted(folder.glob("*.jinja"))
  return {f"trl/{file.stem}": file.read_text(encoding="utf-8") for file in files}


TEMPLATES = trl_templates() | MANNERS


def load_tokenizer(smollm: str) -> transformers.PreTrainedTokenizerFast:
  """SmolLM2's, with each marker of the templates as one token."""
  vocabulary = gguf_file.vocabulary(model_source.resolve(smollm))
  ids = {token: index for index, token in enumerate(vocabulary.tokens)}
  backend = gguf_tokenizer.byte_level_bpe(
    ids, vocabulary.merges, gguf_tokenizer.SPLITTERS["qwen2"]
  )
  loaded = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<repo_name>",
    eos_token="<|endoftext|>",
    clean_up_tokenization_spaces=False,
  )
  spelled = r"<[|｜][^<>'\"{}\s]+[|｜]>|<\|?\w+\|?>|</?(?:\w+:)?\w+>|\[/?[A-Z]{3,}\]"
  marks = {m for t in TEMPLATES.values() for m in re.findall(spelled, t)}
  ordinary = {m for m in marks if re.search("(?i)think|tool|function|param", m)}
  loaded.add_tokens(sorted(ordinary))
  loaded.add_special_tokens({"additional_special_tokens": sorted(marks - ordinary)})
  return loaded


def stop_clock(monkeypatch: pytest.MonkeyPatch) -> None:
  """transformers' clock stands still, as ours does."""

  class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls(2024, 7, 26)

    def strftime(self, form):
      return "26 Jul 2024"

  monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def made(tokenizer, template: str, folder: pathlib.Path) -> chat.ChatTokenizer:
  """The chat tokenizer of a model with this template, without markers in contents."""
  (folder / "config.json").write_text("{}")
  own = copy.copy(tokenizer)
  own.chat_template = template
  own.chat_template = chat_template.closed(own)
  ends = hf_tokenizer.eos_ids(str(folder), own)
  return chat.ChatTokenizer(own, ends, ends[0], "", chat.controls(own, ends))
