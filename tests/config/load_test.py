"""The config file: what it accepts, what it refuses and how it says so."""

import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from raft_jax import errors
from raft_jax.config import load as config_load
from tests.helpers import least_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _root(monkeypatch):
  monkeypatch.chdir(ROOT)  # relative data paths start there


def refused(path: pathlib.Path, *overrides: str) -> list[str]:
  with pytest.raises(errors.UserError) as caught:
    config_load.load(path, overrides)
  return str(caught.value).splitlines()


def test_least_file_gives_the_papers_settings(tmp_path):
  c = least_config.least(tmp_path)
  # The paper's stage 2.
  assert (c.train.batch_size, c.train.epochs, c.train.learning_rate) == (16, 3, 5e-6)
  assert (c.distill.top_k, c.distill.temperature, c.balance.decay) == (512, 1.5, 0.9)
  assert c.refine.similarity_threshold == 0.8
  assert [j.engine for j in c.refine.judges] == ["encoder"]


def test_values_are_read_by_yaml_1_2(tmp_path):
  path = least_config.write(
    tmp_path,
    f"""\
    model: {{source: no, remat: true}}
    data: {{questions: {least_config.QUESTIONS}}}
    train: {{learning_rate: 1e-5, batch_size: 010, weight_decay: .5, clip: ~}}
    balance: {{eps: 1E-9, max_weight: 50}}
    refine: {{encoder: 12:30}}
    output: 2026-01-01
    """,
  )
  c = config_load.load(path)
  assert c.model.source == "no"
  assert c.model.remat is True
  assert (c.train.learning_rate, c.train.batch_size) == (1e-5, 10)
  assert (c.train.weight_decay, c.train.clip) == (0.5, None)
  assert (c.balance.eps, c.balance.max_weight) == (1e-9, 50.0)
  assert (c.refine.encoder, c.output) == ("12:30", "2026-01-01")


def test_byte_order_mark_and_crlf(tmp_path):
  path = tmp_path / "c.yaml"
  path.write_bytes(b"\xef\xbb\xbf" + least_config.LEAST.replace("\n", "\r\n").encode())
  assert config_load.load(path).output == "runs/x"


def test_overrides_in_both_forms(tmp_path):
  c = least_config.least(
    tmp_path,
    "train.batch_size=8",
    "--train.learning_rate",
    "1e-4",
    "--mesh.fsdp=1",
    "--mesh.data",
    "-1",
    "refine.judges=[{engine: jax}, {engine: encoder}]",
    "refine.judges.1.batch_size=3",
    "data.limit=",
    "output=a=b",
    "train.batch_size=4",
  )
  assert (c.train.batch_size, c.train.learning_rate) == (4, 1e-4)
  assert (c.mesh.fsdp, c.mesh.data) == (1, -1)
  assert [j.engine for j in c.refine.judges] == ["jax", "encoder"]
  assert c.refine.judges[1].batch_size == 3
  assert c.data.limit is None
  assert c.output == "a=b"


