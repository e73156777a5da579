"""RAFT: domain fine-tuning of language models without losing general abilities.

Importing this package imports no other module of it: `raft_jax.losses`,
`raft_jax.vocab_head` and `raft_jax.balance` need only jax, optax and numpy.
"""

import signal
import sys

__version__ = "0.1.0"


def _start_command() -> None:
  """Prepares the process of a command, before its imports."""
  # Imports take seconds. A KeyboardInterrupt during them prints a long traceback or is
  # swallowed by a library.
  from raft_jax.runtime import interrupts

  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupts.at_once)

  from raft_jax.runtime import environment

  environment.prepare()


# Only for our own commands, `python -m raft_jax.STAGE`: other programs keep their
# handling of Ctrl-C and their settings of jax.
if sys.argv[:1] == ["-m"] and any(
  option == "-m" and module.startswith("raft_jax.")
  for option, module in zip(sys.orig_argv, sys.orig_argv[1:])
):
  _start_command()
