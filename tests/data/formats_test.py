"""Every format in training, refinement and evaluation, against transformers' ids."""

import json
import pathlib

import pyarrow
import pytest
from pyarrow import parquet

from raft_jax import refine
from raft_jax.config import schema
from raft_jax.curation import documents, extraction_run, qa_pairs
from raft_jax.data import training_set
from raft_jax.evaluation import test_sets
from raft_jax.generation import engines
from raft_jax.hf import answer_turns, chat
from raft_jax.storage import records, row_formats, shards
from tests.helpers import refine_driver

SHORT = [("user", "What is a writ?"), ("assistant", "An order of a court.")]
LONG = [
  ("system", "Answer as a lawyer."),
  ("user", "What is a lien?"),
  ("assistant", "A right to keep a thing."),
  ("user", "Until when, and\nby whom?"),
  ("assistant", "Until the debt is paid; by the creditor."),
]
BOTH = [SHORT, LONG]


def turns(conversation, role="role", content="content"):
  return [{role: who, content: text} for who, text in conversation]


def alpaca(conversation):
  *before, (_, question), (_, answer) = conversation
  system = before.pop(0)[1] if before else None
  instruction, _, given = question.partition("\n")
  texts = [text for _, text in before]
  return {
    "instruction": instruction,
    "input": given,
    "output": answer,
    "system": system,
    "history": [texts[i : i + 2] for i in range(0, len(texts), 2)],
  }


def sharegpt(conversation):
  names = {"user": "human", "assistant": "gpt", "system": "system"}
  spoken = [(names[who], text) for who, text in conversation]
  return {"conversations": turns(spoken, "from", "value")}


