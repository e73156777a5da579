"""What is learned against transformers' rendering of the finished conversation.

The templates are those that TRL ships, the suite's own model's, and short ones in the
manner of known families. Tokens are SmolLM2's, cut as Qwen2's, so that a prompt's last
line ends are the same tokens whatever follows; each marker of a template is one token.
"""

import copy
import dataclasses
import json
import pathlib
import re
import types

import pytest
import transformers

from raft_jax import errors
from raft_jax.evaluation import lm_eval_model
from raft_jax.generation import engines
from raft_jax.hf import (
  answer_turns,
  chat,
  chat_template,
  gguf_file,
  model_source,
  teacher_prompts,
)
from raft_jax.hf import (
  load as hf_load,
)
from raft_jax.hf import (
  save as hf_save,
)
from raft_jax.hf import (
  tokenizer as hf_tokenizer,
)
from raft_jax.storage.records import Message
from tests.helpers import chat_templates

ASKS = chat_templates.ASKS
MANNERS, TEMPLATES = chat_templates.MANNERS, chat_templates.TEMPLATES
opens, made = chat_templates.opens, chat_templates.made
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


def whole(chat_tokenizer: chat.ChatTokenizer) -> chat.ChatTokenizer:
  return chat.of(chat_tokenizer.hf_tokenizer, chat_tokenizer.eos_ids)


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
      answer_turns.ids(made(tokenizer, template, tmp_path), messages, ANSWERS[0])
    return
  chat_tokenizer = made(tokenizer, template, tmp_path)
  prompt_text = theirs(tokenizer, template, messages, prompt=True)
  end = tokenizer.decode([chat_tokenizer.eos_ids[0]])
  for answer in ANSWERS:
    finished = [*messages, Message("assistant", answer)]
    full = theirs(tokenizer, template, finished, prompt=False)
    start = full.rindex(answer.strip())
    cut = full.find(end, start)
    turn = full[: cut + len(end)] if cut >= 0 else full[: start + len(answer.strip())]
    prompt, learned = answer_turns.ids(chat_tokenizer, messages, answer)
    assert learned[-1] == chat_tokenizer.eos_ids[0]
    assert prompt == chat.prompt_ids(chat_tokenizer, messages)
    if cut < 0:  # the template writes no end
      learned = learned[:-1]
    read, said = tokenizer.decode(prompt), tokenizer.decode(learned)
    assert read.startswith(prompt_text)
    if read == prompt_text:
      assert prompt == ids_of(tokenizer, prompt_text)
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


# --- Which template -------------------------------------------------------------------

PLAIN, OTHER = opens(""), opens("").replace("<|im_end|>\\n", "<|im_end|>")


@pytest.fixture
def folder(smollm, complete) -> pathlib.Path:
  """A model's folder without a chat template."""
  (complete / "chat_template.jinja").unlink()
  return complete


def in_config(folder: pathlib.Path, templates: dict[str, str]) -> None:
  path = folder / "tokenizer_config.json"
  named = [{"name": n, "template": t} for n, t in templates.items()]
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({**fields, "chat_template": named}))


def in_files(folder: pathlib.Path, templates: dict[str, str]) -> None:
  (folder / "additional_chat_templates").mkdir()
  for name, template in templates.items():
    place = f"additional_chat_templates/{name}.jinja"
    (folder / ("chat_template.jinja" if name == "default" else place)).write_text(
      template
    )


PLACES = pytest.mark.parametrize("write", [in_config, in_files])


