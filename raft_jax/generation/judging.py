"""Judging of replies: which are usable, prompts that no text can steer, and scores.

A judge scores from 0 to 1 how well a candidate answer agrees with the original. A reply
that is not plainly such a score counts as an abstention. It is never clamped or guessed
at, because a misread reply would silently change a selection.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from raft_jax.generation import engines, thinking
from raft_jax.storage import records

_FENCED = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)
_OPENING = re.compile(r"[\[{]")
_SCORE_KEY = re.compile(r'"score"\s*:')
_SCORE = re.compile(
  r'"score"\s*:\s*(0(?:\.\d+)?|1(?:\.0+)?)[ \t]*(?=[}\r\n]|,[\s"]|\Z)'
)

REPLY_SCHEMA = {
  "type": "object",
  "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
  "required": ["score"],
  "additionalProperties": False,
}
"""The verdict that the prompt requests, for engines that can enforce a JSON schema."""

LEAKS = (
  "reference answer",
  "original answer",
  "rewritten answer",
  "rewritten version",
  "rewrite the answer",
  "keeps every fact",
  "in your own words",
  "final answer",
  "the answer is",
  "your response",
  "my response",
  "your turn",
)
"""Phrases of a prompt, or about it, that no answer should contain. The first and the
last three are those of Self-Distillation (Yang et al., ACL 2024, in
gen_distilled_data.py)."""

REFUSALS = (
  "i'm sorry",
  "i am sorry",
  "sorry,",
  "i apologize",
  "i can't",
  "i cannot",
  "i'm unable",
  "i am unable",
  "i'm not able",
  "as an ai",
  "as a language model",
)
"""How a model begins when it declines to answer."""

REFUSED = {"too_long": "prompt_too_long", "filtered": "filtered"}
"""How requests end that were not answered, and the reason that is recorded for each."""


def flaw(reply: engines.Completion | None, given: str) -> str | None:
  """Why a reply cannot be used as an answer, or None.

  As `no_answer`; in addition, the reply must contain neither phrases of the prompt nor
  a verdict.

  Args:
    given: texts that the model was shown; what they contain is no flaw.
  """
  reason = no_answer(reply, given)
  if reason is not None or reply is None:
    return reason
  text, given = _plain(reply.text), _plain(given)
  leaks = any(phrase in text and phrase not in given for phrase in LEAKS)
  if leaks or text.startswith(("question:", "answer:", "draft:")):
    return "leak"
  if steers(text) and not steers(given):
    return "steers_judge"
  return None


def no_answer(reply: engines.Completion | None, given: str) -> str | None:
  """Why a reply is no answer, or None.

  Args:
    reply: None if the prompt did not fit the model.
    given: texts that the model was shown; what they contain is no flaw.
  """
  if reply is None or reply.finish_reason in REFUSED:
    return REFUSED["too_long" if reply is None else reply.finish_reason]
  text, given = _plain(reply.text), _plain(given)
  if not text:
    return "empty"
  if thinking.left_in(text):
    return "thinking"
  if reply.finish_reason != "stop":
    return "truncated"
  if any(text.startswith(r) and r not in given for r in REFUSALS):
    return "refusal"
  return None


def _plain(text: str) -> str:
  return text.strip().lower().replace("\u2019", "'")


def prompt(question: str, original: str, candidate: str) -> tuple[records.Message, ...]:
  """The messages that request a score from a language model.

  Lines with a nonce fence each text. No text contains the nonce, so that none can
  contain the line that would end it.
  """
  texts = {"question": question, "original": original, "candidate": candidate}
  return fenced("judge", texts)


def fenced(
  name: str, texts: Mapping[str, str], **settings: str
) -> tuple[records.Message, ...]:
  """The prompt `name` as one user turn; its `$nonce` occurs in none of the texts.

  The nonce is a hash of the first text, so that prompts with the same first text share
  a prefix, which an engine can cache.
  """
  nonce = _nonce(*texts.values())
  return records.user_turn(template(name).substitute(texts, nonce=nonce, **settings))


@functools.cache
def template(name: str) -> string.Template:
  """The prompt `prompts/<name>.txt`. Its `$slots` are filled in one pass, so that a
  slot's name inside a text stays text."""
  folder = importlib.resources.files("raft_jax.generation") / "prompts"
  return string.Template((folder / f"{name}.txt").read_text("utf-8").strip())


