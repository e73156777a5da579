"""Judges: which replies are usable, prompts that data cannot steer, scores, panels.

A judge scores how well a candidate answer agrees with the original one, on 0..1 (SPEC,
stage 1). A reply that is not plainly such a score counts as an abstention: it is never
clamped or guessed at, because a misread reply moves a selection silently.
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

from raft_jax.generation import engines
from raft_jax.storage import records

_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
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
"""What the prompt asks of a judge, as a JSON schema for engines that can hold to it."""

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
"""Words of a prompt, or about it, that no answer should hold. The last three and the
first are those of Self-Distillation (Yang et al., ACL 2024, gen_distilled_data.py)."""

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
"""Ends of a request that was never answered, and what they are counted as."""


def flaw(reply: engines.Completion | None, given: str) -> str | None:
  """Why a reply is no answer in the words of its prompt's question, or None.

  As `no_answer`, and neither words of the prompt nor of a verdict may stand in it.
  """
  reason = no_answer(reply, given)
  if reason is not None or reply is None:
    return reason
  said, given = _plain(reply.text), _plain(given)
  leaks = any(phrase in said and phrase not in given for phrase in LEAKS)
  if leaks or said.startswith(("question:", "answer:", "draft:")):
    return "leak"
  if steers(said) and not steers(given):
    return "steers_judge"
  return None


def no_answer(reply: engines.Completion | None, given: str) -> str | None:
  """Why a reply is no answer, or None. What `given` says itself is no flaw.

  None for the reply means that its prompt did not fit the model.
  """
  if reply is None or reply.finish_reason in REFUSED:
    return REFUSED["too_long" if reply is None else reply.finish_reason]
  said, given = _plain(reply.text), _plain(given)
  if not said:
    return "empty"
  if "<think>" in said or "</think>" in said:
    return "thinking"
  if reply.finish_reason != "stop":
    return "truncated"
  if any(said.startswith(r) and r not in given for r in REFUSALS):
    return "refusal"
  return None


def _plain(said: str) -> str:
  return said.strip().lower().replace("\u2019", "'")


def prompt(question: str, original: str, candidate: str) -> tuple[records.Message, ...]:
  """The messages that ask a language model for one score.

  The three texts stand between lines that carry a nonce that none of them holds, so no
  text can contain the line that would end it.
  """
  texts = {"question": question, "original": original, "candidate": candidate}
  return fenced("judge", texts)


def fenced(
  name: str, texts: Mapping[str, str], **settings: str
) -> tuple[records.Message, ...]:
  """The prompt `name` as one user turn; its `$nonce` occurs in none of the texts.

  It is a hash of the first of them, so that prompts which share that text begin alike
  and an engine's prefix cache serves them.
  """
  nonce = _nonce(*texts.values())
  return records.user_turn(template(name).substitute(texts, nonce=nonce, **settings))


@functools.cache
def template(name: str) -> string.Template:
  """The prompt `prompts/<name>.txt`; `$slots` are filled in one pass, so that a slot's
  name inside the data stays text."""
  folder = importlib.resources.files("raft_jax.generation") / "prompts"
  return string.Template((folder / f"{name}.txt").read_text("utf-8").strip())


def steers(text: str, key: str = "score") -> bool:
  """Whether a candidate tries to hand the judge its verdict: it holds that field."""
  return re.search(rf'"{re.escape(key)}"\s*:', text) is not None


def parse_score(text: str, *, cut: bool = False) -> float | None:
  """The score in a judge's reply, or None when the reply does not plainly hold one.

  Read are, in this order: a JSON object with a number "score", alone or in a fenced
  block; else exactly one `"score": x` within other text. Thinking is skipped. Booleans,
  strings, NaN, infinities, numbers outside 0..1 and contradicting scores are None.

  Args:
    cut: the reply ended at its limit; a number that it ends with may lack digits.
  """
  reply = _json(text)
  if reply is None:
    text = _THINK.sub("", text)
    text = text.rpartition("</think>")[2]  # some templates open the block themselves
    reply = _json(text)
  if reply is None:
    return _score_in_prose(text, cut)
  return _on_scale(reply.get("score")) if isinstance(reply, dict) else None


def parse_flags(text: str, names: Sequence[str]) -> dict[str, bool] | None:
  """A judge's yes or no for each name, or None when the reply does not plainly say.

  Read is one JSON object that holds true or false under every name; see `json_in`.
  """
  reply = json_in(text)
  if not isinstance(reply, dict) or any(name not in reply for name in names):
    return None
  flags = {name: reply[name] for name in names}
  return flags if all(isinstance(flag, bool) for flag in flags.values()) else None


def json_in(text: str) -> Any:
  """The one JSON object or list of a reply, or None: the whole of it, its one fenced
  block, or what stands from its first bracket to its last. No key may stand twice."""
  fences, opening = _FENCED.findall(text), _OPENING.search(text)
  tries = [text, *(fences if len(fences) == 1 else [])]
  if opening is not None:
    tries.append(text[opening.start() : max(text.rfind("]"), text.rfind("}")) + 1])
  for part in tries:
    try:
      value = json.loads(part, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError):
      continue
    if isinstance(value, dict | list):
      return value
  return None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(dict(pairs)) < len(pairs):
    raise ValueError("a key stands twice")
  return dict(pairs)


def panel_mean(scores: Sequence[float | None]) -> float | None:
  """Mean over the judges that did not abstain; None when all did.

  Rounded to 12 places: scores of one or two, such as 0.7, 0.8 and 0.9, should have the
  mean that they have on paper, and reach a threshold that equals it.
  """
  given = [score for score in scores if score is not None]
  return round(math.fsum(given) / len(given), 12) if given else None


def majority(votes: Sequence[bool | None]) -> bool | None:
  """What more than half of the whole panel voted for; None means undecided.

  An abstention (None) stays in the denominator: one vote is no majority of three.
  """
  for choice in (True, False):
    if sum(vote is choice for vote in votes) * 2 > len(votes):
      return choice
  return None


def encoder_score(cosine: float | None) -> float | None:
  """The sentence encoder as a judge: cosine of original and candidate, clipped to 0..1.

  Clipped and not (1 + cosine) / 2, so that a score means what the same number means as
  similarity threshold: under the affine map, accept_at 0.8 would let pass a cosine of
  0.6, an answer that the filter throws away. An undefined cosine is an abstention.
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
  """The value of a text that is JSON, alone or in one fenced block, else None."""
  text = text.strip()
  fenced = _FENCED.fullmatch(text)
  try:
    return json.loads(fenced[1] if fenced else text, object_pairs_hook=_once)
  except (ValueError, RecursionError):
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; two scores in one object contradict each other."""
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