# name: (text appended to the least file, line it stands on, key, what must be said)
BAD_FILES = {
  "misspelt key": (
    "train: {bach_size: 8}",
    4,
    "train.bach_size",
    "`train.batch_size`?",
  ),
  "misspelt section": ("tran: {epochs: 1}", 4, "tran", "did you mean `train`?"),
  "key without its section": (
    "learning_rate: 1e-5",
    4,
    "learning_rate",
    "did you mean `train.learning_rate`?",
  ),
  "alien key": ("mesh: {zzz: 1}", 4, "mesh.zzz", "`mesh` has data, fsdp, tensor"),
  "text for int": ("train: {epochs: many}", 4, "train.epochs", 'number, got "many"'),
  "quoted int": ('train:\n  epochs: "3"', 5, "train.epochs", "must be a whole number"),
  "bool for int": (
    "train: {epochs: true}",
    4,
    "train.epochs",
    "whole number, got true",
  ),
  "float for int": ("train: {epochs: 1.5}", 4, "train.epochs", "whole number, got 1.5"),
  "zero": ("train: {epochs: 0}", 4, "train.epochs", "must be greater than 0, got 0"),
  "out of range": (
    "refine: {similarity_threshold: 1.5}",
    4,
    "refine.similarity_threshold",
    "less than or equal to 1, got 1.5",
  ),
  "no top-k": ("distill: {top_k: 0}", 4, "distill.top_k", "greater than 0"),
  "no temperature": ("distill: {temperature: 0}", 4, "distill.temperature", "than 0"),
  "decay of 1": ("balance: {decay: 1}", 4, "balance.decay", "less than 1"),
  "unknown word": (
    "distill: {direction: forwrd}",
    4,
    "distill.direction",
    "must be 'forward', 'reverse' or 'jsd', got \"forwrd\"",
  ),
  "yes": ("model: {source: x, remat: yes}", 4, "model.remat", "must be true or false"),
  "infinity": ("train: {clip: .inf}", 4, "train.clip", "must be a number"),
  "too large a float": ("train: {clip: 1e999}", 4, "train.clip", "not a finite number"),
  "no section": ("train:", 4, "train", "must be a section of `key: value` lines"),
  "not a list": ("refine: {judges: jax}", 4, "refine.judges", "must be a list"),
  "empty list": ("refine: {judges: []}", 4, "refine.judges", "must not be empty"),
  "in a list": (
    "refine:\n  judges:\n  - engine: jax\n  - engin: jax",
    7,
    "refine.judges.1.engin",
    "did you mean `refine.judges.1.engine`?",
  ),
  "encoder cannot write": (
    "refine: {rewriter: {engine: encoder}}",
    4,
    "refine.rewriter.engine",
    "only a judge can be the encoder",
  ),
  "negative seed": ("train: {seed: -1}", 4, "train.seed", "greater than or equal to 0"),
  "duplicate": (
    "train: {epochs: 1,\n  epochs: 1}",
    5,
    "train.epochs",
    "is given twice (first at {path}:4); keep one",
  ),
  "duplicate section": ("mesh: {}\nmesh: {}", 5, "mesh", "is given twice"),
  "python tag": (
    "method: !!python/object/apply:os.system ['touch pwned']",
    4,
    "method",
    "python/object/apply:os.system is not allowed",
  ),
  "other tag": ("method: !secret x", 4, "method", "the tag !secret is not allowed"),
  "set tag": ("method: !!set {a}", 4, "method", "is not allowed"),
  "broken yaml": ("train: {epochs: 1", 5, "", "not valid YAML"),
  "tab": ("train:\n\tepochs: 1", 5, "", "not valid YAML"),
  "alias": ("method: &a raft\ndata: *a", 5, "", "* refers to an anchor"),
  "two documents": ("---\nmethod: x", 4, "", "not valid YAML"),
  "missing file": (
    "",
    2,
    "data.questions",
    "'no/train.jsonl' is not a file (looked in",
  ),
  # Right each by itself, but not together.
  "two rests": ("mesh: {data: -1, fsdp: -1}", 4, "mesh", "only one axis may be -1"),
  "no devices": ("mesh: {tensor: 0}", 4, "mesh.tensor", "devices or -1, got 0"),
  "uneven split": (
    "train: {batch_size: 16, micro_batches: 3}",
    4,
    "train.micro_batches",
    "must divide train.batch_size=16, got 3",
  ),
  "nothing measured": (
    "train: {gradient_stats_every: 0}\nbalance: {mode: gradient_norm}",
    4,
    "train.gradient_stats_every",
    "above 0 for balance.mode=gradient_norm",
  ),
  "old name": (
    "train: {measure_every: 8}",
    4,
    "",
    "train.measure_every: unknown key; it is now called `train.gradient_stats_every`",
  ),
  "no ratio to reach": (
    "balance: {mode: gradient_norm, weight: 0.0}",
    4,
    "balance.weight",
    "above 0 for balance.mode=gradient_norm",
  ),
  "key in the place of its name": (
    "evaluate: {judges: [{engine: openai, api_key_env: sk-secret-1}]}",
    4,
    "evaluate.judges.0.api_key_env",
    "must be the name of an environment variable, which holds the key",
  ),
  "no loss left": (
    "train: {cross_entropy: false}\nbalance: {mode: fixed, weight: 0.0}",
    4,
    "train.cross_entropy",
    "with a weight of 0 no loss is left",
  ),
  "equal rollouts": (
    "rollout: {group: 2, temperature: 0.0}",
    4,
    "rollout.temperature",
    "rollouts of a question are equal",
  ),
  "layers unread": ("freeze: {layers: 3}", 4, "freeze.layers", "freeze.mode=bottom"),
  "average unread": (
    "distill: {average_rate: 0.1}",
    4,
    "distill.average_rate",
    "distill.teacher=average only",
  ),
  "share unread": (
    "distill: {on_policy: 0.9}",
    4,
    "distill.on_policy",
    "distill.trajectory=mixed only",
  ),
  "beta unread": ("distill: {beta: 0.1}", 4, "distill.beta", "direction=jsd only"),
  "start unread": ("balance: {start: 1}", 4, "balance.start", "mode=schedule only"),
  "weight unread": ("balance: {weight: 2}", 4, "balance.weight", "balance.mode=ema"),
  "nothing distilled": (
    "rollout: {max_new_tokens: 8}\ndistill: {skip_first: 8}",
    5,
    "distill.skip_first",
    "leaves no token of rollout.max_new_tokens=8",
  ),
  "encoder judge with a model": (
    "refine: {judges: [{engine: encoder, model: x}]}",
    4,
    "refine.judges.0.model",
    "uses refine.encoder",
  ),
  "key of another engine": (
    "refine: {fusion: {engine: openai, model: m, base_url: 'http://x/v1',\n"
    "  tensor_parallel: 2}}",
    5,
    "refine.fusion.tensor_parallel",
    "is read with engine: vllm only",
  ),
  "server for no engine": (
    "refine: {judges: [{engine: vllm, base_url: 'http://x/v1'}]}",
    4,
    "refine.judges.0.base_url",
    "is read with engine: openai only",
  ),
  "server without an address": (
    "refine: {rewriter: {engine: openai, model: m, base_url: 'x:80'}}",
    4,
    "refine.rewriter.base_url",
    "must be the server's address, like http://localhost:8000/v1",
  ),
  "server without a model": (
    "refine: {rewriter: {engine: openai, base_url: 'http://x/v1'}}",
    4,
    "refine.rewriter.model",
    "is required with engine: openai",
  ),
  "judge twice": (
    "refine: {judges: [{engine: jax}, {engine: jax}]}",
    4,
    "refine.judges.1",
    "same judge again",
  ),
  "judge twice, by servers": (
    "evaluate: {judges: [{engine: openai, model: m, base_url: 'http://a/v1'}, "
    "{engine: openai, model: m, base_url: 'http://b/v1', batch_size: 2}]}",
    4,
    "evaluate.judges.1",
    r"servers tell models apart by name",
  ),
}


