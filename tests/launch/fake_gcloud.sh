#!/usr/bin/env bash
# Stands in for Google's gcloud: a slice of two hosts, which are folders of $CLOUD.
# It is preempted, once, while it runs, if $CLOUD/preempt is there.
set -uo pipefail
echo "$*" >> "$CLOUD/calls"
verb="$3 $4"
case $verb in
  'queued-resources describe')
    if [[ -f $CLOUD/state ]]; then cat "$CLOUD/state"; else
      echo 'ERROR: NOT_FOUND: no such resource' >&2
      exit 1
    fi ;;
  'queued-resources create')
    mkdir -p "$CLOUD/host0" "$CLOUD/host1"
    echo ACTIVE > "$CLOUD/state" ;;
  'queued-resources delete')
    rm -rf "$CLOUD/host0" "$CLOUD/host1" "$CLOUD/state" ;;
  'tpu-vm scp')
    for host in "$CLOUD"/host?; do cp "$5" "$host/${6#*:}"; done ;;
  'tpu-vm ssh')
    for last; do :; done
    if [[ $last == *'cat lowrank/status'* ]] && rm "$CLOUD/preempt" 2> /dev/null; then
      cat "$CLOUD"/host?/lowrank/pid | xargs -n 1 pkill -KILL --parent
      echo SUSPENDED > "$CLOUD/state"
      exit 255
    fi
    status=0
    for host in "$CLOUD"/host?; do
      (cd "$host" && HOME=$host bash -c "${last#--command=}") || status=$?
    done
    exit $status ;;
  *) exit 2 ;;
esac
