"""Accuracy without a judge: the right answer among answers to other test questions.

Every test question becomes a question of multiple choice. The wrong options are the
answers of other test questions whose length is nearest to the right answer's, so that
length does not give the right one away. Two forms are scored. The likelihood form takes
the option with the highest log-probability per token, end token included, after the
question's own prompt. The letter form lists the options in the prompt, and takes the
most probable letter.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.curation import near_duplicates
from raft_jax.data import token_rows
from raft_jax.evaluation import intervals, scoring
from raft_jax.hf import answer_turns, chat
from raft_jax.runtime import interrupts
from raft_jax.storage import journal, records

INSTRUCTION = "Answer with the letter of the correct answer."
"""Last line of the letter form's prompt."""

BINS = 10
"""Bins of the calibration error."""


class Item(NamedTuple):
  """A test question with its options.

  Attributes:
    question: its index among the test questions.
    options: indices of the test questions whose answers are the options, in the order
      of their letters. The question's own index is among them.
  """

  question: int
  options: tuple[int, ...]

  @property
  def right(self) -> int:
    """The place of the right answer among the options."""
    return self.options.index(self.question)


class Choices(NamedTuple):
  """Multiple-choice questions with their tokens.

  Attributes:
    rows: the prompt of each item with each of its options, item by item.
    prompts: the letter form's prompt of each item.
    letters: token ids of the letters.
    left_out: number of test questions that have too few options.
  """

  items: list[Item]
  rows: list[token_rows.Row]
  prompts: list[list[int]]
  letters: list[int]
  left_out: int


class Scored(NamedTuple):
  """What a model thinks of the options.

  Attributes:
    log_probs_NK: mean log-probability per token of each option, in nats.
    logits_NK: logits of the letters.
  """

  log_probs_NK: np.ndarray
  logits_NK: np.ndarray


# --- Options --------------------------------------------------------------------------


def check(answers: Sequence[str], settings: schema.Choice) -> None:
  """Checks, without an encoder, that there are answers enough.

  Raises:
    UserError: fewer different answers than options.
  """
  different = len({near_duplicates.normal(answer) for answer in answers} - {""})
  if different <= settings.others:
    raise errors.UserError(
      f"evaluate.choice.others={settings.others}: needs {settings.others + 1} different"
      f" answers, and data.test has {different} (among its first evaluate.limit"
      " questions, if that is set); lower it, or give more test questions"
    )


def draw(
  answers: Sequence[str],
  lengths: Sequence[int],
  vectors_NE: np.ndarray,
  settings: schema.Choice,
) -> list[Item]:
  """The options of every answer that has enough of them; a function of the seed.

  The wrong options are the answers nearest in length; among equally near ones, chance
  decides. No two options of an item are near duplicates, and of equal texts only the
  first is an option. An answer that the encoder cannot embed is none.

  Args:
    lengths: tokens of each answer.
    vectors_NE: embedding of each answer.
  """
  texts = [near_duplicates.normal(answer) for answer in answers]
  first = {text: i for i, text in reversed(list(enumerate(texts))) if text}
  pool_P, lengths_N = np.array(list(first.values()), int), np.array(lengths)
  vectors_NE = np.asarray(vectors_NE, np.float64)
  with np.errstate(invalid="ignore", divide="ignore"):
    units_NE = vectors_NE / np.linalg.norm(vectors_NE, axis=1, keepdims=True)
  items = []
  for i, text in enumerate(texts):
    interrupts.check()
    if not text:
      continue
    rng = np.random.default_rng([settings.seed, i])
    order_P = rng.permutation(pool_P)
    gaps_P = np.abs(lengths_N[order_P] - lengths_N[i])
    order_P = order_P[np.argsort(gaps_P, kind="stable")]
    left_P, units_PE = order_P != first[text], units_NE[order_P]
    options = [i]
    while len(options) <= settings.others:
      # A cosine that is NaN is not below the limit.
      left_P &= units_PE @ units_NE[options[-1]] < settings.near_duplicate
      if not left_P.any():
        break
      nearest = int(np.argmax(left_P))
      left_P[nearest] = False
      options.append(int(order_P[nearest]))
    if len(options) > settings.others:
      items.append(Item(i, tuple(map(int, rng.permutation(options)))))
  return items


def build(
  questions: Sequence[records.Question],
  rows: Sequence[token_rows.Row],
  tokenizer: chat.ChatTokenizer,
  vectors_NE: np.ndarray,
  settings: schema.Choice,
) -> Choices:
  """The multiple-choice questions of a test set.

  Args:
    rows: tokens of each question with its answer.
    vectors_NE: embedding of each answer.

  Raises:
    UserError: no question has enough options, or letters are not told apart by one
      token.
  """
  answers = [question.answer for question in questions]
  items = draw(answers, [len(row.answer) for row in rows], vectors_NE, settings)
  if not items:
    raise errors.UserError(
      f"evaluate.choice: no test question has {settings.others} other answers that"
      f" differ enough (cosine below near_duplicate={settings.near_duplicate:g});"
      " lower evaluate.choice.others, raise near_duplicate, or leave the section out"
    )
  asked = [
    asking_letter(questions[item.question].messages, [answers[j] for j in item.options])
    for item in items
  ]
  opening, letters = letter_ids(tokenizer, asked[0], settings.others + 1)
  return Choices(
    items,
    rows=[
      option_row(tokenizer, questions, rows, item.question, option)
      for item in items
      for option in item.options
    ],
    prompts=[
      answer_turns.ids(tokenizer, messages, "A")[0] + opening for messages in asked
    ],
    letters=letters,
    left_out=len(questions) - len(items),
  )


