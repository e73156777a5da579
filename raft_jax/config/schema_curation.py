"""Config sections of curation: `extract`, `refine` and `synthesise`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from raft_jax.config.schema_base import Positive, Probability, Section, Seed
from raft_jax.config.schema_endpoints import Engine, Judge, VerdictJudge


class Writer(Engine):
  """The model that writes questions and answers from a chunk of a document."""

  max_new_tokens: Positive = 1024
  """Longest reply: all pairs of a chunk, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: constrain replies to {"pairs": [{"question", "answer"}]}."""


class Shares(Section):
  """How documents are split, by a hash of their ids; the shares must sum to 1."""

  train: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Share of the documents whose pairs are in train.jsonl [O]."""
  validation: Probability = 0.05
  """Share of the documents whose pairs are in validation.jsonl [O]."""
  test: Probability = 0.15
  """Share of the documents whose pairs are in test.jsonl [O]."""


class Extract(Section):
  """Stage 0: question/answer pairs from documents, for `data.questions`. null: none."""

  documents: str
  """A file or a folder: .txt, .md, or files of rows {text, id?, domain?}, as for
  `data.questions`."""
  text_field: str = "text"
  """The field of rows that holds a document's text."""
  domain: str = ""
  """Domain of documents that do not name one."""
  chunk_tokens: Annotated[int, pydantic.Field(ge=16)] = 512
  """Longest chunk of a document, in tokens of `model` [O]."""
  min_chunk_tokens: Annotated[int, pydantic.Field(ge=1)] = 16
  """Shorter documents, and shorter ends of documents, are left out [O]."""
  pairs_per_chunk: Positive = 4
  """Largest number of pairs written from one chunk [O]."""
  writer: Writer = Writer()
  judges: Annotated[tuple[VerdictJudge, ...], pydantic.Field(min_length=1)] = (
    VerdictJudge(),
  )
  """A pair is kept if more than half of the judges approve of it."""
  near_duplicate: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Documents, chunks and pairs are dropped if the Jaccard index of their character
  5-grams with those of an earlier one reaches this [O]."""
  shares: Shares = Shares()
  seed: Seed = 0
  """Seed of sampling in this stage, and of the split."""


class Fusion(Engine):
  """The model that writes one answer from the original and the rewrite."""

  rounds: Annotated[int, pydantic.Field(ge=0)] = 3
  """Largest number of answers written for one question [O]; at 0 the rewrite is
  final."""
  accept_at: Probability = 0.8
  """Stop at the first round whose mean judge score reaches this [R]."""


class Refine(Section):
  """Stage 1: rewrite, filter, fuse and judge the answers."""

  rewriter: Engine = Engine()
  prompt: Literal["rewrite", "sdft"] = "rewrite"
  """Template of the request for a rewrite: `raft_jax/generation/prompts/NAME.txt`."""
  encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
  """Sentence encoder: a hub name, a folder, or `pkg://PACKAGE/FOLDER`."""
  similarity_threshold: Annotated[float, pydantic.Field(ge=-1.0, le=1.0)] = 0.8
  """Smallest cosine of answer and rewrite at which the rewrite is kept [R]. At 1, every
  original answer is kept; at 0 or below, every rewrite passes."""
  fusion: Fusion = Fusion()
  judges: Annotated[tuple[Judge, ...], pydantic.Field(min_length=1)] = (Judge(),)
  """Each judge scores every fused answer; the mean score decides."""
  seed: Seed = 0
  """Seed of sampling in this stage."""
  records_per_shard: Positive = 1024
  """Refined records per file."""
  journal: str | None = None
  """File of finished calls; null: one in `output`. Runs that share the file never
  repeat a call, even with other thresholds."""


class QuestionWriter(Engine):
  """The model that writes and answers questions: the model to be trained."""

  max_new_tokens: Positive = 128
  """Longest question, thinking included; `data.max_answer_tokens` bounds answers."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 0.9
  """Sampling temperature of questions; answers take the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.6
  """Sample questions from the most probable tokens whose probabilities sum to this."""


class Synthesise(Section):
  """Questions for `replay` that the model itself writes and answers (SSR). null:
  none."""

  seeds: str
  """Two or more general questions as examples: JSONL or Parquet {question}."""
  writer: QuestionWriter = QuestionWriter()
  drafts: Positive = 1140
  """Number of questions to write, each from an ordered pair of seeds. The default uses
  each of the 380 pairs of 20 seeds three times."""
  near_duplicate: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Drafts are dropped if the Jaccard index of their character 5-grams with those of a
  seed or an earlier draft reaches this [O]."""
  clusters: Positive = 20
  """Number of clusters of the drafts' embeddings by `refine.encoder`."""
  keep: Positive = 200
  """Number of drafts to keep and answer: each cluster's share, nearest to its
  centre."""
  seed: Seed = 0
  """Seed of the order of pairs, of sampling and of clustering."""
