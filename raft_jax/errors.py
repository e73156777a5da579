"""The one exception that means "the user can mend this".

Every command turns it into one line on stderr and exit code 2. The message says
what was wrong, where (file, line or key) and what to do about it.
"""


class UserError(ValueError):
  """Bad input: a config, a data file, a checkpoint or a model we cannot use."""
