"""Two training steps on several meshes of 8 CPU devices.

`python -m tests.helpers.mesh_steps`.

Run by `sharding_test` in a process of its own, because the number of devices is fixed
when jax starts. Writes what each mesh arrived at to the .npz file that it is given; the
names of meshes after it leave the others out. `hosts_test` runs it as two processes.

The model is mild on purpose: Adam's first step has the sign of the gradient, however
small, and in a model that is steep round-off grows to per cents within two steps.
"""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from raft_jax import balance
from raft_jax.data import batching, packing
from raft_jax.distillation import objective, step
from raft_jax.models import (
  hybrid,
  lora,
  partition,
  quantised_base,
  rotary,
  sharding,
  transformer,
)
from raft_jax.runtime import distributed
from raft_jax.training import optim, run_plan
from raft_jax.training import programs as programs_lib
from tests.helpers import packed_rows, tiny_decoder, tiny_step

# 8 divides every width but the feed-forward's 44, which then stays whole; a head of 8
# spread over tensor = 8 with 4 heads is cut in two.
DECODER = dataclasses.replace(
  tiny_decoder.CONFIG,
  vocab_size=96,
  n_layers=2,
  n_kv_heads=4,
  d_ff=44,
  max_positions=64,
)
ROWS, STEPS, RATE = 8, 2, 1e-2
ONE = "one device"
ADAPTERS, ONE_ADAPTERS = "all, adapters", "one device, adapters"
MESHES = {
  ONE: ((1, 1, 1), 1),
  "data": ((8, 1, 1), 1),
  "fsdp": ((1, 8, 1), 1),
  "tensor": ((1, 1, 8), 1),
  "all": ((2, 2, 2), 1),
  "all, batch in two parts": ((2, 2, 2), 2),
  "all, layers apart": ((2, 2, 2), 1),
  "fsdp, rollouts over 4": ((1, 8, 1), 1),
  "fsdp, rollouts over 8, layers apart": ((1, 8, 1), 1),
  "all, rollouts over 4, layers apart": ((2, 2, 2), 1),
  "packed": ((2, 1, 4), 1),
  "packed, batch in two parts": ((2, 1, 4), 2),
}
"""Name: sizes of the axes, micro-batches. Layers apart: rollouts as on GPUs. Rollouts
over n: `rollout.tensor`. Packed: `train.packing`."""
ADAPTER_MESHES = {
  ONE_ADAPTERS: ((1, 1, 1), 1),
  ADAPTERS: ((2, 2, 2), 1),
  f"{ADAPTERS}, layers apart": ((2, 2, 2), 1),
}
"""The same, to train adapters of a frozen model."""
EXPERTS = dataclasses.replace(
  DECODER, n_experts=8, experts_per_token=2, experts_normalized=True, d_ff=16
)
ONE_EXPERTS = "one device, experts"
EXPERT_MESHES = {
  ONE_EXPERTS: ((1, 1, 1), 1),
  "data, experts": ((8, 1, 1), 1),
  "fsdp, experts": ((1, 8, 1), 1),
  "tensor, experts": ((1, 1, 8), 1),
  "all, experts": ((2, 2, 2), 1),
  "all, experts, layers apart": ((2, 2, 2), 1),
  "fsdp, experts, rollouts over 4": ((1, 8, 1), 1),
}
"""The same, for a mixture of experts; run only if they are named."""
# Of nf4, 2 blocks are spread over 2 devices, and 3 stay whole.
WIDE = dataclasses.replace(DECODER, d_model=128, head_dim=16, d_ff=192)
QUANTISED_MESHES = {
  form: {
    f"one device, {form}": ((1, 1, 1), 1),
    f"all, {form}": ((2, 2, 2), 1),
    f"all, {form}, layers apart": ((2, 2, 2), 1),
    f"all, {form}, rollouts over 4": ((2, 2, 2), 1),
  }
  for form in ("int8", "nf4")
}
"""The same, to train adapters of a quantised model; run only if they are named."""
# Kinds of layers as in Gemma 4 E2B; of each, as many as a scan and a rest need.
KINDS = dataclasses.replace(
  DECODER,
  n_layers=6,
  windows=(5, 0) * 3,
  global_attention=hybrid.GlobalAttention(
    (1, 3, 5), n_kv_heads=2, head_dim=16, rope=rotary.Rope(1e6)
  ),
  kv_sharing=hybrid.KvSharing(first=3, d_ff=80),
  per_layer_inputs=8,
)
KIND_MESHES = {
  "one device, kinds": ((1, 1, 1), 1),
  "all, kinds": ((2, 2, 2), 1),
  "all, kinds, layers apart": ((2, 2, 2), 1),
}
"""The same, for layers of several kinds; run only if they are named."""


ROLLOUTS = programs_lib.Rollouts(
  share=1.0, seed=0, max_new_tokens=6, temperature=1.0, top_p=0.9, pad_id=5
)


def make_settings(
  decoder: transformer.DecoderConfig, micro_batches: int, *, apart: bool
) -> objective.Settings:
  return tiny_step.SETTINGS._replace(
    decoder=decoder,
    micro_batches=micro_batches,
    rollout_unroll=0 if apart else 1,
    top_k=16,
  )


def make_batch(seed: int) -> batching.Batch:
  rng = np.random.default_rng(seed)
  segments = []
  for width in (7, 6, 11):
    length = rng.integers(2, width + 1, ROWS).astype(np.int32)
    tokens = rng.integers(6, 96, (ROWS, width)).astype(np.int32)
    segments += [np.where(np.arange(width) < length[:, None], tokens, 5), length]
  return batching.Batch(*segments, np.arange(ROWS, dtype=np.int32))


