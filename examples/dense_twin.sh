#!/usr/bin/env bash
# Trains the quickstart's mixture of experts and its dense twin, and draws both loss curves in one figure.
#
#   bash examples/dense_twin.sh
#
# The twin has the same layers without experts, so fewer parameters and less work per step. Both learn from the same
# samples, noise and times. Runs that are finished are not trained again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/quickstart.sh >&2

# shellcheck source=examples/setup.sh
REQUIREMENTS=requirements.txt source examples/setup.sh
if (($(python -c 'import torch; print(torch.cuda.device_count())') < 4)); then
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
fi
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 -m megadit.train --config examples/configs/digits_dense.yaml \
    parallel.tensor=2 zero.stage=1 >&2
python tools/judge_digits.py runs/digits_dense
python tools/plot_loss.py runs/digits runs/digits_dense --out runs/dense_twin.png
