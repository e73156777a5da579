"""Lists of messages, checked: {role, content} objects to a conversation.

Everything here is a pure function of what a row holds. A `row_files.Fault` names the
field that cannot be used.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from raft_jax.storage import records, row_files

ROLES = ("system", "user", "assistant")


def text(field: str, value: Any) -> str:
  """The value, if it is a text that is not empty.

  Raises:
    row_files.Fault: it is none.
  """
  if not isinstance(value, str):
    raise row_files.Fault(f"`{field}` is {type(value).__name__}, not text")
  # A text of spaces, control and zero-width characters alone counts as empty.
  if all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in value):
    raise row_files.Fault(f"`{field}` is empty")
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise row_files.Fault(
      f"`{field}` holds half of a surrogate pair, which no text has"
    ) from e
  return value


def plain_text(field: str, value: Any) -> str:
  """As `text`; an `id` may also be a whole number."""
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  return text(field, str(value) if field == "id" and is_integer else value)


def parse(value: Any, field: str = "messages") -> tuple[records.Message, ...]:
  """The turns of a list of messages, whoever has the last word.

  Args:
    value: what the row holds.
    field: its name, for the reasons.

  Raises:
    row_files.Fault: a message is not one, or stands where it cannot.
  """
  if not isinstance(value, list) or not value:
    raise row_files.Fault(f"`{field}` is not a non-empty list of {{role, content}}")
  return tuple(_message(f"{field}[{i}]", item, i) for i, item in enumerate(value))


def _message(at: str, item: Any, position: int) -> records.Message:
  if not isinstance(item, Mapping):
    raise row_files.Fault(f"`{at}` is not an object {{role, content}}")
  extra = [k for k, v in item.items() if k not in records.Message._fields and v]
  if extra:  # e.g. tool calls: dropping them would change the conversation
    raise row_files.Fault(
      f"`{at}` has {extra[0]!r}; only role and content are supported"
    )
  role = item.get("role")
  if role not in ROLES:
    raise row_files.Fault(f"`{at}.role` is {role!r}, not one of {', '.join(ROLES)}")
  if role == "system" and position > 0:
    raise row_files.Fault(f"`{at}` is a system turn; only the first turn may be")
  return records.Message(role, text(f"{at}.content", item.get("content")))


def conversation(value: Any, field: str = "messages") -> tuple[records.Message, ...]:
  """The turns of a list of messages that ends with the user.

  Raises:
    row_files.Fault: as `parse`, or the last turn is another's.
  """
  messages = parse(value, field)
  if messages[-1].role != "user":
    raise row_files.Fault(
      f"`{field}` does not end with a user turn; the reply is `answer`"
    )
  return messages