def test_a_key_in_the_place_of_its_name_is_not_repeated(tmp_path):
  path = least_config.write(
    tmp_path, least_config.LEAST + BAD_FILES["key in the place of its name"][0]
  )
  (message,) = refused(path)
  assert "secret" not in message


def test_half_a_character_is_a_fault_of_the_file(tmp_path):
  assert (
    "Invalid JSON"
    in refused(least_config.write(tmp_path, least_config.LEAST), 'method="\\ud800"')[-1]
  )


def test_cudnn_wants_bfloat16_and_even_rollouts(tmp_path):
  path = least_config.write(tmp_path, least_config.LEAST)
  odd = ["model.attention=cudnn", "rollout.max_new_tokens=9"]
  with pytest.raises(errors.UserError) as caught:
    config_load.load(path, odd)
  assert "model.attention: cudnn computes in bfloat16" in str(caught.value)
  assert "rollout.max_new_tokens: must be even" in str(caught.value)
  config_load.load(path, [odd[0], "rollout.max_new_tokens=8", "model.dtype=bfloat16"])


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_with_place_key_and_remedy(tmp_path, name):
  text, line, key, says = BAD_FILES[name]
  start = least_config.LEAST
  if name == "yes":
    start = least_config.LEAST.replace("model: {source: some/model}", "method: raft")
  if name == "alias":
    start = least_config.LEAST.replace(
      f"data: {{questions: {least_config.QUESTIONS}}}", "mesh: {data: 1}"
    )
  if name == "missing file":
    start = least_config.LEAST.replace(least_config.QUESTIONS, "no/train.jsonl")
  path = least_config.write(tmp_path, start + text + "\n")
  (message,) = refused(path)
  assert message.startswith(f"{path}:{line}: {key + ': ' if key else ''}")
  assert says.format(path=path) in message
  assert not pathlib.Path("pwned").exists()


