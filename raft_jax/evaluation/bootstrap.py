"""Means over items that are resampled together, for intervals of what is made of them.

Differences, ratios and points read off a curve are computed in every resample. Two
means over the same items see the same resamples, which pairs them; means over different
items are independent. Percentiles: Efron, "Bootstrap Methods: Another Look at the
Jackknife", 1979. Shapes: M items, S samples: the mean over all items first, then one a
resample.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from raft_jax.evaluation import intervals

BATCH = 2_000_000
"""Bounds the entries of an array of resamples."""


def means(
  values_M: np.ndarray, items: str, weights_M: np.ndarray | None = None
) -> np.ndarray:
  """The weighted mean over all items and over each resample of them, float64 [S].

  Args:
    values_M: one score an item.
    items: says which items these are; equal words share their resamples.
    weights_M: how many answers each value stands for; None: one.
  """
  if weights_M is None:
    weights_M = np.ones(len(values_M))
  pair_M2 = np.stack([values_M * weights_M, weights_M], axis=-1)
  found = [pair_M2.sum(axis=0, keepdims=True)]
  found += [
    counts_BM.astype(np.float64) @ pair_M2
    for counts_BM in _counts(items, len(values_M))
  ]
  total_S2 = np.concatenate(found)
  # A resample may hold no answer at all; it then says nothing, and NaN is left out.
  with np.errstate(invalid="ignore", divide="ignore"):
    return total_S2[:, 0] / total_S2[:, 1]


@functools.lru_cache(maxsize=8)
def _counts(items: str, count: int) -> tuple[np.ndarray, ...]:
  """How often each resample has each item, [B, M] in batches; no count nears 256."""
  rng = np.random.default_rng(list(items.encode()))
  rows = max(1, BATCH // count)
  sizes = [
    min(rows, intervals.RESAMPLES - done)
    for done in range(0, intervals.RESAMPLES, rows)
  ]
  share_M = np.full(count, 1 / count)
  return tuple(rng.multinomial(count, share_M, size=n).astype(np.uint8) for n in sizes)


def describe(samples_S: np.ndarray) -> dict[str, float]:
  """The value over all items and its 95 % interval, for JSON; {} where it is NaN.

  A resample that is NaN says nothing; where all are, there is no interval.
  """
  value = float(samples_S[0])
  if not np.isfinite(value):
    return {}
  kept_S = samples_S[1:][np.isfinite(samples_S[1:])]
  if not kept_S.size:
    return {"value": value}
  low, high = np.percentile(kept_S, [2.5, 97.5])
  return {"value": value, "low": float(low), "high": float(high)}


def read_off(
  curve: Sequence[tuple[np.ndarray, np.ndarray]], place_S: np.ndarray
) -> np.ndarray:
  """The height of a curve at a place, sample by sample, float64 [S].

  Linear between its points, each (places [S], heights [S]). Outside them the value over
  all items is NaN, and a resample takes the nearest point's height.
  """
  places_PS, heights_PS = (np.stack(part) for part in zip(*curve))
  order_PS = np.argsort(places_PS, axis=0)
  places_PS = np.take_along_axis(places_PS, order_PS, axis=0)
  heights_PS = np.take_along_axis(heights_PS, order_PS, axis=0)
  found_S = np.array(
    [
      np.interp(place, places_P, heights_P)
      for place, places_P, heights_P in zip(place_S, places_PS.T, heights_PS.T)
    ]
  )
  if not places_PS[0, 0] <= place_S[0] <= places_PS[-1, 0]:
    found_S[0] = np.nan
  return found_S
