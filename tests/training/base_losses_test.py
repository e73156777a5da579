"""Losses of the base model that weigh tokens: their file, identity and weights."""

import json

import numpy as np
import pytest

from raft_jax.config import schema
from raft_jax.data import batching, token_rows
from raft_jax.training import base_losses

RUN = {"model": "m sha256:1", "data": "rows", "tokenizer": "t", "lora": None}


def rows(copies=1):
  """Three questions of the domain, of which row 1 was set aside, and one replayed."""
  domain = [token_rows.Row((1, 2), (3,) * n, (9,), i) for i, n in ((0, 1), (2, 4))]
  domain.append(token_rows.Row((1,), (3, 4), (9,), 3))
  replayed = [token_rows.Row((1,), (3, 4, 5), (9,), 4)]
  return base_losses.Rows(domain, replayed, copies, batch_size=2, pad_id=0)


def losses():
  rng = np.random.default_rng(0)
  drawn = {0: 1, 2: 4, 3: 2, 4: 3}
  return {i: rng.gamma(1.0, 1.0, n).astype(np.float32) for i, n in drawn.items()}


def test_they_are_read_back_bit_for_bit(tmp_path):
  own = base_losses.identity(RUN, "float32")
  assert base_losses.read(tmp_path, own) is None
  base_losses.write(tmp_path, losses(), own)
  found = base_losses.read_on_all(tmp_path, own)
  assert list(found) == list(losses())
  for row_id, values in losses().items():
    assert found[row_id].dtype == np.float32
    np.testing.assert_array_equal(found[row_id], values)
  summary = json.loads((tmp_path / "base_losses/summary.json").read_text())
  assert (summary["rows"], summary["tokens"]) == (4, 10)


@pytest.mark.parametrize(
  "changed", [{"model": "m sha256:2"}, {"data": "others"}, {"tokenizer": "u"}]
)
def test_those_of_another_model_template_or_set_of_rows_are_not_read(changed, tmp_path):
  base_losses.write(tmp_path, losses(), base_losses.identity(RUN, "float32"))
  other = base_losses.identity({**RUN, **changed}, "float32")
  assert base_losses.read(tmp_path, other) is None
  assert base_losses.read(tmp_path, base_losses.identity(RUN, "bfloat16")) is None
  # LoRA trains other parameters of the same base model.
  lora = base_losses.identity({**RUN, "lora": {"rank": 4}}, "float32")
  assert base_losses.read(tmp_path, lora) is not None
  # With a quantised base it is another model.
  coded = base_losses.identity({**RUN, "lora": {"rank": 4, "base": "int8"}}, "float32")
  assert base_losses.read(tmp_path, coded) is None


def test_damaged_and_unfinished_files_count_as_absent(tmp_path):
  own = base_losses.identity(RUN, "float32")
  base_losses.write(tmp_path, losses(), own)
  file, manifest = (
    tmp_path / "base_losses" / name for name in ("losses.jsonl", "MANIFEST.json")
  )
  whole = file.read_bytes()
  file.write_bytes(whole.replace(b"0.", b"1.", 1))
  assert base_losses.read(tmp_path, own) is None
  file.write_bytes(whole)
  assert base_losses.read(tmp_path, own) is not None
  manifest.write_text("{")
  assert base_losses.read(tmp_path, own) is None
  manifest.unlink()
  assert base_losses.read(tmp_path, own) is None


def test_stm_learns_tokens_up_to_the_threshold():
  measured = losses()
  settings = schema.TokenWeights(rule="stm", max_perplexity=2.0)
  found = base_losses.weights_by_row(settings, measured, rows())
  for row_id, values in measured.items():
    np.testing.assert_array_equal(found[row_id], values <= np.log(2.0))
    assert found[row_id].dtype == np.float32


def test_flow_has_one_weight_an_answer_by_the_median_of_the_domain():
  measured = losses()
  found = base_losses.weights_by_row(schema.TokenWeights(rule="flow"), measured, rows())
  means = {i: np.float64(values).mean() for i, values in measured.items()}
  median = sorted(means[i] for i in (0, 2, 3))[1]
  for row_id, values in measured.items():
    expected = np.full(len(values), np.exp(-means[row_id] / median))
    np.testing.assert_allclose(found[row_id], expected, rtol=1e-5)
  fixed = schema.TokenWeights(rule="flow", temperature=2.0)
  found = base_losses.weights_by_row(fixed, measured, rows())
  np.testing.assert_allclose(found[4], np.exp(-means[4] / 2), rtol=1e-5)


def test_every_copy_of_a_row_has_its_weights():
  measured, settings = losses(), schema.TokenWeights(rule="stm")
  once = base_losses.weights_by_row(settings, measured, rows())
  found = base_losses.weights_by_row(settings, measured, rows(copies=3))
  assert sorted(found) == [3 * i + copy for i in sorted(measured) for copy in range(3)]
  for row_id, weights in found.items():
    np.testing.assert_array_equal(weights, once[row_id // 3])


def test_weights_stand_on_the_tokens_of_the_batch():
  three = rows().domain
  [batch, _] = batching.sequential_batches(
    three, 2, pad_id=0, width=batching.widths(three, 1)[-1]
  )
  weights = {0: np.float32([0.5]), 2: np.float32([1.0, 0.0, 0.25, 1.0])}
  found = batching.with_token_weights(batch, weights).token_weight_BA
  assert found.dtype == np.float32
  assert found.shape == batch.answer_BA.shape
  assert found[0, :2].tolist() == [0.5, 0.0]
  assert found[1, :5].tolist() == [1.0, 0.0, 0.25, 1.0, 0.0]
  assert batch.token_weight_BA is None
