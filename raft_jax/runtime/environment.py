"""The shell's settings of jax: those that a command ignores, and one that it adds.

A command ignores what would change its results, and keeps its compiled programs.
Only commands call this. Programs that import our losses keep their own settings.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
import pathlib
import platform
import sys
import unicodedata
import warnings
from collections.abc import MutableMapping, Sequence

_NO = ("", "0", "f", "false", "n", "no", "off")
_YES = ("1", "on", "t", "true", "y", "yes")

# Name -> the values that change nothing. These settings change the values of a run or
# forbid what it does. Settings for its devices, caches and logs are kept.
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
  """Removes and prints settings that would change a run; call before jax loads."""
  aside = set_aside(os.environ)
  if _lenient():
    aside.append("warnings as errors")
  command = with_docstrings(sys.orig_argv, os.environ) if sys.flags.optimize > 1 else []
  if command:
    aside.append("Python without docstrings")  # transformers reads docstrings
  if aside:
    print(
      f"ignored, because it would change this command: {', '.join(aside)}",
      file=sys.stderr,
      flush=True,
    )
  if command:
    os.execv(sys.executable, command)
  # If its folder is not writable, matplotlib takes another one and logs two lines.
  logging.getLogger("matplotlib").setLevel(logging.ERROR)
  keep_programs(os.environ)
  fault = flags_fault(os.environ)
  if fault is not None:
    print(f"error: XLA_FLAGS: {fault}; correct or unset it", file=sys.stderr)
    sys.exit(2)


def set_aside(environment: MutableMapping[str, str]) -> list[str]:
  """Removes jax's settings that change results; returns those with an effect."""
  removed = []
  for name, usual in JAX_SETTINGS.items():
    value = environment.pop(name, None)
    if value is not None and value.lower() not in usual:
      removed.append(f"{name}={value}")
  return removed


CACHE = "JAX_COMPILATION_CACHE_DIR"


def keep_programs(environment: MutableMapping[str, str]) -> None:
  """Sets the folder in which jax keeps compiled programs, unless the user did.

  Each kind of processor has its own: a home folder may be shared by machines that
  cannot run each other's programs.
  """
  if CACHE in environment:
    return
  home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = pathlib.Path(home, "raft_jax", f"programs-{_processor()}")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  if os.access(folder, os.W_OK):
    environment[CACHE] = str(folder)


def _processor() -> str:
  """A short digest of what the processor is and can do."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
  except OSError:
    lines = []
  kinds = ("model name", "flags", "Features")
  facts = [line for line in lines if line.startswith(kinds)] or [platform.processor()]
  text = "\n".join([platform.machine(), *facts])
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def with_docstrings(
  command: Sequence[str], environment: MutableMapping[str, str]
) -> list[str]:
  """The command that starts Python again with docstrings; [] if it is not known."""
  module = command.index("-m")
  options = [word for word in command[1:module] if word not in ("-O", "-OO")]
  known = environment.pop("PYTHONOPTIMIZE", None) or len(options) + 1 < module
  return [command[0], *options, *command[module:]] if known else []


def _lenient() -> bool:
  """Stops treating warnings as errors, since libraries warn; returns whether it did."""
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
  """XLA's message if XLA_FLAGS would end the process; None if XLA accepts them.

  XLA runs in a process of its own for this.
  """
  if not environment.get("XLA_FLAGS", "").strip():
    return None
  import subprocess  # not at the top: it would delay the handling of Ctrl-C

  code = "from jaxlib import xla_client; xla_client.CompileOptions()"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, check=False, env=environment
  )
  lines = done.stderr.decode(errors="replace").splitlines()
  message = next((line for line in lines if "XLA_FLAGS" in line), None)
  if done.returncode == 0 or message is None:
    return None
  return message.rpartition("] ")[2]


# --- Output ---------------------------------------------------------------------------

PLAIN = "raft_jax_plain"
"""Name of the error handler for characters that a stream's encoding lacks."""

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
  """A readable ASCII form of a text."""
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
  """Makes stdout and stderr replace characters that their encoding lacks."""
  codecs.register_error(PLAIN, _replace)
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors=PLAIN)
