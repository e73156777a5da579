"""The loop on a tiny model with a real tokenizer: resuming, stopping, bad input."""

import contextlib
import hashlib
import logging
import random
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from raft_jax import errors, train
from raft_jax.config import run_lock
from raft_jax.curation import refined_folder
from raft_jax.data import packing
from raft_jax.generation import engines
from raft_jax.hf import load as hf_load
from raft_jax.models import transformer
from raft_jax.runtime import distributed
from raft_jax.storage import journal, question_files
from raft_jax.training import (
  checkpoint,
  loop,
  output_lock,
  programs,
  run_inputs,
  step_memory,
  step_schedule,
)
from tests.helpers import short_run, tiny_run


def test_every_program_is_compiled_once(tmp_path, source, law, caplog):
  output = tmp_path / "run"
  _, settings = short_run.make_config(output, source, law, "data.buckets=1")
  short_run.write_refined(output, law)
  jax.clear_caches()  # of what other tests have compiled
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    train.fit(settings)
  compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
  counts = {
    name: compiled.count(name) for name in ("generate", "score_teacher", "update")
  }
  # The update also with its gradients taken apart.
  assert counts == {"generate": 1, "score_teacher": 1, "update": 2}, compiled


def test_when_the_gradients_are_taken_apart():
  def steps(every, *, early):
    schedule = step_schedule.StepSchedule(50, 10, every, early, None)
    return [n for n in range(50) if step_schedule.takes_gradient_stats(schedule, n)]

  assert steps(20, early=False) == [0, 20, 40]
  assert steps(20, early=True) == [0, 1, 2, 4, 8, 16, 20, 40]
  assert steps(1, early=True) == [*range(50)]
  assert steps(0, early=True) == []


def test_when_phases_are_timed_and_when_a_run_validates_and_saves():
  schedule = step_schedule.StepSchedule(
    12, 5, 4, gradient_stats_early=False, validate_every=3
  )
  assert [n for n in range(12) if step_schedule.times_phases(schedule, n)] == [2, 6, 10]
  assert [n for n in range(1, 13) if step_schedule.validates(schedule, n)] == [
    3,
    6,
    9,
    12,
  ]
  assert [n for n in range(1, 13) if step_schedule.saves(schedule, n)] == [5, 10, 12]
  never = schedule._replace(gradient_stats_every=0, validate_every=None)
  assert not any(step_schedule.times_phases(never, n) for n in range(12))
  assert not any(step_schedule.validates(never, n) for n in range(1, 13))


def no_weights(*args, **kwargs):
  raise AssertionError("weights were read")


@pytest.fixture(scope="module")
def source(tmp_path_factory, smollm):
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


def final_params(output, source):
  params, step = checkpoint.restore_params(
    output,
    transformer.shapes(hf_load.load_config(source)),
    {"model": engines.identity(source)},
  )
  assert step == short_run.STEPS
  return params


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, source, law):
  """One RAFT run from start to end."""
  output = tmp_path_factory.mktemp("run") / "whole"
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(output, source, law)
  train.fit(settings)
  return output


def test_a_run_logs_every_step_and_what_the_issue_of_collapse_needs(uninterrupted):
  logged = short_run.rows(uninterrupted)
  assert [step for step, _ in logged] == list(range(1, short_run.STEPS + 1))
  first = logged[0][1]
  assert first["kd_ratio"] == pytest.approx(1.0, rel=1e-3)  # L / (L + eps)
  assert {
    "loss_sft",
    "loss_kd",
    "ema_sft",
    "ema_kd",
    "kd_weight",
    "teacher_mass_in_support",
    "student_mass_outside_support",
    "rollout_length",
    "rollout_ended",
    "rollout_empty",
    "rollout_repeated_4gram",
    "rollout_leaked",
    "kd_at_0",
    "kd_at_32_up",
    "grad_norm",
    "grad_norm_sft",
    "grad_norm_kd",
    "grad_cosine",
    "learning_rate",
  } <= first.keys()
  assert first["kd_at_32_up"] is None  # no rollout is that long
  assert all(np.isfinite(values["loss_kd"]) for _, values in logged)


def test_a_finished_run_is_not_run_again(uninterrupted, source, law, capsys):
  _, settings = short_run.make_config(uninterrupted, source, law)
  train.fit(settings)
  assert "already trained" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("kill_at", "number"),
  [pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow), (3, signal.SIGKILL)],
)
def test_a_killed_run_ends_with_the_same_bits(
  tmp_path, source, law, uninterrupted, kill_at, number
):
  output = tmp_path / "killed"
  short_run.write_refined(output, law)
  path, _ = short_run.make_config(output, source, law)
  process = short_run.run(path)
  short_run.wait_for_step(process, output, kill_at)
  process.send_signal(number)
  process.wait()
  again = short_run.run(path)
  said, _ = again.communicate(timeout=600)
  assert again.returncode == 0, said
  jax.tree.map(
    np.testing.assert_array_equal,
    final_params(output, source),
    final_params(uninterrupted, source),
  )
  assert short_run.rows(output) == short_run.rows(uninterrupted)


