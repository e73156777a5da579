"""Loads a folder onto 8 CPU devices.

`python -m tests.helpers.mesh_load FOLDER OUT.npz`.

Run by `load_test` in a process of its own, because the number of devices is fixed when
jax starts. Names in the file begin with the form of the kernels: `float/embed`,
`int8/layers/q/codes`.
"""

import sys

import jax
import numpy as np

from raft_jax.hf import load as hf_load
from raft_jax.models import quantised_base, sharding


def main(folder: str, out: str) -> None:
  config = hf_load.load_config(folder)
  mesh = sharding.make_mesh(1, 4, 2)
  arrays = {}
  for form in (None, "int8", "nf4"):
    places = sharding.tree(
      mesh, quantised_base.axes(config, form), quantised_base.shapes(config, form)
    )
    params = hf_load.load_params(folder, config, shardings=places, form=form)
    assert all(
      jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y, params, places))
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      arrays[f"{form or 'float'}/{name}"] = np.asarray(leaf)
  np.savez(out, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
