#!/usr/bin/env bash
# Runs a command on all hosts of a Cloud TPU slice, and again after a preemption.
#
#   ZONE=us-west4-a TYPE=v5litepod-16 launch/tpu_pod.sh NAME \
#     python -m train.main --config=configs/nested.py --workdir=/mnt/runs/nested
#
# NAME is that of the queued resource and of its node: created if it is not there, created
# again if it was preempted. The tracked files of this repository are copied to every host
# and installed; --distributed is appended to the command, whose workdir must be a place
# that all hosts see. It runs detached: a lost connection does not end it. Ctrl-C or
# SIGTERM here asks it to save and to stop.
#
# Exit status: 0 done; 1 a mistake that a restart does not mend; 75 stopped, to be started
# again by the same command. The slice is left as it is: delete it when all is done.
#
# Environment:
#   ZONE, TYPE   of the slice; must be given
#   VERSION      of its software (v2-alpha-tpuv5-lite)
#   SPOT         1 for a slice that may be preempted, 0 for one that is not (1)
#   RESTARTS     how often to start the command again (100)
#   INSTALL      what installs it on a host, in its folder
#   POLL         seconds between looks (60)
set -euo pipefail

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d' >&2
  exit 1
}

if (($# < 2)) || [[ $1 == -* ]]; then usage; fi
name=$1
shift
zone=${ZONE:?must be given, such as ZONE=us-west4-a}
type=${TYPE:?must be given, such as TYPE=v5litepod-16}
version=${VERSION:-v2-alpha-tpuv5-lite}
poll=${POLL:-60}
install=${INSTALL:-python3 -m venv venv && venv/bin/pip install --quiet "'.[train]'" "'jax[tpu]'"}
stopping=0
trap 'stopping=1' INT TERM

say() { echo "launch/tpu_pod.sh: $*" >&2; }

# The state of the queued resource: NONE if there is none, UNKNOWN if nobody answers.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

# Waits for the slice; makes one where there is none, or only what was preempted.
acquire() {
  local now before=''
  local spot=()
  [[ ${SPOT:-1} == 1 ]] && spot=(--spot)
  while ((!stopping)); do
    now=$(state)
    [[ $now == "$before" ]] || say "$name is $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE)
        gcloud compute tpus queued-resources create "$name" --node-id="$name" \
          --zone="$zone" --accelerator-type="$type" --runtime-version="$version" \
          "${spot[@]}" >&2 || say "it could not be created; trying again"
        ;;
      SUSPENDED | FAILED)
        gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force \
          --quiet >&2 || say "it could not be deleted; trying again"
        ;;
    esac
    pause
  done
}

pause() { # in the background, so that a signal is heard at once
  sleep "$poll" &
  wait $! || true
}

# Copies the repository to all hosts and installs it.
set_up() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$name:lowrank.tar.gz" --zone="$zone" \
    --worker=all >&2 &&
    on_all_hosts "mkdir -p lowrank && tar -xzf lowrank.tar.gz -C lowrank &&
      cd lowrank && $install" >&2
  local status=$?
  rm -f "$archive"
  return $status
}

# Whether the command still runs, of an earlier call of this script.
runs() {
  on_all_hosts "pkill -0 --parent \$(cat lowrank/pid)" > /dev/null 2>&1
}

# Starts the command on all hosts; each writes its status to a file when it ends.
start() {
  local command
  printf -v command '%q ' "$@" --distributed
  # The shell outlives the SIGTERM of a machine that shuts down: it waits for the command.
  printf -v command %q "echo \$\$ > pid; trap : TERM; $command; echo \$? > status"
  on_all_hosts "cd lowrank && rm -f status && PATH=\$PWD/venv/bin:\$PATH \\
    nohup setsid bash -c $command >> log.txt 2>&1 < /dev/null &"
}

# Waits for the command to end on all hosts; leaves the run's status in $status.
follow() {
  local found told=0
  while true; do
    pause
    if ((stopping && !told)); then
      told=1
      say 'asking it to save and to stop'
      on_all_hosts "pkill -TERM --parent \$(cat lowrank/pid)" >&2 || true
    fi
    if found=$(on_all_hosts 'cat lowrank/status 2> /dev/null || echo running'); then
      found=$(grep -xE '[0-9]+|running' <<<"$found" | sort -u)
      [[ -z $found || $found == *running* ]] || break
    elif [[ $(state) != @(ACTIVE|UNKNOWN) ]]; then
      found=75 # the slice is gone
      break
    fi
  done
  # as launch/local.py has it: 75 if one says so and none says 1, else the first failure
  if grep -qx 75 <<<"$found" && ! grep -qx 1 <<<"$found"; then
    status=75
  else
    status=$(grep -vxE '0|75' <<<"$found" | head -n 1) || true
    status=${status:-0}
  fi
}

for ((attempt = 0; attempt <= ${RESTARTS:-100}; attempt++)); do
  acquire
  ((!stopping)) || exit 75
  if runs; then
    say 'it runs already'
  elif ! { set_up && start "$@"; }; then
    say 'the hosts could not be set up; trying again'
    pause
    continue
  fi
  say "attempt $attempt runs; its log: gcloud compute tpus tpu-vm ssh $name" \
    "--zone=$zone --worker=0 --command='tail -f lowrank/log.txt'"
  follow
  say "attempt $attempt ended with status $status"
  ((status == 75 || status > 128)) && ((!stopping)) || exit "$status"
done
exit 75
