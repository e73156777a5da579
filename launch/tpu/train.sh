#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU slice:
# launch/tpu/train.sh NAME ZONE --config my.yaml [key=value ...]
# The repository is in ~/raft_jax on every host (gcloud ... scp --recurse --worker=all),
# installed once with `launch/install.sh tpu`; `output` is a folder that all of them
# mount. jax asks the machine's metadata for the other hosts.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
  "cd raft_jax && launch/again.sh .venv/bin/python -m raft_jax.train cluster.join=true $(printf '%q ' "$@")"
