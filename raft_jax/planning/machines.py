"""Machines to plan for: their makers' figures, and how to compile without them.

A topology is a word such as `a100_80:8` (GPUs), `a100_80:2x8` (nodes x GPUs), `v5e:4x4`
(a TPU slice) or `cpu:8` (this machine as 8 simulated devices, for tests).

Sources: NVIDIA's data sheets of A100 (312 TFLOP/s, NVLink 600 GB/s both ways) and H100
SXM (989 TFLOP/s dense, 900 GB/s), with one 200 or 400 Gbit/s network card per GPU as in
DGX A100 and DGX H100; Cloud TPU's pages on v5e, v5p and v6e. A slice smaller than a pod
has no wrap-around links, so a ring uses half of a chip's links.

Latencies of collectives are those by which NCCL 2.30 chooses its algorithm (ring with
protocol LL on NVLink, src/graph/tuning.cc) and, on TPUs, 1 µs a hop ("How to Scale Your
Model", part 3, jax-ml.github.io/scaling-book).
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.training import throughput


class Chip(NamedTuple):
  """One kind of device.

  Attributes:
    platform: "cuda", "tpu" or "cpu".
    memory: bytes that a program may use; on TPUs, as many as libtpu 0.0.52 allows.
    peak: FLOP/s of bfloat16 matrix products.
    bandwidth: bytes/s of the device's memory.
    link: bytes/s to the neighbouring devices, one way.
    network: bytes/s to other nodes, per device.
    sizes: topologies of increasing size.
  """

  platform: str
  memory: float
  peak: float
  bandwidth: float
  link: float
  network: float
  sizes: tuple[str, ...]


_GPUS = ("1", "2", "4", "8", "2x8", "4x8", "8x8")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
_GIB = 2.0**30
_PEAK = throughput.PEAK_FLOPS

CHIPS = {
  "a100_40": Chip("cuda", 42331013120, _PEAK["A100"], 1555e9, 300e9, 25e9, _GPUS),
  "a100_80": Chip("cuda", 85100068864, _PEAK["A100"], 2039e9, 300e9, 25e9, _GPUS),
  "h100": Chip("cuda", 84942979072, _PEAK["H100"], 3350e9, 450e9, 50e9, _GPUS),
  "v5e": Chip("tpu", 15.75 * _GIB, _PEAK["TPU v5 lite"], 819e9, 100e9, 0, _SQUARES),
  "v5p": Chip("tpu", 95.73 * _GIB, _PEAK["TPU v5"], 2765e9, 300e9, 0, _CUBES),
  "v6e": Chip("tpu", 31.24 * _GIB, _PEAK["TPU v6 lite"], 1638e9, 200e9, 0, _SQUARES),
  # No machine in particular: round numbers, for tests.
  "cpu": Chip("cpu", 16 * _GIB, 1e12, 100e9, 10e9, 0, ("1", "2", "4", "8", "16")),
}

LATENCIES = {"cuda": (6.6e-6, 0.6e-6), "tpu": (0.0, 1e-6), "cpu": (10e-6, 1e-6)}
"""By platform: seconds of any collective, and of each step of its ring."""


class Machine(NamedTuple):
  """Devices of one kind, connected."""

  topology: str
  kind: str
  shape: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def devices(self) -> int:
    return math.prod(self.shape)

  @property
  def link(self) -> float:
    """Bytes/s that a device sends in a ring over all; a node shares its network."""
    if self.chip.platform != "cuda" or len(self.shape) == 1:
      return self.chip.link
    return min(self.chip.link, self.chip.network * self.shape[1])

  def latency(self, kind: str, group: int) -> float:
    """Seconds of a collective that sends next to nothing, within a node or slice.

    Args:
      kind: one of `hlo_cost.KINDS`.
      group: devices that take part.
    """
    steps = {"all-reduce": 2 * (group - 1), "collective-permute": 1}
    base, step = LATENCIES[self.chip.platform]
    return base + steps.get(kind, group - 1) * step

  def usable(self, share: float) -> float:
    """Bytes of a device that a program may use; JAX takes `share` of a GPU's memory."""
    return self.chip.memory * (share if self.chip.platform == "cuda" else 1.0)


