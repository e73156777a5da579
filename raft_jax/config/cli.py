"""The command line of every stage, and the keys of the config written out.

Bad input prints one message and exits with 2. A temporary failure (an unreachable
server) exits with 75, which `launch/again.sh` and schedulers read as "start it again".
Ctrl-C prints a hint and exits with 130. No user error prints a traceback. A signal that
arrives after the work is done also sets the exit code, so that a script stops, too.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import pathlib
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import reference as config_reference
from raft_jax.config import schema
from raft_jax.runtime import environment, host_memory, interrupts
from raft_jax.storage import mirror

RAY: Mapping[str, Mapping[str, Any]] = {
  "--ray": {
    "type": int,
    "metavar": "N",
    "help": "make the calls on N GPUs of a Ray cluster (in N processes, where an engine"
    " takes no GPU)",
  }
}
"""The option of the stages that generate text for curation."""


def run(
  stage: str,
  main: Callable[..., None],
  description: str,
  argv: Sequence[str] | None = None,
  *,
  options: Mapping[str, Mapping[str, Any]] | None = None,
  without_data: bool = False,
  base: Mapping[str, Any] | None = None,
) -> None:
  """Runs `python -m raft_jax.<stage> --config FILE [key=value ...] [--print-config]`.

  `main` is called with the config and, by keyword, the values of the stage's own
  `options`: name -> arguments of `argparse`'s `add_argument`. `without_data`: whether
  the files of questions may be absent. `base`: keys of a run without --config, which
  then may be left out.
  """
  environment.plain_streams()
  parser = _parser(stage, description, options or {}, needs_config=base is None)
  with interrupts.listening():
    try:
      given, overrides = parser.parse_known_args(argv)
      if given.config is None and (base is None or not overrides):
        raise errors.UserError(
          f"--config is missing; write `{parser.prog} --config FILE`"
        )
      names = [name.strip("-").replace("-", "_") for name in options or {}]
      own = {name: getattr(given, name) for name in names}
      for values in own.values():
        if isinstance(values, list):
          # Behind an option that takes several words argparse takes these as well.
          overrides += [word for word in values if "=" in word]
          values[:] = [word for word in values if "=" not in word]
      settings = (
        config_load.load(given.config, overrides, without_data=without_data)
        if given.config is not None
        else config_load.from_tree(dict(base or {}), overrides, "command line")
      )
      if given.print_config:
        print(config_load.dump(settings), end="")
      else:
        interrupts.check()
        host_memory.keep_freed()
        with _mirrored(stage, settings):
          main(settings, **own)
      _flush()
      interrupts.check()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
      _end(error)


WRITING = (
  "extract",
  "synthesise",
  "refine",
  "train",
  "evaluate",
  "export",
  "report",
  "sweep",
)
"""The stages that write into `output`."""


def _mirrored(
  stage: str, settings: schema.Config
) -> contextlib.AbstractContextManager[None]:
  """Keeps the mirror of `output` while a stage writes, if there is one."""
  if settings.mirror is None or stage not in WRITING:
    return contextlib.nullcontext()
  from raft_jax.runtime import distributed  # imports jax, which not every stage needs

  distributed.refuse(f"{stage} with a mirror")
  return mirror.kept(pathlib.Path(settings.output), settings.mirror)


def _parser(
  stage: str,
  description: str,
  options: Mapping[str, Mapping[str, Any]],
  *,
  needs_config: bool,
) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"python -m raft_jax.{stage}",
    usage=" ".join(
      [
        "%(prog)s --config FILE" if needs_config else "%(prog)s [--config FILE]",
        # A switch has no value, and so no name for one.
        *(
          f"[{name} {how.get('metavar', '')}".rstrip() + "]"
          for name, how in options.items()
        ),
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
  for name, how in options.items():
    parser.add_argument(name, **how)
  return parser


def _flush() -> None:
  """Flushes stdout, so that a full disk or a closed pipe is an error here."""
  if sys.stdout is not None:
    sys.stdout.flush()


def _end(error: BaseException) -> NoReturn:
  """Ends the process after an error or a signal; raises a defect again."""
  stopped = isinstance(error, (interrupts.Stopped, KeyboardInterrupt))
  if isinstance(error, SystemExit) and not stopped:  # --help
    try:
      _flush()
    except OSError as failed:
      _end(failed)
    raise error
  if stopped or interrupts.received:
    if not stopped:
      # A library may make this of a server or process that the signal has ended, too.
      fault = _user_fault(error) or f"{type(error).__name__}: {error}".splitlines()[0]
      _complain(f"error while stopping: {fault}")
    _complain(f"interrupted; {interrupts.HINT}")
    _leave(error)
  if isinstance(error, BrokenPipeError):
    # The reader of our output has closed it, as `head` does.
    _silence()
    sys.exit(128 + signal.SIGPIPE)
  text = _user_fault(error)
  if text is None:
    raise error
  _complain(f"error: {text}")
  _silence()
  sys.exit(os.EX_TEMPFAIL if isinstance(error, errors.TryAgainError) else 2)


def _leave(error: BaseException) -> NoReturn:
  """Ends a process after a signal; all its results are on disk.

  Without Python's shutdown, in which threads of XLA and others may crash.
  """
  code = 128 + signal.SIGINT
  if isinstance(error, interrupts.Stopped):
    code = int(str(error.code))
  elif interrupts.received:
    code = interrupts.status()
  _silence()
  if interrupts.handed_over():
    sys.exit(code)  # the other processes wait for jax's goodbye
  os._exit(code)


def _complain(line: str) -> None:
  with contextlib.suppress(OSError):
    print(line, file=sys.stderr)


def _silence() -> None:
  """Flushes both streams; replaces one that cannot be written by the null device."""
  for stream in (sys.stdout, sys.stderr):
    try:
      if stream is not None:
        stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing, which do not name the file."""


