#!/usr/bin/env bash
# Tries launch/slurm.sbatch for real: a run in two tasks, stopped and queued again, ends as
# one that was left alone.
#
#   tests/launch/slurm/try.sh FOLDER [PYTHON]
#
# FOLDER is new. Needs Debian and root (cluster.sh). Ends with 0 and "same parameters".
set -euo pipefail

mkdir -p "$1"
folder=$(realpath "$1")
python=${2:-python}
cd "$(dirname "$0")/../../.."
mkdir "$folder/cluster"
# shellcheck source=/dev/null
source tests/launch/slurm/cluster.sh "$folder/cluster"
trap stop_cluster EXIT

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

# Waits until a job is done; where it is queued again, it is not made to wait two minutes.
finish() {
  local state before=''
  for _ in $(seq 900); do
    state=$(field "$1" JobState)
    [[ $state == "$before" ]] || say "job $1: $state, restarts $(field "$1" Restarts)"
    before=$state
    case $state in
      COMPLETED) return ;;
      PENDING) scontrol update "JobId=$1" StartTime=now || true ;;
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
epochs_per_150=$((epochs * 150 / SECONDS))

say 'stopped: what the time limit sends, as soon as there is a checkpoint'
job=$(submit stopped)
until compgen -G "$folder/stopped/checkpoints/[0-9]*" > /dev/null; do sleep 0.2; done
scancel --signal=TERM "$job"
finish "$job"
(($(field "$job" Restarts) == 1))

say 'over its time: the limit is a minute, the signal comes some 30 s before'
epochs=$epochs_per_150 # seconds, that is, on this machine as it is now
job=$(submit limited --time=1 --signal=TERM@30)
until [[ $(field "$job" Restarts) == 1 ]]; do
  [[ $(field "$job" JobState) != COMPLETED ]]
  sleep 1
done
say "job $job was queued again: $(grep -c 'status 75' "$folder/limited.log") times 75"
scontrol update "JobId=$job" TimeLimit=UNLIMITED StartTime=now
finish "$job"
grep -q 'DUE TO TIME LIMIT' "$folder/limited.log" && exit 1 # it was not cut off

for run in stopped limited; do
  grep -h 'slurm.sbatch:\|resuming at step\|^stopped' "$folder/$run.log"
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
