#!/usr/bin/env bash
# RAFT end to end on a small real model, on a laptop: refine, train, evaluate, export,
# report. Installs into .venv first. Run it again to continue where it stopped.
# launch/quickstart.sh [CONFIG] [key=value ...]
# EXTRAS=refine,cuda for NVIDIA GPUs, refine,tpu for a TPU (default refine).
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh "${EXTRAS:-refine}"
config=configs/quickstart.yaml
if [ $# -gt 0 ] && [ -f "$1" ]; then config=$1; shift; fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
for stage in refine train evaluate export report; do
  echo "== $stage"
  .venv/bin/python -m "raft_jax.$stage" --config "$config" "$@"
done
