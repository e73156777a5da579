"""Settings of malloc for runs on the CPU, which make steps faster."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
  """Makes malloc keep freed memory if jax runs only on the CPU; call before jax starts.

  XLA frees a step's arrays on the CPU, glibc returns their pages to the kernel, and the
  kernel clears new pages for the next step. That took 0.3 of the time of an update of a
  135M model on one core. With these settings the pages are reused: no array is a
  mapping of its own, and all come from one arena that grows and is never trimmed.

  Returns:
    Whether malloc was set. It is not if an accelerator may be the device, if malloc is
    not glibc's, or if the user has tuned it.
  """
  tuned = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ)
  if tuned or platform.libc_ver()[0] != "glibc" or not _cpu_only():
    return False
  malloc = ctypes.CDLL(None)
  options = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
  results = [malloc.mallopt(*option) for option in options]  # try all of them
  return all(results)


def _cpu_only() -> bool:
  """Whether jax is installed and can find no device but the CPU."""
  platforms = os.environ.get("JAX_PLATFORMS")
  if platforms:
    return platforms == "cpu"
  return (
    importlib.util.find_spec("jaxlib") is not None
    and importlib.util.find_spec("libtpu") is None
    and not importlib.metadata.entry_points(group="jax_plugins")
  )
