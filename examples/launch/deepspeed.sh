#!/usr/bin/env bash
# Trains on this machine, or on those of a hostfile, started by the deepspeed launcher. From the repository root:
#
#   bash examples/launch/deepspeed.sh CONFIG [section.key=value ...]
#   HOSTFILE=hosts bash examples/launch/deepspeed.sh CONFIG [section.key=value ...]
#
# A hostfile has a line per machine, `node-0 slots=8`. With one, the launcher needs ssh without a password to the
# machines that it names (to a single one too) and pdsh here, and the same paths everywhere; what it should export to
# them besides NCCL_* and PYTHON* goes into .deepspeed_env, a NAME=value per line.
#
# SIGTERM or SIGUSR1 to this script: the ranks finish their step, save, and the script ends with status 1; the run's
# events.jsonl says what happened. The launcher gives them 30 seconds.
set -euo pipefail

# What differs between sites.
: "${HOSTFILE:=}"        # empty: this machine only
: "${PORT:=29500}"       # a free port on the first machine
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
: "${NPROC:=$((gpus > 0 ? gpus : 2))}" # processes on this machine; a hostfile's slots say it otherwise

config=${1:?usage: deepspeed.sh CONFIG [section.key=value ...]}
shift
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
if [[ -n $HOSTFILE ]]; then
    [[ -f $HOSTFILE ]] || { echo "HOSTFILE=$HOSTFILE is not a file" >&2 && exit 1; }
    where=(--hostfile "$HOSTFILE")
else
    where=(--num_accelerators "$NPROC")
fi
# megadit reads its rank from the environment: no --local_rank argument.
deepspeed "${where[@]}" --master_port "$PORT" --no_local_rank --module megadit.train --config "$config" "$@" &
launcher=$!

# With a hostfile the launcher ends what it has started; without, it would end alone, and its child is who starts the ranks.
# shellcheck disable=SC2329 # the trap calls it
stop() {
    if [[ -n $HOSTFILE ]]; then
        kill -TERM "$launcher"
    else
        pkill -TERM -P "$launcher" || kill -TERM "$launcher"
    fi
}
trap stop TERM INT USR1

status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a trapped signal ended `wait`
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
