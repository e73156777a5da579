"""What jax logs, with the extra `plan`, on a machine without a driver for its GPU."""

import re

_LINES = re.compile(
  r"WARNING: All log messages before absl::.*\nI0000 .*cuda drivers.*\n"
)


def without(text: str) -> str:
  """What a command itself wrote."""
  return _LINES.sub("", text)