def option_row(
  tokenizer: chat.ChatTokenizer,
  questions: Sequence[records.Question],
  rows: Sequence[token_rows.Row],
  question: int,
  option: int,
) -> token_rows.Row:
  """A question's prompt with the answer of the same or another question.

  The right answer's row is that of the held-out loss, which is not computed twice.
  """
  interrupts.check()
  if question == option:
    return rows[question]
  prompt, answer = answer_turns.ids(
    tokenizer, questions[question].messages, questions[option].reply
  )
  return token_rows.Row(tuple(prompt), tuple(answer), (), question)


def asking_letter(
  messages: Sequence[records.Message], options: Sequence[str]
) -> list[records.Message]:
  """The conversation with the options below the question."""
  place = records.last_user(messages)
  lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options)]
  text = "\n".join([messages[place].content, "", *lines, "", INSTRUCTION])
  asked = messages[place]._replace(content=text)
  return [*messages[:place], asked, *messages[place + 1 :]]


def letter_ids(
  tokenizer: chat.ChatTokenizer, messages: Sequence[records.Message], count: int
) -> tuple[list[int], list[int]]:
  """How replies of one letter go on after the prompt.

  Returns:
    The tokens that all of them begin with (often none), and the next token of each.

  Raises:
    UserError: two letters have the same token.
  """
  replies = [
    answer_turns.ids(tokenizer, messages, letter)[1]
    for letter in string.ascii_uppercase[:count]
  ]
  shared = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*replies))
  opening = [ids[0] for ids in shared]
  letters = [reply[len(opening)] for reply in replies if len(reply) > len(opening)]
  if len(set(letters)) < count:
    raise errors.UserError(
      "evaluate.choice: the model's tokenizer has no token of its own for each letter"
      f" A to {string.ascii_uppercase[count - 1]}, by which answers are compared; leave"
      " the section out"
    )
  return opening, letters


# --- Scores ---------------------------------------------------------------------------


def score(model: scoring.EvalModel, choices: Choices, log: journal.Journal) -> Scored:
  """Runs a model on all options and letter prompts."""
  losses = scoring.losses(model, choices.rows, log, name="choice, answers")
  logits = scoring.choices(
    model, choices.prompts, choices.letters, log, name="choice, letters"
  )
  log_probs_NK = -np.array(losses).reshape(len(choices.items), len(choices.letters))
  return Scored(log_probs_NK, np.array(logits))


def scores(items: Sequence[Item], scored: Scored) -> dict[str, intervals.Score]:
  """Accuracy and calibration error of both forms."""
  right_N = np.array([item.right for item in items])
  result: dict[str, intervals.Score] = {}
  for name, scores_NK in zip(("choice", "choice_letter"), scored):
    correct_N = (np.argmax(scores_NK, axis=1) == right_N).astype(float)
    confidence_N = probabilities(scores_NK).max(axis=1)
    result[name] = intervals.ItemScores(correct_N, share=True)
    result[f"{name}_ece"] = calibration_error(confidence_N, correct_N)
  return result


def probabilities(scores_NK: np.ndarray) -> np.ndarray:
  """Softmax over the options of each item, float64 [N, K]."""
  exp_NK = np.exp(scores_NK - scores_NK.max(axis=1, keepdims=True))
  return exp_NK / exp_NK.sum(axis=1, keepdims=True)


def calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray) -> float:
  """Expected calibration error: the mean of |accuracy - confidence| over items, by bin.

  The bins have equal width: (0, 0.1], ..., (0.9, 1]. Guo et al., "On Calibration of
  Modern Neural Networks", arXiv 1706.04599, Eq. 3, who have 15 bins; test sets here
  are smaller.

  Args:
    confidence_N: probability of the chosen option.
    correct_N: 1 if the chosen option is right, else 0.
  """
  edges = np.linspace(0.0, 1.0, BINS + 1)
  bin_N = np.digitize(confidence_N, edges[1:-1], right=True)
  sums = np.bincount(bin_N, weights=correct_N - confidence_N)
  return float(np.abs(sums).sum() / len(confidence_N))


def described(
  choices: Choices,
  questions: Sequence[records.Question],
  base: Scored,
  trained: Scored,
) -> list[dict[str, Any]]:
  """Every item with both models' scores of its options, for `choice.jsonl`."""
  return [
    {
      "id": questions[item.question].id,
      "question": questions[item.question].messages[-1].content,
      "options": [questions[j].answer for j in item.options],
      "right": string.ascii_uppercase[item.right],
      **{
        name: {
          "log_prob_per_token": scored.log_probs_NK[i].tolist(),
          "letter_probability": letter_NK[i].tolist(),
        }
        for name, scored, letter_NK in (
          ("base", base, probabilities(base.logits_NK)),
          ("trained", trained, probabilities(trained.logits_NK)),
        )
      },
    }
    for i, item in enumerate(choices.items)
  ]
