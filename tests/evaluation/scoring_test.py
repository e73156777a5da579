"""Values of single items against transformers, and what is kept of a killed run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from raft_jax import errors
from raft_jax.data import token_rows
from raft_jax.evaluation import scoring
from raft_jax.hf import answer_turns, chat, model_source
from raft_jax.hf import load as hf_load
from raft_jax.models import transformer
from raft_jax.storage import journal, question_files
from tests.helpers import tiny_decoder

TINY = dataclasses.replace(
  tiny_decoder.CONFIG, d_model=16, n_layers=2, head_dim=4, d_ff=24, max_positions=256
)
SETTINGS = scoring.Settings(batch_size=3, dtype="float32", unroll=1)


def _rows(count: int, seed: int = 0) -> list[token_rows.Row]:
  rng = np.random.default_rng(seed)

  def ids(low: int, high: int) -> tuple[int, ...]:
    return tuple(map(int, rng.integers(1, TINY.vocab_size, rng.integers(low, high))))

  return [token_rows.Row(ids(3, 30), ids(1, 40), (), i) for i in range(count)]


@pytest.mark.slow
def test_held_out_loss_equals_transformers_on_the_real_model(smollm, law, tmp_path):
  chat_tokenizer = chat.load(smollm)
  questions = question_files.read_questions(law / "test.jsonl", limit=8)
  rows = [
    token_rows.Row(
      tuple(chat.prompt_ids(chat_tokenizer, q.messages)),
      tuple(answer_turns.answer_ids(chat_tokenizer, q.answer)),
      (),
      i,
    )
    for i, q in enumerate(questions)
  ]
  assert all(row.answer[-1] == chat_tokenizer.eos_ids[0] for row in rows)
  path = model_source.resolve(smollm)
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
  decoder = hf_load.load_config(smollm)
  model = scoring.eval_model(
    hf_load.load_params(smollm, decoder),
    decoder,
    chat_tokenizer,
    SETTINGS._replace(batch_size=5),  # the second batch is filled up
    "real",
  )
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    actual = scoring.losses(model, rows, log, name="loss")
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def _model(params: transformer.Params, batch_size: int = 3, pad_id: int = 0):
  chat_tokenizer = types.SimpleNamespace(pad_id=pad_id, eos_ids=(3,), digest="tiny")
  settings = SETTINGS._replace(batch_size=batch_size)
  return scoring.eval_model(params, TINY, chat_tokenizer, settings, "tiny")  # type: ignore[arg-type]


def test_loss_of_a_row_does_not_depend_on_its_batch(tmp_path):
  params, rows = transformer.init(jax.random.key(0), TINY), _rows(4)
  actual = []
  for batch_size, pad_id in ((4, 0), (1, 5)):
    with journal.open_journal(tmp_path / f"{batch_size}.jsonl") as log:
      model = _model(params, batch_size, pad_id)
      actual.append(scoring.losses(model, rows, log, name="loss"))
  np.testing.assert_allclose(*actual, rtol=1e-5)


def test_the_loss_is_that_of_each_answer_token_after_those_before_it(tmp_path):
  """In float64, from the logits of one pass over each row alone."""
  params, rows = transformer.init(jax.random.key(0), TINY), _rows(3)
  params["embed"] *= 20  # logits that differ
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    actual = scoring.losses(_model(params), rows, log, name="loss")
  expected = []
  for row in rows:
    tokens = np.array([[*row.prompt, *row.answer]])
    valid = np.ones(tokens.shape, bool)
    logits = np.asarray(tiny_decoder.logits(params, TINY, tokens, valid)[0], np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    before = len(row.prompt) - 1
    expected.append(-np.mean([log_p[before + t, a] for t, a in enumerate(row.answer)]))
  assert max(expected) - min(expected) > 0.1
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_the_remedy(tmp_path):
  params = transformer.init(jax.random.key(0), TINY)
  params["final_norm"] = params["final_norm"] * np.nan
  with (
    journal.open_journal(tmp_path / "journal.jsonl") as log,
    pytest.raises(errors.UserError, match=r"train\.learning_rate"),
  ):
    scoring.losses(_model(params), _rows(2), log, name="loss")


def test_choices_are_the_logits_after_each_prompt(tmp_path):
  """Against a forward pass of each prompt alone, without padding."""
  params, rows = transformer.init(jax.random.key(0), TINY), _rows(5)
  prompts, letters = [row.prompt for row in rows], [7, 90, 0]
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    actual = scoring.choices(_model(params), prompts, letters, log, name="choices")
  for prompt, logits in zip(prompts, actual):
    valid = jnp.ones((1, len(prompt)), bool)
    hidden, _ = transformer.forward(
      params,
      TINY,
      jnp.array([prompt]),
      transformer.positions(valid),
      transformer.causal_mask(valid),
    )
    expected = transformer.output_embedding(params)[jnp.array(letters)] @ hidden[0, -1]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_pad_fills_batch_and_width():
  tokens, lengths = scoring.pad([(1, 2, 3), (4,)], count=3, multiple=4, pad_id=9)
  assert tokens.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9], [4, 9, 9, 9]]
  assert lengths.tolist() == [3, 1, 1]


def test_batches_are_longest_first_and_complete():
  lengths = [5, 9, 1, 9, 3]
  assert list(scoring.by_length([0, 1, 3, 4], lengths, 3)) == [[1, 3, 0], [4]]
  assert list(scoring.by_length([], lengths, 3)) == []


def test_finished_batches_survive_an_interruption(tmp_path):
  keys = [journal.content_key(i=i) for i in range(7)]
  lengths = [1, 2, 3, 4, 5, 6, 7]
  computed: list[int] = []

  def compute(batch: list[int]) -> list[int]:
    if len(computed) >= 4:
      raise KeyboardInterrupt
    computed.extend(batch)
    return [10 * i for i in batch]

  def run(compute):
    with journal.open_journal(tmp_path / "journal.jsonl") as log:
      return scoring.compute_missing(
        log, keys, lengths, compute, batch_size=2, title="test"
      )

  with pytest.raises(KeyboardInterrupt):
    run(compute)
  assert computed == [6, 5, 4, 3]
  later: list[int] = []
  values = run(lambda batch: later.extend(batch) or [10 * i for i in batch])
  assert later == [2, 1, 0]
  assert values == [0, 10, 20, 30, 40, 50, 60]
