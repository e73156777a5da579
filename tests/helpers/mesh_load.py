"""Loads a folder onto 8 CPU devices.

`python -m tests.helpers.mesh_load FOLDER OUT.npz`.

Run by `hf_test` in a process of its own, because the number of devices is fixed when
jax starts.
"""

import sys

import jax
import numpy as np
from flax import traverse_util

from raft_jax.hf import load as hf_load
from raft_jax.models import param_sharding, sharding, transformer


def main(folder: str, out: str) -> None:
  config = hf_load.load_config(folder)
  mesh = sharding.make_mesh(1, 4, 2)
  places = sharding.tree(mesh, param_sharding.axes(config), transformer.shapes(config))
  params = hf_load.load_params(folder, config, shardings=places)
  assert all(
    jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y, params, places))
  )
  np.savez(out, **traverse_util.flatten_dict(params, sep="/"))


if __name__ == "__main__":
  main(*sys.argv[1:])