def parts(conversation):
  found = turns(conversation)
  return [
    {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in found
  ]


# file -> (its conversations, a row of one of them)
FILES = {
  "question.jsonl": ([SHORT], lambda c: {"question": c[0][1], "answer": c[1][1]}),
  "question.csv": ([SHORT], lambda c: {"question": c[0][1], "answer": c[1][1]}),
  "question.jsonl.gz": (
    BOTH,
    lambda c: {"messages": turns(c[:-1]), "answer": c[-1][1]},
  ),
  "messages.jsonl": (BOTH, lambda c: {"messages": turns(c)}),
  "messages.json": (BOTH, lambda c: {"messages": parts(c)}),
  "prompt_completion.tsv": (
    [SHORT],
    lambda c: {"prompt": c[0][1], "completion": c[1][1]},
  ),
  "prompt_completion.parquet": (
    BOTH,
    lambda c: {"prompt": turns(c[:-1]), "completion": turns(c[-1:])},
  ),
  "alpaca.json": (BOTH, alpaca),
  "sharegpt.parquet": (BOTH, sharegpt),
  "sharegpt.jsonl.zst": (BOTH, sharegpt),
}


def write(folder: pathlib.Path, name: str) -> pathlib.Path:
  conversations, row = FILES[name]
  rows = [row(conversation) for conversation in conversations]
  path = folder / name
  suffix = name.partition(".")[2]
  if suffix == "parquet":
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  elif suffix == "json":
    path.write_text(json.dumps(rows))
  elif suffix in ("csv", "tsv"):
    between = {"csv": ",", "tsv": "\t"}[suffix]
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    path.write_text("".join(between.join(line) + "\n" for line in lines))
  else:
    packed = {"gz": "gzip", "zst": "zstd"}.get(suffix.rpartition(".")[2])
    with pyarrow.output_stream(str(path), compression=packed) as stream:
      stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
  return path


@pytest.fixture(scope="module")
def tokenizer(smollm):
  return chat.load(smollm)


def theirs(tokenizer, conversations, which):
  """Ids of prompt and answer of every example, from transformers' own rendering."""

  def ids(turns, **options):
    options = {"tokenize": True, "return_dict": False, **options}
    return tokenizer.hf_tokenizer.apply_chat_template(turns, **options)

  found = []
  for conversation in map(turns, conversations):
    whole = ids(conversation)
    examples = [i for i, t in enumerate(conversation) if t["role"] == "assistant"]
    for i in examples if which == "each" else examples[-1:]:
      prompt = ids(conversation[:i], add_generation_prompt=True)
      end = whole.index(tokenizer.eos_ids[0], len(prompt))
      assert whole[: len(prompt)] == prompt
      found.append((tuple(prompt), tuple(whole[len(prompt) : end + 1])))
  return found


def ours(rows):
  return [(tuple(row.prompt), tuple(row.answer)) for row in rows]


def make_config(folder, source, questions, which, **data) -> schema.Config:
  data = {"questions": str(questions), "answers": "original", "turns": which, **data}
  return schema.Config.model_validate(
    {"model": {"source": source}, "data": data, "output": str(folder / "out")}
  )


def extracted(folder: pathlib.Path) -> pathlib.Path:
  """A file as `extract` writes it."""
  document = documents.Document("a.txt", "law", "A writ is an order of a court.")
  chunk = documents.Chunk(document, 0, 0, document.text)
  (_, question), (_, answer) = SHORT
  row = extraction_run.row_of(qa_pairs.Pair(chunk, question, answer))
  path = folder / "extracted.jsonl"
  path.write_text(json.dumps(row) + "\n")
  return path


@pytest.mark.parametrize("which", ["last", "each"])
@pytest.mark.parametrize("name", FILES)
def test_training_learns_transformers_ids(tmp_path, smollm, tokenizer, name, which):
  config = make_config(tmp_path, smollm, write(tmp_path, name), which)
  found = training_set.load(config, tokenizer, distil=True)
  assert ours(found.rows) == theirs(tokenizer, FILES[name][0], which)
  assert not found.rejects


@pytest.mark.parametrize("which", ["last", "each"])
@pytest.mark.parametrize("name", FILES)
def test_evaluation_asks_transformers_ids(tmp_path, smollm, tokenizer, name, which):
  path = write(tmp_path, name)
  kind = name.partition(".")[0]
  config = make_config(
    tmp_path, smollm, extracted(tmp_path), which, test=str(path), format=None
  )
  found = test_sets.read_test(config.data, tokenizer, None)
  assert ours(found.rows) == theirs(tokenizer, FILES[name][0], which)
  named = config.data.model_copy(update={"format": kind})
  assert test_sets.read_test(named, tokenizer, None).rows == found.rows


@pytest.mark.parametrize("name", FILES)
def test_extracts_output_goes_with_every_format(tmp_path, smollm, tokenizer, name):
  """The file that `extract` writes is learned beside general questions of a format, and
  tests what was learned from one."""
  path, mine = write(tmp_path, name), extracted(tmp_path)
  config = make_config(tmp_path, smollm, path, "each", test=str(mine))
  tested = test_sets.read_test(config.data, tokenizer, None)
  assert ours(tested.rows) == theirs(tokenizer, [SHORT], "each")
  replay = schema.Replay(questions=str(path))
  config = make_config(tmp_path, smollm, mine, "each")
  config = config.model_copy(update={"replay": replay})
  found = training_set.load(config, tokenizer, distil=False)
  assert ours(found.rows) == theirs(tokenizer, [SHORT], "each")
  assert ours(found.replayed) == theirs(tokenizer, FILES[name][0], "each")


@pytest.mark.parametrize("which", ["last", "each"])
@pytest.mark.parametrize("name", FILES)
def test_refinement_refines_every_example(
  tmp_path, smollm, tokenizer, name, which, monkeypatch
):
  """The models that answer are scripted; the tokenizer is the model's own."""
  for module, attribute in refine_driver.REPLACED:
    monkeypatch.setattr(module, attribute, getattr(module, attribute))
  refine_driver.script(tmp_path / "log")
  monkeypatch.setattr(
    engines, "chat_tokenizer", lambda source, template=None: tokenizer
  )
  path = write(tmp_path, name)
  config = refine_driver.make_config(tmp_path / "out", path)
  data = config.data.model_copy(update={"turns": which})
  config = config.model_copy(update={"data": data})
  refine.refine(config)
  expected = theirs(tokenizer, FILES[name][0], which)
  refined = [
    records.from_json(raw).question
    for raw in shards.read_shards(tmp_path / "out/refined")
  ]
  pairs = [answer_turns.ids(tokenizer, q.messages, q.reply) for q in refined]
  assert [tuple(map(tuple, pair)) for pair in pairs] == expected
  # Training takes the records: the same prompts, with the chosen answers.
  rows = training_set.load(config, tokenizer, distil=False).rows
  assert [row.prompt for row in rows] == [prompt for prompt, _ in expected]


def test_the_same_questions_have_one_digest_in_every_file(tmp_path, smollm, tokenizer):
  digests = set()
  for name in ("question.jsonl", "question.csv", "prompt_completion.tsv"):
    config = make_config(tmp_path, smollm, write(tmp_path, name), "last")
    digests.add(training_set.load(config, tokenizer, distil=False).digest)
  assert len(digests) == 1


def test_the_table_of_the_config_is_the_table_of_the_code():
  field = schema.Data.model_fields
  assert str(field["format"].annotation) == (
    f"typing.Optional[typing.Literal[{', '.join(map(repr, row_formats.FORMATS))}]]"
  )