@pytest.mark.slow
def test_killed_at_any_of_twenty_instants_a_run_ends_with_the_same_bits(
  tmp_path, source, law
):
  """Five before the first step, fifteen a moment after one or another; seeded."""
  steps, moments = 12, random.Random(0)

  def start(name):
    output = tmp_path / name
    short_run.write_refined(output, law)
    path, settings = short_run.make_config(
      output, source, law, f"train.max_steps={steps}"
    )
    return output, settings, short_run.run(path, f"train.max_steps={steps}")

  whole, _, process = start("whole")
  began = time.monotonic()
  short_run.wait_for_step(process, whole, 1)
  first = time.monotonic()
  assert process.wait() == 0
  expected, found_at = short_run.whole_state(whole, steps), set()
  for number in range(20):
    output, settings, process = start(str(number))
    if number < 5:
      time.sleep(moments.uniform(0, first - began))
    else:
      short_run.wait_for_step(process, output, moments.randrange(1, steps))
      time.sleep(moments.uniform(0, 0.1))
    process.kill()
    process.wait()
    log = output / "metrics.jsonl"
    found_at.add(len(log.read_text().splitlines()) if log.exists() else None)
    train.fit(settings)
    jax.tree.map(
      np.testing.assert_array_equal, short_run.whole_state(output, steps), expected
    )
    assert short_run.rows(output) == short_run.rows(whole), number
  assert len(found_at) >= 5, found_at  # the instants were instants of the run


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.25, 0.4, 0.8])
def test_a_second_signal_while_a_checkpoint_is_written_changes_no_bit(
  tmp_path, source, law, uninterrupted, after_s
):
  output = tmp_path / "twice"
  short_run.write_refined(output, law)
  path, _ = short_run.make_config(output, source, law)
  process = short_run.run(path)
  short_run.wait_for_step(process, output, 1)
  process.send_signal(signal.SIGTERM)
  time.sleep(after_s)  # later than signals that count as one
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=600)
  assert process.returncode != 0, said
  again = short_run.run(path)
  said, _ = again.communicate(timeout=600)
  assert again.returncode == 0, said
  jax.tree.map(
    np.testing.assert_array_equal,
    final_params(output, source),
    final_params(uninterrupted, source),
  )
  assert short_run.rows(output) == short_run.rows(uninterrupted)


def test_sigterm_saves_says_how_to_go_on_and_exits_75(
  tmp_path, source, law, uninterrupted
):
  output = tmp_path / "stopped"
  short_run.write_refined(output, law)
  path, settings = short_run.make_config(output, source, law)
  process = short_run.run(path)
  short_run.wait_for_step(process, output, 1)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=600)
  assert process.returncode == 75, said
  assert "rerun the same command" in said
  train.fit(settings)
  assert short_run.rows(output) == short_run.rows(uninterrupted)


@pytest.mark.slow
def test_weight_zero_is_sft_and_runs_no_rollout(tmp_path, source, law):
  results = []
  for name, overrides in {
    "sft": ["method=fused_sft"],
    "zero": ["balance.mode=fixed", "balance.weight=0.0"],
  }.items():
    output = tmp_path / name
    short_run.write_refined(output, law)
    _, settings = short_run.make_config(output, source, law, *overrides)
    train.fit(settings)
    assert "rollout_length" not in short_run.rows(output)[0][1]
    results.append(final_params(output, source))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_sft_reads_the_questions_themselves(tmp_path, source, law):
  output = tmp_path / "sft"
  _, settings = short_run.make_config(output, source, law, "method=sft", "data.limit=8")
  train.fit(settings)
  assert short_run.rows(output)[-1][0] == short_run.STEPS


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["method=raft"], r"raft_jax\.refine"),
    (
      ["method=raft", "distill.top_k=60000"],
      r"distill\.top_k: 60000 is larger",
    ),
    (["method=sft", "data.max_answer_tokens=3"], r"data\.max_answer_tokens"),
    (["method=sft", "data.max_prompt_tokens=20"], r"data\.max_prompt_tokens"),
    (["method=sft", "train.batch_size=1000"], r"train\.batch_size=1000"),
    (
      ["model.attention=cudnn", "model.dtype=bfloat16"],
      "cudnn runs on NVIDIA GPUs, and the devices here are of platform cpu; use xla",
    ),
    (["mesh.data=3"], r"mesh: data=3 .* does not fit 1 devices"),
    (["model.source=/no/such/folder"], "/no/such/folder"),
  ],
)
def test_bad_input_is_one_clear_error_before_weights(
  tmp_path, source, law, monkeypatch, overrides, message
):
  monkeypatch.setattr(hf_load, "load_params", no_weights)
  output = tmp_path / "bad"
  _, settings = short_run.make_config(output, source, law, *overrides)
  with pytest.raises(errors.UserError, match=message) as caught:
    train.fit(settings)
  assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_step_that_memory_cannot_hold_is_refused_before_weights(
  tmp_path, source, law, monkeypatch
):
  limit, output = tmp_path / "memory.max", tmp_path / "full"
  monkeypatch.setattr(step_memory, "LIMITS", (str(limit),))
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(output, source, law)
  limit.write_text("1000000")
  refused = pytest.raises(
    errors.UserError, match=r"memory: a step takes .*micro_batches"
  )
  with monkeypatch.context() as patch, refused:
    patch.setattr(hf_load, "load_params", no_weights)
    train.fit(settings)
  limit.write_text("200000000")  # asks the compiler, and is enough
  train.fit(settings)
  assert len(short_run.rows(output)) == short_run.STEPS


