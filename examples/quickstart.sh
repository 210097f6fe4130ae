#!/usr/bin/env bash
# Trains a small mixture of experts on handwritten digits, samples it, and has a classifier read the samples.
#
#   bash examples/quickstart.sh [section.key=value ...]
#
# Runs on a laptop: four processes, as two tensor-parallel pairs that share the experts. Progress goes to stderr; the
# last line on stdout is the result. An interrupted run goes on from its last checkpoint, and a finished one is not
# trained again: the result is printed from the run's folder (runs/digits, or what run.name=... or run.dir=... names).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ranks=4
run=runs/digits
for override in "$@"; do
    [[ $override != run.name=* ]] || run=runs/${override#run.name=}
    [[ $override != run.dir=* ]] || run=${override#run.dir=}
done
result=$run/result.json
trained_with=$run/quickstart.overrides # what the last training was asked for

# shellcheck source=examples/setup.sh
REQUIREMENTS=requirements.txt source examples/setup.sh

# True when a result is there that no checkpoint is newer than.
judged() {
    [[ -f $result && -d $run/checkpoints && -z $(find "$run/checkpoints" -newer "$result" -print -quit) ]]
}

if ! judged || [[ ! -f $trained_with || $(<"$trained_with") != "$*" ]]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus < ranks)); then
        # Two ranks cannot share a GPU under NCCL: with too few of them, train on the CPU.
        export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    fi
    echo "training in $run" >&2
    # The ranks share the cores: one thread each (torchrun's own default, without its warning).
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" -m megadit.train --config examples/configs/digits.yaml \
        parallel.tensor=2 parallel.expert=2 zero.stage=1 "$@" >&2
    echo "$*" >"$trained_with"
fi
if ! judged; then
    echo "sampling and judging" >&2
    python tools/plot_loss.py "$run" --out "$run/loss.png" >&2
    python tools/sample.py "$run" --out "$run/samples.png" >&2
    python tools/judge_digits.py "$run" --samples 500 --out "$result" >&2
fi
python tools/judge_digits.py "$run" --show
