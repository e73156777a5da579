"""Clusters of sentence embeddings, and the few texts that represent all of them.

K-means is that of scikit-learn, which sentence-transformers depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Representatives(NamedTuple):
  """The rows that represent all.

  Attributes:
    chosen: their indices, ascending.
    cluster_N: the cluster of every row.
  """

  chosen: list[int]
  cluster_N: list[int]


def representatives(
  vectors_NE: np.ndarray, *, cluster_count: int, keep: int, seed: int
) -> Representatives:
  """The rows nearest to the centroids of k-means, a share of each cluster.

  A cluster of n_c of the N rows gives about keep * n_c / N; see `shares`. Huang et al.,
  "Mitigating Catastrophic Forgetting in Large Language Models with Self-Synthesized
  Rehearsal", arXiv 2403.01244.

  Args:
    vectors_NE: finite vectors of equal length; N >= 1.
    cluster_count: fewer if there are fewer different rows.
    keep: number of rows to choose; all rows if there are no more.
  """
  # Imported here, since loading takes a second and only synthesis needs it.
  import sklearn.cluster
  import threadpoolctl

  vectors_NE = np.asarray(vectors_NE, np.float64)
  means = sklearn.cluster.KMeans(
    min(cluster_count, len(np.unique(vectors_NE, axis=0))), n_init=10, random_state=seed
  )
  # Several threads would add in varying order, and give varying bits.
  with threadpoolctl.threadpool_limits(1):
    cluster_N = means.fit_predict(vectors_NE)
  distance_N = np.linalg.norm(vectors_NE - means.cluster_centers_[cluster_N], axis=1)
  counts = shares(np.bincount(cluster_N).tolist(), keep)
  chosen: list[int] = []
  for cluster, count in enumerate(counts):
    (members,) = np.nonzero(cluster_N == cluster)
    nearest = np.argsort(distance_N[members], kind="stable")[:count]
    chosen += members[nearest].tolist()
  return Representatives(sorted(chosen), cluster_N.tolist())


def shares(sizes: Sequence[int], keep: int) -> list[int]:
  """Integers in proportion to the sizes, whose sum is `keep` or the sum of the sizes.

  Each is keep * size / sum, rounded down. The rest goes one by one to the largest
  remainders, the earlier of equals first (Hamilton's method). None exceeds its size.
  """
  total = sum(sizes)
  keep = min(keep, total)
  counts = [keep * size // total for size in sizes]
  remainders = [keep * size % total for size in sizes]
  by_remainder = sorted(range(len(sizes)), key=lambda i: -remainders[i])
  for i in by_remainder[: keep - sum(counts)]:
    counts[i] += 1
  return counts