def test_rows_longer_than_the_model_reads_are_refused(tmp_path, source, law):
  output = tmp_path / "long"
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(output, source, law, "rollout.max_new_tokens=500")
  with pytest.raises(errors.UserError, match=r"rollout\.max_new_tokens=500.*for 512"):
    train.fit(settings)


@pytest.mark.slow
def test_records_refined_by_another_config_are_refused(tmp_path, source, law):
  output = tmp_path / "elsewhere"
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(output, source, law)
  run_lock.lock_config(settings, "refine", refined_folder.IDENTITY_KEYS)
  train.fit(short_run.make_config(output, source, law, "train.max_steps=1")[1])
  other = str(law.parent / "web/train.jsonl")
  _, changed = short_run.make_config(output, source, law, f"data.questions={other}")
  with pytest.raises(errors.UserError, match=r"refine run of another.*data\.questions"):
    train.fit(changed)


def test_edited_data_do_not_pass_for_a_finished_run(tmp_path, source, law):
  output = tmp_path / "edited"
  questions = tmp_path / "q.jsonl"
  questions.write_text((law / "test.jsonl").read_text())
  overrides = ["method=sft", f"data.questions={questions}", "train.max_steps=1"]
  _, settings = short_run.make_config(output, source, law, *overrides)
  train.fit(settings)
  lines = (law / "validation.jsonl").read_text().splitlines()
  questions.write_text("\n".join(lines))
  with pytest.raises(errors.UserError, match="whose data was"):
    train.fit(settings)


def test_a_process_sees_whether_the_folder_is_the_first_ones(tmp_path, monkeypatch):
  said = ["pid 5 on n0"]
  monkeypatch.setattr(
    distributed, "gather_texts", lambda text: [text] if text.startswith("[") else said
  )
  monkeypatch.setattr(output_lock, "VISIBLE_WITHIN_S", 0.5)
  (tmp_path / "config").mkdir()
  (tmp_path / "config" / "train.yaml").touch()  # of an earlier try, alone
  with contextlib.ExitStack() as stack:
    with pytest.raises(errors.UserError, match="holds nothing of what process 0 wrote"):
      output_lock.lock(tmp_path, stack, is_primary=False)
    written = threading.Timer(
      0.1, (tmp_path / ".train.holder").write_text, ["pid 5 on n0"]
    )
    written.start()
    output_lock.lock(tmp_path, stack, is_primary=False)


def test_micro_batches_work_without_distillation(tmp_path, source, law):
  output = tmp_path / "parts"
  overrides = ["method=sft", "train.micro_batches=2", "train.max_steps=2"]
  _, settings = short_run.make_config(output, source, law, *overrides)
  train.fit(settings)
  assert len(short_run.rows(output)) == 2


def test_a_second_training_in_the_same_folder_is_refused(tmp_path, source, law):
  output = tmp_path / "shared"
  output.mkdir()
  _, settings = short_run.make_config(output, source, law, "method=sft")
  with (
    journal.locked(output / ".train"),
    pytest.raises(errors.UserError, match="in use by pid"),
  ):
    train.fit(settings)


def test_another_config_may_not_use_the_folder(uninterrupted, source, law):
  _, settings = short_run.make_config(
    uninterrupted, source, law, "train.learning_rate=1.0e-4"
  )
  with pytest.raises(errors.UserError, match=r"train\.learning_rate"):
    train.fit(settings)


