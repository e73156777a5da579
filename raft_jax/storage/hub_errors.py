"""Errors of the Hugging Face hub: whether they are temporary, and each in one line."""

from __future__ import annotations

import re


def is_temporary(status: int) -> bool:
  """Whether the same request may succeed later: the hub is busy, or broken."""
  return status == 429 or status >= 500


def line(error: BaseException) -> str:
  """The first line, without the parts of addresses that may hold signatures."""
  first = str(error).strip().partition("\n")[0]
  return re.sub(r"\?\S*", "", first)[:300]
