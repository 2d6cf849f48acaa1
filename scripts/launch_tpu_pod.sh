#!/usr/bin/env bash
# Trains on a TPU VM slice: creates or reuses it, installs, runs on all workers, follows the log,
# and goes on after a preemption. The same command again attaches to a run that is under way.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch_tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE [flags] -- TRAIN_FLAGS

  --name=NAME         of the slice
  --zone=ZONE         such as us-east5-a
  --type=TYPE         accelerator type, such as v5p-128 or v5litepod-16
  --version=VERSION   runtime of the TPU VM (default: the one for the chip, tpu-ubuntu2204-base for
                      v4 and older, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for v5e,
                      v2-alpha-tpuv6e for v6e)
  --python=PROGRAM    a Python 3.11 or newer on the workers (default: python3 where it is one, or
                      python3.14, python3.13, python3.12, python3.11; or else uv's Python 3.12)
  --project=PROJECT   of Google Cloud (default: that of gcloud's configuration)
  --spot              cheaper, may be preempted at any time
  --setup=COMMAND     run on every worker before training, such as mounting the shared folder
                      that holds DATA_DIR and MODEL_DIR
  --max_restarts=N    how often to go on after a preemption (default: 100)
  --wait=SECONDS      between looks at a slice that is not ready (default: 30)
  --delete            delete the slice when training has ended, well or not
  --dry_run           print every command, run none
  TRAIN_FLAGS         of python -m dgr_jax.train, such as --gin_file=msmarco.gin --model_dir=...

What is committed in this repository is installed. Exit status: that of training.
TEXT
}

fail() {
  echo "launch_tpu_pod.sh: $1" >&2
  exit 2
}

name='' zone='' type='' version='' python='' project='' setup=''
spot=0 delete=0 dry_run=0 max_restarts=100 wait=30
while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --version=?*) version=${1#*=} ;;
    --python=?*) python=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --setup=?*) setup=${1#*=} ;;
    --max_restarts=?*) max_restarts=${1#*=} ;;
    --wait=?*) wait=${1#*=} ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
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
for flag in name zone type; do
  [[ -n ${!flag} ]] || fail "--$flag is missing, see --help"
done
if [[ -z $version ]]; then
  case $type in
    v[234]-*) version=tpu-ubuntu2204-base ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-* | v5e-*) version=v2-alpha-tpuv5-lite ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "--type: got $type, whose runtime is not known here; expected --version=VERSION too" ;;
  esac
fi
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max_restarts: got $max_restarts, expected a number"
[[ $wait =~ ^[0-9]+$ ]] || fail "--wait: got $wait, expected a number of seconds"
(($#)) || fail 'no flags of training; expected -- --gin_file=... --model_dir=...'

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
where=("$name" "--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

show() {
  printf '%q ' "$@"
  echo
}

run() {
  if ((dry_run)); then show "$@"; else "$@"; fi
}

tpu() {
  run gcloud compute tpus tpu-vm "$@"
}

on_all() {
  tpu ssh "${where[@]}" --worker=all "--command=$1"
}

# Sets `now`: READY, PREEMPTED, ... or ABSENT.
look() {
  if now=$(gcloud compute tpus tpu-vm describe "${where[@]}" '--format=value(state)' \
    2>"$scratch/error"); then
    return
  fi
  grep -q NOT_FOUND "$scratch/error" || fail "$(cat "$scratch/error")"
  now=ABSENT
}

# Makes the slice, or waits a while where the zone has none to give.
create() {
  local more=("--accelerator-type=$type" "--version=$version")
  ((!spot)) || more+=(--spot)
  if tpu create "${where[@]}" "${more[@]}" 2>"$scratch/error"; then
    return
  fi
  grep -qi -e capacity -e RESOURCE_EXHAUSTED "$scratch/error" || fail "$(cat "$scratch/error")"
  echo "slice $name: no capacity in $zone, asking again" >&2
  sleep "$wait"
}

remove() {
  tpu delete "${where[@]}" --quiet
}

# Returns when the slice is ready: the one that is there, or a new one in its place.
ensure() {
  if ((dry_run)); then
    show gcloud compute tpus tpu-vm describe "${where[@]}" '--format=value(state)'
    create
    return
  fi
  while look && [[ $now != READY ]]; do
    echo "slice $name: $now" >&2
    case $now in
      ABSENT) create ;;
      PREEMPTED | TERMINATED | FAILED) remove || sleep "$wait" ;;
      STOPPED) tpu start "${where[@]}" || sleep "$wait" ;;
      *) sleep "$wait" ;;
    esac
  done
}

