"""The commands: their names, what they do, and the start of one by its name."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence

import raft_jax

COMMANDS = {
  "inspect": "shows your data as the model reads it, and writes a config for it",
  "extract": "writes question/answer pairs from documents",
  "synthesise": "lets the model write general questions to rehearse",
  "refine": "rewrites, filters, fuses and judges the answers",
  "train": "fine-tunes the model on one or many hosts",
  "evaluate": "scores the trained model beside the base model",
  "export": "writes a Hugging Face folder or a PEFT adapter",
  "report": "writes one self-contained HTML page",
  "chat": "talks with the trained model and the base model side by side",
  "sweep": "runs many settings of one config",
  "plan": "estimates memory and step time on machines you do not have",
}
"""Name -> what it does. Each is the module of that name at the top of the package; the
README's table has the same words."""


def listing() -> str:
  """The commands as lines of text."""
  width = max(map(len, COMMANDS))
  lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
  return "\n".join(
    [
      f"raft_jax {raft_jax.__version__}",
      "",
      *lines,
      "",
      "Run each as `python -m raft_jax.COMMAND --config FILE [key=value ...]` or as",
      "`raft-jax COMMAND ...`; --help explains every key.",
    ]
  )


def fault(name: str) -> str | None:
  """What is wrong with the name of a command; None if there is such a command."""
  if name in COMMANDS:
    return None
  near = difflib.get_close_matches(name, COMMANDS, n=2)
  remedy = f"did you mean {' or '.join(near)}?" if near else "`raft-jax` lists them"
  return f"command line: there is no command {name!r}; {remedy}"


def main(arguments: Sequence[str], options: Sequence[str]) -> int:
  """Lists the commands, or becomes the process of one; returns the exit status.

  Args:
    options: of the interpreter, for the command.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C prints no traceback
  name, *rest = arguments or ["--help"]
  if name in ("--version", "-V"):
    return _write(f"raft_jax {raft_jax.__version__}")
  if name in ("--help", "-h", "help"):
    return _write(listing())
  complaint = fault(name)
  if complaint is not None:
    print(f"error: {complaint}", file=sys.stderr)
    return 2
  # A process of its own name, so that both ways to start a command are one.
  command = [sys.executable, *options, "-m", f"raft_jax.{name}", *rest]
  os.execv(sys.executable, command)


def _write(text: str) -> int:
  try:
    print(text, flush=True)
  except BrokenPipeError:  # as `head` closes it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  return 0


def script() -> int:
  """The installed `raft-jax`."""
  # As for any script, the working folder is no place of modules.
  return main(sys.argv[1:], ["-P"])
