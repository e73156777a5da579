"""The command line of every stage, and the keys of the config written out.

Bad input is one message and exit code 2; what may pass by itself (a server that is
away) one and 75, which `launch/again.sh` and schedulers take for "start it again";
Ctrl-C a hint and 130; never a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import raft_jax
from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import reference as config_reference
from raft_jax.runtime import host_memory


def run(
  stage: str,
  main: Callable[..., None],
  description: str,
  argv: Sequence[str] | None = None,
  *,
  options: Mapping[str, Mapping[str, Any]] | None = None,
  without_data: bool = False,
) -> None:
  """Runs `python -m raft_jax.<stage> --config FILE [key=value ...] [--print-config]`.

  `main` gets the config, and the values of the stage's own `options` by name: each is
  what `argparse` takes for it. `without_data`: the files of questions may be absent.

  Bad input is a message on stderr and exit code 2 (75: try again), Ctrl-C a hint and
  exit code 130; neither shows a traceback. A second Ctrl-C ends the process at once.
  """
  parser = argparse.ArgumentParser(
    prog=f"python -m raft_jax.{stage}",
    usage=" ".join(
      [
        "%(prog)s --config FILE",
        *(f"[{name} {how['metavar']}]" for name, how in (options or {}).items()),
        "[key=value ...] [--print-config]",
      ]
    ),
    description=description,
    epilog=_help_table(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    exit_on_error=False,
  )
  parser.add_argument("--config", metavar="FILE", help="the run's YAML file")
  parser.add_argument(
    "--print-config", action="store_true", help="print every key's value and stop"
  )
  for name, how in (options or {}).items():
    parser.add_argument(name, **how)
  with _listening() as signals:
    try:
      given, overrides = parser.parse_known_args(argv)
      if given.config is None:
        raise errors.UserError(
          f"--config is missing; e.g. {parser.prog} --config configs/quickstart.yaml"
        )
      names = [name.strip("-").replace("-", "_") for name in options or {}]
      own = {name: getattr(given, name) for name in names}
      for values in own.values():
        if isinstance(values, list):
          # Behind an option that takes several words argparse takes these as well.
          overrides += [word for word in values if "=" in word]
          values[:] = [word for word in values if "=" not in word]
      settings = config_load.load(given.config, overrides, without_data=without_data)
      if given.print_config:
        print(config_load.dump(settings), end="")
      else:
        host_memory.keep_freed()
        main(settings, **own)
    except (Exception, KeyboardInterrupt) as error:
      if signals or isinstance(error, KeyboardInterrupt):
        # Whatever a library made of it while it was loading.
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
      text = _user_fault(error)
      if text is None:
        raise
      print(f"error: {text}", file=sys.stderr)
      sys.exit(os.EX_TEMPFAIL if isinstance(error, errors.TryAgainError) else 2)


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
  """The SIGINTs that came: the first raises KeyboardInterrupt, the second exits."""
  signals: list[int] = []

  def note(number: int, frame: Any) -> None:
    if signals:
      raft_jax.interrupted(number, frame)
    signals.append(number)
    raise KeyboardInterrupt

  before = signal.getsignal(signal.SIGINT)
  if before not in (signal.default_int_handler, raft_jax.interrupted):
    yield signals  # ignored, as under nohup, or somebody else's
    return
  signal.signal(signal.SIGINT, note)
  try:
    yield signals
  finally:
    signal.signal(signal.SIGINT, before)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of writing, which does not say into which file."""


def _user_fault(error: BaseException) -> str | None:
  """What the user can mend about an exception, or None: then it is a defect."""
  if isinstance(error, errors.UserError):
    return str(error)
  if isinstance(error, argparse.ArgumentError):
    return f"command line: {error}; see --help"
  if isinstance(error, OSError) and error.filename is not None and error.strerror:
    place = str(error.filename)[:200]
    return f"{place}: {error.strerror}; check the path, its rights and the free space"
  if isinstance(error, OSError) and error.errno in FULL:
    return f"{os.strerror(error.errno)}: make room, then run the same command again"
  # By name: a stage that holds no jax must not import it for this.
  if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
    return (
      f"a device's memory is full ({str(error).splitlines()[0][:200]}). Lower "
      "data.max_*_tokens, rollout.max_new_tokens or a batch_size; for training also "
      "raise train.micro_batches, or set model.remat=true or lora={}. `python -m "
      "raft_jax.plan` says beforehand what a run needs"
    )
  return None


# The reference


def _help_table() -> str:
  lines = ["every key, its type and default:"]
  for key in config_reference.every_key():
    head = f"  {key.name}" + (f"  {key.type} = {key.default}" if key.type else "")
    lines += [head] if key.type else ["", head]
    indent = "      "
    lines += textwrap.wrap(
      key.meaning, 84, initial_indent=indent, subsequent_indent=indent
    )
  return "\n".join(lines)


def reference() -> str:
  """A Markdown table of all keys; the README holds it verbatim."""
  rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
  for key in config_reference.every_key():
    name = f"`{key.name}`" if key.type else f"**`{key.name}`**"
    default = f"`{key.default}`" if key.default not in ("", "required") else key.default
    meaning = key.meaning.replace("|", "\\|")
    rows.append(f"| {name} | {key.type} | {default} | {meaning} |")
  return "\n".join(rows) + "\n"
