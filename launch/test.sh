#!/usr/bin/env bash
# Installs into .venv and runs lint, types and tests. Arguments go to pytest:
# launch/test.sh -m slow runs the checks that take minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
