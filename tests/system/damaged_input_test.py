"""Random damage to everything that is read from outside: an error, never a traceback.

The fast tests try a few damages of each kind, always the same ones. The slow one tries
many others: `DAMAGES=2000 launch/test.sh -m slow tests/system/damaged_input_test.py`.
"""

import csv
import json
import os
import pathlib
import random
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.curation import documents
from raft_jax.generation import openai_replies
from raft_jax.hf import load as hf_load
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.storage import journal, question_files, shards
from tests.helpers import tiny_llama

ROWS = [
  {"id": f"q{n}", "question": f"What is {n}?", "answer": f"It is {n}, as said."}
  for n in range(12)
]
ODD = [
  *(None, True, -1, 0, 2**63, 2**200, 1e308, -0.5, "", "\ud800", "é\x00", [], {}),
  *([[]], [None], {"": {}}, "NaN", float("nan"), "../../etc", "x" * 5000),
]
"""JSON values that nobody expects."""

Errors = tuple[type[Exception], ...]


class Target(NamedTuple):
  """Something that is read from outside.

  Attributes:
    file: which file of the folder is damaged.
    read: returns what is in the file, or in its folder.
    may_raise: the errors of a damaged file.
    unchanged: whether a damaged file that is read must give what the whole one gives.
  """

  file: str
  read: Callable[[pathlib.Path], Any]
  may_raise: Errors = (errors.UserError,)
  unchanged: bool = False


# --- Damage ---------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
  """Flips, cuts, repeats or inserts bytes, at one to three places."""
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(data) + 1)
    length = rng.choice([1, 1, 2, 8, 100, 5000])
    kind = rng.choice(["flip", "cut", "end", "repeat", "insert", "empty"])
    if kind == "flip":
      part = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + length])
      data = data[:at] + part + data[at + length :]
    elif kind == "cut":
      data = data[:at] + data[at + length :]
    elif kind == "end":
      data = data[:at]
    elif kind == "repeat":
      data = data[:at] + data[at : at + length] + data[at:]
    elif kind == "insert":
      data = data[:at] + rng.randbytes(length) + data[at:]
    elif rng.random() < 0.2:
      data = b""
  return data


def other_values(data: bytes, rng: random.Random) -> bytes:
  """JSON, or lines of it, in which one value is another, missing, or a level deeper."""
  lines = data.decode().splitlines() if data.count(b"\n{") else [data.decode()]
  number = rng.randrange(len(lines))
  tree = json.loads(lines[number])
  places = list(walk(tree))
  if not places:
    return data
  parent, key = rng.choice(places)
  kind = rng.choice(["odd", "odd", "odd", "gone", "deeper"])
  if kind == "odd":
    parent[key] = rng.choice(ODD)
  elif kind == "gone":
    del parent[key]
  else:
    parent[key] = [parent[key]]
  lines[number] = json.dumps(tree)
  return "\n".join(lines).encode() + b"\n"


def walk(tree: Any):
  """Every (container, key) of a JSON value."""
  pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in list(pairs):
    yield tree, key
    if isinstance(value, (dict, list)):
      yield from walk(value)


# --- What is read ---------------------------------------------------------------------


