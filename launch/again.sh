#!/usr/bin/env bash
# Runs a command, and runs it again if it ended in a way that a rerun may mend: 75
# (stopped by SIGTERM with all saved, or a temporary failure), 134 (JAX lost another
# process) or another signal.
# launch/again.sh COMMAND [ARGUMENT ...]
# RESTARTS: largest number of restarts (default 20). PAUSE: seconds between (default 10).
# A SIGTERM or Ctrl-C to this script reaches the command as SIGTERM and ends the loop.
# PASS_ON: a command that forwards the signal where the child does not. ON_STOP: a command
# to run at the end, for schedulers that can start the job once more.
set -uo pipefail
. "$(dirname "$0")/waiting.sh"
stopped=
child=
stop() {
  stopped=1
  if [ -n "${PASS_ON:-}" ]; then
    $PASS_ON
  elif [ -n "$child" ]; then
    kill -TERM "$child" 2> /dev/null
  fi
}
trap stop TERM INT
leave_if_stopped() {
  [ -n "$stopped" ] || return
  ${ON_STOP:-}
  exit "$status"
}
for ((left = ${RESTARTS:-20}; ; left--)); do
  "$@" &
  child=$!
  ended "$child"
  child=
  leave_if_stopped
  # 130: somebody pressed Ctrl-C.
  if [ "$status" -ne 75 ] && { [ "$status" -le 128 ] || [ "$status" -eq 130 ]; }; then
    exit "$status"
  fi
  if [ "$left" -le 0 ]; then
    echo "error: ended with status $status, and no restart is left" >&2
    exit "$status"
  fi
  echo "ended with status $status; starting again, $((left - 1)) restarts left" >&2
  for ((second = 0; second < ${PAUSE:-10}; second++)); do
    leave_if_stopped
    sleep 1
  done
  leave_if_stopped
done
