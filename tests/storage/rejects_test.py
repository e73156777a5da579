"""Rows that cannot be used: named by line and id, or set aside, wherever they are."""

import json
import pathlib

import pyarrow
import pytest
import transformers
from pyarrow import parquet

from raft_jax import errors, refine
from raft_jax.config import schema
from raft_jax.curation import documents as documents_lib
from raft_jax.curation import synthesis_run
from raft_jax.data import training_set
from raft_jax.evaluation import test_sets
from raft_jax.generation import engines
from raft_jax.hf import chat
from raft_jax.storage import question_files
from tests.helpers import refine_driver, refusals, tiny_run

refused = refusals.refusal

STRICT = (
  "{%- for m in messages %}"
  "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
  "{{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
  "{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Refuses two turns of one role and, as some models do, a system turn."""

TWICE = [{"role": "user", "content": "Why?"}, {"role": "user", "content": "Say."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, TWICE[0]]


@pytest.fixture(scope="module")
def strict(tmp_path_factory, smollm):
  """A tiny model whose chat template wants roles to alternate."""
  folder = tiny_run.save_model(tmp_path_factory.mktemp("strict"), smollm)
  (folder / "chat_template.jinja").write_text(STRICT)
  return str(folder)


def rows(count, **others):
  """Usable rows with ids "row-1" and on, but for those given by number."""
  made = [
    {"id": f"row-{i}", "question": f"What is {i}?", "answer": f"A number, {i}."}
    for i in range(1, count + 1)
  ]
  for number, messages in others.items():
    made[int(number[1:]) - 1] = {
      "id": f"row-{number[1:]}",
      "messages": messages,
      "answer": "So.",
    }
  return made


def write(path: pathlib.Path, made) -> str:
  if path.suffix.lower() == ".parquet":
    names = sorted({name for row in made for name in row})
    columns = {name: [row.get(name) for row in made] for name in names}
    parquet.write_table(pyarrow.table(columns), path)
  else:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
  return str(path)


def make_config(tmp_path, source, *, questions, data=None, **sections):
  return schema.Config.model_validate(
    {
      "model": {"source": source},
      "data": {"questions": questions, "answers": "original", **(data or {})},
      "output": str(tmp_path / "out"),
      **sections,
    }
  )


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".parquet", ".Parquet"])
@pytest.mark.parametrize("bad", [TWICE, SYSTEM], ids=["two users", "system"])
def test_a_row_that_the_template_refuses(tmp_path, strict, suffix, bad):
  path = write(tmp_path / f"q{suffix}", rows(400, _317=bad))
  tokenizer = chat.load(strict)
  run = make_config(tmp_path, strict, questions=path)
  message = refused(lambda: training_set.load(run, tokenizer, distil=False))
  assert message.startswith(f"{path}:317: row 'row-317': the model's chat template")
  assert "roles must alternate" in message
  assert "1 of 400 rows" in message
  assert "data.unusable=skip" in message
  skipping = make_config(tmp_path, strict, questions=path, data={"unusable": "skip"})
  loaded = training_set.load(skipping, tokenizer, distil=False)
  assert [row.row_id for row in loaded.rows] == [i for i in range(400) if i != 316]
  (reject,) = loaded.rejects
  assert reject.place == ("row-317", path, 317)
  assert reject.kind == "refused"
  assert "roles must alternate" in reject.reason
  # The order of what is left is a function of the file, and part of what a run is.
  clean = write(tmp_path / "clean.jsonl", rows(400))
  other = make_config(tmp_path, strict, questions=clean)
  assert training_set.load(skipping, tokenizer, distil=False).digest == loaded.digest
  assert training_set.load(other, tokenizer, distil=False).digest != loaded.digest
  # Transformers' own rendering of the rows that are kept.
  theirs = transformers.AutoTokenizer.from_pretrained(strict)
  for row in loaded.rows[315:318]:
    turns = [m._asdict() for m in loaded.questions_by_row[row.row_id][0]]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(row.prompt) == ids