def write_rows(folder: pathlib.Path) -> None:
  text = "".join(json.dumps(row) + "\n" for row in ROWS)
  (folder / "rows.jsonl").write_text(text)
  (folder / "rows.json").write_text(json.dumps(ROWS))
  with open(folder / "rows.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, ROWS[0])
    writer.writeheader()
    writer.writerows(ROWS)
  pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
  (folder / "text.txt").write_text("Öl schwimmt auf Wasser. " * 50)


def write_own(folder: pathlib.Path) -> None:
  with journal.open_journal(folder / "journal.jsonl") as calls:
    calls.append({f"key {n}": f"answer {n}" for n in range(12)})
  shards.write_shards(
    folder, [json.dumps(row).encode() for row in ROWS], records_per_shard=5, meta={}
  )
  (folder / "run.yaml").write_text(
    f"model: {{source: some/model}}\ndata:\n  questions: {folder / 'rows.jsonl'}\n"
    "train: {learning_rate: 1.0e-5}\noutput: runs/x\n"
  )
  reply = {
    "choices": [
      {"index": 0, "message": {"content": "Yes."}, "finish_reason": "stop"},
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2},
  }
  (folder / "reply.json").write_text(json.dumps(reply))


def write_gguf(folder: pathlib.Path) -> None:
  """A tiny Llama as GGUF, without a tokenizer."""
  writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_block_count(1)
  writer.add_feed_forward_length(48)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(1e4)
  writer.add_tokenizer_model("gpt2")
  writer.add_token_list([f"t{n}" for n in range(40)])
  shapes = {
    **{"token_embd": (40, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)},
    **{"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)},
    **{"blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,)},
    **{
      "blk.0.ffn_gate": (48, 32),
      "blk.0.ffn_up": (48, 32),
      "blk.0.ffn_down": (32, 48),
    },
  }
  for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def read_reply(path: pathlib.Path) -> Any:
  raw = path.read_bytes()
  body = openai_replies.parsed(raw, raw.decode("utf-8", "replace"))
  return openai_replies.completion(body, 16, ())


def read_journal(path: pathlib.Path) -> Any:
  """The finished calls; damage may lose some, but may not change any."""
  with journal.open_journal(path) as opened:
    calls = {key: opened.calls[key] for key in opened.calls}
  assert calls.items() <= {f"key {n}": f"answer {n}" for n in range(12)}.items()
  return calls


def read_model(path: pathlib.Path) -> Any:
  """What is checked before weights are read; a damaged size could ask for too much."""
  config = hf_load.load_config(str(path.parent))
  hf_load.check_params(str(path.parent), config)
  return config


def read_gguf(path: pathlib.Path) -> Any:
  config = hf_load.load_config(str(path))
  hf_load.check_params(str(path), config)
  return config


def read_questions(path: pathlib.Path) -> Any:
  return question_files.read(path, unusable="skip").questions


NO_REPLY = (openai_replies.NoReply, openai_replies.Refused)
TARGETS = {
  "questions, JSONL": Target("rows.jsonl", read_questions),
  "questions, JSON": Target("rows.json", read_questions),
  "questions, CSV": Target("rows.csv", read_questions),
  "questions, Parquet": Target("rows.parquet", read_questions),
  "a document": Target("text.txt", lambda path: documents.read(str(path))),
  "documents as rows": Target(
    "rows.jsonl", lambda path: documents.read(str(path), text_field="answer")
  ),
  "config": Target("run.yaml", config_load.load),
  "journal": Target("journal.jsonl", read_journal),
  "a shard": Target(
    "shard-00000-of-00003.array_record",
    lambda path: shards.read_shards(path.parent),
    unchanged=True,
  ),
  "a manifest": Target("MANIFEST.json", lambda path: shards.read_shards(path.parent)),
  "a server's reply": Target("reply.json", read_reply, NO_REPLY),
  "a model's config": Target("source/config.json", read_model),
  "safetensors": Target("source/model.safetensors", read_model),
  "tokenizer.json": Target(
    "source/tokenizer.json", lambda path: hf_tokenizer.load(str(path.parent))
  ),
  "tokenizer_config.json": Target(
    "source/tokenizer_config.json", lambda path: hf_tokenizer.load(str(path.parent))
  ),
  "GGUF": Target("model.gguf", read_gguf),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_folder) -> pathlib.Path:
  """One file of every kind, none of them damaged."""
  folder = tmp_path_factory.mktemp("whole")
  write_rows(folder)
  write_own(folder)
  write_gguf(folder)
  tiny_llama.save(folder / "source", tied=True)
  shutil.copytree(tokenizer_folder, folder / "source", dirs_exist_ok=True)
  return folder


@pytest.mark.parametrize("name", TARGETS)
def test_undamaged_files_are_read(whole, name):
  target = TARGETS[name]
  assert target.read(whole / target.file)


def faults_of_damages(whole, tmp_path, name, seed, count) -> list[str]:
  """The damages that were neither one clear error nor read as they may be."""
  faults = []
  target = TARGETS[name]
  original = (whole / target.file).read_bytes()
  expected = target.read(whole / target.file) if target.unchanged else None
  folder = tmp_path / "damaged"
  shutil.copytree(whole, folder)
  path = folder / target.file
  ways = [damaged]
  if path.suffix in (".json", ".jsonl"):
    ways.append(other_values)
  for number in range(count):
    rng = random.Random(f"{name} {seed} {number}")
    data = rng.choice(ways)(original, rng)
    path.write_bytes(data)
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = target.read(path)
    except target.may_raise:
      continue
    except Exception as error:
      faults.append(f"seed {seed}, damage {number}: {error!r}")
      continue
    if target.unchanged and result != expected and data != original:
      faults.append(f"seed {seed}, damage {number}: read as something else")
  return faults


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_an_error_or_is_read(whole, tmp_path, name):
  assert faults_of_damages(whole, tmp_path, name, seed=0, count=40) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damages(whole, tmp_path, name):
  seed = int(os.environ.get("SEED", random.randrange(10**6)))
  count = int(os.environ.get("DAMAGES", "500"))
  assert faults_of_damages(whole, tmp_path, name, seed, count) == []
