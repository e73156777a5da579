"""Every method of the table on a tiny model: it trains, resumes, and has a null."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from raft_jax import errors, train
from raft_jax.config import load as config_load
from raft_jax.config import methods
from raft_jax.hf import load as hf_load
from raft_jax.storage import question_files, records, shards
from raft_jax.training import base_losses, programs, run_inputs, trained_model
from tests.helpers import tiny_run

STEPS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory, smollm):
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


@pytest.fixture(scope="module")
def other(tmp_path_factory, smollm):
  """Another model with the same tokenizer."""
  return str(tiny_run.save_model(tmp_path_factory.mktemp("other"), smollm, seed=1))


@pytest.fixture(scope="module")
def refined(tmp_path_factory, law):
  """Refined records whose rewrites and final answers differ from the originals."""
  questions = question_files.read_questions(law / "train.jsonl", limit=16)
  rows = [
    records.Refined(
      q, f"In short: {q.answer}", 0.9, (), f"{q.answer} So it is.", "", ""
    )
    for q in questions
  ]
  # No usable rewrite of the first.
  rows[0] = records.Refined(questions[0], "?", None, (), questions[0].answer, "", "")
  folder = tmp_path_factory.mktemp("refined")
  shards.write_shards(
    folder / "refined",
    [records.to_json(record) for record in rows],
    records_per_shard=10,
    meta={},
  )
  return folder / "refined"


@pytest.fixture(name="make", scope="module")
def _make(tmp_path_factory, source, law, refined):
  """A config of a run of its own."""

  def make(name, *overrides, output=None):
    output = output or tmp_path_factory.mktemp(name) / "run"
    path = output.parent / "c.yaml"
    path.write_text(
      f"""
model: {{source: "{source}"}}
data: {{questions: "{law / "train.jsonl"}", limit: 16, buckets: 1}}
train: {{batch_size: 4, max_steps: {STEPS}, learning_rate: 1.0e-3,
  checkpoint_every: 2, gradient_stats_every: 0}}