def test_every_reader_of_questions_names_the_row(tmp_path, strict):
  bad = write(tmp_path / "bad.jsonl", rows(9, _5=TWICE))
  good = write(tmp_path / "good.jsonl", rows(8))
  tokenizer = chat.load(strict)
  general = {"anchor": {"importance": "empirical", "questions": bad}}

  def sections(policy):
    data = {"unusable": policy, "test": bad, "validation": bad}
    return make_config(tmp_path, strict, questions=good, data=data)

  for reads in (
    lambda run: test_sets.read_test(run.data, tokenizer, None).rejects,
    lambda run: test_sets.read_validation(run.data, tokenizer, None).rejects,
  ):
    message = refused(lambda reads=reads: reads(sections("error")))
    assert message.startswith(f"{bad}:5: row 'row-5': ")
    (reject,) = reads(sections("skip"))
    assert reject.place == ("row-5", bad, 5)
  replays = {"replay": {"questions": bad, "share": 0.5}}
  for others in (general, replays):
    for policy in ("error", "skip"):
      data = {"unusable": policy}
      run = make_config(tmp_path, strict, questions=good, data=data, **others)
      if policy == "error":
        message = refused(
          lambda run=run: training_set.load(run, tokenizer, distil=False)
        )
        assert message.startswith(f"{bad}:5: row 'row-5': ")
      else:
        (reject,) = training_set.load(run, tokenizer, distil=False).rejects
        assert reject.place == ("row-5", bad, 5)


def test_too_long_rows_are_listed_beside_the_others(tmp_path, strict):
  made = rows(20, _3=TWICE)
  made[6]["answer"] = "long" + " long" * 299
  path = write(tmp_path / "q.jsonl", made)
  tokenizer = chat.load(strict)
  data = {"unusable": "skip"}
  run = make_config(tmp_path, strict, questions=path, data=data)
  message = refused(lambda: training_set.load(run, tokenizer, distil=False))
  assert message.startswith(f"{path}:7: row 'row-7' is too long: answer of 301 tokens")
  run = make_config(tmp_path, strict, questions=path, data={**data, "too_long": "skip"})
  loaded = training_set.load(run, tokenizer, distil=False)
  kinds = [(r.place.line, r.place.id, r.kind) for r in loaded.rejects]
  assert kinds == [(3, "row-3", "refused"), (7, "row-7", "too_long")]


def test_refinement_sets_aside_what_training_could_not_take(
  tmp_path, strict, monkeypatch, capsys
):
  """The model's own tokenizer; the models that answer are scripted."""
  tokenizer = chat.load(strict)
  made = rows(12, _4=TWICE, _9=SYSTEM)
  path = write(tmp_path / "q.jsonl", made)
  for module, name in refine_driver.REPLACED:
    monkeypatch.setattr(module, name, getattr(module, name))
  refine_driver.script(tmp_path / "log")
  monkeypatch.setattr(
    engines, "chat_tokenizer", lambda source, template=None: tokenizer
  )
  run = refine_driver.make_config(tmp_path / "out", path)
  assert refused(lambda: refine.refine(run)).startswith(f"{path}:4: row 'row-4': ")
  assert not (tmp_path / "log").exists()  # no model was asked
  skipping = run.model_copy(
    update={"data": run.data.model_copy(update={"unusable": "skip"})}
  )
  refine.refine(skipping)
  assert "2 rows were set aside (2 refused); the first is" in capsys.readouterr().err
  listed = [json.loads(s) for s in (tmp_path / "out/refined/rejects.jsonl").open()]
  assert [(r["file"], r["line"], r["id"]) for r in listed] == [
    (path, 4, "row-4"),
    (path, 9, "row-9"),
  ]
  # Training takes the records, and says where a row of them is.
  learns = run.model_copy(
    update={
      "data": skipping.data.model_copy(update={"max_answer_tokens": 1}),
    }
  )
  message = refused(lambda: training_set.load(learns, tokenizer, distil=False))
  assert message.startswith(f"{path}:1: row 'row-1' is too long: ")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
  ("given", "says"),
  [
    ({"Question": "Why?", "answer": "So."}, "(or `messages`); rename 'Question'"),
    ({"QUESTION": "Why?", "answer": "So."}, "(or `messages`); rename 'QUESTION'"),
    ({"prompt": "Why?", "answer": "So."}, "(or `messages`); rename 'prompt'"),
    ({"instruction": "Why?", "answer": "So."}, "rename 'instruction'"),
    ({"conversations": "x", "answer": "So."}, "'conversations' to `messages`"),
    ({"question": "Why?", "Answer": "So."}, "has no `answer`; rename 'Answer'"),
    ({"question": "Why?", "response": "So."}, "has no `answer`; rename 'response'"),
    ({"question": "Why?", "anwser": "So."}, "has no `answer`; rename 'anwser'"),
    ({"text": "Why?", "answer": "So."}, "has no `question` (or `messages`); 1 of 1"),
  ],
)
def test_both_readers_hint_at_a_misnamed_field(tmp_path, suffix, given, says):
  path = write(tmp_path / f"q{suffix}", [given])
  message = refused(lambda: question_files.read_questions(path))
  assert message.startswith(f"{path}:1: ")
  assert says in message