def parse(topology: str) -> Machine:
  """The machine that a word such as `v5e:4x4` names.

  Raises:
    errors.UserError: there is no such machine.
  """
  kind, _, size = topology.partition(":")
  if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){0,2}", size):
    raise errors.UserError(
      f"--topology {topology}: write KIND:SIZE with a kind of {', '.join(CHIPS)}; e.g. "
      "a100_80:8, a100_80:2x8 (nodes x GPUs), v5e:4x4, v5p:2x2x2"
    )
  chip, shape = CHIPS[kind], tuple(int(part) for part in size.split("x"))
  gpus = chip.platform == "cuda" and len(shape) <= 2 and 0 < shape[-1] <= 8 and shape[0]
  cpus = chip.platform == "cpu" and len(shape) == 1 and 0 < shape[0] <= 64
  if not (gpus or cpus or size in chip.sizes):
    raise errors.UserError(
      f"--topology {topology}: there is no {kind} of this size; e.g. "
      f"{', '.join(f'{kind}:{known}' for known in chip.sizes)}"
    )
  return Machine(topology, kind, shape)


def ladder(kind: str) -> list[Machine]:
  """The machines of a kind, the smallest first."""
  return [parse(f"{kind}:{size}") for size in CHIPS[kind].sizes]


# --- Without the machine --------------------------------------------------------------

PACKAGES = {
  "cuda": ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"),
  "tpu": ("libtpu",),
  "cpu": (),
}
"""Modules that compiling for a platform needs besides jax, from the extra `plan`."""


def environment(machine: Machine) -> dict[str, str]:
  """Environment of a process that compiles for a machine.

  jax itself must run on the CPU, or it would look for the device. libtpu would query
  where it runs, and take a lock that only one process may hold.
  """
  common = {
    "JAX_PLATFORMS": "cpu",
    # Cached programs have no HLO text, and new entries would fill the disk.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  if machine.chip.platform == "cpu":
    flag = f"--xla_force_host_platform_device_count={machine.devices}"
    return {**common, "XLA_FLAGS": flag}
  return {
    **common,
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any value of the right form
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }


def devices(machine: Machine) -> list[Any]:
  """The machine's devices to compile for, in a process with `environment`."""
  import jax
  from jax.experimental import topologies

  platform = machine.chip.platform
  if platform == "cpu":
    return jax.devices()
  if platform == "tpu":
    topology = topologies.get_topology_desc(machine.topology, platform="tpu")
  else:
    nodes, gpus = (1, *machine.shape)[-2:]
    topology = topologies.get_topology_desc(
      platform="cuda",
      topology=f"1x{nodes}x{gpus}",
      target_config=_gpu_target(machine.kind),
    )
  return list(topology.devices)


def pretend_cudnn(machine: Machine) -> None:
  """Lets jax trace cuDNN's attention in a process without cuDNN and without a GPU.

  jax 0.10.2 checks both in private functions, though compiling needs neither.
  """
  from jax._src.cudnn import fused_attention_stablehlo as attention

  capability = 9.0 if machine.kind == "h100" else 8.0
  attention.check_cudnn_version = lambda: 91000
  attention.check_compute_capability = lambda least: float(least) <= capability


class _Gpu(NamedTuple):
  """The properties of a GPU that XLA's compiler needs, besides its memory."""

  name: str
  cores: int
  units: int  # float32 units of a core
  shared: int  # bytes of shared memory of a core
  cache: int  # bytes, second level
  clock: float  # GHz
  capability: int


_A100 = _Gpu("NVIDIA A100-SXM4", 108, 64, 167936, 41943040, 1.41, 8)
_H100 = _Gpu("NVIDIA H100 80GB HBM3", 132, 128, 233472, 52428800, 1.98, 9)


def _gpu_target(kind: str) -> str:
  """The text of stream_executor's GpuTargetConfigProto for a GPU.

  openxla/xla keeps such files in xla/backends/gpu/target_config/specs.
  """
  gpu, chip = _H100 if kind == "h100" else _A100, CHIPS[kind]
  feature = " feature_extension: ACCELERATED_FEATURES" if gpu.capability == 9 else ""
  fields = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_core": gpu.shared,
    "shared_memory_per_block_optin": gpu.shared - 1024,
    "threads_per_core_limit": 2048,
    "core_count": gpu.cores,
    "fpus_per_core": gpu.units,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "memory_bandwidth": int(chip.bandwidth),
    "device_memory_size": int(chip.memory),
    "l2_cache_size": gpu.cache,
    "clock_rate_ghz": gpu.clock,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
  }
  lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
  return (
    f"gpu_device_info {{\n{lines}\n"
    f"  cuda_compute_capability {{ major: {gpu.capability}{feature} }}\n}}\n"
    'platform_name: "CUDA"\n'
    "dnn_version_info { major: 9 minor: 10 }\n"
    "runtime_version { major: 12 minor: 9 }\n"
    f'device_description_str: "{gpu.name}"\n'
  )
