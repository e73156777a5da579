"""The split of documents: by their ids alone, and in the shares."""

import collections

import hypothesis
import hypothesis.strategies as st

from raft_jax.curation import extraction

SHARES = {"train": 0.8, "validation": 0.05, "test": 0.15}


@hypothesis.given(st.text(), st.integers(0, 2**31 - 1))
def test_a_document_has_one_split_whatever_else_there_is(name, seed):
  split = extraction.split_of(name, SHARES, seed)
  assert split in SHARES
  assert extraction.split_of(name, dict(SHARES), seed) == split
  only_train = {"train": 1.0, "validation": 0, "test": 0}
  assert extraction.split_of(name, only_train, seed) == "train"


def test_splits_have_their_shares():
  counts = collections.Counter(
    extraction.split_of(f"document {i}", SHARES, 0) for i in range(20_000)
  )
  # Three standard deviations of a share p of n: 3 sqrt(p (1 - p) / n) <= 0.0085.
  for name, share in SHARES.items():
    assert abs(counts[name] / 20_000 - share) < 0.0085
  moved = [extraction.split_of(f"document {i}", SHARES, 1) for i in range(100)]
  assert moved != [extraction.split_of(f"document {i}", SHARES, 0) for i in range(100)]
