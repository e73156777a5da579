"""How the host's memory is handed out where its CPU is the device."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
  """Has malloc keep what is freed, where jax runs on the CPU alone; before it starts.

  XLA frees a step's arrays on the CPU, glibc gives them back to the kernel, and the
  next step has every page of them cleared anew: 0.3 of an update of a 135M model on one
  core. Kept, the pages are used again: no array is a mapping of its own, and all come
  from the one arena that grows without bound and is never trimmed.

  Returns:
    Whether it did; not where an accelerator may be the device, malloc is not glibc's,
    or its user has tuned it.
  """
  tuned = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ)
  if tuned or platform.libc_ver()[0] != "glibc" or not _cpu_only():
    return False
  malloc = ctypes.CDLL(None)
  wanted = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
  taken = [malloc.mallopt(*option) for option in wanted]
  return all(taken)


def _cpu_only() -> bool:
  """Whether jax is here and can find no other device than the CPU."""
  asked = os.environ.get("JAX_PLATFORMS")
  if asked:
    return asked == "cpu"
  return (
    importlib.util.find_spec("jaxlib") is not None
    and importlib.util.find_spec("libtpu") is None
    and not importlib.metadata.entry_points(group="jax_plugins")
  )