def base_params(
  decoder: transformer.DecoderConfig = DECODER,
) -> transformer.Params:
  """Random parameters, the embedding so large that distributions have a shape."""
  params = transformer.init(jax.random.key(0), decoder)
  params["embed"] *= 10
  return jax.tree.map(np.asarray, params)


def flat(name: str, tree) -> dict[str, np.ndarray]:
  return {
    f"{name}{jax.tree_util.keystr(path)}": np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def adapter_split(
  decoder: transformer.DecoderConfig = DECODER,
) -> partition.Split:
  """Adapters that start away from 0, so that both halves have a gradient."""
  split = lora.split(decoder, lora.KERNELS, rank=4, alpha=8.0, key=jax.random.key(0))
  rng = np.random.default_rng(0)
  start = jax.tree.map(
    lambda leaf: np.float32(0.2 * rng.normal(size=leaf.shape)), split.shapes
  )
  return split._replace(start=lambda base: start)


def steps(
  sizes: tuple[int, int, int],
  micro_batches: int,
  split: partition.Split,
  *,
  apart: bool,
  tensor: int | None = None,
  decoder: transformer.DecoderConfig = DECODER,
  form: str | None = None,
  packs: bool = False,
) -> dict[str, np.ndarray]:
  """Trains as the loop does; what came out, by name."""
  if sizes == (1, 1, 1):
    one = np.array(jax.devices()[:1]).reshape(sizes)
    mesh = Mesh(one, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  else:
    mesh = sharding.make_mesh(*sizes)
  balancer = balance.balance_by_ema()
  optimizer = optim.chain(
    balancer, optim.warmup_cosine(RATE, STEPS), weight_decay=0.01, clip=1.0
  )
  _, shardings = run_plan.state_shardings(mesh, split, optimizer)
  programs = programs_lib.compile_programs(
    make_settings(decoder, micro_batches, apart=apart),
    ROLLOUTS,
    optimizer=optimizer,
    balancer=balancer,
    state_shardings=shardings,
    teacher="base",
    rollout_mesh=sharding.decode_mesh(mesh, tensor) if tensor else None,
  )
  out = {}
  with jax.set_mesh(mesh):
    placed = run_plan.param_shardings(mesh, decoder, form)
    base = quantised_base.quantise(base_params(decoder), decoder, form)
    teacher = jax.device_put(base, placed)
    frozen = split.freeze(teacher) if split.freeze else {}
    reference = step.ReferenceParams(frozen, teacher, None)
    params = split.start(base_params(decoder))
    state = jax.device_put(
      step.TrainState(jnp.int32(0), params, optimizer.init(params)), shardings
    )
    for index in range(STEPS):
      rows = make_batch(index)
      if packs:
        groups = packing.Groups(sizes[0] * sizes[1], micro_batches)
        rows = packed_rows.packed(rows, ROLLOUTS.max_new_tokens, groups, per_lane=2)
      batch = sharding.spread(sharding.batch(mesh), rows)
      state, dispatched = programs_lib.run_step(
        programs, state, reference, batch, index
      )
      # jax 0.10.2 on CPU locks up when many collectives are queued.
      jax.block_until_ready(state)
      assert dispatched.trajectory is not None
      trajectory = dispatched.trajectory._asdict()
      out |= flat(f"rollout {index} ", distributed.to_host(trajectory))
      out |= flat(f"values {index} ", distributed.to_host(dispatched.metrics))
      if index == 0:
        # A tenth of the clipped gradient.
        out |= flat("first ", distributed.to_host(state.opt_state["adamw"][0].mu))
    out |= flat("params ", distributed.to_host(state.params))
  shards = jax.tree.map(
    lambda leaf: np.array(leaf.sharding.shard_shape(leaf.shape)),
    {"params": state.params, "adam": state.opt_state["adamw"][0].mu},
  )
  return out | flat("shards ", shards)


def chosen(meshes: dict, names: list[str]) -> list:
  return [(name, how) for name, how in meshes.items() if not names or name in names]


def main() -> None:
  distributed.join(
    wanted=None, coordinator=None, processes=None, index=None, heartbeat_s=60
  )
  path, *names = sys.argv[1:]
  out = flat("start ", base_params())
  out |= flat("adapters at start ", adapter_split().start({}))
  wide = adapter_split(WIDE)
  for meshes, split, decoder, form in (
    (MESHES, partition.everything(DECODER), DECODER, None),
    (ADAPTER_MESHES, adapter_split(), DECODER, None),
    (EXPERT_MESHES if names else {}, partition.everything(EXPERTS), EXPERTS, None),
    (KIND_MESHES if names else {}, partition.everything(KINDS), KINDS, None),
    (QUANTISED_MESHES["int8"] if names else {}, wide, WIDE, "int8"),
    (QUANTISED_MESHES["nf4"] if names else {}, wide, WIDE, "nf4"),
  ):
    for name, (sizes, micro_batches) in chosen(meshes, names):
      arrived = steps(
        sizes,
        micro_batches,
        split,
        apart="layers apart" in name,
        tensor=int(over[1]) if (over := re.search(r"over (\d)", name)) else None,
        decoder=decoder,
        form=form,
        packs="packed" in name,
      )
      out |= {f"{name}: {key}": value for key, value in arrived.items()}
  if distributed.is_primary():
    np.savez(path, **out)


if __name__ == "__main__":
  main()
