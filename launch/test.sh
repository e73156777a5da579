#!/usr/bin/env bash
# Installs into .venv and runs lint, types and tests. Arguments go to pytest:
# `launch/test.sh -m slow` runs the checks that take minutes, and installs what compiles
# for GPUs and TPUs that are absent.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=test
# A file's tests share what they compile, so that files are what two processes share out.
# Slow tests want the machine for themselves.
processes=(-n 2 --dist loadfile)
[[ " $* " == *slow* ]] && extras=test,plan processes=()
launch/install.sh "$extras"
# Most of the time goes into compiling small programs; slow tests run large ones.
[[ " $* " == *slow* ]] || export JAX_DISABLE_MOST_OPTIMIZATIONS=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false JAX_PLATFORMS=cpu
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "${processes[@]}" "$@"