rollout: {{max_new_tokens: 6}}
distill: {{top_k: 64}}
method: {name}
output: "{output}"
"""
    )
    if not (output / "refined").exists():
      (output / "config").mkdir(parents=True)
      shutil.copytree(refined, output / "refined")
    return config_load.load(path, overrides)

  return make


@pytest.fixture(name="needs", scope="module")
def _needs(law, other):
  general = law.parent / "culture/validation.jsonl"
  return {
    "replay": [f"replay.questions={general}"],
    "ssr": [f"replay.questions={general}", f"synthesise.seeds={general}"],
    "mssr": [
      f"replay.questions={general}",
      *("replay.adaptive.interval=2", "replay.adaptive.factor=1.0"),
    ],
    "ewc": [
      *(f"anchor.questions={general}", "anchor.limit=8"),
      *("anchor.batch_size=4", "anchor.max_new_tokens=5"),
    ],
    "opd_recover": [f"distill.source={other}"],
    "disc": [f"extract.documents={law}", "extract.text_field=answer"],
    "das": ["soft_mask.limit=4", "soft_mask.batch_size=2"],
    "recadam": ["recadam.gamma=100.0"],
    "sdft_cl": ["distill.average_rate=0.5"],
    # What a random model samples succeeds only where every text does.
    "sdpo": [
      *("distill.success=0.0", "rollout.group=2", "distill.average_rate=0.5"),
      "data.max_teacher_tokens=256",
    ],
  }


def fitted(settings):
  """Trained parameters and the log of a run to its end."""
  train.fit(settings)
  decoder = hf_load.load_config(settings.model.source)
  params, step = trained_model.load(settings, decoder)
  assert step == STEPS
  log = pathlib.Path(settings.output) / "metrics.jsonl"
  lines = log.read_text(encoding="utf-8").splitlines()
  return params, [json.loads(line)["values"] for line in lines]


def state_at_the_end(settings):
  """Fingerprints of every array of the last checkpoint, optimizer and memory too."""
  meta = pathlib.Path(settings.output) / f"checkpoints/{STEPS}/meta/metadata"
  return json.loads(meta.read_text(encoding="utf-8"))["fingerprints"]


def assert_identical(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def distance(one, other):
  parts = jax.tree.map(lambda a, b: float(np.sum((a - b) ** 2)), one, other)
  return sum(jax.tree.leaves(parts)) ** 0.5


@pytest.fixture(scope="module")
def base(source):
  return hf_load.load_params(source, hf_load.load_config(source))


@pytest.fixture(scope="module")
def sft(make):
  return fitted(make("sft"))


# Each adds a state of its own to a run: an average, an anchor, a memory of replays.
# `train_test` and `lora_test` stop and resume RAFT and LoRA.
WITH_STATE = ("sdft_cl", "recadam", "mssr")


@pytest.mark.parametrize(
  "name",
  [
    name if name in WITH_STATE else pytest.param(name, marks=pytest.mark.slow)
    for name in methods.METHODS
  ],
)
def test_it_trains_and_a_resumed_run_ends_with_the_same_bits(name, make, needs, base):
  settings = make(name, *needs.get(name, []))
  whole, log = fitted(settings)
  assert len(log) == STEPS
  key = "loss_sft" if settings.train.cross_entropy else "loss_kd"
  assert all(np.isfinite(row[key]) for row in log)
  assert distance(whole, base) > 0
  events = [step for step, row in enumerate(log, 1) if "replay_interval" in row]
  assert events == ([2, 4] if name == "mssr" else [])
  saved = state_at_the_end(settings)
  # As if the run had been killed after its second step was saved.
  shutil.rmtree(f"{settings.output}/checkpoints/{STEPS}")
  again, repeated = fitted(settings)
  assert_identical(again, whole)
  assert state_at_the_end(settings) == saved
  timeless = [
    {k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_s"))}
    for row in (*log, *repeated)
  ]
  assert timeless[:STEPS] == timeless[STEPS:]


@pytest.mark.slow
def test_opd_pure_stays_at_the_base_model_while_opd_leaves_it(make):
  """Student and teacher are the same at step 1: no loss, no gradient but rounding."""
  _, (pure, *_) = fitted(make("opd_pure", "train.max_steps=4"))
  _, (whole, *rest) = fitted(make("opd"))
  assert pure["loss_kd"] < 1e-6
  assert pure["grad_norm"] < 1e-5 * whole["grad_norm"]
  assert rest[-1]["loss_kd"] > 100 * pure["loss_kd"]
  # As in RAFT λ may follow the losses; without an answer for the teacher it is bounded.
  _, bounded = fitted(make("opd", "balance.mode=ema", "balance.max_weight=50.0"))
  assert bounded[0]["kd_weight"] == 50
  assert all(row["kd_weight"] <= 50 for row in bounded)
  assert bounded[-1]["loss_sft"] < bounded[0]["loss_sft"]


@pytest.mark.slow
def test_parts_go_together(make, needs, base):
  """RAFT on adapters, with replay, pruned afterwards."""
  overrides = ["lora={rank: 4}", "prune={keep: 0.25}", *needs["replay"]]
  settings = make("raft", *overrides)
  params, log = fitted(settings)
  assert log[0]["loss_kd"] > 0
  moved = jax.tree.map(lambda a, b: np.asarray(a != b), params, base)
  for name, leaf in moved["layers"].items():
    if not name.endswith("norm"):
      assert [np.count_nonzero(layer) for layer in leaf] == [leaf[0].size // 4] * 2
  assert not moved["embed"].any()
  whole, _ = trained_model.load(
    settings.model_copy(update={"prune": None}),
    hf_load.load_config(settings.model.source),
  )
  jax.tree.map(
    lambda kept, pruned, tuned: np.testing.assert_array_equal(
      pruned[kept], tuned[kept]
    ),
    moved,
    params,
    whole,
  )


def answers_nll(source, rows):
  """Nats of each answer token by transformers."""
  network = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
  found = {}
  for row in rows:
    ids = torch.tensor([row.prompt + row.answer])
    with torch.no_grad():
      log_p = torch.log_softmax(network(ids).logits[0].double(), -1)
    places = torch.arange(len(row.prompt) - 1, ids.shape[1] - 1)
    found[row.row_id] = -log_p[places, ids[0, len(row.prompt) :]].numpy()
  return found


def test_the_base_models_losses_are_measured_once_and_again_if_damaged(
  make, source, monkeypatch
):
  """Against transformers; a resumed run ends with the same bits either way."""
  calls, measure = [], base_losses.measure
  monkeypatch.setattr(
    base_losses, "measure", lambda *args: calls.append(1) or measure(*args)
  )
  # A random model finds all tokens about equally improbable: 49152 of them.
  settings = make("stm", "token_weights.max_perplexity=49152.0")
  whole, log = fitted(settings)
  assert all(0.1 < row["token_weight"] < 0.9 for row in log)
  assert all(row["loss_sft"] < row["loss_sft_unweighted"] for row in log)
  _, inputs = run_inputs.prepare(settings)
  own = base_losses.identity(inputs.identity, "float32")
  output = pathlib.Path(settings.output)
  stored = base_losses.read(output, own)
  expected = answers_nll(source, inputs.base_loss_rows.domain)
  assert sorted(stored) == sorted(expected)
  for row_id, values in expected.items():
    np.testing.assert_allclose(stored[row_id], values, rtol=2e-5)
  file = output / "base_losses/losses.jsonl"
  for damaged, measured in ((False, 1), (True, 2)):
    if damaged:
      file.write_bytes(file.read_bytes()[:-20])
    shutil.rmtree(output / f"checkpoints/{STEPS}")
    again, _ = fitted(settings)
    assert len(calls) == measured
    assert_identical(again, whole)
    assert base_losses.read(output, own).keys() == stored.keys()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["eaft", "flow"])
def test_token_weights_go_together_with_raft_adapters_and_replay(rule, make, needs):
  own = [f"token_weights.rule={rule}", "lora={rank: 4}", *needs["replay"]]
  settings = make("raft", *own, "balance.max_weight=null")
  params, log = fitted(settings)
  for row in log:
    assert 0 < row["token_weight"] < 1.1
    assert row["loss_kd"] > 0
  # λ follows the weighed loss: the first step has λ (L_KD + eps) = L_SFT.
  assert log[0]["kd_ratio"] == pytest.approx(1, rel=1e-3)
  shutil.rmtree(f"{settings.output}/checkpoints/{STEPS}")
  again, _ = fitted(settings)
  assert_identical(again, params)


def test_more_tokens_than_the_vocabulary_are_refused(make):
  settings = make("eaft", "token_weights.top_k=100000")
  named = r"token_weights\.top_k: 100000 is larger than the vocabulary of .*\(49152\)"
  with pytest.raises(errors.UserError, match=named):
    run_inputs.prepare(settings)


def test_wise_ft_is_between_the_base_model_and_sft(make, base, sft):
  params, _ = fitted(make("wise_ft", "interpolate.weight=0.25"))
  jax.tree.map(
    lambda actual, before, after: np.testing.assert_allclose(
      actual, 0.75 * np.float64(before) + 0.25 * np.float64(after), rtol=1e-6, atol=1e-7
    ),
    *(params, base, sft[0]),
  )
  assert distance(params, base) == pytest.approx(distance(sft[0], base) / 4, rel=1e-3)


@pytest.mark.slow
def test_disc_is_the_scaled_kl_of_sentences_by_transformers(make, source, tmp_path):
  text = "A writ orders an act. It is issued by a court. Nobody may ignore it. "
  for number in range(4):
    (tmp_path / f"{number}.txt").write_text(text * (2 + number))
  # All tokens of the vocabulary are compared.
  settings = make("disc", f"extract.documents={tmp_path}", "distill.top_k=49152")
  params, (first, *_) = fitted(settings)
  _, inputs = run_inputs.prepare(settings)
  batch = inputs.dataset[0]
  network = transformers.AutoModelForCausalLM.from_pretrained(source).eval()

  def log_p(tokens_T, length, answer):
    ids = torch.tensor([[*tokens_T[:length], *answer]])
    with torch.no_grad():
      logits = network(ids).logits[0].double()
    return torch.log_softmax(logits[length - 1 : -1] / 2, -1)

  expected = []
  for row in range(len(batch.row_id_B)):
    answer = batch.answer_BA[row, : batch.answer_length_B[row]]
    student = log_p(batch.prompt_BP[row], 1, answer)
    teacher = log_p(batch.teacher_BC[row], batch.teacher_length_B[row], answer)
    assert batch.prompt_length_B[row] == 1
    assert batch.teacher_length_B[row] > 5
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    expected.append(4 * float(kl.mean()))
  assert first["loss_kd"] == pytest.approx(np.mean(expected), rel=1e-3)
  assert distance(params, hf_load.load_params(source, hf_load.load_config(source))) > 0


@pytest.mark.slow
def test_mssr_whose_first_event_comes_after_the_end_is_sft(make, law, sft):
  """To the bit, with questions to replay that need no wider batches."""
  domain = f"replay.questions={law / 'train.jsonl'}"
  never = make("mssr", domain, f"replay.adaptive.interval={STEPS + 1}")
  params, log = fitted(never)
  assert not any("replay_interval" in row for row in log)
  assert_identical(params, sft[0])


def test_gkd_draws_by_seed_and_step_where_it_compares(make):
  def rolls_out(config, count):
    share, seed = programs.rollout_share(config.distill), config.train.seed
    return [programs.rolls_out(share, seed=seed, step=step) for step in range(count)]

  drawn = rolls_out(make("gkd"), 1000)
  assert drawn == rolls_out(make("gkd"), 1000)
  assert 450 < sum(drawn) < 550  # ±3 standard deviations of 16
  other = make("gkd", "train.seed=1")
  assert drawn != rolls_out(other, 1000)
  _, log = fitted(make("gkd"))
  # Only a rollout can end by itself.
  assert ["rollout_ended" in row for row in log] == drawn[:STEPS]
  assert len(set(drawn[:STEPS])) == 2
  for share, words in ((0.0, "answer"), (1.0, "rollout")):
    always = make("gkd", f"distill.on_policy={share}")
    fixed = make("gkd", f"distill.trajectory={words}")
    assert rolls_out(always, 50) == rolls_out(fixed, 50)


def test_sdpo_without_a_success_moves_nothing(make, needs, base):
  """No rollout of a random model is its answer: the loss is 0, and nothing divides by
  the count of tokens; only the decay, off here, would move the model."""
  never = ["distill.success=1.0", "train.weight_decay=0.0"]
  params, log = fitted(make("sdpo", *needs["sdpo"], *never))
  assert [row["loss_kd"] for row in log] == [0.0] * STEPS
  assert [row["grad_norm"] for row in log] == [0.0] * STEPS
  assert [row["rollout_taught"] for row in log] == [0.0] * STEPS
  assert all(row["rollout_length"] > 0 for row in log)
  assert_identical(params, base)


def test_a_teacher_with_another_tokenizer_is_refused(make, smollm, tmp_path):
  folder = tmp_path / "other"
  tiny_run.save_model(folder, smollm)
  template = folder / "chat_template.jinja"
  template.write_text(template.read_text() + "{# changed #}")
  settings = make("opd_recover", f"distill.source={folder}")
  with pytest.raises(errors.UserError, match=r"distill\.source: the tokenizer or chat"):
    run_inputs.prepare(settings)


def test_a_teacher_with_another_vocabulary_is_refused(make, smollm, tmp_path):
  folder = tmp_path / "padded"
  tiny_run.save_model(folder, smollm)
  fields = json.loads((folder / "config.json").read_text())
  size = fields["vocab_size"]
  (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": size + 64}))
  settings = make("opd_recover", f"distill.source={folder}")
  named = rf"distill\.source: .* has logits of {size + 64} tokens, and .* of {size} "
  with pytest.raises(errors.UserError, match=named):
    run_inputs.prepare(settings)


def test_fewer_general_questions_than_a_batch_are_refused(make, needs):
  settings = make("ewc", *needs["ewc"], "anchor.batch_size=9")
  with pytest.raises(errors.UserError, match=r"anchor\.batch_size: 9 is more than"):
    run_inputs.prepare(settings)


# Method -> the settings under which nothing is left of it but SFT.
NULLS = {
  "fused_sft": ["data.answers=original"],
  "opd": ["balance.weight=0.0"],
  "opd_pure": ["balance.weight=0.0", "train.cross_entropy=true"],
  "gkd": ["balance.weight=0.0"],
  "sdft_cl": ["balance.weight=0.0", "train.cross_entropy=true"],
  "sdpo": [
    *("balance.weight=0.0", "train.cross_entropy=true"),
    "train.loss_mean=sequence",
  ],
  "fapm": ["prune.keep=1.0"],
  "dg_hard": ["hard_threshold.scale=0.0"],
  "wise_ft": ["interpolate.weight=1.0"],
  "l2sp": ["anchor.strength=0.0", "train.weight_decay=0.01"],
  "ewc": ["anchor.strength=0.0", "train.weight_decay=0.01"],
  "recadam": ["recadam=null", "train.weight_decay=0.01"],
  "freeze": ["freeze=null"],
  "das": ["soft_mask=null"],
  "replay": ["replay.share=0.0"],
  "ssr": ["replay.questions=null", "replay.share=0.0"],
  "mssr": ["replay.share=0.0"],
  "lora": ["lora=null", "train.weight_decay=0.01"],
  "eaft": ["token_weights.exponent=0.0"],
  "dft": ["token_weights.exponent=0.0"],
  "talr": ["token_weights.floor=1.0"],
  "stm": ["token_weights.max_perplexity=1.0e+300"],
  "flow": ["token_weights.temperature=1.0e+30"],
  "sft_kl": ["balance.weight=0.0"],
  "asft": ["balance.weight=0.0", "token_weights=null"],
  "raft": ["balance.mode=fixed", "balance.weight=0.0", "data.answers=original"],
}


# Without a null setting: they differ from SFT in their data or their first model alone,
# or learn from no answers.
WITHOUT_NULL = {"sft", "sdft", "opd_recover", "disc"}


def test_every_method_has_a_null_setting_or_none_for_a_reason():
  assert NULLS.keys() | WITHOUT_NULL == methods.METHODS.keys()


@pytest.mark.parametrize("name", NULLS)
@pytest.mark.slow
def test_its_null_setting_is_sft_bit_for_bit(name, make, needs, sft):
  params, _ = fitted(make(name, *needs.get(name, []), *NULLS[name]))
  assert_identical(params, sft[0])
