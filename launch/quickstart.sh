#!/usr/bin/env bash
# RAFT end to end on a small real model, on a laptop: refine, train, evaluate, export,
# report. Installs into .venv first. Run it again to continue where it stopped.
# launch/quickstart.sh [CONFIG] [key=value ...]
# Without CONFIG it also trains and evaluates plain SFT on the same questions, in a folder
# beside the first, and the report compares the two.
# EXTRAS=refine,eval,cuda for NVIDIA GPUs, refine,eval,tpu for a TPU (default refine,eval).
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh "${EXTRAS:-refine,eval}"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false

stage() {  # NAME [key=value ...]
  echo "== $1"
  .venv/bin/python -m "raft_jax.$1" --config "$config" "${@:2}"
}

if [ $# -gt 0 ] && [ -f "$1" ]; then
  config=$1
  for name in refine train evaluate export report; do stage "$name" "${@:2}"; done
  exit
fi

config=configs/quickstart.yaml
output=runs/quickstart
for setting in "$@"; do
  case $setting in output=*) output=${setting#output=} ;; esac
done
for name in refine train evaluate export; do stage "$name" "$@"; done
echo "== plain SFT, at a learning rate with which it fits the questions about as well"
sft=(method=sft data.answers=original train.learning_rate=2e-5 "output=$output-sft"
  "evaluate.journal=$output/evaluation/journal.jsonl")  # with the base model's scores
for name in train evaluate; do stage "$name" "$@" "${sft[@]}"; done
stage report "$@" "report.sft=$output-sft"