def steers(text: str, key: str = "score") -> bool:
  """Whether a text contains the field of a verdict, so that it may steer a judge."""
  return re.search(rf'"{re.escape(key)}"\s*:', text) is not None


def parse_score(text: str, *, cut: bool = False) -> float | None:
  """The score in a judge's reply, or None if the reply does not plainly contain one.

  Accepted are a JSON object with a number "score", alone or in a fenced block, or else
  exactly one `"score": x` within other text. Thinking is skipped. Booleans, strings,
  NaN, infinities, numbers outside 0..1 and contradicting scores give None.

  Args:
    cut: whether the reply ended at its limit, so that its last number may lack digits.
  """
  reply = _json(text)
  if reply is None:
    text = thinking.ended(text)
    reply = _json(text)
  if reply is None:
    return _score_in_prose(text, cut)
  return _on_scale(reply.get("score")) if isinstance(reply, dict) else None


def parse_flags(text: str, names: Sequence[str]) -> dict[str, bool] | None:
  """A judge's true or false for each name, or None if the reply does not plainly give
  one JSON object with all of them; see `json_in`."""
  reply = json_in(text)
  if not isinstance(reply, dict) or any(name not in reply for name in names):
    return None
  flags = {name: reply[name] for name in names}
  return flags if all(isinstance(flag, bool) for flag in flags.values()) else None


def json_in(text: str) -> Any:
  """The one JSON object or list in a reply, or None.

  It is the whole reply, its one fenced block, or the text from its first bracket to its
  last. Thinking is skipped. No key may occur twice.
  """
  answer = thinking.ended(text)
  fences, opening = _FENCED.findall(answer), _OPENING.search(answer)
  candidates = [text, *(fences if len(fences) == 1 else [])]
  if opening is not None:
    last = max(answer.rfind("]"), answer.rfind("}"))
    candidates.append(answer[opening.start() : last + 1])
  for part in candidates:
    try:
      value = json.loads(part, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
      continue
    if isinstance(value, dict | list):
      return value
  return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(dict(pairs)) < len(pairs):
    raise ValueError("a key occurs twice")
  return dict(pairs)


def panel_mean(scores: Sequence[float | None]) -> float | None:
  """Mean over the judges that did not abstain; None if all did.

  It is rounded to 12 places, so that short decimals such as 0.7, 0.8 and 0.9 have the
  mean that they have on paper, and reach a threshold equal to it.
  """
  votes = [score for score in scores if score is not None]
  return round(math.fsum(votes) / len(votes), 12) if votes else None


def majority(votes: Sequence[bool | None]) -> bool | None:
  """The vote of more than half of the panel; None if there is no majority.

  An abstention (None) counts in the denominator: one vote is no majority of three.
  """
  for choice in (True, False):
    if sum(vote is choice for vote in votes) * 2 > len(votes):
      return choice
  return None


def encoder_score(cosine: float | None) -> float | None:
  """The score of the sentence encoder: the cosine clipped to 0..1.

  It is clipped, and not mapped to (1 + cosine) / 2, so that a score and the similarity
  threshold have the same scale. Under the affine map, accept_at=0.8 would accept a
  cosine of 0.6, which the filter rejects. An undefined cosine is an abstention.
  """
  if cosine is None or not math.isfinite(cosine):
    return None
  return min(max(cosine, 0.0), 1.0)


def _nonce(*texts: str) -> str:
  digest = hashlib.sha256(texts[0].encode("utf-8")).hexdigest()
  while any(digest[:12] in text for text in texts):
    digest = hashlib.sha256(digest.encode()).hexdigest()
  return digest[:12]


def _json(text: str) -> Any:
  """The value of a text that is JSON, alone or in one fenced block; else None."""
  text = text.strip()
  fenced = _FENCED.fullmatch(text)
  try:
    return json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique_score)
  except (ValueError, RecursionError):
    return None


def _unique_score(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object, or {} if it has two scores, which contradict each other."""
  if sum(name == "score" for name, _ in pairs) > 1:
    return {}
  return dict(pairs)


def _score_in_prose(text: str, cut: bool) -> float | None:
  scores = list(_SCORE.finditer(text))
  if len(scores) != 1 or len(_SCORE_KEY.findall(text)) != 1:
    return None
  return None if cut and scores[0].end() == len(text) else float(scores[0][1])


def _on_scale(value: Any) -> float | None:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return float(value) + 0.0 if 0.0 <= value <= 1.0 else None
