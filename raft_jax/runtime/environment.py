"""What a command takes over from the shell that starts it, and what it sets aside.

Commands only: these settings are other programs' own where they import our losses.
"""

from __future__ import annotations

import codecs
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import MutableMapping, Sequence

_NO = ("", "0", "f", "false", "n", "no", "off")
_YES = ("1", "on", "t", "true", "y", "yes")

# Name -> the values that change nothing. Set aside is what decides the values of a run
# or forbids what it does; not what decides where it runs, its caches and its logs.
JAX_SETTINGS = {
  **dict.fromkeys(
    (
      "JAX_ALLOW_F16_REDUCTIONS",
      "JAX_AUTO_PCAST",
      "JAX_THREEFRY_PARTITIONABLE",
      "JAX_USE_DIRECT_LINEARIZE",
    ),
    _YES,
  ),
  **dict.fromkeys(
    (
      "JAX_CHECK_STATIC_INDICES",
      "JAX_CHECK_TRACER_LEAKS",
      "JAX_CUSTOM_VJP3",
      "JAX_DEBUG_INFS",
      "JAX_DEBUG_KEY_REUSE",
      "JAX_DEBUG_NANS",
      "JAX_DISABLE_JIT",
      "JAX_DISALLOW_MESH_CONTEXT_MANAGER",
      "JAX_ENABLE_CHECKS",
      "JAX_ENABLE_CUSTOM_PRNG",
      "JAX_ENABLE_X64",
      "JAX_HIGH_DYNAMIC_RANGE_GUMBEL",
      "JAX_NO_EXECUTION",
      "JAX_NO_TRACING",
      "JAX_RAISE_PERSISTENT_CACHE_ERRORS",
      "JAX_RANDOM_SEED_OFFSET",
      "JAX_REMAT3",
      "JAX_REMOVE_SIZE_ONE_MESH_AXIS_FROM_TYPE",
      "JAX_SCAN3",
      "JAX_SOFTMAX_CUSTOM_JVP",
      "JAX_THREAD_GUARD",
    ),
    _NO,
  ),
  **dict.fromkeys(
    (
      "JAX_ARRAY_GARBAGE_COLLECTION_GUARD",
      "JAX_LEGACY_PRNG_KEY",
      "JAX_NUMPY_RANK_PROMOTION",
      "JAX_TRANSFER_GUARD",
      "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE",
      "JAX_TRANSFER_GUARD_DEVICE_TO_HOST",
      "JAX_TRANSFER_GUARD_HOST_TO_DEVICE",
    ),
    ("allow",),
  ),
  **dict.fromkeys(
    (
      "JAX_ERROR_CHECKING_BEHAVIOR_DIVIDE",
      "JAX_ERROR_CHECKING_BEHAVIOR_NAN",
      "JAX_ERROR_CHECKING_BEHAVIOR_OOB",
    ),
    ("ignore",),
  ),
  "JAX_DEFAULT_DTYPE_BITS": (),
  "JAX_DEFAULT_MATMUL_PRECISION": (),
  "JAX_DEFAULT_PRNG_IMPL": ("threefry2x32",),
  "JAX_EXPLICIT_X64_DTYPES": ("warn",),
  "JAX_NUMPY_DTYPE_PROMOTION": ("standard",),
}


def prepare() -> None:
  """Sets aside what would change a run or end it, with one line; before jax loads."""
  aside = set_aside(os.environ)
  if _lenient():
    aside.append("warnings as errors")
  command = with_docstrings(sys.orig_argv, os.environ) if sys.flags.optimize > 1 else []
  if command:
    aside.append("Python without docstrings")  # which transformers reads
  if aside:
    print(
      f"not used in this command, which it would change: {', '.join(aside)}",
      file=sys.stderr,
      flush=True,
    )
  if command:
    os.execv(sys.executable, command)
  # Where its folder cannot be written it takes another, and says so in two lines.
  logging.getLogger("matplotlib").setLevel(logging.ERROR)
  fault = flags_fault(os.environ)
  if fault is not None:
    print(f"error: XLA_FLAGS: {fault}; correct or unset it", file=sys.stderr)
    sys.exit(2)


def set_aside(environment: MutableMapping[str, str]) -> list[str]:
  """Removes jax's settings that decide results; returns those that were not usual."""
  found = []
  for name, usual in JAX_SETTINGS.items():
    value = environment.pop(name, None)
    if value is not None and value.lower() not in usual:
      found.append(f"{name}={value}")
  return found


def with_docstrings(
  command: Sequence[str], environment: MutableMapping[str, str]
) -> list[str]:
  """The command that starts Python again, but with docstrings; [] if unknown."""
  module = command.index("-m")
  options = [word for word in command[1:module] if word not in ("-O", "-OO")]
  known = environment.pop("PYTHONOPTIMIZE", None) or len(options) + 1 < module
  return [command[0], *options, *command[module:]] if known else []


def _lenient() -> bool:
  """Whether warnings were errors, which they are not any more: libraries warn."""
  if not any(option.startswith("error") for option in sys.warnoptions):
    return False
  sys.warnoptions.clear()
  os.environ.pop("PYTHONWARNINGS", None)
  warnings.resetwarnings()
  for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
    warnings.simplefilter("ignore", kind)
  warnings.simplefilter("ignore", ResourceWarning)
  return True


def flags_fault(environment: MutableMapping[str, str]) -> str | None:
  """What XLA says of XLA_FLAGS where it would end the process; None if it takes them.

  It is asked in a process of its own.
  """
  if not environment.get("XLA_FLAGS", "").strip():
    return None
  import subprocess  # a Ctrl-C is heard earlier without it

  code = "from jaxlib import xla_client; xla_client.CompileOptions()"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, check=False, env=environment
  )
  lines = done.stderr.decode(errors="replace").splitlines()
  said = next((line for line in lines if "XLA_FLAGS" in line), None)
  return None if done.returncode == 0 or said is None else said.rpartition("] ")[2]


# Output

PLAIN = "raft_jax_plain"
"""Name of the way to write what a stream's encoding lacks."""

_WORDS = {
  "λ": "lambda",
  "×": "x",
  "·": "*",
  "≤": "<=",
  "≥": ">=",
  "±": "+-",
  "→": "->",
  "…": "...",
  "–": "-",
  "—": "-",
  "−": "-",
  "‘": "'",
  "’": "'",
  "“": '"',
  "”": '"',
}


def plain(text: str) -> str:
  """A text in ASCII that can still be read."""
  return "".join(map(_plain, text))


def _plain(letter: str) -> str:
  if letter.isascii():
    return letter
  if letter in _WORDS:
    return _WORDS[letter]
  name = unicodedata.name(letter, "")
  if name.startswith("BOX DRAWINGS"):
    kinds = {"HORIZONTAL": "-", "VERTICAL": "|"}
    return kinds.get(name.rpartition(" ")[2], "+") if " AND " not in name else "+"
  if "BLOCK" in name or "SHADE" in name:
    return "#"
  return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


def _replace(error: UnicodeError) -> tuple[str, int]:
  assert isinstance(error, UnicodeEncodeError)
  return plain(error.object[error.start : error.end]), error.end


def plain_streams() -> None:
  """Lets stdout and stderr write plain letters where their encoding has no others."""
  codecs.register_error(PLAIN, _replace)
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors=PLAIN)
