"""RAFT: domain fine-tuning of language models without losing general abilities.

Importing this package imports no other room: `raft_jax.losses`, `raft_jax.vocab_head`
and `raft_jax.balance` need only jax, optax and numpy.
"""

import signal
import sys

__version__ = "0.1.0"


def _starts() -> None:
  """Prepares the process of a command, before its imports."""
  # Imports take seconds. A KeyboardInterrupt there ends in a page of traceback, or is
  # lost inside a library.
  from raft_jax.runtime import interrupts

  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupts.at_once)

  from raft_jax.runtime import environment

  environment.prepare()


# Only for our own commands, `python -m raft_jax.STAGE`: another program's Ctrl-C and
# settings of jax are its own, whatever it imports.
if sys.argv[:1] == ["-m"] and any(
  option == "-m" and module.startswith("raft_jax.")
  for option, module in zip(sys.orig_argv, sys.orig_argv[1:])
):
  _starts()
