"""Near duplicates: those of a brute-force search, and hardly any missed."""

import random

import pytest

from raft_jax.curation import near_duplicates
from tests.helpers import brute_force_duplicates


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_are_those_of_a_brute_force_search(threshold):
  dice = random.Random(0)
  vocabulary = ["".join(dice.choices("abcdeéß日", k=k % 7 + 2)) for k in range(200)]
  texts = []
  for _ in range(60):
    words = dice.choices(vocabulary, k=dice.randrange(1, 80))
    for _ in range(4):
      texts.append(dice.choice([" ", "  ", "\n"]).join(words))
      for _ in range(dice.randrange(3)):
        words[dice.randrange(len(words))] = dice.choice(vocabulary).upper()
  dice.shuffle(texts)
  expected = brute_force_duplicates.find(texts, threshold)
  assert 10 < sum(j is not None for j in expected) < 200
  matches = near_duplicates.find(texts, threshold)
  assert [match and match.earlier for match in matches] == expected
  for text, match in zip(texts, matches, strict=True):
    if match is not None:
      mine = brute_force_duplicates.grams(text)
      theirs = brute_force_duplicates.grams(texts[match.earlier])
      assert match.jaccard == len(mine & theirs) / len(mine | theirs)


def test_the_index_misses_hardly_any_pair_at_the_threshold():
  for threshold in (0.1, 0.5, 0.8, 0.9, 0.99):
    bands, rows = near_duplicates._bands(threshold)
    assert bands * rows <= near_duplicates.PERMUTATIONS
    assert (1 - threshold**rows) ** bands <= 1e-4
  # 0.8^6 = 0.262 and 0.738^21 = 0.0017: six rows would miss more.
  assert near_duplicates._bands(0.8) == (25, 5)