def template_ids(source: str | pathlib.Path, **options) -> list[int]:
  """What transformers gives for a question."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(source)
  return tokenizer.apply_chat_template(
    [{"role": "user", "content": "1"}],
    add_generation_prompt=True,
    return_dict=False,
    **options,
  )


QUESTION = [Message("user", "1")]


@PLACES
def test_the_default_of_several_templates_is_used(folder, write):
  write(folder, {"default": PLAIN, "tool_use": OTHER, "rag": OTHER})
  chat_tokenizer = chat.load(str(folder))
  assert chat.prompt_ids(chat_tokenizer, QUESTION) == template_ids(folder)
  chosen = chat.load(str(folder), "tool_use")
  assert chat.prompt_ids(chosen, QUESTION) == template_ids(
    folder, chat_template="tool_use"
  )
  assert chosen.digest != chat_tokenizer.digest


@PLACES
@pytest.mark.parametrize("name", ["tools", "Default", "tool_use/"])
def test_a_name_that_is_not_there(folder, write, name):
  write(folder, {"default": PLAIN, "tool_use": OTHER})
  says = rf"model\.chat_template.*named '{name}' \(it has: default, tool_use\)"
  with pytest.raises(errors.UserError, match=says):
    chat.load(str(folder), name)


def test_several_templates_without_a_default(folder):
  in_config(folder, {"rag": PLAIN, "tool_use": OTHER})
  with pytest.raises(
    errors.UserError, match=r"named 'default' \(it has: rag, tool_use"
  ):
    chat.load(str(folder))
  chat_tokenizer = chat.load(str(folder), "rag")
  assert chat.prompt_ids(chat_tokenizer, QUESTION) == template_ids(
    folder, chat_template="rag"
  )


def test_a_template_from_a_file(folder, tmp_path):
  file = tmp_path / "mine.jinja"
  file.write_text(OTHER)
  chat_tokenizer = chat.load(str(folder), str(file))
  assert chat.prompt_ids(chat_tokenizer, QUESTION) == template_ids(
    folder, chat_template=OTHER
  )
  with pytest.raises(errors.UserError, match=r"none\.jinja cannot be read"):
    chat.load(str(folder), str(tmp_path / "none.jinja"))
  file.write_bytes(b"\xff\xfe")
  with pytest.raises(errors.UserError, match=r"mine\.jinja cannot be read"):
    chat.load(str(folder), str(file))
  with pytest.raises(errors.UserError, match=r"named 'mine' \(it has: none\)"):
    chat.load(str(folder), "mine")


def test_templates_of_a_gguf_file_have_names(monkeypatch, smollm):
  read = {
    "tokenizer.chat_template": PLAIN,
    "tokenizer.chat_templates": ["tool_use"],
    "tokenizer.chat_template.tool_use": OTHER,
  }
  monkeypatch.setattr(gguf_file, "value", lambda reader, key: read.get(key))
  templates = gguf_file.templates(None)
  assert templates == {"default": PLAIN, "tool_use": OTHER}
  assert chat_template.choose(templates, None, "x") == PLAIN
  assert chat_template.choose(templates, "tool_use", "x") == OTHER


ALWAYS = MANNERS["always_thinks"]


@pytest.mark.parametrize(
  ("templates", "name", "kept"),
  [
    ({"default": PLAIN, "tool_use": OTHER}, None, True),
    ({"default": PLAIN, "tool_use": OTHER}, "tool_use", False),
    ({"default": ALWAYS, "tool_use": OTHER}, None, False),
  ],
)
@PLACES
def test_an_export_renders_as_it_was_trained(folder, write, templates, name, kept):
  """By transformers, which knows nothing of the config; as the source where it did."""
  write(folder, templates)
  config = hf_load.load_config(str(folder))
  params, out = hf_load.load_params(str(folder), config), folder.parent / "out"
  hf_save.save(out, params, config, str(folder), template=name, card="")
  chat_tokenizer = chat.load(str(folder), name)
  assert template_ids(out) == chat.prompt_ids(chat_tokenizer, QUESTION)
  assert chat.load(str(out)).digest == chat_tokenizer.digest
  if kept:
    assert template_ids(out, chat_template="tool_use") == template_ids(
      folder, chat_template="tool_use"
    )


@pytest.mark.parametrize(
  "template", [ALWAYS, MANNERS["qwen3_thinking"], MANNERS["seed"], MANNERS["magistral"]]
)
def test_a_closed_template_is_closed_once(tokenizer, template, tmp_path):
  own = copy.copy(tokenizer)
  own.chat_template = template
  own.chat_template = chat_template.closed(own)
  assert own.chat_template != template
  assert chat_template.closed(own) == own.chat_template
  turns = [*QUESTION, Message("assistant", "2")]
  same = theirs(own, own.chat_template, turns, prompt=False)
  assert same == theirs(tokenizer, template, turns, prompt=False)


@pytest.mark.parametrize("name", ["chatml", "llama2", "granite", "trl/llama3_2"])
def test_templates_without_an_open_part_stay(tokenizer, name):
  own = copy.copy(tokenizer)
  own.chat_template = TEMPLATES[name]
  assert chat_template.closed(own) == TEMPLATES[name]


def test_what_the_teacher_reads_is_followed_as_the_prompt_is(tokenizer, tmp_path):
  """And a template that looks into the question is refused."""
  chat_tokenizer = made(tokenizer, MANNERS["always_thinks"], tmp_path)
  messages = CONVERSATIONS["multi"]
  for form in ("chat", "example", "sibling"):
    prompt, learned, teacher = teacher_prompts.row_ids(
      chat_tokenizer, messages, "It is 12.", form
    )
    shown = teacher_prompts.teacher_messages(messages, "It is 12.", form)
    assert (prompt, learned) == answer_turns.ids(chat_tokenizer, messages, "It is 12.")
    assert (teacher, learned) == answer_turns.ids(chat_tokenizer, shown, "It is 12.")
    assert teacher == teacher_prompts.teacher_ids(
      chat_tokenizer, messages, "It is 12.", form
    )
    assert tokenizer.decode(teacher).endswith("<think>\n\n</think>\n\n")
  looks = opens("").replace(
    "m.content",
    "('> ' if m.role == 'assistant' and 'knowledge' in messages[0].content else '')"
    " + m.content",
  )
  single = CONVERSATIONS["single"]
  with pytest.raises(errors.UserError, match="after the teacher's context"):
    teacher_prompts.row_ids(made(tokenizer, looks, tmp_path), single, "12", "chat")


@pytest.mark.parametrize("answer", ["a</think>b", "<think>x</think>y", "[/THINK]"])
def test_a_template_that_drops_a_part_of_the_answer(tokenizer, answer, tmp_path):
  """Where its words are tokens they are content; else the row is refused."""
  drops = MANNERS["magistral"].replace(
    "split('[/THINK]')", "replace('</think>', '[/THINK]').split('[/THINK]')"
  )
  chat_tokenizer = whole(made(tokenizer, drops, tmp_path))
  _, learned = answer_turns.ids(chat_tokenizer, QUESTION, answer)
  assert tokenizer.decode(learned) == answer + "<|im_end|>"
  marks = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "[/THINK]"])
  assert not set(learned) & set(marks)
  bare = dataclasses.replace(chat_tokenizer, controls=("<|im_start|>", "<|im_end|>"))
  with pytest.raises(errors.UserError, match="leaves out a part of the answer"):
    answer_turns.ids(bare, QUESTION, answer)


# --- Markers that are no special tokens -----------------------------------------------

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[THINK]", "<|odd|>")


CONTENTS = (*MARKERS, "x.<think>y</think> z", "<think><think>", "<tool_call>{}<b>")


@pytest.mark.parametrize("template", [PLAIN, opens("<think>\\n\\n</think>\\n\\n")])
def test_markers_in_content_are_text(smollm, template):
  """Their ids are those of a tokenizer that was never given the markers."""
  given = hf_tokenizer.load(smollm)
  before = {content: given(content).input_ids for content in CONTENTS}
  given.add_tokens(list(MARKERS))
  given.chat_template = template
  chat_tokenizer = chat.of(given, (2,))
  marks = set(given.convert_tokens_to_ids(list(MARKERS)))
  assert min(marks) >= 49152
  roles = ("system", "user", "assistant", "user")
  clean = [Message(role, "x") for role in roles]
  for content in CONTENTS:
    assert chat.encode(chat_tokenizer, content) == before[content]
    assert chat.decode(chat_tokenizer, chat.encode(chat_tokenizer, content)) == content
    messages = [Message(role, content) for role in roles]
    for form in ("chat", "paper", "none"):
      foul = teacher_prompts.row_ids(chat_tokenizer, messages, content, form)
      fair = teacher_prompts.row_ids(chat_tokenizer, clean, "x", form)
      for ids, others in zip(foul, fair, strict=True):
        assert [i for i in ids if i in marks] == [i for i in others if i in marks]
  # What a model writes with its markers is read with them, and its thinking is found.
  said = "<think>hm</think>yes"
  assert set(given(said).input_ids) & marks
  reply = engines.Completion(
    chat.decode(chat_tokenizer, given(said).input_ids), "stop", 1, 4
  )
  assert reply.text == said
  assert engines.strip_thinking(reply).text == "yes"


def test_words_of_a_domain_stay_single_tokens(smollm):
  """Only what steers is split: spaces, HTML's elements and a user's words are text."""
  given = hf_tokenizer.load(smollm)
  words = ["<extra_0>", "[GENE]", "Vertragsrecht", "    ", "<table>", "</h1>"]
  given.add_tokens([*words, "<think>"])
  chat_tokenizer = chat.of(given, (2,))
  for word in words:
    assert len(chat.encode(chat_tokenizer, word)) == 1
  assert len(chat.encode(chat_tokenizer, "<think>")) > 1


def test_markers_of_a_gguf_file_are_text(monkeypatch, smollm):
  """GGUF calls them user-defined."""
  whole = gguf_file.vocabulary(model_source.resolve(smollm))
  added = {**whole.added, "<think>": False, "</think>": False}
  tokens = [*whole.tokens, "<think>", "</think>"]
  changed = whole._replace(added=added, tokens=tokens)
  monkeypatch.setattr(gguf_file, "vocabulary", lambda path: changed)
  chat_tokenizer = chat.load(smollm)
  assert chat_tokenizer.hf_tokenizer("<think>").input_ids == [49152]
  before = chat.encode(dataclasses.replace(chat_tokenizer, plain=None), "<|im_end|>")
  assert chat.encode(chat_tokenizer, "<|im_end|>") == before
  assert max(answer_turns.ids(chat_tokenizer, QUESTION, "<think>2</think>")[1]) < 49152


# --- The date, for all that renders ---------------------------------------------------


@pytest.mark.parametrize("name", ["trl/llama3_2", "trl/gptoss", "smollm3"])
def test_the_harness_reads_the_date_and_template_of_training(name, tokenizer, tmp_path):
  chat_tokenizer = made(tokenizer, TEMPLATES[name], tmp_path)
  adapter = lm_eval_model.Adapter(types.SimpleNamespace(tokenizer=chat_tokenizer), None)
  turns = [{"role": "user", "content": "1"}]
  rendered = adapter.apply_chat_template(turns)
  assert "26 Jul 2024" in rendered
  ids = adapter.tok_encode(rendered, add_special_tokens=False)
  assert ids == chat.prompt_ids(chat_tokenizer, QUESTION)
  begun = [*turns, {"role": "assistant", "content": "It is"}]
  assert adapter.apply_chat_template(begun, False).endswith("It is")
