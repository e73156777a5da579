"""A mixture of experts on several meshes of 8 CPU devices, against one device.

`python -m tests.helpers.mesh_experts` prints, by mesh, the largest relative difference
of the values, the load and each gradient. Run by `experts_test` in a process of its
own, because the number of devices is fixed when jax starts.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.models import experts, sharding

MESHES = {"tensor": (1, 1, 8), "all": (2, 2, 2), "fsdp": (1, 8, 1)}
ROWS, LENGTH, WIDTH, INNER, COUNT = 8, 5, 16, 8, 8


def main() -> None:
  rng = np.random.default_rng(0)
  shapes = {
    "router": (COUNT, WIDTH),
    "gate": (COUNT, INNER, WIDTH),
    "up": (COUNT, INNER, WIDTH),
    "down": (COUNT, WIDTH, INNER),
    "router_bias": (COUNT,),
    "down_bias": (COUNT, WIDTH),
  }
  weights = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
  x, slope = (np.float32(rng.normal(size=(ROWS, LENGTH, WIDTH))) for _ in range(2))
  counted = rng.random((ROWS, LENGTH)) < 0.7

  def loss(x, weights):
    out, load = experts.mixture(
      x,
      weights,
      per_token=2,
      normalized=True,
      gating=lambda gate, up: jax.nn.silu(gate) * up,
      counted_BT=jnp.asarray(counted),
    )
    assert load is not None
    stacked = jax.tree.map(lambda leaf: leaf[None], load)
    return jnp.sum(out * slope) + experts.balance_loss(stacked), (out, load)

  def arrays(x, weights) -> dict[str, np.ndarray]:
    program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (x_gradient, gradients), (out, load) = program(x, weights)
    named = {f"gradient of {name}": leaf for name, leaf in gradients.items()}
    named |= {"out": out, "load": load.chosen_E, "gradient of x": x_gradient}
    return {name: np.asarray(leaf) for name, leaf in named.items()}

  want, differences = arrays(x, weights), {}
  for name, sizes in MESHES.items():
    mesh = sharding.make_mesh(*sizes)
    axes = {key: experts.AXES[key][1:] for key in weights}
    with jax.set_mesh(mesh):
      placed = jax.device_put(weights, sharding.tree(mesh, axes, weights))
      ours = arrays(jax.device_put(x, sharding.batch(mesh)), placed)
    differences[name] = {
      key: float(np.abs(ours[key] - leaf).max() / np.abs(leaf).max())
      for key, leaf in want.items()
    }
  print(json.dumps(differences))


if __name__ == "__main__":
  main()
