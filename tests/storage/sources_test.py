"""Folders, globs, saved datasets and the hub; addresses that name nothing readable."""

import json
import os
import pathlib
import subprocess
import sys

import datasets
import pytest

from raft_jax import errors
from raft_jax.config import run_lock
from raft_jax.storage import question_files, sources
from raft_jax.training import checkpoint
from tests.helpers import dataset_hub, least_config, refusals


def lines(*names: str) -> str:
  rows = [{"id": name, "question": f"{name}?", "answer": name} for name in names]
  return "".join(json.dumps(row) + "\n" for row in rows)


def refused(address: object, **options) -> str:
  message = refusals.refusal(question_files.read, address, **options)
  assert message == (sources.problem(str(address)) or message)
  return message


def ids(address: object) -> list[str]:
  return [question.id for question in question_files.read_questions(address)]


def test_a_folder_and_a_glob_are_read_in_order_of_names(tmp_path):
  (tmp_path / "b.jsonl").write_text(lines("3"))
  (tmp_path / "a.csv").write_text("id,question,answer\n1,x,y\n2,x,y\n")
  (tmp_path / "README.md").write_text("no rows")
  (tmp_path / ".hidden.jsonl").write_text("{")
  (tmp_path / "deeper").mkdir()
  (tmp_path / "deeper" / "c.jsonl").write_text(lines("4"))
  assert ids(tmp_path) == ["1", "2", "3"]
  assert ids(f"{tmp_path}/*.jsonl") == ["3"]
  assert ids(f"{tmp_path}/**/*.jsonl") == ["3", "4"]
  read = question_files.read(tmp_path)
  assert str(read.places["2"]) == f"{tmp_path}/a.csv:3: row '2'"
  assert str(read.places["3"]) == f"{tmp_path}/b.jsonl:1: row '3'"


def test_a_file_with_brackets_in_its_name_is_no_glob(tmp_path):
  (tmp_path / "q[1].jsonl").write_text(lines("1"))
  (tmp_path / "q1.jsonl").write_text(lines("2"))
  assert ids(tmp_path / "q[1].jsonl") == ["1"]


def test_an_id_in_two_files_names_both(tmp_path):
  (tmp_path / "a.jsonl").write_text(lines("1"))
  (tmp_path / "b.jsonl").write_text(lines("0", "1"))
  message = refused(tmp_path)
  assert f"{tmp_path}/b.jsonl:2: duplicate id: '1'" in message
  assert f"has the id of {tmp_path}/a.jsonl:1" in message


def test_the_limit_ends_in_the_middle_of_a_file(tmp_path):
  (tmp_path / "a.jsonl").write_text(lines("1", "2"))
  (tmp_path / "b.jsonl").write_text(lines("3", "4"))
  found = question_files.read_questions(tmp_path, limit=3)
  assert [question.id for question in found] == ["1", "2", "3"]


def test_a_folder_that_mixes_splits_is_refused(tmp_path):
  for name in ("train-00000.jsonl", "test-00000.jsonl"):
    (tmp_path / name).write_text(lines(name))
  message = refused(tmp_path)
  assert (
    "holds files of several splits (test-00000.jsonl, train-00000.jsonl)" in message
  )
  assert ids(f"{tmp_path}/train*") == ["train-00000.jsonl"]


def test_addresses_that_name_nothing(tmp_path):
  (tmp_path / "data").mkdir()
  assert "is a folder without files of rows; it has the folders data" in refused(
    tmp_path
  )
  assert "no file matches" in refused(f"{tmp_path}/*.csv")
  assert "no such file" in refused(tmp_path / "q.csv")
  (tmp_path / "notes.md").write_text("x")
  assert "matches" in refused(f"{tmp_path}/*.md")
  assert "unknown file type '.md'" in refused(tmp_path / "notes.md")


@pytest.mark.parametrize(
  "address",
  ["hub://", "hub://squad", "hub://a/b/c/d", "hub://a/b:", "hub://a/b@", "hub://a b/c"],
)
def test_an_address_of_the_hub_has_one_grammar(address):
  assert "write hub://ORG/NAME[:CONFIG][/SPLIT][@REVISION]" in refused(address)


def test_saved_datasets(tmp_path):
  rows = [{"id": f"{i}", "question": "Why?", "answer": f"{i}"} for i in range(5)]
  whole = datasets.Dataset.from_list(rows)
  whole.save_to_disk(tmp_path / "one", num_shards=2)
  assert ids(tmp_path / "one") == list("01234")
  picked = whole.select([4, 2])
  picked.save_to_disk(tmp_path / "picked")
  assert ids(tmp_path / "picked") == ["4", "2"]
  read = question_files.read(tmp_path / "one")
  assert str(read.places["4"]) == f"{tmp_path}/one:5: row '4'"
  both = datasets.DatasetDict(train=whole, test=picked)
  both.save_to_disk(tmp_path / "both")
  message = refused(tmp_path / "both")
  assert "holds the splits test, train of a dataset; name one of them" in message
  assert ids(tmp_path / "both/test") == ["4", "2"]
  arrow = next((tmp_path / "one").glob("*.arrow"))
  arrow.write_bytes(arrow.read_bytes()[:300])
  assert "not a readable Arrow file" in refused(tmp_path / "one")
  (tmp_path / "picked/state.json").write_text("{")
  assert "state.json is damaged" in refused(tmp_path / "picked")


