"""What is said of an error of the hub: one line, and no secret of an address."""

import pytest

from raft_jax.storage import hub_errors


def test_a_line_without_signatures():
  error = OSError(
    "403 for url 'https://cdn.example/a.parquet?X-Amz-Signature=SECRET&id=1' (retry)\n"
    "Request ID: 1"
  )
  line = hub_errors.line(error)
  assert line == "403 for url 'https://cdn.example/a.parquet (retry)"
  assert len(hub_errors.line(OSError("x" * 1000))) == 300
  assert hub_errors.line(OSError()) == ""


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_or_broken_server_is_temporary(status):
  assert hub_errors.is_temporary(status)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 422])
def test_a_refusal_is_not(status):
  assert not hub_errors.is_temporary(status)
