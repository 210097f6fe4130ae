#!/usr/bin/env bash
# Trains on scenes of shapes, draws, judges, and shows the routing: a quarter of an hour on two CPU cores.
#
#   bash examples/shapes/run.sh [section.key=value ...]
#
# Stopped or killed, the same command goes on. What it writes is in runs/shapes: samples.png, shapes.json (the score),
# heatmap/ (which patches how many experts pick).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run=runs/shapes
for override in "$@"; do
    [[ $override != run.name=* ]] || run=runs/${override#run.name=}
    [[ $override != run.dir=* ]] || run=${override#run.dir=}
done

# shellcheck source=examples/setup.sh
REQUIREMENTS=requirements.txt source examples/setup.sh
if [[ $(python -c 'import torch; print(torch.cuda.device_count())') -lt 2 ]]; then
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu # two ranks cannot share a GPU
fi
export OMP_NUM_THREADS=1 # the ranks share the cores

torchrun --standalone --nproc-per-node 2 -m megadit.train --config examples/shapes/train_32.yaml \
    run.name=shapes parallel.expert=2 "$@" >&2
python tools/sample.py "$run" --out "$run/samples.png" --zoom 3 >&2
python tools/heatmap.py "$run" "a ring left of a cross" --out "$run/heatmap" >&2
torchrun --standalone --nproc-per-node 2 tools/judge_shapes.py "$run" >&2
python tools/judge_shapes.py "$run" --show
