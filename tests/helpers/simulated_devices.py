"""XLA's flag for a process with several CPU devices."""

import os


def flags(count: int) -> str:
  """The value of XLA_FLAGS for `count` devices, with the flags that are set already."""
  present = os.environ.get("XLA_FLAGS", "")
  return f"{present} --xla_force_host_platform_device_count={count}".strip()
