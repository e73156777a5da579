"""The built-in engine on the real model: a reply depends on its own request alone."""

import json

import pytest

from raft_jax import errors
from raft_jax.generation import engines, jax_engine
from raft_jax.hf import chat, model_source
from raft_jax.storage import records
from tests.helpers import tiny_run

BATCH = 4


@pytest.fixture(scope="module")
def engine(smollm):
  return jax_engine.load(smollm, dtype="float32", batch_size=BATCH)


@pytest.fixture(scope="module")
def requests(law):
  rows = [json.loads(line) for line in (law / "test.jsonl").open()][:5]
  short = [
    engines.Request((records.Message("user", row["question"]),), 12, 0.8, 0.95, seed)
    for seed, row in enumerate(rows, start=2**31 - 6)
  ]
  # The second width: a long prompt pads to another bucket than a short one.
  long = (records.Message("user", "Answer with yes. " * 20),)
  return [*short, engines.Request(long, 12, 0.8, 0.95, 7)]


@pytest.fixture(scope="module")
def replies(engine, requests):
  return engines.in_order(engine, requests)


@pytest.mark.slow
def test_order_batch_mates_and_filling_do_not_matter(engine, requests, replies):
  assert len({jax_engine.padded_width(r.prompt_tokens) for r in replies}) == 2
  assert engines.in_order(engine, requests[::-1]) == replies[::-1]
  assert engines.in_order(engine, [requests[2]]) == [replies[2]]
  assert engines.in_order(engine, [requests[5], requests[0]]) == [
    replies[5],
    replies[0],
  ]


@pytest.mark.slow
def test_the_seed_matters(engine, requests, replies):
  again = engines.in_order(
    engine, [r._replace(seed=r.seed - 100) for r in requests[:4]]
  )
  assert [r.text for r in again] != [r.text for r in replies[:4]]


@pytest.mark.slow
def test_counts_and_finish_reasons(engine, requests, replies, smollm):
  chat_tokenizer = chat.load(smollm)
  for request, reply in zip(requests, replies, strict=True):
    assert reply.prompt_tokens == engine.count_tokens(request.messages)
    assert reply.prompt_tokens == len(chat.prompt_ids(chat_tokenizer, request.messages))
    assert (reply.finish_reason == "length") == (reply.completion_tokens == 12)
    assert len(chat.encode(chat_tokenizer, reply.text)) <= reply.completion_tokens


@pytest.mark.slow
def test_a_reply_that_ends_is_a_stop_without_control_tokens(engine, smollm):
  ask = (records.Message("user", "Say hello."),)
  (reply,) = engines.in_order(engine, [engines.Request(ask, 40, 0.0, 1.0, 0)])
  assert reply.finish_reason == "stop"
  assert 1 < reply.completion_tokens < 40
  assert reply.text
  assert "<|" not in reply.text
  # Every token but the EOS is in the text.
  assert len(chat.encode(chat.load(smollm), reply.text)) == reply.completion_tokens - 1


@pytest.mark.slow
def test_greedy_equals_transformers(engine, smollm, law):
  """Golden tokens from an independent implementation on the same weights."""
  import torch
  import transformers

  path = model_source.resolve(smollm)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  tokenizer = chat.load(smollm).hf_tokenizer
  rows = [json.loads(line) for line in (law / "test.jsonl").open()][:2]
  for row in rows:
    messages = (records.Message("user", row["question"]),)
    (reply,) = engines.in_order(engine, [engines.Request(messages, 16, 0.0, 1.0, 0)])
    ids = tokenizer.apply_chat_template(
      [m._asdict() for m in messages], add_generation_prompt=True, return_dict=False
    )
    out = model.generate(
      torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=0
    )[0, len(ids) :]
    assert reply.text == tokenizer.decode(out, skip_special_tokens=True)


def test_one_model_is_one_copy(engine, smollm):
  other = jax_engine.load(smollm, dtype="float32", batch_size=2)
  assert other.identity == engine.identity
  assert "sha256:" in engine.identity
  assert jax_engine._params(smollm, "float32") is jax_engine._params(smollm, "float32")
  assert jax_engine.load(smollm, dtype="bfloat16", batch_size=2).identity != (
    engine.identity
  )


def test_a_model_that_cannot_be_used_is_refused_when_it_is_named(tmp_path, smollm):
  folder = tiny_run.save_model(tmp_path, smollm)
  weights = folder / "model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-1000])
  with pytest.raises(errors.UserError, match=r"model\.safetensors: damaged"):
    jax_engine.load(str(folder), dtype="float32", batch_size=1)
  weights.write_bytes(whole)
  (folder / "chat_template.jinja").unlink()
  with pytest.raises(errors.UserError, match="no chat template"):
    jax_engine.load(str(folder), dtype="float32", batch_size=1)


def test_over_the_limit_is_refused(engine):
  ask = (records.Message("user", "x"),)
  assert engine.prompt_limit == 8192
  with pytest.raises(ValueError, match="exceed"):
    engines.in_order(engine, [engines.Request(ask, 8192, 0.0, 1.0, 0)])


def test_bucket_is_a_close_upper_bound_with_four_widths_a_doubling():
  widths = [jax_engine.padded_width(n) for n in range(1, 4097)]
  assert all(w >= n for n, w in enumerate(widths, start=1))
  assert all(w <= max(1.25 * n + 64, 64) for n, w in enumerate(widths, start=1))
  assert [w for w in sorted(set(widths)) if w > 1024] == [
    *range(1280, 2049, 256),
    *range(2560, 4097, 512),
  ]
  assert jax_engine.padded_width(1) == jax_engine.padded_width(64) == 64
  assert jax_engine.padded_width(65) == 128


def test_logits_that_are_not_finite_are_an_error_of_the_row(tmp_path, smollm):
  source = str(tiny_run.save_overflowing_model(tmp_path / "model", smollm))
  engine = jax_engine.load(source, dtype="float32", batch_size=2)
  request = engines.Request((records.Message("user", "Hello"),), 4, 1.0, 1.0, 1)
  (reply,) = engines.in_order(engine, [request])
  assert isinstance(reply, errors.UserError)
  assert f"{source} (float32): the model's logits are not finite" in str(reply)
