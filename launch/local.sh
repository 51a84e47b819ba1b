#!/usr/bin/env bash
# Several processes on this machine, as on several: for trying things out, and tests.
#
#   launch/local.sh N DEVICES COMMAND...
#
# Starts COMMAND N times, each with DEVICES CPU devices, joined over loopback. Each line
# that a process says begins with its number. When a process ends with an error, or is
# killed, the others are killed too, and the first such status is returned. SIGTERM and
# SIGINT go on to every process; they then have 60 seconds to save and leave.
#
# JAX_PLATFORMS (default cpu) chooses the devices; DEVICES counts CPU devices only.
set -u -m # -m: every process is a group of its own, with whatever it starts

if [ $# -lt 3 ]; then
  sed -n 's/^# \{0,1\}//; 2,11p' "$0" >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
for number in "$processes" "$devices"; do
  case $number in
    '' | 0* | *[!0-9]*)
      echo "local.sh: N and DEVICES are numbers from 1 on, not '$number'" >&2
      exit 2
      ;;
  esac
done

free_port() { # 60 tries; a closed port refuses the connection
  local port
  for _ in {1..60}; do
    port=$((20000 + RANDOM % 12000))
    (: </dev/tcp/127.0.0.1/$port) 2>/dev/null || break
  done
  echo "$port"
}

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=$devices
export NUM_PROCESSES=$processes COORDINATOR_ADDRESS=127.0.0.1:$(free_port)

folder=$(mktemp -d)
groups=()

to_all() {
  local group
  for group in ${groups[@]+"${groups[@]}"}; do
    kill "-$1" -- "-$group" 2>/dev/null
  done
}

# One of the processes, its lines numbered. Runs in a process of its own.
one() {
  local number=$1 status
  shift
  set +m # with what it starts it stays one group
  trap : TERM INT USR1 # they are for the command, whose status is awaited
  mkfifo "$folder/out$number" "$folder/err$number"
  (trap '' TERM INT && exec sed -u "s/^/[$number] /" <"$folder/out$number") &
  (trap '' TERM INT && exec sed -u "s/^/[$number] /" <"$folder/err$number" >&2) &
  PROCESS_ID=$number "$@" >"$folder/out$number" 2>"$folder/err$number"
  status=$?
  if [ "$status" -ne 0 ]; then
    (set -C && echo "$status" >"$folder/first") 2>/dev/null
    kill -USR1 $$ # the script
  fi
  wait # for the last lines
}

# 143: a process was asked to leave, and so are the others, which need time to save.
ended() {
  if [ "$(cat "$folder/first")" -eq 143 ]; then
    leave
  else
    to_all KILL
  fi
}

leave() {
  [ -z "${asked:-}" ] || return
  asked=yes
  to_all "${1:-TERM}"
  {
    for _ in {1..60}; do
      sleep 1
      kill -0 $$ 2>/dev/null || exit # everything has ended
    done
    to_all KILL
  } >/dev/null 2>&1 &
}

trap ended USR1
trap 'leave TERM' TERM
trap 'leave INT' INT
trap 'to_all KILL; rm -rf "$folder"' EXIT

for ((i = 0; i < processes; i++)); do
  one "$i" "$@" &
  groups+=($!)
done
for group in "${groups[@]}"; do
  while kill -0 "$group" 2>/dev/null; do
    wait "$group" 2>/dev/null # returns early when a signal comes
  done
done
[ ! -e "$folder/first" ] || exit "$(cat "$folder/first")"
