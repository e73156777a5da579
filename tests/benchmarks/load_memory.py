"""Peak host memory and time of loading a checkpoint, in a process of its own.

python -m tests.benchmarks.load_memory FOLDER [float32|bfloat16]
"""

import json
import pathlib
import re
import resource
import sys
import time

import jax

from raft_jax.hf import load as hf_load

GIB = 1 << 30


def main(folder: str, dtype: str = "bfloat16") -> None:
  config = hf_load.load_config(folder)
  jax.numpy.zeros(1).block_until_ready()  # the runtime itself
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  start = time.monotonic()
  leaves = jax.tree.leaves(hf_load.load_params(folder, config, dtype=dtype))
  seconds = time.monotonic() - start
  # Not ru_maxrss of getrusage: it begins with the peak of the process that started us.
  status = pathlib.Path("/proc/self/status").read_text()
  peak_kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
  measured = {
    "parameters": sum(leaf.size for leaf in leaves),
    "params_gib": sum(leaf.nbytes for leaf in leaves) / GIB,
    "before_gib": pages * resource.getpagesize() / GIB,
    "peak_gib": peak_kib * 1024 / GIB,
    "seconds": seconds,
  }
  print(json.dumps(measured))


if __name__ == "__main__":
  main(*sys.argv[1:])
