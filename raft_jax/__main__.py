"""The list of commands (`python -m raft_jax`), and any of them by its name."""

import sys

from raft_jax.config import commands

if __name__ == "__main__":
  words = sys.orig_argv
  options = words[1 : words.index("-m")] if "-m" in words else []
  sys.exit(commands.main(sys.argv[1:], options))
