"""Errors that name what a user has to mend."""

from collections.abc import Callable
from typing import Any

import pytest

from raft_jax import errors


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
  """What a call is refused with, which is one line."""
  with pytest.raises(errors.UserError) as caught:
    call(*arguments, **options)
  message = str(caught.value)
  assert "\n" not in message
  return message
