"""Thinking in replies: the marks around it, by model, and the answer without it.

A reply's thinking is taken out only where its model's marks say where it ends. What is
left over of any known mark makes a reply no answer: see `left_in`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from raft_jax.hf import chat


class Marks(NamedTuple):
  """What stands before and after the thinking of a model."""

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
"""What some models put around the answer that follows their thinking."""

# Harmony (gpt-oss): channels, whose control tokens a server may have dropped.
_CHANNEL = "<|channel|>"
_CONTROLS = (_CHANNEL, "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_FINAL = re.compile(r"<\|channel\|>final\b.*?<\|message\|>", re.DOTALL)
_END = re.compile(r"<\|(?:end|return|call|start)\|>")
_BARE_FINAL = "assistantfinal"
_BARE_ANALYSIS = re.compile(r"\s*analysis(?=\w)")  # not of a sentence


def own(template: str) -> tuple[Marks, ...]:
  """The marks of a model: the known ones that its chat template holds, and THINK."""
  return tuple(
    marks
    for marks in KNOWN
    if marks is THINK or (marks.opening in template or marks.closing in template)
  )


def answer(reply: str, marks: Sequence[Marks] = (THINK,)) -> str:
  """The reply without its thinking; the whole reply where that has no end.

  Args:
    marks: the model's own. They count wherever they stand, and what stands before a
      lone closing one is thinking, too: some templates open it themselves. Other known
      marks count at the start of the reply only, where an answer does not mention them.
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


def left_in(said: str, marks: Sequence[Marks] = ()) -> bool:
  """Whether a mark is left in what `answer` gave: it holds thinking, or may."""
  low = said.lower()
  known = itertools.chain.from_iterable((*KNOWN, *marks))
  return (
    any(mark.lower() in low for mark in known)
    or _CHANNEL in low
    or _BARE_ANALYSIS.match(said) is not None
  )


def ended(said: str) -> str:
  """What follows the last thinking of a reply; "" where that never ends."""
  rest = said
  for each in KNOWN:
    rest = _between(each).sub("", rest).partition(each.opening)[0]
    rest = rest.rpartition(each.closing)[2]
  rest = answer(rest)
  harmony = _CHANNEL in rest or _BARE_ANALYSIS.match(rest) is not None
  return "" if harmony else rest


def decode(tokenizer: chat.ChatTokenizer, ids: Sequence[int]) -> str:
  """`chat.decode`, but marks that are control tokens stay, so that they can be read."""
  kept = _control_ids(tokenizer)
  pieces = []
  for control, run in itertools.groupby(ids, lambda i: i in kept):
    part = list(run)
    pieces.append(
      "".join(kept[i] for i in part) if control else chat.decode(tokenizer, part)
    )
  return "".join(pieces)


def _control_ids(tokenizer: chat.ChatTokenizer) -> dict[int, str]:
  """Marks that are one control token of this model's, but for ends of an answer."""
  wanted = {part.removesuffix("thought") for marks in KNOWN for part in marks}
  if _CHANNEL in tokenizer.controls:  # elsewhere <|end|> is the end of a turn
    wanted |= set(_CONTROLS)
  marks = [each for each in tokenizer.controls if each in wanted]
  added = tokenizer.hf_tokenizer.added_tokens_encoder if marks else {}
  return {
    added[m]: m for m in marks if m in added and added[m] not in tokenizer.eos_ids
  }
