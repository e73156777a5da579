#!/usr/bin/env bash
# Checks and times raft_jax on the NVIDIA GPU that is here: the tests of losses, head,
# balancer and sampler, then one table of what a step reaches. Nothing is downloaded but
# packages. Takes about 10 minutes on one H100, installation not included (estimated).
# launch/gpu_check.sh [--small]
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh test,cuda
# The tests compare with float64; in TF32 products would differ.
JAX_DEFAULT_MATMUL_PRECISION=highest .venv/bin/python -m pytest \
  tests/losses_test.py tests/vocab_head_test.py tests/balance_test.py \
  tests/models/sampling_test.py
exec .venv/bin/python -m tests.benchmarks.accelerator "$@"
