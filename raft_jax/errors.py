"""The exceptions that mean "the user can mend this".

Every command turns one into one line on stderr and exit code 2, or 75 where nothing
need be mended but the same command run again. The message says what was wrong, where
(file, line or key) and what to do about it.
"""


def install(extra: str) -> str:
  """The command that adds an extra of pyproject.toml where this program runs.

  Not `raft_jax[extra]`: no index holds the project, and its name there is anybody's.
  """
  return (
    f"`python -m pip install --constraint constraints.txt --editable '.[{extra}]'` in "
    "the folder of raft_jax's repository"
  )


class UserError(ValueError):
  """Bad input: a config, a data file, a checkpoint or a model we cannot use."""


class TryAgainError(UserError):
  """Something outside was away or busy: the same command may do, a little later."""
