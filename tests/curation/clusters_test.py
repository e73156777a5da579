"""Clusters: the rows nearest to the centres, in proportional shares."""

import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from raft_jax.curation import clusters


@hypothesis.given(
  st.lists(st.integers(0, 50), min_size=1).filter(any), st.integers(1, 300)
)
def test_shares_are_proportional(sizes, keep):
  counts = clusters.shares(sizes, keep)
  keep = min(keep, sum(sizes))
  assert sum(counts) == keep
  for count, size in zip(counts, sizes, strict=True):
    assert 0 <= count <= size
    assert abs(count - keep * size / sum(sizes)) < 1


@pytest.mark.parametrize("keep", [1, 7, 23, 60, 99])
def test_those_nearest_to_the_centres_stand_for_their_clusters(keep):
  """Blobs so far apart that the clusters are known: 30, 20 and 10 points of each."""
  rng = np.random.default_rng(0)
  true = rng.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
  points = 50 * np.eye(8)[true] + rng.normal(size=(60, 8))
  selection = clusters.representatives(
    points.astype(np.float32), cluster_count=3, keep=keep, seed=0
  )
  names = {}
  for label, blob in zip(selection.cluster_N, true, strict=True):
    assert names.setdefault(label, blob) == blob
  expected, counts = set(), collections.Counter(true[selection.chosen].tolist())
  for blob, size in enumerate([30, 20, 10]):
    exact = min(keep, 60) * size / 60
    assert abs(counts[blob] - exact) < 1
    members = [i for i in range(60) if true[i] == blob]
    centre = sum(points[i] for i in members) / size
    members.sort(key=lambda i: float(((points[i] - centre) ** 2).sum()))
    expected.update(members[: counts[blob]])
  assert set(selection.chosen) == expected
  assert selection.chosen == sorted(selection.chosen)


def test_fewer_different_rows_than_clusters():
  rows = np.array([[1.0, 0], [0, 1], [1, 0], [1, 0]])
  with np.errstate(all="raise"):
    selection = clusters.representatives(rows, cluster_count=20, keep=2, seed=0)
  # 3 and 1 rows share 2: 1.5 and 0.5, of which one is rounded up.
  assert len(selection.chosen) == 2
  assert selection.cluster_N[0] == selection.cluster_N[2] == selection.cluster_N[3]
