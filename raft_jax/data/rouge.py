"""ROUGE-L, the likeness of an answer to a reference by their common words."""

import functools

from rouge_score import rouge_scorer


@functools.lru_cache(maxsize=1)
def _scorer() -> rouge_scorer.RougeScorer:
  return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(reference: str, answer: str) -> float:
  """F1 of the longest common subsequence of stemmed words, 0..1.

  Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. The library
  compares letters and digits of the Latin script only.
  """
  return float(_scorer().score(reference, answer)["rougeL"].fmeasure)
