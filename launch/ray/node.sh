#!/usr/bin/env bash
# Makes a task of a Slurm step a node of the Ray cluster at RAY_ADDRESS, until the step
# ends. Task 0 is the cluster's head:
# srun launch/ray/node.sh
set -uo pipefail
ray=.venv-vllm/bin/ray
if [ "$SLURM_PROCID" = 0 ]; then
  exec "$ray" start --head --port="${RAY_ADDRESS##*:}" --block
fi
until "$ray" health-check --address="$RAY_ADDRESS" 2> /dev/null; do sleep 1; done
exec "$ray" start --address="$RAY_ADDRESS" --block
