#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU slice:
# launch/tpu/train.sh NAME ZONE --config my.yaml [key=value ...]
# Copy the repository to ~/raft_jax on every host (gcloud ... scp --recurse --worker=all)
# and install it once with `launch/install.sh tpu`. All hosts must mount the folder
# `output`. JAX reads the other hosts from the machine's metadata.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
  "cd raft_jax && launch/again.sh .venv/bin/python -m raft_jax.train cluster.join=true $(printf '%q ' "$@")"