def test_the_remedies_for_full_memory_may_use_the_folder(
  uninterrupted, source, law, capsys
):
  remedies = ["train.micro_batches=2", "model.remat=true", "rollout.unroll=1"]
  _, settings = short_run.make_config(uninterrupted, source, law, *remedies)
  train.fit(settings)
  assert "already trained" in capsys.readouterr().out


def test_a_damaged_shard_is_refused(tmp_path, source, law):
  output = tmp_path / "damaged"
  short_run.write_refined(output, law)
  _, settings = short_run.make_config(output, source, law)
  shard = next((output / "refined").glob("shard-*"))
  shard.write_bytes(shard.read_bytes()[:65536])
  with pytest.raises(errors.UserError, match=shard.name):
    train.fit(settings)


def test_answers_to_other_questions_than_the_file_has_now_are_refused(
  tmp_path, source, law
):
  output, digest = tmp_path / "edited", hashlib.sha256()
  questions_file = tmp_path / "questions.jsonl"
  questions_file.write_bytes((law / "train.jsonl").read_bytes())
  for question in question_files.read_questions(questions_file):
    digest.update(refined_folder.question_bytes(question))
  short_run.write_refined(output, law, questions=digest.hexdigest())
  _, settings = short_run.make_config(
    output, source, law, f"data.questions={questions_file}"
  )
  plan, _ = run_inputs.prepare(settings)
  assert plan.schedule.total_steps == short_run.STEPS
  questions_file.write_text(questions_file.read_text().replace("court", "tribunal"))
  with pytest.raises(errors.UserError, match=r"other questions than .* has now; run"):
    run_inputs.prepare(settings)


def test_answers_written_with_another_tokenizer_are_refused(tmp_path, source, law):
  output = tmp_path / "foreign"
  short_run.write_refined(output, law, tokenizer="0" * 64)
  _, settings = short_run.make_config(output, source, law)
  with pytest.raises(errors.UserError, match="with another tokenizer or chat template"):
    train.fit(settings)


@pytest.mark.parametrize("method", ["sft", pytest.param("gkd", marks=pytest.mark.slow)])
def test_a_packed_run_is_the_run(tmp_path, source, law, method, monkeypatch):
  """Step by step, whether the trajectories are rollouts or answers; and resumed."""
  logged, lanes = {}, []
  lay = packing.pack

  def counted(length_BS, widths, room, groups):
    plain = len(length_BS) * sum(widths)
    lanes.append(groups.total * room.lanes * room.width / plain)
    return lay(length_BS, widths, room, groups)

  monkeypatch.setattr(packing, "pack", counted)
  for name in ("padded", "packed"):
    _, settings = short_run.make_config(
      *(tmp_path / name, source, law, f"method={method}", "train.batch_size=8"),
      *("train.micro_batches=2", "data.buckets=1"),
      f"train.packing={str(name == 'packed').lower()}",
    )
    train.fit(settings)
    logged[name] = short_run.rows(tmp_path / name)
    assert bool(lanes) == (name == "packed")
  assert max(lanes) < 0.8
  for (step, ours), (_, theirs) in zip(logged["packed"], logged["padded"], strict=True):
    for name, value in theirs.items():
      if value is None or name == "grad_cosine":  # at first of a gradient that is noise
        continue
      assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (step, name)
  logged = short_run.rows(tmp_path / "packed")
  shutil.rmtree(tmp_path / f"packed/checkpoints/{short_run.STEPS}")
  train.fit(settings)
  assert short_run.rows(tmp_path / "packed") == logged


def test_rollouts_from_bad_logits_stop_the_run_and_are_named():
  rows, ended_B = np.array([3, 8, 9]), np.ones(3, bool)
  status = programs.RolloutStatus(ended_B, np.array([False, True, False]))
  with pytest.raises(errors.UserError, match=r"step 5: rollouts of rows 3, 9: .*saved"):
    loop.check_rollouts(status, rows, 4)
  loop.check_rollouts(programs.RolloutStatus(ended_B, ended_B), rows, 4)


def test_a_loss_that_is_not_finite_stops_the_run_by_name(tmp_path, source, law):
  output = tmp_path / "nan"
  _, settings = short_run.make_config(
    output, source, law, "method=sft", "train.learning_rate=1.0e30", "train.clip=1.0e30"
  )
  with pytest.raises(errors.UserError, match=r"step \d+: (loss_sft|grad_norm) is"):
    train.fit(settings)
  for folder in (output / "checkpoints").glob("[0-9]*"):
    assert int(folder.name) < short_run.STEPS
