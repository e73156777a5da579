#!/usr/bin/env bash
# Runs a stage in N processes on this machine, with restarts (again.sh):
# launch/local_multiprocess.sh train|refine N --config FILE [key=value ...]
# `train` is one run over all processes. `refine` gives each process a share of the rows
# and then merges.
# PYTHON names the interpreter (default .venv/bin/python). If there are N GPUs (those of
# CUDA_VISIBLE_DEVICES, if set), each process gets one. To try `train` on a CPU:
# XLA_FLAGS=--xla_force_host_platform_device_count=4 launch/local_multiprocess.sh train 2 ...
set -uo pipefail
if [ $# -lt 2 ] || [[ ! $1 =~ ^(train|refine)$ ]] || [[ ! $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 train|refine N --config FILE [key=value ...]" >&2
  exit 2
fi
if [ -z "${ONE_ATTEMPT:-}" ]; then
  export ONE_ATTEMPT=1
  exec "$(dirname "$0")/again.sh" "$0" "$@"
fi
. "$(dirname "$0")/waiting.sh"
stage=$1 count=$2
shift 2
python=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"
else
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null)
fi
if [ "$stage" = train ]; then
  # Each attempt has another port, because the last one may not be free yet.
  export JAX_COORDINATOR_ADDRESS=localhost:$((20000 + RANDOM % 20000))
  export JAX_NUM_PROCESSES=$count
fi
children=()
trap 'kill -TERM "${children[@]}" 2> /dev/null' TERM INT
for ((index = 0; index < count; index++)); do
  [ "${#gpus[@]}" -ge "$count" ] && export CUDA_VISIBLE_DEVICES=${gpus[index]}
  if [ "$stage" = train ]; then
    JAX_PROCESS_ID=$index "$python" -m raft_jax.train "$@" &
  else
    "$python" -m raft_jax.refine "$@" --num-workers "$count" --worker "$index" &
  fi
  children+=($!)
done
ends=" "
for child in "${children[@]}"; do
  ended "$child"
  ends+="$status "
done
# A signal to one process outranks the errors of those that lost it.
for status in 130 143 137 75 2 134 $(tr ' ' '\n' <<< "$ends" | sort -rn); do
  [[ $ends == *" $status "* ]] && break
done
if [ "$stage" = refine ] && [ "$status" -eq 0 ]; then
  "$python" -m raft_jax.refine "$@"
  status=$?
fi
exit "$status"
