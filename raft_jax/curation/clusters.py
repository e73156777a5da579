"""Clusters of sentence embeddings, and the few texts that stand for all of them.

K-means by scikit-learn, which sentence-transformers brings along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Representatives(NamedTuple):
  """Who stands for all.

  Attributes:
    chosen: indices, ascending.
    cluster_N: cluster of each row.
  """

  chosen: list[int]
  cluster_N: list[int]


def representatives(
  vectors_NE: np.ndarray, *, clusters: int, keep: int, seed: int
) -> Representatives:
  """The rows nearest to the centroids of k-means, from each cluster its share.

  A cluster of n_c of the N rows gives about keep * n_c / N, see `shares`. Huang et al.,
  "Mitigating Catastrophic Forgetting in Large Language Models with Self-Synthesized
  Rehearsal", arXiv 2403.01244.

  Args:
    vectors_NE: finite, of equal length each; N >= 1.
    clusters: fewer if there are fewer different rows.
    keep: rows in all; all of them if there are no more.
  """
  # Only here: a second to load, and the stage that needs it loads torch anyway.
  import sklearn.cluster
  import threadpoolctl

  vectors_NE = np.asarray(vectors_NE, np.float64)
  means = sklearn.cluster.KMeans(
    min(clusters, len(np.unique(vectors_NE, axis=0))), n_init=10, random_state=seed
  )
  # Threads would add up in an order of their own: not the same bits every time.
  with threadpoolctl.threadpool_limits(1):
    cluster_N = means.fit_predict(vectors_NE)
  away_N = np.linalg.norm(vectors_NE - means.cluster_centers_[cluster_N], axis=1)
  counts = shares(np.bincount(cluster_N).tolist(), keep)
  chosen: list[int] = []
  for cluster, count in enumerate(counts):
    (mine,) = np.nonzero(cluster_N == cluster)
    chosen += mine[np.argsort(away_N[mine], kind="stable")[:count]].tolist()
  return Representatives(sorted(chosen), cluster_N.tolist())


def shares(sizes: Sequence[int], keep: int) -> list[int]:
  """Whole numbers in proportion to sizes, together `keep` or the sum of the sizes.

  keep * size / sum rounded down, and the rest one by one to the largest remainders, the
  earlier of equals first (Hamilton's method); none exceeds its size.
  """
  total = sum(sizes)
  keep = min(keep, total)
  counts = [keep * size // total for size in sizes]
  remainders = [keep * size % total for size in sizes]
  by_remainder = sorted(range(len(sizes)), key=lambda i: -remainders[i])
  for i in by_remainder[: keep - sum(counts)]:
    counts[i] += 1
  return counts
