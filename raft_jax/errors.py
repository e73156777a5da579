"""Exceptions for errors that the user can correct.

A command prints one as a line on stderr and exits with code 2, or with 75 if running
the same command again may be enough. The message says what was wrong, where (file, line
or key) and what to do about it.
"""


def install(extra: str) -> str:
  """The command that installs an extra of pyproject.toml into this environment.

  Not `raft_jax[extra]`: the project is on no index, where anybody could take its name.
  """
  return (
    f"`python -m pip install --constraint constraints.txt --editable '.[{extra}]'` in "
    "the folder of raft_jax's repository"
  )


class UserError(ValueError):
  """Bad input: an unusable config, data file, checkpoint or model."""


class TryAgainError(UserError):
  """A temporary failure: e.g. a server is unreachable, or a folder is locked."""
