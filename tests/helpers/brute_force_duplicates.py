"""Near duplicates by a brute-force comparison of sets of strings."""

import unicodedata


def grams(text):
  text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
  return {text[i : i + 5] for i in range(max(len(text) - 4, 1))}


def find(texts, threshold):
  """The index that each text repeats, by sets of strings; None for kept ones."""
  sets, earlier = [grams(text) for text in texts], []
  for i, mine in enumerate(sets):
    kept = [j for j in range(i) if earlier[j] is None]
    near = (j for j in kept if len(mine & sets[j]) >= threshold * len(mine | sets[j]))
    earlier.append(next(near, None))
  return earlier
