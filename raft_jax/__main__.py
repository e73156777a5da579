"""The list of commands, and any of them: `python -m raft_jax [COMMAND ...]`."""

import sys

from raft_jax.config import commands

if __name__ == "__main__":
  words = sys.orig_argv
  options = words[1 : words.index("-m")] if "-m" in words else []
  sys.exit(commands.main(sys.argv[1:], options))
