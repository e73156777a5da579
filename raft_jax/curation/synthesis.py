"""Self-synthesised rehearsal: questions that the model writes and answers itself (SSR).

Huang et al., "Mitigating Catastrophic Forgetting in Large Language Models with
Self-Synthesized Rehearsal", arXiv 2403.01244. `synthesise` below is the whole method.
The model sees two seeds at a time and writes one more question. Drafts that are no
question, or repeat another, are dropped. The drafts nearest to the centres of clusters
represent all, and the model answers these greedily.

The paper continues raw text with examples and their answers. This is a chat, for
instruction-tuned models: the user asks for a question three times, and the seeds are
the assistant's first two replies. No answers are shown, since they are written anew in
any case.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax.config import schema
from raft_jax.curation import clusters, near_duplicates, qa_pairs
from raft_jax.generation import calls as calls_lib
from raft_jax.generation import engines, judging, sentence_encoder
from raft_jax.storage import journal, question_files, records


class Draft(NamedTuple):
  """A question written after two seeds, or a seed itself (then `seeds` is empty)."""

  text: str
  seeds: tuple[int, ...] = ()
  round: int = 0

  def place(self) -> dict[str, Any]:
    return {"seeds": list(self.seeds), "round": self.round, "question": self.text}


class Synthesised(NamedTuple):
  """The questions to rehearse, and everything that was dropped.

  Attributes:
    cluster_sizes: number of drafts in each cluster.
  """

  rows: list[dict[str, Any]]
  dropped: list[qa_pairs.Dropped]
  cluster_sizes: list[int]


class Chosen(NamedTuple):
  """The drafts that represent all.

  Attributes:
    cluster: of each chosen draft, its cluster.
    dropped: the other drafts.
    cluster_sizes: number of drafts in each cluster.
  """

  drafts: list[Draft]
  cluster: list[int]
  dropped: list[qa_pairs.Dropped]
  cluster_sizes: list[int]


def synthesise(
  seeds: Sequence[str],
  *,
  writer: calls_lib.Role,
  answerer: calls_lib.Role,
  encoder: sentence_encoder.Encoder,
  fits_prompt: Callable[[str], bool],
  fits_answer: Callable[[str], bool],
  settings: schema.Synthesise,
  calls: calls_lib.Calls,
) -> Synthesised:
  """Writes and answers questions after the seeds; each draft is kept or dropped.

  Args:
    fits_prompt, fits_answer: whether a text is within training's budget.
  """
  written, unwritten = write(seeds, settings, writer, calls, fits_prompt)
  unique, repeats = qa_pairs.drop_repeats(
    [*map(Draft, seeds), *written], lambda draft: draft.text, settings.near_duplicate
  )
  # Seeds are compared with, but they are no drafts.
  fresh = [draft for draft in unique if draft.seeds]
  repeats = [row for row in repeats if row["seeds"]]
  chosen = choose(fresh, encoder, settings)
  rows, unanswered = [], []
  prompts = [records.user_turn(draft.text) for draft in chosen.drafts]
  replies = calls.ask(answerer, prompts)
  for draft, cluster, reply in zip(chosen.drafts, chosen.cluster, replies, strict=True):
    reason = answer_fault(draft.text, reply, settings.near_duplicate, fits_answer)
    if reason is not None or reply is None:
      unanswered.append(qa_pairs.drop(draft, f"answer_{reason}", cluster=cluster))
    else:
      rows.append(row_of(draft, reply.text.strip(), cluster))
  dropped = [*unwritten, *repeats, *chosen.dropped, *unanswered]
  return Synthesised(rows, dropped, chosen.cluster_sizes)


def shuffled_pairs(count: int, seed: int) -> list[tuple[int, int]]:
  """All ordered pairs of `count` different seeds, shuffled by `seed`.

  The order does not depend on how many drafts are wanted, so that a longer run begins
  like a shorter one.
  """
  pairs = itertools.permutations(range(count), 2)
  return sorted(pairs, key=lambda pair: journal.content_key(pair=pair, seed=seed))


def write(
  seeds: Sequence[str],
  settings: schema.Synthesise,
  writer: calls_lib.Role,
  calls: calls_lib.Calls,
  fits: Callable[[str], bool],
) -> tuple[list[Draft], list[qa_pairs.Dropped]]:
  """The model's drafts after each pair of seeds, and the replies that are none.

  Once every pair was shown, the next round shows all of them again.
  """
  drafts, dropped = [], []
  all_pairs = shuffled_pairs(len(seeds), settings.seed)
  for number in range(-(-settings.drafts // len(all_pairs))):
    pairs = all_pairs[: settings.drafts - number * len(all_pairs)]
    prompts = [request(seeds[i], seeds[j]) for i, j in pairs]
    replies = calls.ask(writer, prompts, round_number=number)
    for pair, reply in zip(pairs, replies, strict=True):
      text, reason = read_draft(reply, seeds[pair[0]] + "\n" + seeds[pair[1]])
      draft = Draft(text, pair, number)
      if reason is None and not fits(text):
        reason = "too_long"
      if reason is None:
        drafts.append(draft)
      else:
        dropped.append(qa_pairs.drop(draft, reason))
  return drafts, dropped


def request(first: str, second: str) -> tuple[records.Message, ...]:
  """A chat in which the user has got two questions and requests a third."""
  wish = records.Message("user", judging.template("synthesise").substitute())
  given = [records.Message("assistant", seed) for seed in (first, second)]
  return (wish, given[0], wish, given[1], wish)


_LABEL = re.compile(r"(?:new )?instruction(?: 3)?:\s*", re.IGNORECASE)
_LABELS = re.compile(
  r"^\W*(?:new |example )?(?:instruction|question|task|answer|response|output)"
  r"(?: \d+)?\W*:",
  re.IGNORECASE | re.MULTILINE,
)
_CHATTER = re.compile(r"(?:sure|certainly|of course|okay|here(?:'s| is| are))\b", re.I)


def read_draft(
  reply: engines.Completion | None, seed_texts: str
) -> tuple[str, str | None]:
  """The question in a reply, and why it cannot be used (None if it can).

  The reply must be the question and nothing else, except one label in front of it. A
  reply that talks about its task, or continues with an answer or a second question, is
  dropped.
  """
  reason = judging.no_answer(reply, seed_texts)
  text = reply.text.strip() if reply is not None else ""
  label = _LABEL.match(text)
  if label:
    text = text[label.end() :].strip()
  if reason is not None:
    return text[:500], reason
  if question_files.text_fault("question", text) is not None:
    return "", "empty"
  if _CHATTER.match(text.replace("\u2019", "'")):
    return text[:500], "chatter"
  return text, "several" if _LABELS.search(text) else None


def choose(
  drafts: Sequence[Draft],
  encoder: sentence_encoder.Encoder,
  settings: schema.Synthesise,
) -> Chosen:
  """The drafts nearest to the centres of the clusters of their embeddings."""
  if not drafts:
    return Chosen([], [], [], [])
  vectors_NE = encoder([draft.text for draft in drafts])
  lengths_N = np.linalg.norm(vectors_NE, axis=1)
  embedded = [i for i, length in enumerate(lengths_N) if 0 < length < np.inf]
  dropped = [
    qa_pairs.drop(draft, "no_embedding")
    for i, draft in enumerate(drafts)
    if i not in set(embedded)
  ]
  if not embedded:
    return Chosen([], [], dropped, [])
  nearest = clusters.representatives(
    vectors_NE[embedded] / lengths_N[embedded, None],
    cluster_count=settings.clusters,
    keep=settings.keep,
    seed=settings.seed,
  )
  chosen = set(nearest.chosen)
  for i, cluster in enumerate(nearest.cluster_N):
    if i not in chosen:
      draft = drafts[embedded[i]]
      dropped.append(qa_pairs.drop(draft, "not_nearest", cluster=cluster))
  return Chosen(
    [drafts[embedded[i]] for i in nearest.chosen],
    [nearest.cluster_N[i] for i in nearest.chosen],
    dropped,
    np.bincount(nearest.cluster_N).tolist(),
  )


def answer_fault(
  question: str,
  reply: engines.Completion | None,
  near_duplicate: float,
  fits: Callable[[str], bool],
) -> str | None:
  """Why a reply is no answer to learn, or None.

  Args:
    near_duplicate: Jaccard index from which an answer is an echo of its question.
  """
  reason = judging.no_answer(reply, question)
  if reason is not None or reply is None:
    return reason
  answer = reply.text.strip()
  if question_files.text_fault("answer", answer) is not None:
    return "empty"
  if near_duplicates.find([question, answer], near_duplicate)[1] is not None:
    return "echo"
  return None if fits(answer) else "too_long"


def row_of(draft: Draft, answer: str, cluster: int) -> dict[str, Any]:
  """A question as `question_files.read_questions` takes it, with its source."""
  return {
    "id": journal.content_key(question=draft.text, answer=answer)[:16],
    "question": draft.text,
    "answer": answer,
    "source": {"seeds": draft.seeds, "round": draft.round, "cluster": cluster},
  }
