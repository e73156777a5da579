"""The table of methods: words for settings, and how they lie under a user's own."""

import pathlib

import pytest

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import methods

ROOT = pathlib.Path(__file__).parents[2]
LEAST = """\
model: {source: some/model}
data: {questions: configs/data/wordnet/law/train.jsonl}
output: runs/x
"""
GENERAL = "configs/data/wordnet/culture/train.jsonl"
NEEDED = {
  "replay": [f"replay.questions={GENERAL}"],
  "mssr": [f"replay.questions={GENERAL}"],
  "ewc": [f"anchor.questions={GENERAL}"],
  "disc": ["extract.documents=configs/data/wordnet"],
  "opd_recover": ["distill.source=the/original"],
  "ssr": ["synthesise.seeds=configs/data/seeds.jsonl"],
}


@pytest.fixture(name="load")
def _load(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)

  def load(name, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(LEAST)
    return config_load.load(path, [f"method={name}", *NEEDED.get(name, []), *overrides])

  return load


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_a_valid_config_that_can_be_written_out(name, load, tmp_path):
  loaded = load(name)
  written = tmp_path / "written.yaml"
  written.write_text(config_load.dump(loaded))
  assert config_load.load(written) == loaded
  values = config_load.diff({}, loaded)
  for key in methods.words(methods.METHODS[name].settings):
    dotted, _, _ = key.partition("=")
    assert any(k == dotted or k.startswith(f"{dotted}.") for k in values), key


def test_raft_is_the_defaults_and_every_other_method_is_not(load):
  assert methods.METHODS["raft"].settings == {}
  plain = load("raft")
  for name in methods.METHODS:
    changed = set(config_load.diff(plain, load(name))) - {"method"}
    assert bool(changed) == (name != "raft"), name


def test_no_two_methods_are_the_same_settings(load):
  seen = {}
  for name in methods.METHODS:
    values = config_load.dump(load(name).model_copy(update={"method": ""}))
    assert values not in seen, f"{name} is {seen[values]}"
    seen[values] = name


def test_the_users_own_values_win(load):
  loaded = load("opd", "balance.weight=0.1", "distill.tail=renormalize")
  assert (loaded.balance.mode, loaded.balance.weight) == ("fixed", 0.1)
  assert (loaded.distill.direction, loaded.distill.tail) == ("reverse", "renormalize")
  assert load("fapm", "prune=null").prune is None
  assert load("fapm", "prune.keep=0.5").prune.keep == 0.5
  assert load("raft", "prune={}").prune.keep == 0.1


@pytest.mark.parametrize(
  ("name", "overrides", "message"),
  [
    ("rfat", [], "method: unknown method 'rfat'; did you mean 'raft'?"),
    ("fused-sft", [], "did you mean 'fused_sft'?"),
    ("SFT!", [], "known: raft, sft, fused_sft, "),
    ("replay", ["replay={}"], "replay.questions: is required"),
    ("ssr", ["synthesise=null"], "replay.questions: is required: name a file"),
    ("ssr", ["synthesise.keep=2000"], "synthesise.keep: must not exceed synthesise.dr"),
    (
      "ssr",
      ["synthesise.writer={timeout_s: 1.0}"],
      "synthesise.writer.timeout_s: is r",
    ),
    (
      "mssr",
      ["train.cross_entropy=false", "distill.teacher=base", "balance.mode=fixed"],
      "replay.adaptive: reads the cross-entropy",
    ),
    ("mssr", ["rollout.group=2", "distill.teacher=base"], "replay.adaptive: counts"),
    ("mssr", ["replay.adaptive.longest=3"], "replay.adaptive.longest: must not be"),
    ("ewc", ["anchor.questions=null"], "anchor.questions: anchor.importance needs"),
    ("opd_recover", ["distill.source=null"], "distill.source: method 'opd_recover'"),
    ("opd_pure", ["distill.teacher=none"], "no loss is left"),
    ("opd_pure", ["balance.mode=ema"], "balance.mode: ema weighs"),
    ("l2sp", ["recadam={}"], "anchor: recadam has its own pull"),
    ("opd", ["distill.teacher=live"], "its loss is 0"),
    ("sdft_cl", ["distill.source=a/b"], "distill.source: is read with"),
    ("freeze", ["freeze.mode=names"], "freeze.names: freeze.mode=names needs"),
    ("freeze", ["freeze.names=[embed]"], "freeze.names: freeze.mode=names needs"),
    ("sdpo", ["rollout.group=1"], "rollout.group: distill.teacher_context=sibling"),
    ("sdpo", ["distill.trajectory=mixed"], "distill.teacher_context: needs rollouts"),
    ("gkd", ["rollout.group=2"], "rollout.group: needs rollouts at every step"),
    ("gkd", ["distill.support=student"], "distill.support: needs rollouts"),
    ("sdpo", ["distill.temperature=1.5"], "distill.max_importance: compares"),
    ("opd", ["distill.success=0.7"], "distill.success: is read with"),
    ("sft", ["replay.questions=/no"], "replay.questions: '/no' is not a file"),
    ("disc", ["extract=null"], "extract.documents: not set; `sentences` learns"),
    ("disc", ["data.answers=refined"], "set data.answers=original"),
    ("disc", ["distill.trajectory=rollout"], "set distill.trajectory=answer"),
    ("lora", ["interpolate={}", "export.adapter=true"], "interpolated weights cannot"),
    ("lora", ["prune={}", "export.adapter=true"], "pruned weights cannot"),
    ("lora", ["anchor={}"], "anchor: pulls to the base model's parameters, and `lora`"),
    ("lora", ["recadam={}"], "recadam: pulls"),
    ("lora", ["soft_mask={}"], "soft_mask: masks the base model's"),
    ("lora", ["freeze={}"], "freeze: names the base model's"),
    (
      "lora",
      ["lora.base=nf4", "prune={}", "validation={}", f"data.validation={GENERAL}"],
      "lora.base: keeps no whole weights, which",
    ),
    ("eaft", ["token_weights.floor=0.5"], "token_weights.floor: is read with token_"),
    ("dft", ["token_weights.top_k=5"], "token_weights.top_k: is read with"),
    ("stm", ["token_weights.temperature=1.0"], "token_weights.rule=talr or flow only"),
    ("talr", ["token_weights.exponent=2.0"], "token_weights.rule=eaft or dft only"),
    (
      "opd_pure",
      ["token_weights={}"],
      "token_weights: weighs the tokens of",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(name, overrides, message, load):
  with pytest.raises(errors.UserError) as caught:
    load(name, *overrides)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


ON_QUICKSTART = {
  "sft_kl": "balance.weight=0.5",
  "asft": "balance.weight=0.1",
  "sdft_cl": "distill.teacher_context=example",
  "sdpo": "distill.teacher_context=sibling",
  "sdft": "refine.fusion.rounds=0",
  "lora": "train.learning_rate=2.0e-4",
  "disc": "train.learning_rate=3.0e-6",
}
"""What a method needs beside its name, where the quickstart's own values would win."""


@pytest.mark.parametrize("name", methods.METHODS)
def test_it_runs_on_the_quickstart_with_the_keys_that_it_needs(name, monkeypatch):
  """The file with another method in it, and the keys that configs/README.md names."""
  monkeypatch.chdir(ROOT)
  more = ON_QUICKSTART.get(name)
  if more:
    assert f"`{more}`" in (ROOT / "configs/README.md").read_text()
  loaded = config_load.load(
    "configs/quickstart.yaml",
    [f"method={name}", *NEEDED.get(name, []), *([more] if more else [])],
  )
  plain = config_load.load("configs/quickstart.yaml")
  assert loaded.method == name
  assert loaded.train.batch_size == plain.train.batch_size
  for section, values in methods.METHODS[name].settings.items():
    found = getattr(loaded, section)
    for key, value in values.items():
      if not isinstance(value, dict):
        assert getattr(found, key) == value, (section, key)


@pytest.mark.parametrize("name", methods.METHODS)
def test_own_values_are_the_least_file(name, load):
  loaded = load(name, "train.batch_size=8", "prune={}")
  least = config_load.non_defaults(loaded)
  assert config_load.from_tree(least, []) == loaded
  expected = {
    "model": {"source": "some/model"},
    "data": {"questions": "configs/data/wordnet/law/train.jsonl"},
    "train": {"batch_size": 8},
    "method": name,
    "output": "runs/x",
  }
  for item in NEEDED.get(name, []):
    key, _, value = item.partition("=")
    section, leaf = key.split(".")
    expected[section] = {leaf: value}
  if name != "fapm":
    expected["prune"] = {}
  assert least == expected


def test_another_method_brings_its_own_settings(load):
  """As a sweep exchanges it: what the first method set does not stay."""
  tree = config_load.non_defaults(load("raft", "train.epochs=1"))
  assert config_load.from_tree(tree, ["method=sft"]) == load("sft", "train.epochs=1")


def test_under_merges_and_changes_neither():
  settings = {"a": {"x": 1, "y": {"z": 2}}, "b": {}}
  own = {"a": {"y": {"w": 3}}, "b": None, "c": 4}
  merged = methods.merge(settings, own)
  assert merged == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": None, "c": 4}
  assert settings == {"a": {"x": 1, "y": {"z": 2}}, "b": {}}
