#!/usr/bin/env bash
# From photographs to pictures: tars, encoders, an encoded data set, a training on two ranks, samples.
#
#   bash examples/real_images/run.sh [FOLDER [section.key=value ...]]      FOLDER: data/photographs by default
#
# It shows the path, not quality: the encoders are small and random, so what is learned means nothing to the eye. With
# real ones, name them in AUTOENCODER, T5 and CLIP: folders, or names in the Hub's cache of this machine, and set the
# widths of text and latents in train.yaml. A step that was interrupted goes on where it was when this runs again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-data/photographs}
shift || true
: "${CROPS:=1200}" "${RESOLUTION:=64}"
: "${AUTOENCODER:=$folder/encoders/vae}" "${T5:=$folder/encoders/t5}" "${CLIP:=$folder/encoders/clip}"

# shellcheck source=examples/setup.sh
REQUIREMENTS=requirements-test.txt source examples/setup.sh
if [[ $(python -c 'import torch; print(torch.cuda.device_count())') -lt 2 ]]; then
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu # two ranks cannot share a GPU
fi
export OMP_NUM_THREADS=1 # the ranks share the cores

if [[ ! -e $folder/tars.done ]]; then
    python examples/real_images/photographs.py "$folder/tars" --crops "$CROPS"
    touch "$folder/tars.done"
fi
if [[ "$AUTOENCODER $T5 $CLIP" == *"$folder/encoders/"* && ! -e $folder/encoders/clip ]]; then
    python tools/tiny_encoders.py "$folder/encoders"
fi
if [[ ! -e $folder/encoded/manifest.json ]]; then
    torchrun --standalone --nproc-per-node 2 tools/encode_dataset.py "$folder/tars" --out "$folder/encoded" \
        --autoencoder "$AUTOENCODER" --t5 "$T5" --clip "$CLIP" --resolution "$RESOLUTION" --patch 2 --text-length 48
fi
torchrun --standalone --nproc-per-node 2 -m megadit.train --config examples/real_images/train.yaml \
    run.dir="$folder/run" data.path="$folder/encoded" parallel.expert=2 "$@"
python tools/sample.py "$folder/run" "a tabby cat that looks at the camera" "a cup of coffee on a wooden table" \
    --repeat 4 --columns 4 --zoom 2 --size "${RESOLUTION}x${RESOLUTION}" --out "$folder/samples.png"