def _user_fault(error: BaseException) -> str | None:
  """The message for an error that the user can correct; None: it is a defect."""
  if isinstance(error, errors.UserError):
    return str(error)
  if isinstance(error, argparse.ArgumentError):
    return f"command line: {error}; see --help"
  if isinstance(error, OSError) and error.filename is not None and error.strerror:
    place = str(error.filename)[:200]
    return f"{place}: {error.strerror}; check the path, its rights and the free space"
  if type(error) is RuntimeError and "Unable to initialize backend" in str(error):
    return f"{str(error).splitlines()[0][:300]}; correct or unset JAX_PLATFORMS"
  if isinstance(error, AssertionError) and _raised_in(error, "xla_bridge.py"):
    wanted = os.environ.get("JAX_PLATFORMS")
    return (
      f"JAX_PLATFORMS={wanted}: JAX finds no such device; install JAX for it and check "
      "its driver, or unset JAX_PLATFORMS"
    )
  if isinstance(error, OSError) and error.errno in FULL:
    return f"{os.strerror(error.errno)}: make room, then run the same command again"
  # By name, because a stage without jax must not import it for this.
  if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
    return (
      f"a device's memory is full ({str(error).splitlines()[0][:200]}). Lower "
      "data.max_*_tokens, rollout.max_new_tokens or a batch_size; for training also "
      "raise train.micro_batches, or set model.remat=true or lora={}. `python -m "
      "raft_jax.plan` says beforehand what a run needs"
    )
  return None


def _raised_in(error: BaseException, file: str) -> bool:
  frames = traceback.extract_tb(error.__traceback__)
  return bool(frames) and pathlib.Path(frames[-1].filename).name == file


# --- The reference --------------------------------------------------------------------


def _help_table() -> str:
  lines = [
    "every key, its type and default:",
    *_help_lines(config_reference.reference_keys()),
  ]
  lines += [
    "",
    f"every role takes these engine keys ({', '.join(config_reference.roles())}):",
  ]
  return "\n".join([*lines, *_help_lines(config_reference.engine_keys())])


def _help_lines(keys: Sequence[config_reference.Key]) -> list[str]:
  lines = []
  for key in keys:
    head = f"  {key.name}" + (f"  {key.type} = {key.default}" if key.type else "")
    lines += [head] if key.type else ["", head]
    indent = "      "
    lines += textwrap.wrap(
      key.meaning, 84, initial_indent=indent, subsequent_indent=indent
    )
  return lines


def reference() -> str:
  """A Markdown table of all keys except those that roles share."""
  return _markdown(config_reference.reference_keys())


def engine_reference() -> str:
  """A Markdown table of the keys that roles share."""
  return _markdown(config_reference.engine_keys())


def _markdown(keys: Sequence[config_reference.Key]) -> str:
  rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
  for key in keys:
    name = f"`{key.name}`" if key.type else f"**`{key.name}`**"
    default = f"`{key.default}`" if key.default not in ("", "required") else key.default
    meaning = key.meaning.replace("|", "\\|")
    rows.append(f"| {name} | {key.type} | {default} | {meaning} |")
  return "\n".join(rows) + "\n"
