"""Pages that a step frees are used again, and where malloc is left alone."""

import os
import subprocess
import sys

import pytest

from raft_jax.runtime import host_memory

FAULTS = """
import resource
from raft_jax.runtime import host_memory
kept = host_memory.keep_freed()
import jax, jax.numpy as jnp
shift = jax.jit(lambda a: a + 1)
faults = []
for _ in range(10):
  a = shift(jnp.zeros((32, 1 << 20)))  # two arrays of 128 MiB, freed at the next turn
  b = [shift(jnp.zeros((8, 1 << 20))) for _ in range(3)]
  jax.block_until_ready((a, b))
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, *(late - early for early, late in zip(faults, faults[1:])))
"""


def tunes(name):
  return name.startswith(("JAX_PLATFORMS", "GLIBC_TUNABLES", "MALLOC_"))


def faults(**environment):
  """Whether freed memory was kept, and each turn's page faults but the first's."""
  bare = {key: value for key, value in os.environ.items() if not tunes(key)}
  done = subprocess.run(
    [sys.executable, "-c", FAULTS],
    capture_output=True,
    text=True,
    check=True,
    env={**bare, **environment},
  )
  kept, *turns = done.stdout.split()
  return kept == "True", [int(turn) for turn in turns]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_pages_are_used_again():
  kept, few = faults(JAX_PLATFORMS="cpu")
  left, many = faults(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="8")  # tuned by its user
  assert (kept, left) == (True, False)
  # A turn that fits what is freed takes no page; how soon one does is a matter of
  # timing: arrays freed late make the heap grow once more.
  assert min(many) > 10_000
  assert min(few) < min(many) / 10


def test_where_an_accelerator_may_be_the_device_malloc_is_left_alone(monkeypatch):
  for name in filter(tunes, list(os.environ)):
    monkeypatch.delenv(name)
  monkeypatch.setattr(host_memory.ctypes, "CDLL", None)  # would fail if it were asked
  for platforms in ("cuda,cpu", "tpu"):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert not host_memory.keep_freed()
  monkeypatch.delenv("JAX_PLATFORMS")  # any device that jax finds: a plugin's
  monkeypatch.setattr(
    host_memory.importlib.metadata, "entry_points", lambda group: [group]
  )
  assert not host_memory.keep_freed()
