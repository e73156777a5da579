"""Drift and weight distance of two small models, against torch and numpy."""

import jax
import numpy as np
import pytest
import torch
import transformers

from raft_jax.evaluation import drift, scoring
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import transformer
from raft_jax.storage import journal
from tests.helpers import tiny_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory, smollm):
  """Base and tuned model as transformers' networks and as ours."""
  folder = tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm)
  networks, params = [], []
  for scale in (1.0, 1.7):
    network = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
      for tensor in network.parameters():
        tensor.mul_(scale)
    networks.append(network)
    ours = hf_load.load_params(str(folder), hf_load.load_config(str(folder)))
    params.append(jax.tree.map(lambda leaf, scale=scale: leaf * scale, ours))
  return networks, params, hf_load.load_config(str(folder)), chat.load(smollm)


def test_drift_is_the_full_kl_over_the_answer(pair, tmp_path):
  (base, tuned), (base_params, params), config, chat_tokenizer = pair
  rows = [
    (
      chat.encode(chat_tokenizer, "Name a colour."),
      chat.encode(chat_tokenizer, " Red, like a rose."),
    ),
    (
      chat.encode(chat_tokenizer, "Count from one to ten, please."),
      chat.encode(chat_tokenizer, " One"),
    ),
    (
      chat.encode(chat_tokenizer, "Hm"),
      chat.encode(chat_tokenizer, " what is it that you ask of me"),
    ),
  ]
  expected = []
  for prompt, answer in rows:
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
      log_p0, log_p = (n(ids).logits[0].double().log_softmax(-1) for n in (base, tuned))
    kl = (log_p0.exp() * (log_p0 - log_p)).sum(-1)
    expected.append(float(kl[len(prompt) - 1 : -1].mean()))
  settings = scoring.Settings(batch_size=2, dtype="float32", unroll=1)
  model, origin = (
    scoring.eval_model(p, config, chat_tokenizer, settings, "tiny")
    for p in (params, base_params)
  )
  with journal.open_journal(tmp_path / "journal.jsonl") as log:
    actual = drift.row_drifts(origin, model, rows, log, name="drift")
    still = drift.row_drifts(origin, origin, rows, log, name="drift")
  assert min(expected) > 1e-3
  np.testing.assert_allclose(actual, expected, rtol=1e-3)
  assert still == [0.0] * 3


def test_weight_distance_of_every_tensor_and_layer(pair):
  params, config = pair[1][0], pair[2]
  tuned = dict(params, layers=dict(params["layers"]))
  tuned["embed"] = params["embed"] * 1.25
  tuned["layers"]["q"] = params["layers"]["q"].at[1].add(0.5)
  actual = drift.weight_distances(params, tuned, config)
  assert actual["embed"] == pytest.approx(0.25, rel=1e-5)
  assert actual["layers.q.0"] == actual["layers.down.1"] == 0.0
  q = np.asarray(params["layers"]["q"][1], np.float64)
  expected = 0.5 * np.sqrt(q.size) / np.sqrt((q**2).sum())
  assert actual["layers.q.1"] == pytest.approx(expected, rel=1e-5)
  shapes = transformer.shapes(config)
  layers = len(jax.tree.leaves(shapes["layers"])) * config.n_layers
  assert len(actual) == layers + len(jax.tree.leaves(shapes)) - len(
    jax.tree.leaves(shapes["layers"])
  )
