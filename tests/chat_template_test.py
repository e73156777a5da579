"""What is learned against transformers' rendering of the finished conversation.

The templates are those that TRL ships, the suite's own model's, and short ones in the
manner of known families. Tokens are SmolLM2's, cut as Qwen2's, so that a prompt's last
line ends are the same tokens whatever follows; each marker of a template is one token.
"""

import copy
import datetime
import importlib.util
import pathlib
import re

import pytest
import transformers
from transformers.utils import chat_template_utils

from raft_jax import chat_template, errors, gguf_file, hf, hf_tokenizer, text
from raft_jax.records import Message

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
  found = importlib.util.find_spec("trl")
  folder = pathlib.Path(found.origin).parent / "chat_templates"
  files = sorted(folder.glob("*.jinja"))
  return {f"trl/{file.stem}": file.read_text(encoding="utf-8") for file in files}


TEMPLATES = trl_templates() | MANNERS
CONVERSATIONS = {
  "single": [Message("user", "What is a tort?")],
  "multi": [
    Message("user", "Hi"),
    Message("assistant", " Hello.\n"),
    Message("user", "Why 12?"),
  ],
  "system": [Message("system", "Be brief."), Message("user", "What is a tort?")],
}
ANSWERS = ("A civil wrong,\nno crime.", "final ", "\nnot 1", "(a) <b>bold</b>")

CLOSED = {
  **dict.fromkeys(
    [
      *("trl/deepseek_r1_distill", "trl/deepseek_r1_distill_training"),
      *("trl/deepseekv3", "trl/deepseekv3_training", "always_thinks"),
    ],
    "<think>\n\n</think>\n\n",
  ),
  "smollm3": "<think>\n\n</think>\n",
  "magistral": "[THINK][/THINK]\n\n",
  "seed": "<seed:think>\n\n</seed:think>\n\n",
}
"""The empty thinking part that a prompt ends in and a finished turn does not have."""

SEAMS = {"no_end"}
"""Prompts whose last space would be of the answer's first token."""

PARTS = r"cannot render a question and an answer|leaves the answer out of a finished"
REFUSED = {
  **{
    (name, situation): PARTS
    for name in TEMPLATES
    if re.match("trl/(llava_next|idefics3|smolvlm)", name)
    for situation in CONVERSATIONS
  },
  ("trl/gemma", "system"): "System role not supported",
  ("trl/gemma_training", "system"): "System role not supported",
  ("system_in_last_turn", "system"): "writes another text before a finished answer",
  **{
    (name, situation): "writes another text before a finished answer"
    for name in ("alpaca", "never_closes", "prefilled", "two_shapes")
    for situation in CONVERSATIONS
  },
}
"""What cannot be learned, and the words that say why."""


@pytest.fixture(scope="module")
def tokenizer(smollm):
  vocabulary = gguf_file.vocabulary(hf.resolve(smollm))
  ids = {token: index for index, token in enumerate(vocabulary.tokens)}
  backend = hf_tokenizer.byte_level_bpe(
    ids, vocabulary.merges, hf_tokenizer.SPLITTERS["qwen2"]
  )
  found = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<repo_name>",
    eos_token="<|endoftext|>",
    clean_up_tokenization_spaces=False,
  )
  spelled = r"<[|｜][^<>'\"{}\s]+[|｜]>|<\|?\w+\|?>|</?(?:\w+:)?\w+>|\[/?[A-Z]{3,}\]"
  marks = {m for t in TEMPLATES.values() for m in re.findall(spelled, t)}
  ordinary = {m for m in marks if re.search("(?i)think|tool|function|param", m)}
  found.add_tokens(sorted(ordinary))
  found.add_special_tokens({"additional_special_tokens": sorted(marks - ordinary)})
  return found


@pytest.fixture
def still(monkeypatch):
  """transformers' clock stands still, as ours does."""

  class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls(2024, 7, 26)

    def strftime(self, form):
      return "26 Jul 2024"

  monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def made(tokenizer, template: str, folder: pathlib.Path) -> text.Codec:
  """The codec that a model with this template has."""
  (folder / "config.json").write_text("{}")
  own = copy.copy(tokenizer)
  own.chat_template = template
  own.chat_template = chat_template.closed(own)
  ends = hf_tokenizer.eos_ids(str(folder), own)
  return text.Codec(own, ends, ends[0], "", text.controls(own, ends))


def theirs(tokenizer, template, messages, *, prompt: bool) -> str:
  off = dict.fromkeys(re.findall(r"\benable_thinking\b", template), False)
  return tokenizer.apply_chat_template(
    [m._asdict() for m in messages],
    chat_template=template,
    tokenize=False,
    add_generation_prompt=prompt,
    **off,
  )


def ids_of(tokenizer, rendered: str) -> list[int]:
  return tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("situation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_ids_are_the_templates(name, situation, tokenizer, still, tmp_path):
  template, messages = TEMPLATES[name], CONVERSATIONS[situation]
  if (name, situation) in REFUSED:
    with pytest.raises(errors.UserError, match=REFUSED[name, situation]):
      text.turn_ids(made(tokenizer, template, tmp_path), messages, ANSWERS[0])
    return
  codec = made(tokenizer, template, tmp_path)
  asked = theirs(tokenizer, template, messages, prompt=True)
  end = tokenizer.decode([codec.eos_ids[0]])
  for answer in ANSWERS:
    finished = [*messages, Message("assistant", answer)]
    whole = theirs(tokenizer, template, finished, prompt=False)
    start = whole.rindex(answer.strip())
    cut = whole.find(end, start)
    turn = whole[: cut + len(end)] if cut >= 0 else whole[: start + len(answer.strip())]
    prompt, learned = text.turn_ids(codec, messages, answer)
    assert learned[-1] == codec.eos_ids[0]
    assert prompt == text.prompt_ids(codec, messages)
    if cut < 0:  # the template writes no end
      learned = learned[:-1]
    read, said = tokenizer.decode(prompt), tokenizer.decode(learned)
    assert read.startswith(asked)
    if read == asked:
      assert prompt == ids_of(tokenizer, asked)
    if name in CLOSED:
      assert read.endswith(CLOSED[name])
      header = read.removesuffix(CLOSED[name])
      assert header + said == turn
    else:
      assert read + said == turn
      if name in SEAMS or answer[:1].isspace():
        assert learned == ids_of(tokenizer, turn.removeprefix(read))
      else:
        assert prompt + learned == ids_of(tokenizer, turn)
    # Thinking is off: no part is open where the answer begins.
    assert read.count("<think>") == read.count("</think>")
