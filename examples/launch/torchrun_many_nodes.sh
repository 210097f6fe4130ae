#!/usr/bin/env bash
# Trains on several machines, started by torchrun. Run the same command on every one of them, from the repository root:
#
#   NNODES=4 HEAD_NODE=node-0 bash examples/launch/torchrun_many_nodes.sh CONFIG [section.key=value ...]
#
# The machines find one another at HEAD_NODE and number themselves (torchrun's c10d rendezvous gives out the node
# ranks, and ignores --node-rank); the ranks of one machine are always consecutive. All machines need the same code
# and environment, and a run.dir that they share. SIGTERM or SIGUSR1 to torchrun on all of them: the ranks finish their step,
# save, and torchrun ends with status 1; the run's events.jsonl says what happened.
set -euo pipefail

# What differs between sites.
: "${NNODES:?set it to the number of machines}"
: "${HEAD_NODE:?set it to the host name or address of one of the machines, the same on all}"
: "${PORT:=29500}"       # a free port on HEAD_NODE
: "${RUN_ID:=megadit}"   # tells apart the jobs that meet at one HEAD_NODE:PORT
: "${INTERFACE:=}"       # the network interface to use, such as ib0; empty: NCCL and gloo choose
: "${MAX_RESTARTS:=0}"   # starts from the newest checkpoint after a rank died; a stop at a time limit counts as such
: "${SHUTDOWN_S:=300}"   # seconds for the last step and its checkpoint, between a signal and SIGKILL
: "${RENDEZVOUS:=}"      # settings of the rendezvous, NAME=VALUE,..., such as last_call_timeout=60
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
: "${NPROC:=$((gpus > 0 ? gpus : 2))}" # processes per machine, the same on all

config=${1:?usage: torchrun_many_nodes.sh CONFIG [section.key=value ...]}
shift
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
if [[ -n $INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
# A new store for each round of the rendezvous: in a shared one machines that came later would not meet the others.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" \
    --rdzv-id "$RUN_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:$PORT" --rdzv-conf "$RENDEZVOUS" \
    --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SHUTDOWN_S" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m megadit.train --config "$config" "$@"
