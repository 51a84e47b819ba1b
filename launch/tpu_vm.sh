#!/usr/bin/env bash
# One training run on all workers of a Cloud TPU VM, one process per worker.
#
#   TPU_NAME=NAME ZONE=ZONE launch/tpu_vm.sh --config FILE --workdir DIR
#
# Everything after the script's name goes to `cached-tx train`, on every worker; JAX finds
# out by itself who is who. DIR must be a folder that every worker sees, such as a mounted
# bucket. When a worker is preempted or fails, all end; give the same command again (on a
# TPU made anew, if it is gone) and the run continues bit for bit.
#
# Variables:
#   TPU_NAME    name of the TPU VM (needed)
#   ZONE        its zone (needed)
#   PROJECT     its project (default: gcloud's own)
#   FOLDER      where the repository is on every worker (default: cached_tx)
#   CACHED_TX   the command there (default: .venv/bin/cached-tx)
#   HEARTBEAT   seconds until a silent process counts as dead (default: 100)
#   TRIES       how often to start again after a failure (default: 0)
set -u

: "${TPU_NAME:?set it to the name of the TPU VM}" "${ZONE:?set it to the zone of the TPU VM}"
if [ $# -eq 0 ]; then
  sed -n 's/^# \{0,1\}//; 2,19p' "$0" >&2
  exit 2
fi

gcloud=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || gcloud+=(--project="$PROJECT")

# Quoted once more, for the shell on the worker.
printf -v arguments ' %q' train --heartbeat="${HEARTBEAT:-100}" "$@"
printf -v folder %q "${FOLDER:-cached_tx}"
command="cd $folder && exec ${CACHED_TX:-.venv/bin/cached-tx}$arguments"

tries=${TRIES:-0}
while true; do
  "${gcloud[@]}" --command="$command"
  status=$?
  if [ "$status" -eq 0 ] || ((tries-- <= 0)); then
    exit "$status"
  fi
  echo "tpu_vm.sh: status $status; starting again in 30 seconds" >&2
  sleep 30
done
