# Source this file. `ended PID` waits for a child of this script and sets `status` to its
# exit status. Unlike bash's own `wait`, it continues after a trapped signal.
ended() {
  wait "$1"
  status=$?
  while kill -0 "$1" 2> /dev/null; do
    wait "$1"
    status=$?
  done
  # If the child ended while the signal was handled, bash still knows its status.
  wait "$1" 2> /dev/null
  local known=$?
  [ "$known" -eq 127 ] || status=$known
}
