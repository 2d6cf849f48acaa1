#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process a GPU. Called on a login node it submits
# itself; as the job it runs training on all nodes, and queues itself again when preempted or near
# the end of its time.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch_slurm.sh [flags] -- TRAIN_FLAGS

  --nodes=N           (default: 1)
  --gpus_per_node=N   (default: 8)
  --time=TIME         of one turn in the queue (default: 24:00:00)
  --grace=SECONDS     before the end of that time, to save in (default: 300)
  --python=PATH       that dgr_jax is installed in (default: .venv/bin/python of this repository)
  --max_restarts=N    how often to go on (default: 100)
  --sbatch=FLAG       more for sbatch, such as --sbatch=--partition=gpu; may be repeated
  --dry_run           print every command, run none
  TRAIN_FLAGS         of python -m dgr_jax.train, such as --gin_file=msmarco.gin --model_dir=...

MODEL_DIR and DATA_DIR must be on a file system that all nodes see. Exit status: that of training.
TEXT
}

fail() {
  echo "launch_slurm.sh: $1" >&2
  exit 2
}

given=()
for flag in "$@"; do
  [[ $flag == --dry_run ]] || given+=("$flag")
done
python='' nodes=1 gpus_per_node=8 time=24:00:00 grace=300 max_restarts=100 dry_run=0 more=()
while (($#)); do
  case $1 in
    --nodes=?*) nodes=${1#*=} ;;
    --gpus_per_node=?*) gpus_per_node=${1#*=} ;;
    --time=?*) time=${1#*=} ;;
    --grace=?*) grace=${1#*=} ;;
    --python=?*) python=${1#*=} ;;
    --max_restarts=?*) max_restarts=${1#*=} ;;
    --sbatch=?*) more+=("${1#*=}") ;;
    --dry_run) dry_run=1 ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) fail "got $1, expected a flag of those in --help; flags of training stand after --" ;;
  esac
  shift
done
for flag in nodes gpus_per_node grace max_restarts; do
  [[ ${!flag} =~ ^[0-9]+$ ]] || fail "--$flag: got ${!flag}, expected a number"
done
(($#)) || fail 'no flags of training; expected -- --gin_file=... --model_dir=...'

run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# The processes end together by themselves; killed ones would hide the exit status of the others.
train() {
  run srun "--nodes=$nodes" "--ntasks-per-node=$gpus_per_node" --kill-on-bad-exit=0 --label \
    "${python:-.venv/bin/python}" -m dgr_jax.train --distributed "$@"
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ -z $python ]]; then # the job runs a copy of this file that lies elsewhere
    python=$repository/.venv/bin/python
    given=("--python=$python" "${given[@]}")
  fi
  # Without B: the signal goes to srun's processes, which save and leave with 75.
  run sbatch --job-name=dgr_jax "--nodes=$nodes" "--ntasks-per-node=$gpus_per_node" \
    "--gpus-per-node=$gpus_per_node" "--time=$time" "--signal=TERM@$grace" --requeue \
    --open-mode=append "${more[@]}" "${BASH_SOURCE[0]}" "${given[@]}"
  ((!dry_run)) || train "$@"
  exit
fi

trap : TERM # training gets it too, and says how it ended
code=0
train "$@" || code=$?
if ((code == 75 || code == 76)); then # told to stop, or another process died
  restarts=${SLURM_RESTART_COUNT:-0}
  ((restarts < max_restarts)) || fail "preempted more often than --max_restarts=$max_restarts"
  echo "exit status $code: the job is queued again ($((restarts + 1)) of $max_restarts)" >&2
  run scontrol requeue "$SLURM_JOB_ID" || echo 'submit it again: it goes on where it was' >&2
fi
exit "$code"
