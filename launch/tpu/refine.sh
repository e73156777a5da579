#!/usr/bin/env bash
# Refinement with the built-in engine, one worker on each of COUNT single TPU machines
# NAME-0, NAME-1, ..., prepared as for train.sh:
# launch/tpu/refine.sh NAME COUNT ZONE --config my.yaml [key=value ...]
# When all workers are done, the same command with COUNT 1 merges on NAME-0.
set -euo pipefail
name=$1 count=$2 zone=$3
shift 3
workers=()
for ((index = 0; index < count; index++)); do
  share=
  [ "$count" -gt 1 ] && share="--num-workers $count --worker $index"
  gcloud compute tpus tpu-vm ssh "$name-$index" --zone "$zone" --command \
    "cd raft_jax && launch/again.sh .venv/bin/python -m raft_jax.refine $(printf '%q ' "$@") $share" &
  workers+=($!)
done
for worker in "${workers[@]}"; do
  wait "$worker"
done