@pytest.mark.parametrize("suffix", [".JSONL", ".Jsonl", ".PARQUET", ".Parquet"])
def test_a_suffix_is_read_without_its_case(tmp_path, suffix):
  path = write(tmp_path / f"q{suffix}", rows(3))
  assert [q.id for q in question_files.read_questions(path)] == [
    "row-1",
    "row-2",
    "row-3",
  ]
  seeds, _ = synthesis_run.read_seeds(path)
  assert seeds == ["What is 1?", "What is 2?", "What is 3?"]


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("q.jsonl.bz2", b"BZh", "unknown file type '.bz2'; rows are read from .jsonl"),
    ("q.jsonl.gz", b"\x1f\x8b\x08", "the .gz archive is torn or damaged"),
    ("q.JSONL", b"\x1f\x8b\x08", r"is compressed \(gzip\)"),
    ("q.jsonl", b"PAR1....", "is a Parquet file; name it .parquet"),
    ("q.jsonl", b"PK\x03\x04", "is a zip archive"),
    ("q.jsonl", b"\x28\xb5\x2f\xfd", r"is compressed \(zstd\)"),
    ("q.json", b"[]", "holds no rows"),
    ("q.Parquet", b"{}", "not a readable Parquet file"),
  ],
)
def test_files_of_other_formats_are_named(tmp_path, name, content, says):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError, match=says):
    question_files.read_questions(tmp_path / name)


def test_skip_sets_aside_whatever_is_wrong_with_a_row(tmp_path, capsys):
  lines = [json.dumps(row) for row in rows(6)]
  lines[1] = '{"id": "torn", "question": '
  lines[2] = json.dumps({"id": "empty", "question": "Why?", "answer": ""})
  lines[4] = lines[0]
  path = tmp_path / "q.jsonl"
  path.write_text("\n".join(lines))
  listed = tmp_path / "rejects.jsonl"
  kept = question_files.read_questions(path, unusable="skip", rejects_path=listed)
  assert [q.id for q in kept] == ["row-1", "row-4", "row-6"]
  listed_rows = [json.loads(line) for line in listed.open()]
  assert [(r["line"], r["id"], r["kind"]) for r in listed_rows] == [
    (2, None, "unreadable"),
    (3, "empty", "unreadable"),
    (5, "row-1", "repeated"),
  ]
  assert listed_rows[2]["reason"] == "has the id of line 1"
  told = capsys.readouterr().err
  assert told.count("\n") == 1
  assert "3 rows were set aside (1 repeated, 2 unreadable)" in told
  assert f"all are in {listed}" in told


def test_seeds_and_documents_name_their_rows(tmp_path):
  seeds = tmp_path / "seeds.jsonl"
  seeds.write_text(
    '{"id": "a", "question": "Why?"}\n{"id": "b", "question": ""}\n'
    '{"id": "c", "question": "How?"}\n{"id": "d", "question": "Why?"}\n'
  )
  message = refused(lambda: synthesis_run.read_seeds(str(seeds)))
  assert message.startswith(f"{seeds}:2: row 'b': `question` is empty")
  kept, aside = synthesis_run.read_seeds(str(seeds), "skip")
  assert kept == ["Why?", "How?"]
  assert [(r.place.line, r.place.id) for r in aside] == [(2, "b"), (4, "d")]
  documents = tmp_path / "d.jsonl"
  documents.write_text('{"id": "a", "text": "One."}\n{"id": "b", "text": 3}\n')
  other = write(tmp_path / "other.Parquet", [{"id": "a", "Question": "x"}])
  message = refused(lambda: synthesis_run.read_seeds(other))
  assert f"{other}:1: row 'a': has no `question`; rename 'Question'" in message
  _, (row,) = documents_lib.read(other, text_field="question")
  assert "has no `question`; rename 'Question'; see extract" in row["detail"]
  readable, unusable = documents_lib.read(str(documents))
  assert [document.id for document in readable] == ["a"]
  assert [(row["document"], row["id"]) for row in unusable] == [("d.jsonl:2", "b")]
  with pytest.raises(errors.UserError, match=r"data\.unusable=skip"):
    documents_lib.check("d.jsonl", 1, unusable, 0.01)
  documents_lib.check("d.jsonl", 1, unusable, 0.01, "skip")
