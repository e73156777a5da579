#!/usr/bin/env bash
# Installs into .venv and runs lint, type checks and tests. Arguments go to pytest.
# `launch/test.sh -m slow` runs the tests that take minutes. It also installs the
# compilers for GPUs and TPUs that are absent, the libraries of all trackers, Go and
# Gemma 3 270M.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=test
# Tests of one file share compiled programs, so each file stays in one of two processes.
# Slow tests need the machine for themselves.
processes=(-n 2 --dist loadfile)
[[ " $* " == *slow* ]] && extras=test,plan,trackers,modelfiles processes=()
launch/install.sh "$extras"
# Fast tests mostly compile small programs; slow tests run large ones.
if [[ " $* " != *slow* ]]; then
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1
  # Without fusion emitters, XLA compiles a training step in a quarter of the time. That of
  # jax 0.12 ends the process at this flag, which it does not know.
  flags="--xla_cpu_use_fusion_emitters=false ${XLA_FLAGS:-}"
  if XLA_FLAGS=$flags .venv/bin/python -c \
    'from jaxlib import xla_client; xla_client.CompileOptions()' 2> /dev/null; then
    export XLA_FLAGS=$flags
  fi
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false JAX_PLATFORMS=cpu
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "${processes[@]}" "$@"
