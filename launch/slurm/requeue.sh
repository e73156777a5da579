#!/usr/bin/env bash
# Queues a job of Slurm again, unless somebody has cancelled it:
# launch/slurm/requeue.sh JOB
# `scancel` sends the same SIGTERM as a time limit, but ends the job first.
set -uo pipefail
if [ "$(squeue --noheader --jobs "$1" --format %T)" = RUNNING ]; then
  scontrol requeue "$1"
fi
