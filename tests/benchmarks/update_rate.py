"""The update's share of the rate at which this machine multiplies its matrices.

`python -m tests.benchmarks.update_rate FOLDER`

On the first batch of the quickstart's questions, with SFT. An update needs at least
three products of every kernel (the output, and the gradients of input and kernel) with
the batch's padded tokens, and as many of the output embedding with the answers' tokens.
Products and updates take turns. FOLDER gets what a run claims of its output.
"""

import collections
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax.config import load as config_load
from raft_jax.distillation import sequences
from raft_jax.models import sharding
from raft_jax.training import run_inputs
from tests.benchmarks import started_run

ROUNDS = 5
PRODUCTS = 3


def seconds_of(work: Callable[[], Any]) -> float:
  began = time.perf_counter()
  jax.block_until_ready(work())
  return time.perf_counter() - began


def product(inputs: int, outputs: int, tokens: int) -> Callable[[], jax.Array]:
  """A compiled product of tokens and a kernel."""
  x, kernel = jnp.ones((tokens, inputs)), jnp.ones((outputs, inputs))
  multiply = jax.jit(lambda x, kernel: jnp.einsum("mi,oi->mo", x, kernel))
  jax.block_until_ready(multiply(x, kernel))
  return lambda: multiply(x, kernel)


def main(folder: str, *settings: str) -> None:
  overrides = ["method=sft", "data.answers=original", f"output={folder}", *settings]
  config = config_load.load("configs/quickstart.yaml", overrides)
  plan, inputs = run_inputs.prepare(config)
  _, state = started_run.begin(config, plan, inputs)
  with jax.set_mesh(plan.mesh):
    batch = sharding.spread(sharding.batch(plan.mesh), inputs.dataset[0])
    rows, answer_width = batch.answer_BA.shape
    tokens = rows * (batch.prompt_BP.shape[1] + answer_width)
    products = collections.Counter(
      {(plan.decoder.d_model, plan.decoder.vocab_size, rows * answer_width): PRODUCTS}
    )
    for leaf in jax.tree.leaves(state.params["layers"]):
      if leaf.ndim == 3:
        layers, outputs, width = leaf.shape
        products[width, outputs, tokens] += PRODUCTS * layers
    timed = {shape: product(*shape) for shape in products}
    shares = []
    for number in range(ROUNDS + 1):
      least = sum(seconds_of(timed[shape]) * n for shape, n in products.items())
      no_rollout = sequences.empty_trajectory(rows)
      began = time.perf_counter()
      state, metrics = plan.programs.update(
        state, {}, batch, no_rollout, None, gradient_stats=False
      )
      jax.block_until_ready(metrics)
      took = time.perf_counter() - began
      if number:  # the first compiles
        shares.append(least / took)
        print(f"products {least:.2f} s, update {took:.2f} s: {least / took:.0%}")
  print(
    f"{tokens} tokens: the products alone take {statistics.median(shares):.0%} of the"
    f" update's time (median of {ROUNDS}; {min(shares):.0%} to {max(shares):.0%})"
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
