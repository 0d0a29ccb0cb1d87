#!/usr/bin/env bash
# Tries launch/slurm.sbatch for real: a run in two tasks, stopped and queued again, ends as
# one that was left alone.
#
#   tests/launch/slurm/try.sh FOLDER [PYTHON]
#
# FOLDER is new. Needs Debian and root (cluster.sh). Ends with 0, with 77 where Slurm cannot
# be installed.
set -euo pipefail

mkdir -p "$1"
folder=$(realpath "$1")
python=${2:-python}
cd "$(dirname "$0")/../../.."
mkdir "$folder/cluster"
trap 'stop_cluster' EXIT
stop_cluster() { :; } # until there is one
# shellcheck source=/dev/null
source tests/launch/slurm/cluster.sh "$folder/cluster"

say() { echo "$(date +%T) $*"; }

epochs=8

train() { # what trains in a workdir
  echo "$python" -m train.main --config=configs/digits_mlp.py:smoke \
    --config.checkpoint_every_steps=40 "--config.phases[0].until.epochs=$epochs" \
    "--workdir=$folder/$1"
}

field() { # of a job, as Slurm shows it
  scontrol show job "$1" | grep -oP "(?<=\b$2=)\S+"
}

submit() { # a workdir, then what sbatch is given beside
  # shellcheck disable=SC2046
  sbatch --parsable --ntasks=2 --output="$folder/$1.log" "${@:2}" \
    --export=ALL,JAX_PLATFORMS=cpu launch/slurm.sbatch $(train "$1")
}

hasten() { # a job that is queued again waits two minutes; not here
  scontrol update "JobId=$1" StartTime=now 2> /dev/null || true
}

# Waits until a job is done.
finish() {
  local state before=''
  for _ in $(seq 900); do
    state=$(field "$1" JobState)
    [[ $state == "$before" ]] || say "job $1: $state, restarts $(field "$1" Restarts)"
    before=$state
    case $state in
      COMPLETED) return ;;
      PENDING) hasten "$1" ;;
      RUNNING | COMPLETING | CONFIGURING | REQUEUED) ;;
      *) break ;;
    esac
    sleep 1
  done
  tail -n 30 "$folder"/*.log
  return 1
}

say 'undisturbed, in two tasks'
SECONDS=0
finish "$(submit undisturbed)"

say 'stopped: what the time limit sends, as soon as there is a checkpoint'
job=$(submit stopped)
until compgen -G "$folder/stopped/checkpoints/[0-9]*" > /dev/null; do sleep 0.2; done
scancel --signal=TERM "$job"
finish "$job"
(($(field "$job" Restarts) == 1))

say 'over its time: the signal comes 30 s before the limit, or up to a minute sooner'
epochs=$((epochs * 600 / SECONDS + 1)) # more than it has time for
job=$(submit limited --time=3 --signal=TERM@30)
until [[ $(field "$job" Restarts) == 1 ]]; do
  [[ $(field "$job" JobState) != COMPLETED ]]
  sleep 1
done
say "job $job: $(field "$job" JobState), restarts 1"
scancel "$job"

say 'a sweep as an array, one of whose jobs is stopped once'
export PYTHONPATH=$PWD/tests/launch STUB_PLAN='{"seed=1": ["75", "done"], "seed=2": ["1"]}'
sweep=("$python" -m launch.sweep "--output=$folder/sweep")
"${sweep[@]}" --config=configs/digits_mlp.py:smoke --grid=config.seed=0,1,2 \
  --program=sweep_stub --slurm
for _ in $(seq 300); do
  jobs=$(squeue --noheader --array --format=%A)
  [[ $jobs ]] || break
  for job in $jobs; do hasten "$job"; done
  sleep 1
done
"${sweep[@]}" --gather
wc -l "$folder"/sweep/jobs/*/workdir/attempts

for run in stopped limited; do
  grep 'slurm.sbatch:\|resuming at step\|^stopped' "$folder/$run.log"
done
"$python" - "$folder" << 'PYTHON'
import sys

import jax
import numpy as np
from flax import nnx

from lowrank_jax import checkpoint
from train.model import load_model

runs = [f"{sys.argv[1]}/{name}" for name in ("undisturbed", "stopped")]
saved = [checkpoint.open_checkpoint(run) for run in runs]
assert saved[0].step == saved[1].step, [one.step for one in saved]
models = [load_model(one, allow_imports=None) for one in saved]
arrays = [jax.tree.leaves(nnx.as_pure(nnx.state(model))) for model in models]
for one, other in zip(*arrays, strict=True):
    np.testing.assert_array_equal(one, other)
print(f"same parameters: {len(arrays[0])} arrays at step {saved[0].step}, bit for bit")
PYTHON
