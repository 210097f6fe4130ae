#!/usr/bin/env bash
# Trains on this machine, one process per GPU (or a few on the CPU), started by torchrun.
# From the repository root:
#
#   bash examples/launch/torchrun_one_node.sh CONFIG [section.key=value ...]
#   NPROC=4 bash examples/launch/torchrun_one_node.sh examples/configs/digits.yaml run.steps=20
set -euo pipefail

# What differs between sites.
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
: "${NPROC:=$((gpus > 0 ? gpus : 2))}" # processes; set it when CUDA_VISIBLE_DEVICES hides some of the GPUs

config=${1:?usage: torchrun_one_node.sh CONFIG [section.key=value ...]}
shift
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
exec torchrun --standalone --nproc-per-node "$NPROC" -m megadit.train --config "$config" "$@"