def test_a_saved_conversation_of_mixed_types_is_read(tmp_path):
  """`datasets` keeps such a column as JSON texts."""
  turns = [
    {"role": "user", "content": "A?"},
    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
  ]
  saved = datasets.Dataset.from_list([{"messages": turns}], on_mixed_types="use_json")
  assert "Json" in str(saved.features)
  saved.save_to_disk(tmp_path / "chat")
  (question,) = question_files.read_questions(tmp_path / "chat")
  assert (question.messages[0].content, question.answer) == ("A?", "a")


def test_a_test_file_among_the_training_files_is_refused(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.jsonl").write_text(lines(name))
  with pytest.raises(errors.UserError) as caught:
    least_config.least(
      tmp_path, f"data.questions={tmp_path}", f"data.test={tmp_path}/b.jsonl"
    )
  assert "data.test: holds" in str(caught.value)
  assert "b.jsonl, which is also in data.questions" in str(caught.value)


# The hub, in a process of its own: its libraries read their settings when they start

READ = """
import json, sys
from raft_jax import errors
from raft_jax.storage import question_files, sources

for address in sys.argv[1:]:
  try:
    read = question_files.read(address)
  except errors.UserError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
    continue
  print(json.dumps({
    "ids": [question.id for question in read.questions],
    "place": str(next(iter(read.places.values()))),
    "formats": read.formats,
    "commits": sources.revisions(address),
  }))
"""


def ask(hub_url: str, home: pathlib.Path, *addresses: str, **settings) -> list[dict]:
  environment = {
    **os.environ,
    "HF_ENDPOINT": hub_url,
    "HF_HUB_OFFLINE": "0",
    "HF_HOME": str(home),
    **settings,
  }
  done = subprocess.run(
    [sys.executable, "-c", READ, *addresses],
    check=False,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


CONFIGS = b"""---
configs:
- config_name: law
  data_files:
  - {split: train, path: law/train.jsonl}
- config_name: tax
  data_files:
  - {split: train, path: tax/train.jsonl}
---
"""


def test_datasets_of_the_hub(tmp_path):
  with dataset_hub.serving() as hub:
    first = hub.push("org/one", {"data/train.jsonl": lines("1", "2").encode()})
    hub.push(
      "org/two",
      {"train.jsonl": lines("1").encode(), "test.jsonl": lines("2").encode()},
    )
    alpaca = b'{"instruction": "Translate.", "input": "Hund", "output": "dog"}'
    hub.push(
      "org/many",
      {
        "README.md": CONFIGS,
        "law/train.jsonl": lines("1").encode(),
        "tax/train.jsonl": alpaca,
      },
    )
    hub.push("org/gated", {"train.jsonl": lines("1").encode()})
    hub.gated.add("org/gated")
    found = ask(
      hub.url,
      tmp_path / "home",
      "hub://org/one",
      "hub://org/two/test",
      "hub://org/many:tax",
      "hub://org/two",
      "hub://org/two/dev",
      "hub://org/many",
      "hub://org/many:civil/train",
      "hub://org/gated",
      "hub://org/none",
      "hub://org/one@v1.0",
    )

    one, test, tax, *faults = found
    assert one["ids"] == ["1", "2"]
    assert one["commits"] == {"hub://org/one": first}
    assert one["place"] == f"hub://org/one/train@{first[:12]}:1: row '1'"
    assert test["ids"] == ["2"]
    assert [*tax["formats"].values()] == ["alpaca"]
    says = [
      "names no split; those of the dataset are train, test: write hub://org/two/train",
      "has no split 'dev'; those of the dataset are train, test",
      "names no config; those of the dataset are law, tax: write hub://org/many:law",
      "has no config 'civil'; those of the dataset are law, tax",
      "the dataset is gated; accept its terms on the hub's page of the dataset, then "
      "log in by `hf auth login` or set HF_TOKEN",
      "no such dataset, or it is private",
      "the dataset has no such revision",
    ]
    for fault, words in zip(faults, says, strict=True):
      assert words in fault["error"]
      assert fault["kind"] == "UserError"
    second = hub.push("org/one", {"data/train.jsonl": lines("3").encode()})
    now, pinned = ask(
      hub.url, tmp_path / "home", "hub://org/one", f"hub://org/one@{first}"
    )
    assert (now["ids"], now["commits"]) == (["3"], {"hub://org/one": second})
    assert (pinned["ids"], pinned["commits"]) == (["1", "2"], {"hub://org/one": first})
    url = hub.url
  (away,) = ask(url, tmp_path / "home", "hub://org/one")
  assert away["kind"] == "TryAgainError"
  assert "the hub cannot be reached" in away["error"]
  (offline,) = ask(url, tmp_path / "home", "hub://org/one", HF_HUB_OFFLINE="1")
  assert "HF_HUB_OFFLINE is set" in offline["error"]


def test_a_run_refuses_another_commit_and_says_how_to_keep_the_first(tmp_path):
  key = "commit of hub://org/one"
  with pytest.raises(errors.UserError) as caught:
    checkpoint.check_identity(tmp_path, {key: "1" * 40}, {key: "2" * 40})
  assert f"name the dataset with @{'1' * 40}, choose another" in str(caught.value)


def test_the_lock_of_a_folder_lets_a_revision_be_named(tmp_path):
  def config(address: str):
    where = f"output={tmp_path}/out"
    return least_config.least(tmp_path, f"data.questions={address}", where)

  first = config("hub://org/one")
  run_lock.lock_config(first, "train", ["data.questions"])
  (tmp_path / "out/checkpoints/1").mkdir(parents=True)
  run_lock.check_lock(config("hub://org/one@v2"), "train", ["data.questions"])
  with pytest.raises(errors.UserError, match="hub://org/one -> hub://org/two"):
    run_lock.check_lock(config("hub://org/two"), "train", ["data.questions"])
