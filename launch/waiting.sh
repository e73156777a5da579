# To be sourced: ended PID waits for a child of this script and sets `status` to its exit
# status; a signal that is trapped ends bash's own `wait` early, and not this.
ended() {
  wait "$1"
  status=$?
  while kill -0 "$1" 2> /dev/null; do
    wait "$1"
    status=$?
  done
  # The child may have ended while the signal was handled; then bash still knows how.
  wait "$1" 2> /dev/null
  local known=$?
  [ "$known" -eq 127 ] || status=$known
}