# Puts what is committed here on every worker, with the packages it needs. The Python is looked at
# before: runtimes of Ubuntu 22.04 have Python 3.10.
install() {
  local archive=$scratch/dgr_jax.tar.gz
  [[ -z $setup ]] || on_all "$setup" || return
  run git -C "$repository" archive --format=tar.gz "--output=$archive" HEAD || return
  tpu scp "$archive" "$name:" "${where[@]:1}" --worker=all || return
  # shellcheck disable=SC2016 # for the workers' shell
  on_all 'set -e; mkdir -p "$HOME/dgr_jax"; cd "$HOME/dgr_jax"; tar -xzf "$HOME/dgr_jax.tar.gz"
given='"${python:+$(printf %q "$python")}"'
fits() { "$1" -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }
fits .venv/bin/python || {
  rm -rf .venv
  for python in ${given:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if fits "$python"; then "$python" -m venv .venv; break; fi
  done
}
[ -x .venv/bin/python ] || [ -z "$given" ] || {
  echo "--python: got $given, expected a Python 3.11 or newer with venv on every worker" >&2; exit 2
}
[ -x .venv/bin/python ] || {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --seed --python 3.12 .venv
}
.venv/bin/python -m pip install --quiet --upgrade -e ".[tpu]"'
}

# On every worker, in place of what is left of an older run: its process goes to `pid`, its exit
# status to `status` in the end.
begin() {
  local command
  command=".venv/bin/python -m dgr_jax.train --distributed$(printf ' %q' "$@"); echo \$? > status"
  # shellcheck disable=SC2016
  on_all 'set -e; cd "$HOME/dgr_jax"; rm -f status
if grep -qs dgr_jax.train "/proc/$(cat pid 2>/dev/null)/cmdline"; then kill -9 -- -"$(cat pid)"; fi
nohup setsid bash -c '"$(printf %q "$command")"' > train.log 2>&1 < /dev/null &
echo $! > pid'
}

# Whether a run is under way on every worker: then nothing is installed or begun.
under_way() {
  ((!dry_run)) || return 1
  # shellcheck disable=SC2016
  on_all 'cd "$HOME/dgr_jax" && grep -q dgr_jax.train "/proc/$(cat pid)/cmdline"' 2>/dev/null
}

# The log of the first worker until training ends; exits as training does.
follow() {
  # shellcheck disable=SC2016
  tpu ssh "${where[@]}" --worker=0 '--command=cd "$HOME/dgr_jax"
tail -n +1 -s 0.2 --pid="$(cat pid)" -F train.log 2>/dev/null
for i in 1 2 3 4 5; do [ -f status ] && exit "$(cat status)"; sleep 1; done; exit 1'
}

leave() {
  ((!delete)) || remove
  exit "$1"
}

for ((restart = 0; restart <= max_restarts; restart++)); do
  ensure
  code=0
  if under_way; then
    echo "slice $name: a run is under way, its log follows" >&2
    follow || code=$?
  else
    { install && begin "$@" && follow; } || code=$?
  fi
  ((code)) || leave 0
  look
  # 75: preempted, but saved. 76: another worker died. 255: the connection broke; the run may be
  # under way still.
  if ((code != 75 && code != 76 && code != 255)) && [[ $now == READY ]]; then
    echo "slice $name: failed with exit status $code" >&2
    leave "$code"
  fi
  echo "slice $name: $now, exit status $code" >&2
done
echo "slice $name: preempted more often than --max_restarts=$max_restarts" >&2
leave 75
