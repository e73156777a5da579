"""ROUGE-L: the similarity of an answer to a reference by their common words."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rouge_score import rouge_scorer


@functools.lru_cache(maxsize=1)
def _scorer() -> rouge_scorer.RougeScorer:
  from rouge_score import rouge_scorer  # imports nltk, which takes seconds

  return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(reference: str, answer: str) -> float:
  """F1 of the longest common subsequence of stemmed words, 0..1.

  Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. The library
  compares only letters and digits of the Latin script.
  """
  return float(_scorer().score(reference, answer)["rougeL"].fmeasure)
