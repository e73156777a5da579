"""RAFT: domain fine-tuning of language models without losing general abilities.

Importing this package imports no other room: `raft_jax.losses`, `raft_jax.vocab_head`
and `raft_jax.balance` need only jax, optax and numpy.
"""

import os
import signal
import sys

__version__ = "0.1.0"


def interrupted(number: int, frame: object) -> None:
  """A signal handler that ends the process at once, with one line and status 130."""
  del number, frame
  os.write(2, b"interrupted; run the same command again to continue\n")
  os._exit(130)


# `python -m raft_jax.STAGE` imports for seconds before `cli.run` listens. A
# KeyboardInterrupt there ends in a page of traceback, or is lost inside a library.
# Only for our own commands: another program's Ctrl-C is its own, whatever it imports.
if (
  sys.argv[:1] == ["-m"]
  and any(
    option == "-m" and module.startswith("raft_jax.")
    for option, module in zip(sys.orig_argv, sys.orig_argv[1:])
  )
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, interrupted)
