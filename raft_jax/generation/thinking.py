"""Thinking in replies: the marks that enclose it, and the answer without it.

Thinking is removed only where the model's marks say where it ends. A reply in which any
known mark remains is no answer: see `left_in`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from raft_jax.hf import chat


class Marks(NamedTuple):
  """The texts before and after the thinking of a model."""

  opening: str
  closing: str


THINK = Marks("<think>", "</think>")

KNOWN = (
  THINK,  # DeepSeek, Qwen, SmolLM3, GLM, Nemotron, OLMo and most others
  Marks("[THINK]", "[/THINK]"),  # Magistral
  Marks("<seed:think>", "</seed:think>"),  # Seed-OSS
  Marks("<longcat_think>", "</longcat_think>"),  # LongCat
  Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
  Marks("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
  Marks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
  Marks("<|channel>thought", "<channel|>"),  # Gemma 4
  Marks("<unused94>thought", "<unused95>"),  # MedGemma
  Marks("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
  Marks("<thought>", "</thought>"),  # Gemini's compatible endpoint
  Marks("<thinking>", "</thinking>"),
  Marks("<reasoning>", "</reasoning>"),
)

_WRAPPED = re.compile(
  r"(?:<\|START_RESPONSE\|>(.*?)<\|END_RESPONSE\|>"
  r"|<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>"
  r"|<(answer|response)>(.*)</\3>)",
  re.DOTALL,
)
"""Marks of some models around the answer that follows their thinking."""

# Harmony (gpt-oss) has channels. A server may have dropped their control tokens.
_CHANNEL = "<|channel|>"
_CONTROLS = (_CHANNEL, "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_FINAL = re.compile(r"<\|channel\|>final\b.*?<\|message\|>", re.DOTALL)
_END = re.compile(r"<\|(?:end|return|call|start)\|>")
_BARE_FINAL = "assistantfinal"
_BARE_ANALYSIS = re.compile(r"\s*analysis(?=\w)")  # not the word in a sentence


def own(template: str) -> tuple[Marks, ...]:
  """The marks of a model: THINK, and the known ones in its chat template."""
  return tuple(
    marks
    for marks in KNOWN
    if marks is THINK or (marks.opening in template or marks.closing in template)
  )


def answer(reply: str, marks: Sequence[Marks] = (THINK,)) -> str:
  """The reply without its thinking; the whole reply if its thinking does not end.

  Args:
    marks: the model's own marks, which count anywhere. Text before a lone closing mark
      is thinking too, since some templates open it themselves. Other known marks count
      only at the start of the reply, where no answer would mention them.
  """
  rest = reply
  for each in marks:
    opening, closed, after = rest.partition(each.closing)
    rest = after if closed and each.opening not in opening else rest
    rest = _between(each).sub("", rest)
  while leading := next((m for m in map(_leads, KNOWN) if m.match(rest)), None):
    rest = leading.sub("", rest, count=1)
  if _CHANNEL in rest:
    finals = list(_FINAL.finditer(rest))
    rest = _END.split(rest[finals[-1].end() :])[0] if finals else rest
  rest = rest.rpartition(_BARE_FINAL)[2]
  if rest == reply:
    return reply
  wrapped = _WRAPPED.fullmatch(rest.strip())
  if wrapped is not None:
    rest = next(g for g in (wrapped[1], wrapped[2], wrapped[4]) if g is not None)
  return rest


def _between(marks: Marks) -> re.Pattern[str]:
  return re.compile(
    f"{re.escape(marks.opening)}.*?{re.escape(marks.closing)}", re.DOTALL
  )


def _leads(marks: Marks) -> re.Pattern[str]:
  return re.compile(rf"\s*{_between(marks).pattern}", re.DOTALL)


def left_in(text: str, marks: Sequence[Marks] = ()) -> bool:
  """Whether a mark remains in an answer, which then may contain thinking."""
  low = text.lower()
  known = itertools.chain.from_iterable((*KNOWN, *marks))
  return (
    any(mark.lower() in low for mark in known)
    or _CHANNEL in low
    or _BARE_ANALYSIS.match(text) is not None
  )


def ended(reply: str) -> str:
  """The text after the last thinking of a reply; "" if the thinking never ends."""
  rest = reply
  for each in KNOWN:
    rest = _between(each).sub("", rest).partition(each.opening)[0]
    rest = rest.rpartition(each.closing)[2]
  rest = answer(rest)
  harmony = _CHANNEL in rest or _BARE_ANALYSIS.match(rest) is not None
  return "" if harmony else rest


def decode(tokenizer: chat.ChatTokenizer, ids: Sequence[int]) -> str:
  """`chat.decode`, except that marks which are control tokens stay in the text."""
  marks = _control_ids(tokenizer)
  pieces = []
  for is_mark, run in itertools.groupby(ids, lambda i: i in marks):
    part = list(run)
    pieces.append(
      "".join(marks[i] for i in part) if is_mark else chat.decode(tokenizer, part)
    )
  return "".join(pieces)


def _control_ids(tokenizer: chat.ChatTokenizer) -> dict[int, str]:
  """Marks that are single control tokens of the model, except its end tokens."""
  known = {part.removesuffix("thought") for marks in KNOWN for part in marks}
  if _CHANNEL in tokenizer.controls:  # in other models <|end|> is the end of a turn
    known |= set(_CONTROLS)
  marks = [control for control in tokenizer.controls if control in known]
  added = tokenizer.hf_tokenizer.added_tokens_encoder if marks else {}
  return {
    added[m]: m for m in marks if m in added and added[m] not in tokenizer.eos_ids
  }
