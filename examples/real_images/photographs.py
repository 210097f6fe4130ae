"""Cut the photographs that scikit-image and scikit-learn ship into captioned crops, packed as WebDataset tars.

    python examples/real_images/photographs.py data/photographs               # 1,200 crops in 6 tars
    python examples/real_images/photographs.py data/photographs --crops 200

Crops are square, wide or tall. Each has two captions: what the photograph shows, three times as often as that and where
in it the crop lies. The same arguments make the same tars.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

# File -> what it shows. The packages' own notes on origin and licence: skimage/data/README.txt, and
# sklearn/datasets/images/README.txt.
SKIMAGE = {
    "astronaut.png": "a portrait of an astronaut in an orange suit",
    "chelsea.png": "a tabby cat that looks at the camera",
    "coffee.png": "a cup of coffee on a wooden table",
    "rocket.jpg": "a rocket on its launch pad at dusk",
    "hubble_deep_field.jpg": "galaxies on a black sky",
    "motorcycle_left.png": "a motorcycle in a workshop",
    "retina.jpg": "the retina of an eye",
    "ihc.png": "stained cells under a microscope",
    "camera.png": "a grey photograph of a man with a camera",
    "coins.png": "old coins on a dark ground",
    "moon.png": "the surface of the moon",
    "grass.png": "blades of grass from above",
    "brick.png": "a brick wall",
    "gravel.png": "gravel on the ground",
}
SKLEARN = {"china.jpg": "a temple in China among trees", "flower.jpg": "a pink flower before green leaves"}
ASPECTS = ((1, 1), (4, 3), (3, 4), (2, 1), (1, 2))  # width, height
PLACES = (("upper left", "top", "upper right"), ("left", "middle", "right"), ("lower left", "bottom", "lower right"))


def photographs() -> list[tuple[str, Image.Image, str]]:
    """(name, RGB image, caption) of every photograph."""
    import skimage.data
    import sklearn.datasets

    folders = {Path(skimage.data.__file__).parent: SKIMAGE, Path(sklearn.datasets.__file__).parent / "images": SKLEARN}
    return [
        (Path(name).stem, Image.open(folder / name).convert("RGB"), caption)
        for folder, names in folders.items()
        for name, caption in names.items()
    ]


def crops(count: int, seed: int) -> Iterator[tuple[str, bytes, dict[str, object]]]:
    """(key, JPEG, captions and weights) of `count` crops, the photographs in turn."""
    known, draw = photographs(), random.Random(seed)
    for i in range(count):
        name, photograph, caption = known[i % len(known)]
        across, down = draw.choice(ASPECTS)
        unit = draw.uniform(0.4, 0.9) * min(photograph.width / across, photograph.height / down)
        width, height = round(unit * across), round(unit * down)
        left, top = draw.randint(0, photograph.width - width), draw.randint(0, photograph.height - height)
        column = min(2, 3 * (2 * left + width) // (2 * photograph.width))
        row = min(2, 3 * (2 * top + height) // (2 * photograph.height))
        jpeg = io.BytesIO()
        photograph.crop((left, top, left + width, top + height)).save(jpeg, "JPEG", quality=90)
        captions = [caption, f"{caption}, the {PLACES[row][column]} of the picture"]
        yield f"{i:06d}_{name}", jpeg.getvalue(), {"captions": captions, "weights": [3, 1]}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Put a file into a tar, without a time or an owner."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for the tars")
    parser.add_argument("--crops", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--per-tar", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    made = iter(tqdm(crops(args.crops, args.seed), total=args.crops, desc="crops"))
    for number in range(-(-args.crops // args.per_tar)):
        with tarfile.open(args.out / f"{number:05d}.tar", "w") as tar:
            for key, jpeg, told in islice(made, args.per_tar):
                add(tar, f"{key}.jpg", jpeg)
                add(tar, f"{key}.json", json.dumps(told).encode())


if __name__ == "__main__":
    main()
