#!/usr/bin/env bash
# Trains on this machine, one process per GPU (or a few on the CPU), started by torchrun.
# From the repository root:
#
#   bash examples/launch/torchrun_one_node.sh CONFIG [section.key=value ...]
#   NPROC=4 bash examples/launch/torchrun_one_node.sh examples/configs/digits.yaml run.steps=20
#
# SIGTERM or SIGUSR1 to torchrun: the ranks finish their step, save, and torchrun ends with status 1; the run's
# events.jsonl says what happened.
set -euo pipefail

# What differs between sites.
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
: "${NPROC:=$((gpus > 0 ? gpus : 2))}" # processes; set it when CUDA_VISIBLE_DEVICES hides some of the GPUs
: "${MAX_RESTARTS:=0}" # starts from the newest checkpoint after a rank died; a stop at a time limit counts as such
: "${SHUTDOWN_S:=300}" # seconds for the last step and its checkpoint, between a signal and SIGKILL

config=${1:?usage: torchrun_one_node.sh CONFIG [section.key=value ...]}
shift
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
exec torchrun --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SHUTDOWN_S" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m megadit.train --config "$config" "$@"
