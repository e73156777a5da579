#!/usr/bin/env bash
# Runs a command, and again while it ended in a way that a rerun mends: 75 (stopped by
# SIGTERM, all saved), 134 (jax lost another process) or another signal.
# launch/again.sh COMMAND [ARGUMENT ...]
# RESTARTS: at most so many (default 20). PAUSE: seconds between (default 10).
# A SIGTERM or Ctrl-C to this script is passed on as SIGTERM, and ends the loop; ON_STOP
# is a command to run after that, for schedulers that can start the job once more.
# What jax compiled is kept for the next start, in JAX_COMPILATION_CACHE_DIR.
set -uo pipefail
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/raft_jax}
. "$(dirname "$0")/waiting.sh"
stopped=
child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM INT
for ((left = ${RESTARTS:-20}; ; left--)); do
  "$@" &
  child=$!
  ended "$child"
  if [ -n "$stopped" ]; then
    ${ON_STOP:-}
    exit "$status"
  fi
  # 130 is somebody's Ctrl-C.
  if [ "$status" -ne 75 ] && { [ "$status" -le 128 ] || [ "$status" -eq 130 ]; }; then
    exit "$status"
  fi
  if [ "$left" -le 0 ]; then
    echo "error: ended with status $status, and no restart is left" >&2
    exit "$status"
  fi
  echo "ended with status $status; starting again, $((left - 1)) restarts left" >&2
  sleep "${PAUSE:-10}"
done