@pytest.mark.parametrize(
  ("override", "says"),
  [
    ("train.bach_size=8", "train.bach_size: unknown key; did you mean `train.batch_s"),
    ("train.measure_every=5", "train.measure_every: unknown key; it is now called `tr"),
    ("watch={}", "watch: unknown key; it is now called `validation`"),
    ("train.epochs=x", 'train.epochs: must be a whole number, got "x"'),
    ("train.epochs=*x", "train.epochs: not valid YAML"),
    ("train.epochs", "'train.epochs' is not an override; write key=value"),
    ("--train.epochs", "--train.epochs: has no value"),
    ("output=~/x", "output: begins with ~, which only a shell expands"),
    (
      f"data.test={least_config.QUESTIONS}",
      "data.test: is data.questions, so memorised answers",
    ),
    ('output="a\\0b"', "output: holds a NUL character"),
    ("output.x=1", "output.x: there is no output to put it in"),
    ("refine.judges.0.model=x", "refine.judges.0.model: there is no refine.judges.0"),
    ("data.test=no.jsonl", "data.test: 'no.jsonl' is not a file"),
    ("=1", "'=1' is not an override"),
  ],
)
def test_bad_override_names_the_command_line(tmp_path, override, says):
  path = least_config.write(
    tmp_path, least_config.LEAST + "refine: {judges: []}\n" * ("judges" in override)
  )
  message = "\n".join(refused(path, override))
  assert f"command line: {says}" in message


def test_every_fault_is_reported_at_once(tmp_path):
  path = least_config.write(
    tmp_path,
    """\
    data: {questions: no.jsonl, limt: 3}
    train: {epochs: 0, epochs: 0, seed: "x"}
    refine: {judges: [{modle: x}]}
    """,
  )
  head, *lines = refused(path, "train.x=1")
  assert head == "9 faults in the config"
  assert sorted(line.split(": ")[1] for line in lines) == [
    "data.limt",
    "data.questions",
    "model",
    "output",
    "refine.judges.0.modle",
    "train.epochs",  # given twice
    "train.epochs",  # and 0
    "train.seed",
    "train.x",
  ]


def test_empty_foreign_and_missing_files(tmp_path):
  assert "is empty" in refused(least_config.write(tmp_path, "# nothing\n"))[0]
  assert (
    "is not a list of `key: value`" in refused(least_config.write(tmp_path, "- a\n"))[0]
  )
  assert "No such file" in refused(tmp_path / "none.yaml")[0]
  assert "check --config" in refused(tmp_path)[0]
  (tmp_path / "c.yaml").write_bytes(b"output: \xff")
  assert "is not UTF-8" in refused(tmp_path / "c.yaml")[0]
  assert "not valid YAML" in refused(least_config.write(tmp_path, "output: \x07"))[0]
  assert "not valid YAML" in refused(least_config.write(tmp_path, "[" * 10_000))[0]


# Writing and comparing


@hypothesis.given(
  st.text(), st.floats(0, 1e300), st.sampled_from(["1e-5", "no", "~", "1"])
)
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.example(text="\U0007b88d]t\x85D", number=1.5, word="1e-5")
@hypothesis.example(text="é" * 300, number=1.5, word="1e-5")  # no file name can be
def test_dump_loads_as_the_same_config(tmp_path_factory, text, number, word):
  hypothesis.assume(text.strip() and not any("\ud800" <= c <= "\udfff" for c in text))
  hypothesis.assume("\0" not in text and not text.startswith("~"))
  folder = tmp_path_factory.mktemp("dump")
  c = least_config.least(folder)
  c = c.model_copy(
    update={
      "output": text,
      "refine": c.refine.model_copy(update={"encoder": word}),
      "train": c.train.model_copy(update={"learning_rate": number}),
    }
  )
  assert config_load.load(write_raw(folder, config_load.dump(c))) == c


def write_raw(folder: pathlib.Path, text: str) -> pathlib.Path:
  (folder / "d.yaml").write_bytes(text.encode())
  return folder / "d.yaml"


def test_digest_sees_values_not_order(tmp_path):
  c = least_config.least(tmp_path)
  tree = c.model_dump(mode="json")
  assert config_load.digest(c) == config_load.digest(dict(reversed(tree.items())))
  assert config_load.digest(c) != config_load.digest(
    least_config.least(tmp_path, "train.seed=1")
  )
  # echo -n '{"a": 1}' | sha256sum
  assert config_load.digest({"a": 1}).startswith("f9d86028c6e0d64e225186f96acb6933")


def test_diff(tmp_path):
  a = least_config.least(tmp_path)
  b = least_config.least(tmp_path, "train.seed=1", "refine.judges=[{}, {engine: jax}]")
  assert config_load.diff(a, a) == {}
  changes = config_load.diff(a, b)
  assert changes["train.seed"] == (0, 1)
  assert changes["refine.judges.1.engine"] == (config_load.ABSENT, "jax")
  assert {key.rsplit(".", 1)[0] for key in changes} == {"train", "refine.judges.1"}
  assert config_load.diff({"a": {"b": 1}}, {"a": 2}) == {
    "a.b": (1, config_load.ABSENT),
    "a": (config_load.ABSENT, 2),
  }
