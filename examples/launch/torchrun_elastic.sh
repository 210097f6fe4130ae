#!/usr/bin/env bash
# Trains on as many machines as there are, between MIN_NODES and MAX_NODES, started by torchrun. When one is lost, the
# others go on from the newest checkpoint; when one comes, all start again with it. Run the same command on every machine,
# at any time, from the repository root:
#
#   MIN_NODES=2 MAX_NODES=4 HEAD_NODE=node-0 bash examples/launch/torchrun_elastic.sh CONFIG [section.key=value ...]
#
# HEAD_NODE must stay: the machines meet there. Fewer machines have fewer data-parallel ranks, and where the configured
# layout does not fit their number, the first of parallel.fallbacks that does.
set -euo pipefail

# What differs between sites; torchrun_many_nodes.sh has the others.
: "${MIN_NODES:?set it to the fewest machines that may train}"
: "${MAX_NODES:?set it to the most machines}"
: "${MAX_RESTARTS:=100}" # machines lost and won, and processes that died, all counted

export NNODES=$MIN_NODES:$MAX_NODES MAX_RESTARTS
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun_many_nodes.sh" "$@"
