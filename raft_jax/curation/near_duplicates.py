"""Near duplicates: texts that share most of their character 5-grams.

MinHash with locality-sensitive hashing (datasketch) proposes pairs in about linear
time, and the exact Jaccard index decides: Lee et al., "Deduplicating Training Data
Makes Language Models Better", arXiv 2107.06499. The 5-grams are of characters and not
of words, because questions are short and some scripts have no spaces.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from raft_jax.runtime import interrupts

if TYPE_CHECKING:
  import datasketch

GRAM = 5
PERMUTATIONS = 128
MISSES = 1e-4
"""Largest probability that a pair exactly at the threshold is not proposed."""

_FACTORS = np.random.default_rng(0).integers(2**63, size=GRAM, dtype=np.uint64) | 1
_BATCH = 8192  # shingles; datasketch makes an array [shingles, permutations]


class Match(NamedTuple):
  """The index of the earlier text that a text repeats, and their Jaccard index."""

  earlier: int
  jaccard: float


def find(texts: Sequence[str], threshold: float) -> list[Match | None]:
  """For each text, the first kept text before it that it repeats; None if it is kept.

  A text repeats another if the Jaccard index J(A, B) = |A and B| / |A or B| of their
  sets of 5-grams is at least `threshold` (0..1). Texts are compared with kept texts
  only, and no two kept texts repeat each other.
  """
  import datasketch  # imports scipy, which takes seconds

  index = datasketch.MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
  matches: list[Match | None] = []
  for i, text in enumerate(texts):
    interrupts.check()
    shingles = _shingles(text)
    sketch = _sketch(shingles)
    matches.append(None)
    for j in sorted(index.query(sketch)):
      similarity = _jaccard(shingles, _shingles(texts[j]))
      if similarity >= threshold:
        matches[i] = Match(j, similarity)
        break
    else:
      index.insert(i, sketch)
  return matches


def normal(text: str) -> str:
  """A text as it is compared, without differences of case, white space and compatible
  characters."""
  return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shingles(text: str) -> np.ndarray:
  """Sorted 64-bit hashes of the set of 5-grams; a shorter text is one 5-gram."""
  points = np.frombuffer(normal(text).encode("utf-32-le", "surrogatepass"), np.uint32)
  points = np.pad(points.astype(np.uint64), (0, max(GRAM - len(points), 0)))
  windows = np.lib.stride_tricks.sliding_window_view(points, GRAM)
  hashes = (windows * _FACTORS).sum(axis=1, dtype=np.uint64)
  hashes ^= hashes >> np.uint64(32)  # mixes all bits into those that MinHash reads
  return np.unique(hashes)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
  common = len(np.intersect1d(a, b, assume_unique=True))
  return common / (len(a) + len(b) - common)


def _sketch(shingles: np.ndarray) -> datasketch.MinHash:
  import datasketch

  sketch = datasketch.MinHash(num_perm=PERMUTATIONS, hashfunc=lambda hashed: hashed)
  short = (shingles & np.uint64(2**32 - 1)).tolist()
  for start in range(0, len(short), _BATCH):
    sketch.update_batch(short[start : start + _BATCH])
  return sketch


def _bands(threshold: float) -> tuple[int, int]:
  """Bands and rows of the index, with as many rows as MISSES allows.

  Two texts with Jaccard index s agree in one of b bands of r rows with probability
  1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4).
  """
  rows = max(
    (r for r in range(1, 17) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSES),
    default=1,
  )
  return PERMUTATIONS // rows, rows
